"""Stand-in for `algoperf.spec`: the names and signatures that a submission and a workload use, without jax.

Omitted are `Workload.output_activation_fn`, which needs jax, and the stubs of the functions that a submission must define:
`init_optimizer_state`, `update_params`, `prepare_for_eval`, `data_selection`, `get_batch_size`. Everything else has AlgoPerf's
names, values, parameters, and defaults; type annotations are looser.
"""

import abc
import enum
from collections.abc import Callable, Iterator
from typing import Any


class LossType(enum.Enum):
    """The loss that a workload minimizes."""

    SOFTMAX_CROSS_ENTROPY = 0
    SIGMOID_CROSS_ENTROPY = 1
    MEAN_SQUARED_ERROR = 2
    CTC_LOSS = 3
    MEAN_ABSOLUTE_ERROR = 4


class ForwardPassMode(enum.Enum):
    """Whether a forward pass is for training (dropout, batch statistics, gradients) or evaluation."""

    TRAIN = 0
    EVAL = 1


class ParameterType(enum.Enum):
    """The role of a parameter in the model."""

    WEIGHT = 0
    BIAS = 1
    CONV_WEIGHT = 2
    BATCH_NORM_SCALE = 3
    BATCH_NORM_BIAS = 4
    LAYER_NORM_SCALE = 5
    LAYER_NORM_BIAS = 6
    EMBEDDING = 7
    ATTENTION_Q = 8
    ATTENTION_K = 9
    ATTENTION_V = 10
    ATTENTION_OUT = 11
    ATTENTION_QKV = 12
    ATTENTION_KV = 13
    ATTENTION_BIAS = 14


class ShapeTuple:
    """A shape as a leaf in a tree of shapes."""

    def __init__(self, shape_tuple: tuple[int, ...]):
        self.shape_tuple = shape_tuple

    def __repr__(self) -> str:
        return f"ShapeTuple({self.shape_tuple})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShapeTuple) and self.shape_tuple == other.shape_tuple

    __hash__ = None  # type: ignore[assignment]


Tensor = Any
Shape = tuple[int, ...] | ShapeTuple
ParameterKey = str
ParameterShapeTree = dict[str, Any]
ParameterTypeTree = dict[str, Any]
ParameterContainer = Any
RandomState = Any
OptimizerState = dict[str, Any] | tuple[Any, Any]
Hyperparameters = Any
Timing = int
Steps = int
ModelAuxiliaryState = Any
ModelInitState = tuple[ParameterContainer, ModelAuxiliaryState]
UpdateReturn = tuple[OptimizerState, ParameterContainer, ModelAuxiliaryState]
InitOptimizerFn = Callable[..., OptimizerState]
UpdateParamsFn = Callable[..., UpdateReturn]
PrepareForEvalFn = Callable[..., UpdateReturn]
DataSelectionFn = Callable[..., dict[str, Tensor]]


class TrainingCompleteError(Exception):
    """Raised by `update_params` to end a run."""


class Workload(abc.ABC):
    """A dataset, a model, a loss, and a metric with its targets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._param_shapes: ParameterShapeTree | None = None
        self._param_types: ParameterTypeTree | None = None
        self._eval_iters: dict[str, Iterator[dict[str, Any]]] = {}
        self.metrics_logger: Any = None

    def attach_metrics_logger(self, metrics_logger: Any) -> None:
        """Set the logger that the submission logs its metrics to."""
        self.metrics_logger = metrics_logger

    @property
    def param_shapes(self) -> ParameterShapeTree:
        """The shape of each parameter. Raise ValueError if `init_model_fn` was not called."""
        if self._param_shapes is None:
            raise ValueError("param_shapes is not set; call init_model_fn() first")
        return self._param_shapes

    @property
    def model_params_types(self) -> ParameterTypeTree:
        """The type of each parameter. Raise ValueError if `init_model_fn` was not called."""
        if self._param_types is None:
            raise ValueError("model_params_types is not set; call init_model_fn() first")
        return self._param_types

    @property
    @abc.abstractmethod
    def target_metric_name(self) -> str: ...

    @property
    @abc.abstractmethod
    def validation_target_value(self) -> float: ...

    @property
    @abc.abstractmethod
    def test_target_value(self) -> float: ...

    @property
    @abc.abstractmethod
    def loss_type(self) -> LossType: ...

    @property
    @abc.abstractmethod
    def num_train_examples(self) -> int: ...

    @property
    @abc.abstractmethod
    def num_eval_train_examples(self) -> int: ...

    @property
    @abc.abstractmethod
    def num_validation_examples(self) -> int: ...

    @property
    @abc.abstractmethod
    def num_test_examples(self) -> int: ...

    @property
    @abc.abstractmethod
    def eval_batch_size(self) -> int: ...

    @property
    @abc.abstractmethod
    def train_mean(self) -> Any: ...

    @property
    @abc.abstractmethod
    def train_stddev(self) -> Any: ...

    @property
    @abc.abstractmethod
    def max_allowed_runtime_sec(self) -> float: ...

    @property
    @abc.abstractmethod
    def eval_period_time_sec(self) -> float: ...

    @property
    @abc.abstractmethod
    def step_hint(self) -> int: ...

    @abc.abstractmethod
    def _build_input_queue(
        self,
        data_rng: RandomState,
        split: str,
        data_dir: str,
        global_batch_size: int,
        cache: bool | None = None,
        repeat_final_dataset: bool | None = None,
        num_batches: int | None = None,
    ) -> Iterator[dict[str, Any]]: ...

    @abc.abstractmethod
    def init_model_fn(self, rng: RandomState) -> ModelInitState: ...

    @abc.abstractmethod
    def model_fn(
        self,
        params: ParameterContainer,
        augmented_and_preprocessed_input_batch: dict[str, Tensor],
        model_state: ModelAuxiliaryState,
        mode: ForwardPassMode,
        rng: RandomState,
        update_batch_norm: bool,
        dropout_rate: float,
    ) -> tuple[Tensor, ModelAuxiliaryState]: ...

    @abc.abstractmethod
    def loss_fn(
        self,
        label_batch: tuple[Tensor, Tensor] | Tensor,
        logits_batch: tuple[Tensor, Tensor] | Tensor,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]: ...

    @abc.abstractmethod
    def is_output_params(self, param_key: ParameterKey) -> bool: ...

    @abc.abstractmethod
    def has_reached_validation_target(self, eval_result: dict[str, float]) -> bool: ...

    @abc.abstractmethod
    def has_reached_test_target(self, eval_result: dict[str, float]) -> bool: ...

    @abc.abstractmethod
    def _eval_model_on_split(
        self,
        split: str,
        num_examples: int,
        global_batch_size: int,
        params: ParameterContainer,
        model_state: ModelAuxiliaryState,
        rng: RandomState,
        data_dir: str,
        global_step: int = 0,
    ) -> dict[str, float]: ...

    def eval_model(
        self,
        global_batch_size: int,
        params: ParameterContainer,
        model_state: ModelAuxiliaryState,
        rng: RandomState,
        data_dir: str,
        imagenet_v2_data_dir: str | None,
        global_step: int,
    ) -> dict[str, float]:
        """Return the metrics of train, validation, and test as "SPLIT/METRIC", and "SPLIT/num_examples" of the last two."""
        results: dict[str, float] = {}
        sizes = {
            "train": self.num_eval_train_examples,
            "validation": self.num_validation_examples,
            "test": self.num_test_examples,
        }
        for split, size in sizes.items():
            name = "eval_train" if split == "train" else split
            metrics = self._eval_model_on_split(name, size, global_batch_size, params, model_state, rng, data_dir, global_step)
            results |= {f"{split}/{metric}": value for metric, value in metrics.items()}
            if split != "train":
                results[f"{split}/num_examples"] = size
        return results

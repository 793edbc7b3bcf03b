"""Base class of the laptop workloads: batches, model call, evaluation, targets. Subclasses add data, model, loss, metrics."""

import abc
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import distributed

if TYPE_CHECKING:
    from .. import spec  # algoperf may not be installed
else:
    from algoperf import spec

Split = dict[str, Any]  # "inputs" and "targets": a tensor or a tuple of tensors, each with one row per example

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def map_tensors(function: Callable[[Tensor], Tensor], examples: Split) -> Split:
    """Apply the function to every tensor."""
    return {key: tuple(map(function, x)) if isinstance(x, tuple) else function(x) for key, x in examples.items()}


def rows(examples: Split, chosen: slice | Tensor) -> Split:
    """Select rows of every tensor."""
    return map_tensors(lambda x: x[chosen], examples)


class LaptopWorkload(spec.Workload):
    """A workload that holds its splits in memory.

    A subclass sets the class attributes and defines `load_splits`, `build_model`, `per_example_loss`, and `metric_sums`.
    """

    loss_type: spec.LossType
    target_metric_name: str
    validation_target_value: float
    test_target_value = math.nan  # there is none: a trial ends at the validation target, and test metrics are only logged
    step_hint: int
    default_batch_size: ClassVar[int]  # for submissions that do not know the workload
    higher_is_better: ClassVar[bool]
    eval_batch_size = 1024
    eval_splits: tuple[str, ...] = ("train", "validation", "test")
    max_allowed_runtime_sec: float = 60
    eval_period_time_sec: float = 1
    train_mean = 0.0
    train_stddev = 1.0

    def __init__(self) -> None:
        super().__init__()
        splits = self.load_splits()
        self._splits = {split: map_tensors(lambda x: x.to(DEVICE), examples) for split, examples in splits.items()}

    @abc.abstractmethod
    def load_splits(self) -> dict[str, Split]:
        """Return the disjoint splits train, validation, and test, and eval_train, a subset of train."""

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """Return a new model, initialized from torch's global random state."""

    @abc.abstractmethod
    def per_example_loss(self, logits: Any, targets: Any, label_smoothing: float) -> Tensor:
        """Return the loss of each example, shape (B,); `logits` is the model's output."""

    @abc.abstractmethod
    def metric_sums(self, logits: Any, targets: Any) -> dict[str, Tensor]:
        """Return sums over the examples of a batch, from which `metrics` computes the metrics."""

    def metrics(self, sums: dict[str, float], num_examples: int) -> dict[str, float]:
        """Return the metrics of a split: the sums divided by the number of examples, unless a subclass overrides this."""
        return {name: value / num_examples for name, value in sums.items()}

    def augment(self, batch: Split, draw: np.random.Generator) -> Split:
        """Return a random variant of a training batch, drawn from `draw`; here, the batch itself."""
        return batch

    @property
    def num_train_examples(self) -> int:
        return self._size("train")

    @property
    def num_eval_train_examples(self) -> int:
        return self._size("eval_train")

    @property
    def num_validation_examples(self) -> int:
        return self._size("validation")

    @property
    def num_test_examples(self) -> int:
        return self._size("test")

    def _size(self, split: str) -> int:
        targets = self._splits[split]["targets"]
        return len(targets[0] if isinstance(targets, tuple) else targets)

    def has_reached_validation_target(self, eval_result: dict[str, float]) -> bool:
        return self._reached(eval_result[f"validation/{self.target_metric_name}"], self.validation_target_value)

    def has_reached_test_target(self, eval_result: dict[str, float]) -> bool:
        return True

    def _reached(self, value: float, target: float) -> bool:
        return value > target if self.higher_is_better else value < target

    def _build_input_queue(
        self,
        data_rng: Any,
        split: str,
        data_dir: str,
        global_batch_size: int,
        cache: bool | None = None,
        repeat_final_dataset: bool | None = None,
        num_batches: int | None = None,
    ) -> Iterator[Split]:
        """Yield batches: of "train" without end, reshuffled every epoch, dropping an incomplete last batch; of any other split
        one pass in order. Training batches are augmented.

        With multiple ranks, each gets an equal part of every training batch, and every `world_size`-th batch of other splits.
        Raise ValueError if the batch size of "train" is not a multiple of the number of ranks, or exceeds the split.
        """
        examples, size = self._splits[split], self._size(split)
        rank, world_size = distributed.rank(), distributed.world_size()
        if split != "train":
            for first in range(rank * global_batch_size, size, world_size * global_batch_size):
                yield rows(examples, slice(first, first + global_batch_size))
            return
        if global_batch_size % world_size:
            raise ValueError(
                f"the batch size is {global_batch_size}; it must be a multiple of {world_size}, the number of ranks"
            )
        if global_batch_size > size:
            raise ValueError(f"the batch size is {global_batch_size}; it must be at most {size}, the number of examples")
        shuffle = np.random.default_rng(np.asarray(data_rng, dtype=np.uint32))
        while True:
            order = torch.from_numpy(shuffle.permutation(size)).to(DEVICE)
            for first in range(0, size - global_batch_size + 1, global_batch_size):
                batch = self.augment(rows(examples, order[first : first + global_batch_size]), shuffle)
                yield map_tensors(lambda x: x.chunk(world_size)[rank], batch)

    def init_model_fn(self, rng: Any) -> tuple[nn.Module, None]:
        """Return a new model on the device, wrapped in DDP if there are multiple ranks. Its weights depend only on `rng`."""
        torch.manual_seed(int(rng[0]))
        model = self.build_model().to(DEVICE)
        self._param_shapes = {name: spec.ShapeTuple(tuple(p.shape)) for name, p in model.named_parameters()}
        self._param_types = parameter_types(model)
        return DistributedDataParallel(model) if distributed.world_size() > 1 else model, None

    def is_output_params(self, param_key: str) -> bool:
        """Return True for a parameter of the last layer, which all models name `output`."""
        return param_key.startswith("output.")

    def model_fn(
        self,
        params: nn.Module,
        augmented_and_preprocessed_input_batch: Split,
        model_state: None,
        mode: Any,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float = 0.0,
    ) -> tuple[Any, None]:
        """Return the logits of a batch. Dropout is seeded from `rng`, so a resumed run draws the same masks."""
        train = mode == spec.ForwardPassMode.TRAIN
        params.train(train)
        for module in params.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout_rate
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.1 if update_batch_norm else 0.0
        if train and dropout_rate > 0:
            torch.manual_seed(int(rng[0]))
        with torch.set_grad_enabled(train):
            return params(augmented_and_preprocessed_input_batch["inputs"]), None

    def loss_fn(
        self,
        label_batch: Any,
        logits_batch: Any,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """Return the summed and per-example losses and the number of valid examples; examples with mask 0 do not count."""
        losses = self.per_example_loss(logits_batch, label_batch, label_smoothing)
        mask = torch.ones_like(losses) if mask_batch is None else mask_batch
        return {"summed": (losses * mask).sum(), "n_valid_examples": mask.sum(), "per_example": losses * mask}

    def eval_model(
        self,
        global_batch_size: int,
        params: nn.Module,
        model_state: None,
        rng: Any,
        data_dir: str,
        imagenet_v2_data_dir: str | None,
        global_step: int,
    ) -> dict[str, float]:
        """Return the metrics of each of `eval_splits` as "SPLIT/METRIC", and "SPLIT/num_examples" of validation and test."""
        results: dict[str, float] = {}
        for name in self.eval_splits:
            split = "eval_train" if name == "train" else name
            size = self._size(split)
            metrics = self._eval_model_on_split(split, size, global_batch_size, params, model_state, rng, data_dir, global_step)
            results |= {f"{name}/{metric}": value for metric, value in metrics.items()}
            if name != "train":
                results[f"{name}/num_examples"] = size
        return results

    def _eval_model_on_split(
        self,
        split: str,
        num_examples: int,
        global_batch_size: int,
        params: nn.Module,
        model_state: None,
        rng: Any,
        data_dir: str,
        global_step: int = 0,
    ) -> dict[str, float]:
        sums: dict[str, float] = {}
        model = distributed.unwrap(params)  # DDP would wait for all ranks
        for batch in self._build_input_queue(rng, split, data_dir, global_batch_size):
            logits, _ = self.model_fn(model, batch, None, spec.ForwardPassMode.EVAL, rng, update_batch_norm=False)
            for name, value in self.metric_sums(logits, batch["targets"]).items():
                sums[name] = sums.get(name, 0.0) + value.item()
        rank_sums = [x for x in distributed.all_gather(sums) if x]  # a rank may have no batch
        return self.metrics({name: sum(x[name] for x in rank_sums) for name in rank_sums[0]}, num_examples)


def parameter_types(model: nn.Module) -> dict[str, Any]:
    """Return AlgoPerf's type of each parameter, given by the class of its module or, in attention, its name (qkv, out)."""
    weights = {nn.Embedding: "EMBEDDING"} | dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d), "CONV_WEIGHT")
    norms = {nn.LayerNorm: "LAYER_NORM", nn.BatchNorm1d: "BATCH_NORM", nn.BatchNorm2d: "BATCH_NORM"}
    attention = {"qkv": "ATTENTION_QKV", "out": "ATTENTION_OUT"}
    types = {}
    for path, module in model.named_modules():
        last = path.split(".")[-1]
        for name, _ in module.named_parameters(recurse=False):
            bias = name.startswith("bias")  # an LSTM has bias_ih_l0, bias_hh_l0, ...
            if type(module) in norms:
                kind = norms[type(module)] + ("_BIAS" if bias else "_SCALE")
            elif last in attention:
                kind = "ATTENTION_BIAS" if bias else attention[last]
            else:
                kind = "BIAS" if bias else weights.get(type(module), "WEIGHT")
            types[f"{path}.{name}"] = spec.ParameterType[kind]
    return types

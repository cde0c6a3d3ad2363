"""Finished rows of the paper's tables: what classify.py left behind, read back, and scores averaged
over seeds."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from eval.compare import Difference, over_both, over_patients, paired_bootstrap, spread
from eval.metrics import Definition, Scores, _draw, _weighted_scores, confusion
from paper.plan import Row
from planes import PLANES

METRICS: tuple[str, ...] = tuple(field.name for field in fields(Scores))


def row_folder(out: Path, data: str, classifier: str, seed: int) -> Path:
    """Where a reproduction keeps a row's run."""
    return out / "rows" / data / re.sub(r"[^\w.-]+", "_", classifier) / f"seed{seed}"


def is_run(out: Path, row: Row, seed: int) -> bool:
    return (row_folder(out, row.data.name, row.classifier, seed) / "args.json").exists()


class ResultError(Exception):
    """A row that cannot be read or does not belong with the others; one line that says which."""


@dataclass(frozen=True)
class Result:
    """One classifier trained once: a row of a table, for one seed.

    table, data, classifier: as in paper.plan ("1", "HB+DA", "resnet18")
    training: images, patients, and how many images of each source
    targets, predictions: (N,) class indices of the test images
    probabilities: (N, K)
    patients, centers, images: (N,) names
    copies: (N,) bool, whether the image's bytes occur earlier in the test list or among its site's
        training images
    classes: their names, by index
    """

    table: str
    data: str
    classifier: str
    seed: int
    training: dict
    targets: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray
    patients: np.ndarray
    centers: np.ndarray
    images: np.ndarray
    copies: np.ndarray
    classes: tuple[str, ...] = PLANES

    @property
    def name(self) -> str:
        return f"{self.data}/{self.classifier}/seed{self.seed}"


@dataclass(frozen=True)
class Estimate:
    """A metric of one row: a fraction for each seed, and the interval of their mean.

    The interval is over patients and seeds; with one seed over patients alone, and so for this
    trained network.
    """

    values: tuple[float, ...]
    low: float
    high: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    def reaches(self, value: float, level: float = 0.95) -> bool | None:
        """Whether one more seed, tested on the same images, might give this value; None if there is
        but one.

        It lies in the prediction interval of a normal sample. A published number is one such run.
        """
        if len(self.values) < 2:
            return None
        mean, deviation = spread(self.values)
        n = len(self.values)
        return bool(
            abs(value - mean) <= stdtrit(n - 1, (1 + level) / 2) * deviation * np.sqrt(1 + 1 / n)
        )


def read_result(folder: Path, table: str, data: str, classifier: str, seed: int) -> Result:
    """The row that classify.py wrote into `folder`.

    Raises ResultError for files that are missing, broken, or of two different runs.
    """
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        named = ("image", "patient", "center", "target", "prediction", "copy")
        classes = tuple(name for name in rows[0] if name not in named)
        targets, predictions = (
            np.array([classes.index(row[key]) for row in rows]) for key in ("target", "prediction")
        )
        columns = {
            f"{key}s": np.array([row[key] for row in rows])
            for key in ("patient", "center", "image")
        }
        probabilities = np.array([[float(row[name]) for name in classes] for row in rows])
        copies = np.array([row.get("copy", "0") == "1" for row in rows])
        training, counts = metrics["training"], metrics["confusion"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ResultError(
            f"{folder}: not a finished row ({type(error).__name__}: {error}); run it again"
        ) from None
    if confusion(targets, predictions, len(classes)).tolist() != counts:
        raise ResultError(
            f"{folder}: metrics.json and predictions.csv are of different runs; run the row again"
        )
    found = (targets, predictions, probabilities)
    return Result(
        table, data, classifier, seed, training, *found, copies=copies, classes=classes, **columns
    )


def require_same_test(results: Sequence[Result]) -> None:
    """ResultError unless all rows were tested on the same images in the same order."""
    for result in results:
        for key in ("images", "targets", "patients", "centers", "copies"):
            if not np.array_equal(getattr(result, key), getattr(results[0], key)):
                raise ResultError(
                    f"{result.name}: its test {key} are not those of {results[0].name}; run one of"
                    " the two again"
                )


def estimate(
    seeds: Sequence[Result],
    definition: Definition = "notebook",
    distinct: bool = False,
    *,
    replicates: int = 1000,
    level: float = 0.95,
) -> dict[str, Estimate]:
    """Scores of one row over its seeds: metric's name -> Estimate.

    seeds: the row's results, all of the same test images
    distinct: leave out the test images that are copies
    Every replicate draws the same patients for all seeds. Ends of intervals are fractions: none
    beyond 0 and 1.
    """
    kept = ~seeds[0].copies if distinct else np.full(len(seeds[0].copies), True)
    weights, clusters = _draw(seeds[0].patients[kept], kept.sum(), replicates, seed=0)
    weights = np.concatenate([np.ones((1, kept.sum())), weights])  # row 0: the test set itself
    runs = (
        (r.targets[kept], r.predictions[kept], definition, r.probabilities[kept]) for r in seeds
    )
    scores = np.stack([_weighted_scores(weights, *run) for run in runs])
    found = (
        over_both([scores], [1], clusters, level)
        if len(seeds) > 1
        else over_patients(scores[0], clusters, level)
    )
    low, high = np.clip(found[1:3], 0, 1)
    return {
        name: Estimate(tuple(scores[:, 0, n].tolist()), float(low[n]), float(high[n]))
        for n, name in enumerate(METRICS)
    }


def compare(
    first: Sequence[Sequence[Result]], second: Sequence[Sequence[Result]]
) -> dict[str, Difference]:
    """Two data models, second less first, by metric, averaged over classifiers that weigh the same.

    first, second: for each classifier, its results; both data models have the same classifiers, and
        as many seeds as there are
    """
    sides = (
        [np.stack([result.predictions for result in row]) for row in rows]
        for rows in (first, second)
    )
    test = first[0][0]
    return paired_bootstrap(test.targets, *sides, test.patients)

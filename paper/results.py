"""Finished rows of the paper's tables: what classify.py left behind, read back, and scores averaged
over seeds."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from urllib.parse import quote

import numpy as np
from sklearn.metrics import confusion_matrix

from classify.data import PlaneImages, batches
from classify.models import load
from classify.train import predict
from eval.compare import Difference, over_both, over_patients, paired_bootstrap
from eval.metrics import METRICS, draw_patients, weighted_scores
from paper.plan import Row
from planes import PLANES
from planes.datasets import Record


def row_folder(out: Path, data: str, classifier: str, seed: int) -> Path:
    """Where a reproduction keeps a row's run; no two classifiers share a folder."""
    name = quote(classifier, safe="").replace("probe%3A", "probe_", 1)
    return out / "rows" / data / name / f"seed{seed}"


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
    held_out: accuracy on images of the source that were not trained on; nan without any
    folder: of the run
    leaked: how many test images are byte for byte in training
    definitions: of the AUC, the main one first: "notebook" and "ranked", of own sites the latter
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
    held_out: float = nan
    folder: Path = Path()
    leaked: int = 0
    definitions: tuple[str, ...] = ("notebook", "ranked")

    @property
    def confusion(self) -> np.ndarray:
        """(K, K) counts, row = target, column = prediction."""
        return confusion_matrix(self.targets, self.predictions, labels=range(len(self.classes)))

    @property
    def name(self) -> str:
        return f"{self.data}/{self.classifier}/seed{self.seed}"

    @property
    def units(self) -> str:
        """What an interval draws: images where no patient is named, each being one of its own."""
        own = (Path(patient).stem == image for patient, image in zip(self.patients, self.images))
        return "images" if all(own) else "patients"


@dataclass(frozen=True)
class Estimate:
    """A metric of one row: the mean over its seeds, as a fraction, and the mean's interval.

    The interval is over patients and seeds; with one seed over patients alone, and so for this
    trained network.
    """

    mean: float
    low: float
    high: float
    seeds: int


def read_result(out: Path, row: Row, seed: int) -> Result:
    """A row that classify.py wrote into its `row_folder`.

    Raises ResultError for files that are missing, broken, or of two different runs.
    """
    about = row.table, row.data.name, row.classifier, seed
    folder = row_folder(out, *about[1:])
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        cells, classes = np.array(rows), tuple(header[6:])
        images, patients, centers, *named, copied = cells[:, :6].T
        targets, predictions = (np.array([*map(classes.index, names)]) for names in named)
        probabilities = cells[:, 6:].astype(float)
        definitions = tuple(metrics["scores"])
        scores = metrics.get("validation", {}).get("scores", {})
        held_out = scores.get(definitions[0], {}).get("accuracy", nan)
        found = (
            metrics["training"],
            targets,
            predictions,
            probabilities,
            patients,
            centers,
            images,
            copied == "1",
        )
        leaked = metrics.get("test", {}).get("copies_of_training", 0)
        result = Result(*about, *found, classes, held_out, folder, leaked, definitions)
        if result.confusion.tolist() != metrics["confusion"]:
            raise ValueError("metrics.json and predictions.csv are of different runs")
        return result
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ResultError(
            f"{folder}: not a finished row ({type(error).__name__}: {error}); run it again"
        ) from None


def read_by(classifier: Path, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """What a classifier, a file of classify.py, says of images: (N,) class indices of the records
    and (N, K) probabilities."""
    model, description = load(classifier)
    images = PlaneImages(records, description["size"], description["classes"])
    probabilities = predict(model, batches(images, 64), description["input_range"])
    return np.array(images.targets), probabilities.numpy()


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
    seeds: Sequence[Result], definition: str, distinct: bool = False
) -> dict[str, Estimate]:
    """Scores of one row over its seeds: metric's name -> Estimate.

    seeds: the row's results, all of the same test images
    definition: of the AUC, "notebook" or "ranked"
    distinct: leave out the test images that are copies
    Each of 1000 replicates draws the same patients for all seeds. Ends of intervals are fractions:
    none beyond 0 and 1.
    """
    kept = ~(seeds[0].copies & distinct)
    if not kept.any():
        return dict.fromkeys(METRICS, Estimate(nan, nan, nan, len(seeds)))
    # row 0 of the weights: the test set itself
    weights, clusters = draw_patients(seeds[0].patients[kept], 1000, seed=0)
    scores = []
    for r in seeds:
        run = (r.targets, r.predictions, r.probabilities)[: 3 if definition == "ranked" else 2]
        scores.append(weighted_scores(weights, *(values[kept] for values in run)))
    if len(seeds) == 1:
        found = over_patients(scores[0], clusters)
    else:
        found = over_both([np.stack(scores)], [1], clusters)
    numbers = np.clip(found[:3], 0, 1).T.tolist()  # a metric's mean and ends
    return {name: Estimate(*three, len(seeds)) for name, three in zip(METRICS, numbers)}


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

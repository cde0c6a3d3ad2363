"""Accuracy, recall, precision, F-score and AUC as the paper reports them, with intervals by
bootstrap over patients.

Macro averages run over the classes that occur among the targets: the African set has no Other, and
counting that class would cap recall at 80 %. Everything is a fraction; percent is for printing.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

import numpy as np
from scipy.special import ndtr, stdtrit

from planes import PLANES

Definition = Literal["notebook", "plain"]
K = len(PLANES)


@dataclass(frozen=True)
class Scores:
    """Fractions; all but accuracy are macro averages. auc is nan if the targets are all of one
    class."""

    accuracy: float
    recall: float
    precision: float
    f_score: float
    auc: float


def confusion(targets: np.ndarray, predictions: np.ndarray, classes: int = K) -> np.ndarray:
    """Confusion matrix, (K, K) counts, row = target, column = prediction.

    targets, predictions: (N,) class indices
    """
    targets, predictions = _indices(targets, predictions, classes)
    return np.bincount(targets * classes + predictions, minlength=classes**2).reshape(
        classes, classes
    )


def score(
    targets: np.ndarray,
    predictions: np.ndarray,
    definition: Definition = "notebook",
    probabilities: np.ndarray | None = None,
    classes: int = K,
) -> Scores:
    """The paper's five metrics of predicted planes.

    targets, predictions: (N,) class indices
    definition: how the AUC of a class is computed. "plain": one against the rest. "notebook", as
        the authors do: from the predicted labels, and a prediction that is no class of the targets
        (Other, on the African set) counts as positive for every class
    probabilities: (N, K) that the plain AUC ranks images by; without it the predicted labels do,
        where the AUC is (sensitivity + specificity) / 2
    classes: how many there are
    A class that is never predicted has precision 0. ValueError for indices of unequal number or out
    of range.
    """
    targets, predictions = _indices(targets, predictions, classes)
    weights = np.ones((1, len(targets)))
    return Scores(
        *_weighted_scores(weights, targets, predictions, definition, probabilities)[0].tolist()
    )


def bootstrap(
    targets: np.ndarray,
    predictions: np.ndarray,
    patients: Sequence[Hashable],
    definition: Definition = "notebook",
    probabilities: np.ndarray | None = None,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    classes: int = K,
) -> dict[str, tuple[float, float]]:
    """Intervals by bootstrap over patients (Efron and Tibshirani 1993): metric's name -> (low,
    high).

    Expanded percentile intervals (Hesterberg 2015): see `_interval`.

    targets, predictions, definition, probabilities, classes: as for `score`
    patients: (N,) whose image it is; images of a patient resemble each other, so patients are
    drawn, not images A class that no drawn patient has is left out of that replicate's averages, as
    `score` does.
    """
    targets, predictions = _indices(targets, predictions, classes)
    weights, clusters = _draw(patients, len(targets), replicates, seed)
    scores = _weighted_scores(weights, targets, predictions, definition, probabilities)
    low, high = _interval(scores, clusters, level).tolist()
    return {field.name: (a, b) for field, a, b in zip(fields(Scores), low, high)}


def evaluate(targets: np.ndarray, probabilities: np.ndarray, patients: Sequence[Hashable]) -> dict:
    """Scores and 95 % intervals by both definitions, the plain AUC by probability, and the
    confusion matrix, for JSON.

    targets: (N,) class indices; probabilities: (N, K); patients: (N,)
    """
    predictions, classes = probabilities.argmax(axis=1), probabilities.shape[1]
    scores, intervals = {}, {}
    for definition in get_args(Definition):
        given = (targets, predictions)
        scores[definition] = asdict(score(*given, definition, probabilities, classes))
        intervals[definition] = bootstrap(
            *given, patients, definition, probabilities, classes=classes
        )
    return {
        "scores": scores,
        "intervals": intervals,
        "confusion": confusion(targets, predictions, classes).tolist(),
    }


def _draw(
    patients: Sequence[Hashable], images: int, replicates: int, seed: int
) -> tuple[np.ndarray, int]:
    """Patients drawn with replacement: how often each image counts, (R, N), and the number of
    patients."""
    if len(patients) != images:
        raise ValueError(
            f"{len(patients)} patients for {images} images; name the patient of each image"
        )
    unique, owner = np.unique(np.asarray(patients), return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(
        len(unique), np.full(len(unique), 1 / len(unique)), replicates
    )
    return draws[:, owner].astype(float), len(unique)


def _interval(scores: np.ndarray, clusters: int, level: float) -> np.ndarray:
    """The two ends, (2, ...), of the expanded percentile interval (Hesterberg 2015, section 5.3).

    scores: (R, ...) replicates; nan ones do not count
    A bootstrap's percentiles behave as z sqrt((n - 1) / n) times the standard error, where a mean
    of n needs t_(n-1): so the tail probability is Phi(t_(n-1) sqrt(n / (n - 1))) (measured in
    tests/eval/test_compare.py).
    """
    freedom = max(clusters - 1, 1)
    tail = ndtr(stdtrit(freedom, (1 - level) / 2) * np.sqrt(clusters / freedom))
    return np.nanquantile(scores, (tail, 1 - tail), axis=0)


def _indices(
    targets: np.ndarray, predictions: np.ndarray, classes: int | None = K
) -> tuple[np.ndarray, np.ndarray]:
    targets, predictions = np.asarray(targets), np.asarray(predictions)
    if targets.ndim != 1 or targets.shape != predictions.shape or not len(targets):
        raise ValueError(
            f"targets {targets.shape} and predictions {predictions.shape} are not one index per"
            " image each"
        )
    if min(targets.min(), predictions.min()) < 0 or max(targets.max(), predictions.max()) >= (
        classes or math.inf
    ):
        raise ValueError(f"class indices must lie in 0..{classes - 1 if classes else ''}")
    return targets, predictions


def _weighted_scores(
    weights: np.ndarray,
    targets: np.ndarray,
    predictions: np.ndarray,
    definition: Definition,
    probabilities: np.ndarray | None,
) -> np.ndarray:
    """Scores in which an image counts any number of times, as it does in a bootstrap replicate.

    weights: (R, N) counts, a row for each replicate
    Returns (R, 5) in the order of Scores.
    """
    if definition not in get_args(Definition):
        raise ValueError(
            f"AUC definition {definition!r} is not one of {', '.join(get_args(Definition))}"
        )
    k = (
        1 + max(targets.max(), predictions.max())
        if probabilities is None
        else probabilities.shape[1]
    )
    # a confusion matrix per replicate
    counts = (weights @ np.eye(k * k)[targets * k + predictions]).reshape(-1, k, k)
    hits, support, predicted = (
        np.diagonal(counts, axis1=1, axis2=2),
        counts.sum(axis=2),
        counts.sum(axis=1),
    )
    present, total = support > 0, support.sum(axis=1, keepdims=True)

    if definition == "plain" and probabilities is not None:
        auc = np.stack(
            [_rank_auc(weights, targets == c, probabilities[:, c]) for c in range(k)], axis=1
        )
    else:
        # the notebook's extra positives: images of each class whose prediction is no class of the
        # targets
        astray = (counts * ~present[:, None]).sum(axis=2) * (definition == "notebook")
        true_positives = hits + astray
        false_positives = predicted - hits + astray.sum(axis=1, keepdims=True) - astray
        with np.errstate(invalid="ignore"):  # 0 / 0 if there is but one class
            specificity = 1 - false_positives / (total - support)
        auc = (true_positives / np.maximum(support, 1) + specificity) / 2

    per_class = {
        "recall": hits / np.maximum(support, 1),
        "precision": hits / np.maximum(predicted, 1),
        "f_score": 2 * hits / np.maximum(support + predicted, 1),
        "auc": auc,
    }
    macro = [
        np.where(present, values, 0).sum(axis=1) / present.sum(axis=1)
        for values in per_class.values()
    ]
    return np.stack([hits.sum(axis=1) / total[:, 0], *macro], axis=1)


def _rank_auc(weights: np.ndarray, positive: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Area under the ROC curve, (R,): the share of (positive, negative) pairs that `values` ranks
    right, ties half.

    weights: (R, N); positive: (N,) bool; values: (N,)
    """
    right = (1 + np.sign(values[positive][:, None] - values[~positive])) / 2
    of_positives, of_negatives = weights[:, positive], weights[:, ~positive]
    with np.errstate(invalid="ignore"):  # 0 / 0 without one or the other
        return (of_positives @ right * of_negatives).sum(axis=1) / (
            of_positives.sum(axis=1) * of_negatives.sum(axis=1)
        )

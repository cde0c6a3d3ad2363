"""Accuracy, recall, precision, F-score and AUC as the paper reports them, with intervals by
bootstrap over patients.

Each metric, but for the AUC by probabilities, is a function of confusion matrices, (..., K, K),
row = target, column = prediction: of one, or of one for each bootstrap replicate. Macro averages
run over the classes that occur among the targets: the African set has no Other, and counting that
class would cap recall at 80 %. Everything is a fraction; percent is for printing.
"""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy.special import ndtr, stdtrit
from sklearn.metrics import confusion_matrix

LEVEL = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class Scores:
    """Fractions; all but accuracy are macro averages. auc is nan if the targets are all of one
    class."""

    accuracy: float
    recall: float
    precision: float
    f_score: float
    auc: float


METRICS = tuple(field.name for field in fields(Scores))


# --- the five metrics ---


def class_scores(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each class, (..., K): recall TP / (TP + FN), of its images those that are found; precision
    TP / (TP + FP), of its predictions those that are right, 0 without any; F-score, their harmonic
    mean 2 TP / (2 TP + FN + FP)."""
    hits, targets, predicted = _totals(counts)
    f_score = 2 * hits / np.maximum(targets + predicted, 1)
    return hits / np.maximum(targets, 1), hits / np.maximum(predicted, 1), f_score


def label_auc(counts: np.ndarray) -> np.ndarray:
    """(sensitivity + specificity) / 2, the area under the ROC curve of predicted labels.

    As the authors do it, a prediction that is no class of the targets (Other, on the African set)
    is positive for every class.
    """
    hits, targets, predicted = _totals(counts)
    astray = (counts * (targets == 0)[..., None, :]).sum(axis=-1)
    false_positives = predicted - hits + astray.sum(axis=-1, keepdims=True) - astray
    with np.errstate(invalid="ignore"):  # 0 / 0 if there is but one class
        specificity = 1 - false_positives / (targets.sum(axis=-1, keepdims=True) - targets)
    return _macro(((hits + astray) / np.maximum(targets, 1) + specificity) / 2, counts)


def rank_auc(
    counts: np.ndarray, weights: np.ndarray, targets: np.ndarray, probabilities: np.ndarray
) -> np.ndarray:
    """Area under the ROC curve of a class against the rest: the share of (positive, negative) pairs
    of images that its probability ranks right, ties half.

    weights: (R, N) how often an image counts; targets: (N,); probabilities: (N, K)
    """

    def area(positive: np.ndarray, values: np.ndarray) -> np.ndarray:
        right = (1 + np.sign(values[positive][:, None] - values[~positive])) / 2
        positives, negatives = weights[:, positive], weights[:, ~positive]
        pairs = positives.sum(axis=1) * negatives.sum(axis=1)
        with np.errstate(invalid="ignore"):  # 0 / 0 without one or the other
            return (positives @ right * negatives).sum(axis=1) / pairs

    areas = [area(targets == c, probabilities[:, c]) for c in range(counts.shape[-1])]
    return _macro(np.stack(areas, axis=1), counts)


def _totals(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each class, (..., K): true positives, targets, predictions."""
    return np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1), counts.sum(axis=-2)


def _macro(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over the classes that have targets."""
    present = counts.sum(axis=-1) > 0
    return np.where(present, values, 0).sum(axis=-1) / present.sum(axis=-1)


# --- of a test set, and of bootstrap replicates of it ---


def evaluate(
    targets: np.ndarray,
    probabilities: np.ndarray,
    patients: Sequence[Hashable],
    classes: Sequence[str],
    notebook: bool = True,
) -> dict:
    """Scores and 95 % intervals, the confusion matrix, and the scores of each class that has
    targets, for JSON.

    targets: (N,) class indices; probabilities: (N, K)
    classes: K names
    notebook: with the AUC by labels too, as the paper's authors compute it; "ranked" has the one
        by probabilities
    patients: (N,) whose image it is; images of a patient resemble each other, so the bootstrap
        (Efron and Tibshirani 1993) draws patients, not images. A class that no drawn patient has
        is left out of that replicate's averages.
    """
    predictions = probabilities.argmax(axis=1)
    weights, clusters = draw_patients(patients, 1000, seed=0)
    scores, intervals = {}, {}
    for definition, ranked in (("notebook", None),) * notebook + (("ranked", probabilities),):
        found = weighted_scores(weights, targets, predictions, ranked)
        scores[definition] = dict(zip(METRICS, found[0].tolist()))
        ends = expanded_interval(found[1:], clusters).T.tolist()
        intervals[definition] = dict(zip(METRICS, ends))
    matrix = confusion_matrix(targets, predictions, labels=range(len(classes)))
    columns = (*class_scores(matrix), matrix.sum(axis=1))
    rows = zip(*(column.tolist() for column in columns))
    names = *METRICS[1:4], "support"
    by_class = {name: dict(zip(names, row)) for name, row in zip(classes, rows) if row[-1]}
    return {
        "scores": scores,
        "intervals": intervals,
        "confusion": matrix.tolist(),
        "by_class": by_class,
    }


def draw_patients(
    patients: Sequence[Hashable], replicates: int, seed: int
) -> tuple[np.ndarray, int]:
    """Patients drawn with replacement: how often each image counts, (1 + R, N), and the number of
    patients. Row 0 is the test set itself."""
    unique, owner = np.unique(patients, return_inverse=True)
    shares = np.full(len(unique), 1 / len(unique))
    draws = np.random.default_rng(seed).multinomial(len(unique), shares, replicates)
    draws = np.concatenate([np.ones((1, len(unique))), draws])
    return draws[:, owner], len(unique)


def weighted_scores(
    weights: np.ndarray,
    targets: np.ndarray,
    predictions: np.ndarray,
    probabilities: np.ndarray | None = None,
) -> np.ndarray:
    """Scores in which an image counts any number of times, as it does in a bootstrap replicate.

    weights: (R, N) counts, a row for each replicate
    targets, predictions: (N,) class indices
    probabilities: (N, K) that the AUC ranks images by; without them it is the notebook's, of
        predicted labels
    Returns (R, 5) in the order of Scores.
    """
    k = 1 + max(targets.max(), predictions.max())
    # a confusion matrix per replicate
    counts = (weights @ np.eye(k * k)[targets * k + predictions]).reshape(-1, k, k)
    accuracy = np.trace(counts, axis1=1, axis2=2) / counts.sum(axis=(1, 2))
    macro = (_macro(values, counts) for values in class_scores(counts))
    if probabilities is None:
        area = label_auc(counts)
    else:
        area = rank_auc(counts, weights, targets, probabilities)
    return np.stack([accuracy, *macro, area], axis=1)


def expanded_interval(scores: np.ndarray, clusters: int) -> np.ndarray:
    """The two ends, (2, ...), of the expanded percentile interval (Hesterberg 2015, section 5.3).

    scores: (R, ...) replicates; nan ones do not count
    clusters: patients; of one alone nothing is known of others, and the ends are nan
    A bootstrap's percentiles behave as z sqrt((n - 1) / n) times the standard error, where a mean
    of n needs t_(n-1): so the tail probability is Phi(t_(n-1) sqrt(n / (n - 1))) (measured in
    tests/eval/test_compare.py).
    """
    if clusters < 2:
        return np.full((2, *scores.shape[1:]), np.nan)
    freedom = clusters - 1
    tail = ndtr(stdtrit(freedom, (1 - LEVEL) / 2) * np.sqrt(clusters / freedom))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a metric that is nan in all
        return np.nanquantile(scores, (tail, 1 - tail), axis=0)

"""Two classifiers on the same test images: is the difference more than chance? And means, spreads and groups of one.

Both tests pair the images. McNemar's counts images as if they were independent; the bootstrap draws patients, as
`eval.metrics.bootstrap` does, and so also serves the F-score and the AUC.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy.special import ndtri, stdtr

from eval.metrics import Definition, Scores, _draw, _indices, _interval, _weighted_scores


@dataclass(frozen=True)
class McNemar:
    """Images that only the first or only the second classifier reads right, and how surprising their ratio is."""

    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True)
class Difference:
    """Second minus first, as a fraction, with its interval and two-sided p-value. nan where the metric is undefined."""

    value: float
    low: float
    high: float
    p_value: float


def mcnemar(targets: np.ndarray, first: np.ndarray, second: np.ndarray) -> McNemar:
    """Exact two-sided test that two classifiers are right equally often (McNemar 1947, with binomial probabilities).

    targets, first, second: (N,) class indices
    Given n discordant images, each is the first's or the second's with probability 1/2 if the two are equally good.
    """
    right_first, right_second = (np.equal(*_indices(targets, predictions)) for predictions in (first, second))
    b, c = int((right_first & ~right_second).sum()), int((right_second & ~right_first).sum())
    at_most = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))  # of the 2^n outcomes, an exact integer
    return McNemar(b, c, min(1.0, 2 * at_most / 2 ** (b + c)))


def paired_bootstrap(
    targets: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    patients: Sequence[Hashable],
    definition: Definition = "notebook",
    *,
    replicates: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Differences by bootstrap over patients, the same drawn for all: metric's name -> second minus first.

    targets: (N,) class indices
    first, second: (N,), or (M, N) of M runs (classifiers, seeds) whose scores are averaged in every replicate; the
        interval is over patients, for these runs
    patients: (N,) whose image it is
    definition: of the AUC, from the labels, as for `score`
    The p-value is that of the level at which the interval would end at zero, and never 0 (Davison and Hinkley 1997,
    Eq. 4.11: the observed data count as one more replicate).
    """
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    weights, clusters = _draw(patients, len(targets), replicates, seed)
    weights = np.concatenate([np.ones((1, len(targets))), weights])  # row 0: the observed data

    def mean_scores(runs: np.ndarray) -> np.ndarray:
        return np.mean([_weighted_scores(weights, *_indices(targets, run), definition, None) for run in runs], axis=0)

    # rounded, for ties to be ties in whatever order the runs were summed
    differences = np.round(mean_scores(second) - mean_scores(first), 12)
    value, replicas = differences[0], differences[1:]
    low, high = _interval(replicas, clusters, level)
    defined = (~np.isnan(replicas)).sum(axis=0)
    beyond = np.minimum((replicas <= 0).sum(axis=0), (replicas >= 0).sum(axis=0))
    tail = np.minimum((1 + beyond) / (1 + defined), 0.5)
    freedom = max(clusters - 1, 1)  # undo what _interval does to a tail
    p_value = np.where(np.isnan(value), np.nan, 2 * stdtr(freedom, ndtri(tail) * np.sqrt(freedom / clusters)))
    columns = zip(fields(Scores), value.tolist(), low.tolist(), high.tolist(), p_value.tolist())
    return {field.name: Difference(*numbers) for field, *numbers in columns}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, of a metric over seeds say; the latter is nan for a single value."""
    if not len(values):
        raise ValueError("no values to average")
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def by_group(
    targets: np.ndarray, predictions: np.ndarray, groups: Sequence[Hashable]
) -> dict[Hashable, tuple[int, int]]:
    """(images read right, images) of each group, such as a plane or a country, in order of first appearance.

    targets, predictions: (N,) class indices
    groups: (N,) the group of each image
    """
    targets, predictions = _indices(targets, predictions)
    if len(groups) != len(targets):
        raise ValueError(f"{len(groups)} groups for {len(targets)} images; name the group of each image")
    counts: dict[Hashable, tuple[int, int]] = {}
    for group, right in zip(groups, (targets == predictions).tolist()):
        correct, total = counts.get(group, (0, 0))
        counts[group] = correct + right, total + 1
    return counts

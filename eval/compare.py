"""Two classifiers, or two data models, on the same test images: is the difference more than chance? And groups of one.

McNemar's test counts images as if they were independent. The bootstrap draws patients, as `eval.metrics.bootstrap`
does, and reckons with the seeds of the training; so it serves averages over classifiers, the F-score and the AUC too.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from eval.levels import over_both, over_patients
from eval.metrics import Definition, Scores, _draw, _indices, _weighted_scores

Over = Literal["patients", "patients and seeds"]


@dataclass(frozen=True)
class McNemar:
    """Images that only the first or only the second classifier reads right, and how surprising their ratio is."""

    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True)
class Difference:
    """Second minus first, as a fraction, with its interval and two-sided p-value. nan where the metric is undefined.

    over: what else might have come up, for the interval and the p-value. Over patients alone they speak of these
        trained networks and say nothing of the data that trained them: another seed may turn the sign.
    """

    value: float
    low: float
    high: float
    p_value: float
    over: Over = "patients"


def mcnemar(targets: np.ndarray, first: np.ndarray, second: np.ndarray) -> McNemar:
    """Exact two-sided test that two classifiers are right equally often (McNemar 1947, with binomial probabilities).

    targets, first, second: (N,) class indices
    Given n discordant images, each is the first's or the second's with probability 1/2 if the two are equally good.
    """
    right_first, right_second = (np.equal(*_indices(targets, predictions, None)) for predictions in (first, second))
    b, c = int((right_first & ~right_second).sum()), int((right_second & ~right_first).sum())
    at_most = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))  # of the 2^n outcomes, an exact integer
    return McNemar(b, c, min(1.0, 2 * at_most / 2 ** (b + c)))


def paired_bootstrap(
    targets: np.ndarray,
    first: Sequence,
    second: Sequence,
    patients: Sequence[Hashable],
    definition: Definition = "notebook",
    *,
    replicates: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Differences of averages over classifiers, with intervals: metric's name -> second minus first.

    targets: (N,) class indices
    first, second: predictions of a run, (N,); or for each classifier those of a run, (N,), or of its seeds, (M, N).
        Seeds are averaged, then classifiers, each weighing the same
    patients: (N,) whose image it is; every replicate draws the same ones for all runs
    definition: of the AUC, from the labels, as for `score`
    Where every classifier has several seeds, the interval is over patients and seeds (`eval.levels.over_both`), else
    over patients alone (`eval.levels.over_patients`).
    """
    sides = [[np.atleast_2d(runs) for runs in (side if np.ndim(side[0]) else [side])] for side in (first, second)]
    weights, clusters = _draw(patients, len(targets), replicates, seed)
    weights = np.concatenate([np.ones((1, len(targets))), weights])  # row 0: the observed data

    def scores(runs: np.ndarray) -> np.ndarray:
        return np.stack([_weighted_scores(weights, *_indices(targets, run, None), definition, None) for run in runs])

    cells = [scores(runs) for side in sides for runs in side]
    coefficients = [sign / len(side) for sign, side in zip((-1, 1), sides) for _ in side]
    over: Over = "patients"
    if min(map(len, cells)) > 1:
        over, found = "patients and seeds", over_both(cells, coefficients, clusters, level)
    else:
        total = sum(coefficient * cell.mean(axis=0) for coefficient, cell in zip(coefficients, cells))
        # rounded, for ties to be ties in whatever order the runs were summed
        found = over_patients(np.round(total, 12), clusters, level)
    columns = zip(fields(Scores), *(column.tolist() for column in found))
    return {field.name: Difference(*numbers, over) for field, *numbers in columns}


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
    targets, predictions = _indices(targets, predictions, None)
    if len(groups) != len(targets):
        raise ValueError(f"{len(groups)} groups for {len(targets)} images; name the group of each image")
    counts: dict[Hashable, tuple[int, int]] = {}
    for group, right in zip(groups, (targets == predictions).tolist()):
        correct, total = counts.get(group, (0, 0))
        counts[group] = correct + right, total + 1
    return counts

"""Paired comparisons: intervals and p-values against simulations whose truth is known."""

import numpy as np
import pytest
from scipy.stats import t, ttest_ind

from eval.compare import Difference, over_both, over_patients, paired_bootstrap
from eval.metrics import METRICS, draw_patients, expanded_interval, weighted_scores
from paper.gain import points_between


def score(targets, predictions):
    """The metrics by name."""
    return dict(zip(METRICS, weighted_scores(np.ones((1, len(targets))), targets, predictions)[0]))


def accuracy_interval(targets, predictions, patients, replicates, seed):
    weights, clusters = draw_patients(patients, replicates, seed)
    scores = weighted_scores(weights, targets, predictions)
    return expanded_interval(scores[1:, 0], clusters)


def clustered(seed, patients, second_gain=0.0):
    """A study: patients differ in how often they are read right, 0.7 on average; 1 to 4 images of
    each.

    The second classifier turns this share of the first's errors right. Returns targets, two
    predictions, owners.
    """
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(patients), rng.integers(1, 5, patients))
    right = rng.random((2, len(owner))) < rng.beta(2.1, 0.9, patients)[owner]
    right[1] |= rng.random(len(owner)) < second_gain
    targets = rng.integers(0, 4, len(owner))
    first, second = np.where(right, targets, (targets + 1) % 4)
    return targets, first, second, owner


def single(targets, first, second, owner, **settings):
    """The comparison of two runs."""
    return paired_bootstrap(targets, [first[None]], [second[None]], owner, **settings)


def numbers(difference, sign=1):
    ends = sorted((sign * difference.low, sign * difference.high))
    return (sign * difference.value, *ends, difference.p_value)


# --- paired bootstrap ---


def test_a_planted_difference_is_found_with_the_sign_of_second_minus_first_and_mirrors():
    targets, first, second, owner = clustered(0, 80, second_gain=0.5)
    there, back = single(targets, first, second, owner), single(targets, second, first, owner)
    twice = paired_bootstrap(targets, [np.stack([first] * 2)], [np.stack([second] * 2)], owner)
    for name, found in there.items():
        truth = score(targets, second)[name] - score(targets, first)[name]
        assert (found.value, twice[name].value) == pytest.approx((truth, truth), abs=1e-11)
        assert 0 < found.low < found.value < found.high and found.p_value < 0.01, name
        assert numbers(found) == pytest.approx(numbers(back[name], -1), abs=1e-9)


def test_equal_predictions_differ_by_exactly_nothing_in_whatever_order_the_classifiers_come():
    targets, first, second, owner = clustered(2, 40)
    runs = [first[None], second[None], np.roll(first, 1)[None]]
    none = dict.fromkeys(METRICS, Difference(0, 0, 0, 1))
    assert paired_bootstrap(targets, runs[:1], runs[:1], owner) == none
    assert paired_bootstrap(targets, runs, [runs[2], runs[0], runs[1]], owner) == none


def test_the_interval_over_patients_and_its_p_value_are_these():
    """100 replicates of 20 patients, of which 7 are at or below zero."""
    replicas = np.concatenate([np.linspace(-0.6, 0, 7), np.linspace(0.1, 1, 93)])
    value, low, high, p_value = over_patients(np.append(0.4, replicas), 20)
    tail = t.cdf(t.ppf(0.025, 19) * np.sqrt(20 / 19), np.inf)
    ends = np.quantile(replicas, [tail, 1 - tail])
    assert (value, low, high) == pytest.approx((0.4, *ends), abs=1e-12)
    # the level at which the interval would end at zero
    level = t.cdf(t.ppf(8 / 101, np.inf) * np.sqrt(19 / 20), 19)
    assert p_value == pytest.approx(2 * level, rel=1e-9)
    replicas[:7] = 1  # never 0: the observed data count as one more replicate
    level = t.cdf(t.ppf(1 / 101, np.inf) * np.sqrt(19 / 20), 19)
    assert over_patients(np.append(0.4, replicas), 20)[3] == pytest.approx(2 * level, rel=1e-9)


@pytest.mark.filterwarnings("error:All-NaN slice")
def test_the_auc_of_a_single_class_has_no_difference_and_the_rest_has():
    zeros = np.zeros(6, int)
    found = single(zeros, np.array([1, 0, 0, 0, 0, 0]), zeros, range(6), replicates=50)
    assert np.isnan(numbers(found["auc"])).all()
    assert found["accuracy"].value == pytest.approx(1 / 6)


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_patient_says_nothing_of_others(seeds):
    targets, first, second, _ = clustered(2, 40)
    runs = [np.stack([run] * seeds) for run in (first, second)]
    found = paired_bootstrap(targets, runs[:1], runs[1:], ["anonymous"] * len(targets))["accuracy"]
    assert found.value == pytest.approx((second == targets).mean() - (first == targets).mean())
    assert np.isnan([found.low, found.high, found.p_value]).all()
    assert points_between(found) == "no interval"


# --- patients and seeds ---


def same_in_every_patient(*right):
    """Runs that read right so many of every patient's 10 images; returns targets, runs, owners of 5
    patients."""
    targets = np.arange(50) % 4
    runs = np.stack([np.where(np.arange(50) % 10 < n, targets, 4) for n in right])
    return targets, runs, np.arange(50) // 10


def test_where_all_patients_are_alike_the_interval_over_seeds_is_welchs_t_test():
    targets, first, owner = same_in_every_patient(6, 7, 5)
    _, second, _ = same_in_every_patient(9, 7, 8, 9)
    found = paired_bootstrap(targets, [first], [second], owner)["accuracy"]
    welch = ttest_ind([0.9, 0.7, 0.8, 0.9], [0.6, 0.7, 0.5], equal_var=False)
    low, high = welch.confidence_interval(0.95)
    assert found.over == "patients and seeds" and found.value == pytest.approx(0.825 - 0.6)
    expected = low, high, welch.pvalue
    assert (found.low, found.high, found.p_value) == pytest.approx(expected, rel=1e-9)


def test_classifiers_weigh_the_same_and_each_brings_its_own_spread_over_seeds():
    targets, first, owner = same_in_every_patient(6, 7, 5)
    second = [same_in_every_patient(*right)[1] for right in ((9, 7), (5, 6, 7, 8))]
    found = paired_bootstrap(targets, [first, first], second, owner)["accuracy"]
    assert found.value == pytest.approx((0.8 + 0.65) / 2 - 0.6)
    runs = [0.6, 0.7, 0.5], [0.6, 0.7, 0.5], [0.9, 0.7], [0.5, 0.6, 0.7, 0.8]
    variances = [np.var(x, ddof=1) / len(x) / 4 for x in runs]
    freedom = sum(variances) ** 2 / sum(v**2 / n for v, n in zip(variances, (2, 2, 1, 3)))
    half = t.ppf(0.975, freedom) * np.sqrt(sum(variances))
    expected = found.value - half, found.value + half
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)


def test_one_seed_of_one_classifier_leaves_the_interval_over_patients_alone():
    targets, first, second, owner = clustered(6, 40)
    several = np.stack([first, second, first])
    found = paired_bootstrap(targets, [several, several], [several, second[None]], owner)
    assert {difference.over for difference in found.values()} == {"patients"}
    mean = np.mean([score(targets, run)["accuracy"] for run in several])
    expected = (mean + score(targets, second)["accuracy"]) / 2 - mean
    assert found["accuracy"].value == pytest.approx(expected, abs=1e-11)


def test_a_row_of_several_seeds_differs_from_itself_by_nothing_but_other_seeds_might():
    targets, first, second, owner = clustered(7, 40)
    runs = np.stack([first, second, np.roll(first, 1)])
    found = paired_bootstrap(targets, [runs], [runs[[1, 2, 0]]], owner)["accuracy"]
    assert (found.value, found.p_value) == (0, 1) and found.high == -found.low > 0.01


def test_the_variance_of_what_a_run_does_on_these_patients_is_counted_once():
    """The docstring's sum, written out: patients' and seeds' variances each hold that of a run on
    these patients."""
    rng, clusters = np.random.default_rng(9), 12
    seeds, patients = rng.normal(0, 2, (2, 3, 1)), rng.normal(0, 1, 400)
    cells = seeds + patients * np.array([[[1]], [[2]]]) + rng.normal(0, 1, (2, 3, 400))
    value, low, high, p_value = over_both(cells, [-1, 1], clusters)
    scale = clusters / (clusters - 1)
    of_patients = scale * (cells[1].mean(axis=0) - cells[0].mean(axis=0))[1:].var()
    of_seeds = cells[:, :, 0].var(axis=1, ddof=1) / 3
    of_both = scale * sum(
        (cell - cell.mean(axis=0))[:, 1:].var(axis=1).sum() / 2 / 3 for cell in cells
    )
    variance = of_patients + of_seeds.sum() - of_both
    assert 0.2 < of_both < of_seeds.sum()
    freedom = variance**2 / (of_patients**2 / 11 + (of_seeds**2 / 2).sum())
    half = t.ppf(0.975, freedom) * np.sqrt(variance)
    assert (low, high) == pytest.approx((value - half, value + half))
    assert p_value == pytest.approx(2 * t.sf(abs(value) / np.sqrt(variance), freedom))


# --- coverage: 150 studies of 66 patients, as in the African test ---

STUDIES = 150  # binomial sd 1.8 points at 95 of 100


def covered(rng, seeds, classifiers, study, seed_sd=0.08, gain=0.05):
    """A study of a gain by 5 points: whether the interval over patients and seeds, that of a single
    row, and that over patients, hold the truth. Classifiers from 40 to 60 %, patients' ease 25
    points to either side."""
    owner = np.repeat(np.arange(66), rng.integers(1, 7, 66))
    own = rng.normal(0, seed_sd, (2, classifiers, seeds))
    level = np.linspace(0.4, 0.6, classifiers)[:, None] + own + np.array([0, gain])[:, None, None]
    ease = rng.uniform(-0.25, 0.25, 66)[owner]
    right = rng.random((*level.shape, len(owner))) < level[..., None] + ease
    weights, clusters = draw_patients(owner, 300, study)
    scores = right.astype(float) @ (weights / weights.sum(axis=1, keepdims=True)).T
    coefficients = np.repeat([-1, 1], classifiers) / classifiers
    _, low, high, p_value = over_both([*scores[0], *scores[1]], coefficients, clusters)
    assert (p_value < 0.05) == (not low <= 0 <= high)
    _, low_row, high_row, _ = over_both([scores[0, 0]], [1], clusters)
    _, old_low, old_high, _ = over_patients((scores[1] - scores[0]).mean(axis=(0, 1)), clusters)
    return low <= gain <= high, low_row <= 0.4 <= high_row, old_low <= gain <= old_high


def test_intervals_over_seeds_hold_the_truth_where_those_over_patients_miss_it_every_other_time():
    """3 seeds of 3 classifiers with a standard deviation of 8 points; 60 studies, binomial sd 3
    points."""
    rng = np.random.default_rng(10)
    difference, _, old = np.mean([covered(rng, 3, 3, study) for study in range(60)], axis=0)
    assert difference >= 0.88 and old < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("gain", [0, 0.2])
def test_95_percent_intervals_over_patients_hold_the_truth_and_over_images_do_not(gain):
    """Of the first's accuracy 0.7, and of the difference: the second turns none or a fifth of its
    errors right."""
    held = []
    for seed in range(STUDIES):
        *study, owner = clustered(seed, 66, gain)
        settings = {"replicates": 400, "seed": seed}
        low, high = accuracy_interval(*study[:2], owner, **settings)
        low_image, high_image = accuracy_interval(*study[:2], range(len(owner)), **settings)
        found = single(*study, owner, **settings)["accuracy"]
        row = low <= 0.7 <= high, low_image <= 0.7 <= high_image
        held.append((*row, found.low <= 0.3 * gain <= found.high, found.p_value < 0.05))
    by_patient, by_image, paired, significant = np.mean(held, axis=0)
    assert 0.9 <= by_patient <= 0.99 and 0.9 <= paired <= 0.99
    assert by_image < by_patient - 0.03  # too narrow: in truth 88 of 100
    assert significant <= 0.1 if gain == 0 else significant > 0.15


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seeds, classifiers", [(3, 5), (3, 3), (5, 5), (5, 3)])
def test_95_percent_intervals_over_patients_and_seeds_hold_the_truth_in_93_to_97_of_100_studies(
    seeds, classifiers
):
    """Seeds with a standard deviation of 8 points; 2000 studies, binomial sd 0.5 points."""
    rng = np.random.default_rng(11)
    studies = [covered(rng, seeds, classifiers, study) for study in range(2000)]
    difference, row, old = np.mean(studies, axis=0)
    # a single row of three seeds: 93 to 94
    assert 0.93 <= difference <= 0.975 and 0.925 <= row <= 0.975 and old < 0.6

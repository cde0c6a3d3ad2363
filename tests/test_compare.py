"""Paired comparisons: McNemar against SciPy, and intervals and p-values against simulations whose truth is known."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from eval.compare import Difference, McNemar, by_group, mcnemar, paired_bootstrap, spread
from eval.metrics import Scores, bootstrap, score

NAMES = list(Scores.__dataclass_fields__)


def discordant(only_first, only_second, both=3, neither=2):
    """Targets and two predictions that differ in this many images."""
    right_first, right_second = (
        np.repeat(flags, [only_first, only_second, both, neither])
        for flags in ([True, False, True, False], [False, True, True, False])
    )
    targets = np.arange(len(right_first)) % 4
    return targets, np.where(right_first, targets, 4), np.where(right_second, targets, 4)


def clustered(rng, patients, second_gain=0.0, images=(1, 5), a=2.1, b=0.9):
    """A study: patients differ in how often they are read right, a / (a + b) on average; 1 to 4 images of each.

    The second classifier turns this share of the first's errors right, and loses as many right ones as it makes up
    for with a gain of 0. Returns targets, two predictions, owners.
    """
    owner = np.repeat(np.arange(patients), rng.integers(*images, patients))
    right = rng.random((2, len(owner))) < rng.beta(a, b, patients)[owner]
    right[1] |= rng.random(len(owner)) < second_gain
    targets = rng.integers(0, 4, len(owner))
    first, second = np.where(right, targets, (targets + 1) % 4)
    return targets, first, second, owner


# --- McNemar ---


@pytest.mark.parametrize(("b", "c"), [(b, c) for b in range(8) for c in range(8)] + [(3, 19), (40, 61), (200, 150)])
def test_mcnemar_is_scipys_exact_binomial_test_of_the_discordant_images(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    result = mcnemar(*discordant(b, c))
    assert (result.only_first, result.only_second) == (b, c)
    assert result.p_value == pytest.approx(expected, rel=1e-10)


def test_mcnemar_is_statsmodels_exact_test():
    statsmodels = pytest.importorskip("statsmodels.stats.contingency_tables", reason="statsmodels is not installed")
    for b, c in [(0, 3), (4, 9), (30, 12)]:
        expected = statsmodels.mcnemar([[3, b], [c, 2]], exact=True).pvalue
        assert mcnemar(*discordant(b, c)).p_value == pytest.approx(expected, rel=1e-10)


def test_mcnemar_of_thousands_of_images_neither_overflows_nor_exceeds_one():
    assert mcnemar(*discordant(2400, 2600)).p_value == pytest.approx(binomtest(2400, 5000).pvalue, rel=1e-9)
    assert mcnemar(*discordant(5, 5)) == McNemar(5, 5, 1.0)


def test_two_different_wrong_answers_are_no_disagreement():
    assert mcnemar([0, 0], [1, 0], [2, 0]) == McNemar(0, 0, 1.0)


# --- paired bootstrap ---


def test_a_planted_difference_is_found_and_has_the_sign_of_second_minus_first():
    targets, first, second, owner = clustered(np.random.default_rng(0), 80, second_gain=0.5)
    for name, found in paired_bootstrap(targets, first, second, owner).items():
        truth = getattr(score(targets, second), name) - getattr(score(targets, first), name)
        assert found.value == pytest.approx(truth, abs=1e-11)
        assert 0 < found.low < found.value < found.high and found.p_value < 0.01, name


def test_swapping_the_two_mirrors_the_result():
    targets, first, second, owner = clustered(np.random.default_rng(1), 40)
    there, back = (paired_bootstrap(targets, *pair, owner) for pair in ((first, second), (second, first)))
    for name in NAMES:
        one, other = there[name], back[name]
        mirrored = (-other.value, -other.high, -other.low, other.p_value)
        assert (one.value, one.low, one.high, one.p_value) == pytest.approx(mirrored, abs=1e-9)


def test_equal_predictions_differ_by_exactly_nothing_in_whatever_order_the_runs_come():
    targets, first, second, owner = clustered(np.random.default_rng(2), 40)
    runs = np.stack([first, second, np.roll(first, 1)])
    none = dict.fromkeys(NAMES, Difference(0, 0, 0, 1))
    assert paired_bootstrap(targets, first, first, owner) == none
    assert paired_bootstrap(targets, runs, runs[[2, 0, 1]], owner) == none


def test_runs_are_averaged_by_score_within_each_replicate_of_the_same_patients():
    targets, first, second, owner = clustered(np.random.default_rng(3), 30)
    third = np.roll(first, 1)
    alone = [paired_bootstrap(targets, first, run, owner, replicates=1)["f_score"] for run in (second, third)]
    both = paired_bootstrap(targets, first, np.stack([second, third]), owner, replicates=1)["f_score"]
    assert both.value == pytest.approx(np.mean([run.value for run in alone]), abs=1e-11)
    assert both.low == both.high == pytest.approx(np.mean([run.low for run in alone]), abs=1e-11)


def test_the_p_value_is_below_one_minus_the_level_just_where_the_interval_leaves_zero_out():
    rng, outside = np.random.default_rng(4), 0
    for _ in range(40):
        found = paired_bootstrap(*clustered(rng, 20, second_gain=0.3), replicates=1000, level=0.9)["accuracy"]
        outside += (without := not found.low <= 0 <= found.high)
        if abs(found.p_value - 0.1) > 0.01:  # quantiles interpolate, counts do not
            assert without == (found.p_value < 0.1), found
    assert 5 < outside < 35


def test_no_p_value_is_zero_and_fewer_replicates_can_show_less():
    targets = np.tile([0, 1], 50)
    few, many = (
        paired_bootstrap(targets, 1 - targets, targets, range(100), replicates=count)["accuracy"].p_value
        for count in (99, 999)
    )
    assert 2 / 100 <= few < 2.5 / 100 and 2 / 1000 <= many < 3 / 1000  # a little more, for 100 patients


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_the_auc_of_a_single_class_has_no_difference_and_the_rest_has():
    found = paired_bootstrap(np.zeros(6, int), [1, 0, 0, 0, 0, 0], np.zeros(6, int), range(6), replicates=50)
    assert math.isnan(found["auc"].value) and math.isnan(found["auc"].p_value)
    assert found["accuracy"].value == pytest.approx(1 / 6)


def test_the_definition_of_the_auc_is_used():
    targets, first = np.tile([0, 1, 2, 3, 3], 8), np.tile([0, 1, 2, 4, 4], 8)  # uneven: else both are one
    differences = [paired_bootstrap(targets, first, targets, range(40), kind)["auc"] for kind in ("notebook", "plain")]
    expected = [1 - score(targets, first, kind).auc for kind in ("notebook", "plain")]
    assert [found.value for found in differences] == pytest.approx(expected, abs=1e-11)
    assert abs(expected[0] - expected[1]) > 0.01


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="3 patients for 4 images"):
        paired_bootstrap([0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], range(3))
    with pytest.raises(ValueError, match="one index per image"):
        paired_bootstrap([0, 1], [0, 1], [[0, 1, 1]], range(2))
    with pytest.raises(ValueError, match="1 groups for 2 images"):
        by_group([0, 1], [0, 1], ["Malawi"])


# --- coverage ---

STUDIES = 1000


@pytest.mark.slow
def test_95_percent_intervals_over_patients_hold_the_true_accuracy_in_93_to_97_of_100_studies_and_over_images_do_not():
    """66 patients, as in the African test set, of 1 to 4 images each; 1000 studies, binomial sd 0.7 points."""
    rng = np.random.default_rng(0)
    by_patient, by_image = [], []
    for study in range(STUDIES):
        targets, first, _, owner = clustered(rng, 66)
        low, high = bootstrap(targets, first, owner, replicates=400, seed=study)["accuracy"]
        by_patient.append(low <= 0.7 <= high)
        if study % 4 == 0:
            low, high = bootstrap(targets, first, range(len(owner)), replicates=400, seed=study)["accuracy"]
            by_image.append(low <= 0.7 <= high)
    assert 0.93 <= np.mean(by_patient) <= 0.97
    assert np.mean(by_image) < 0.92  # too narrow: in truth 88 of 100


@pytest.mark.slow
def test_95_percent_intervals_of_a_paired_difference_hold_the_truth_in_93_to_97_of_100_studies():
    """The second classifier turns a fifth of its errors right: from 0.7 to 0.76."""
    rng = np.random.default_rng(1)
    covered = 0
    for study in range(STUDIES):
        found = paired_bootstrap(*clustered(rng, 66, second_gain=0.2), replicates=400, seed=study)["accuracy"]
        covered += found.low <= 0.06 <= found.high
    assert 0.93 <= covered / STUDIES <= 0.97


@pytest.mark.slow
def test_a_p_value_below_5_percent_comes_up_in_about_5_of_100_studies_without_a_difference():
    rng = np.random.default_rng(2)
    below = 0
    for study in range(STUDIES):
        below += paired_bootstrap(*clustered(rng, 66), replicates=400, seed=study)["accuracy"].p_value < 0.05
    assert 0.03 <= below / STUDIES <= 0.07


# --- one classifier ---


def test_spread_is_the_sample_standard_deviation():
    assert spread([0.7, 0.8, 0.9]) == pytest.approx((0.8, 0.1))
    assert spread([0.7])[0] == 0.7 and math.isnan(spread([0.7])[1])
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_groups_are_counted_in_order_of_appearance():
    counts = by_group([0, 1, 2, 0], [0, 1, 0, 1], ["Malawi", "Egypt", "Malawi", "Malawi"])
    assert list(counts.items()) == [("Malawi", (1, 3)), ("Egypt", (1, 1))]
    assert {type(n) for pair in counts.values() for n in pair} == {int}

"""The metrics against the authors' published run, scikit-learn, and a bootstrap whose truth is
known."""

import time
from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import norm, t
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

from eval.metrics import Scores, bootstrap, confusion, score
from planes import PLANES

# the authors' committed run: a row for each plane that the African set has, our class order in the
# columns
PUBLISHED = np.array(
    [[37, 0, 2, 1, 25], [0, 64, 0, 0, 1], [0, 0, 53, 0, 11], [0, 1, 1, 29, 8], [0, 0, 0, 0, 0]]
)
NAMES = list(Scores.__dataclass_fields__)


def labels_of(matrix):
    """Targets and predictions, (N,) each, that have this confusion matrix."""
    targets, predictions = np.indices(matrix.shape).reshape(2, -1).repeat(matrix.ravel(), axis=1)
    return targets, predictions


def random_run(seed, n=300, planes=5):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, planes, n)
    predictions = np.where(rng.random(n) < 0.6, targets, rng.integers(0, 5, n))
    return targets, predictions, rng


def notebook_auc(targets, predictions):
    """The authors' rule, image by image: positive unless the prediction is another class of the
    targets."""
    classes, areas = set(targets), []
    for c in classes:
        called = [0 if p in classes - {c} else 1 for p in predictions]
        areas.append(roc_auc_score(targets == c, called))
    return areas


def test_the_published_run_gives_the_published_numbers():
    percent = {
        name: round(100 * value, 2) for name, value in asdict(score(*labels_of(PUBLISHED))).items()
    }
    assert percent == {
        "accuracy": 78.54,
        "recall": 78.14,
        "precision": 97.44,
        "f_score": 85.85,
        "auc": 88.76,
    }
    assert round(100 * score(*labels_of(PUBLISHED), "plain").auc, 2) == 88.71


def test_the_published_auc_is_the_mean_of_the_authors_rule_over_the_four_planes():
    areas = notebook_auc(*labels_of(PUBLISHED))
    assert np.round(areas, 5).tolist() == [0.91740, 0.86607, 0.89053, 0.87642]
    assert score(*labels_of(PUBLISHED)).auc == pytest.approx(np.mean(areas), abs=1e-12)


def test_a_class_without_targets_does_not_count_in_the_averages():
    recall = score(*labels_of(PUBLISHED)).recall
    assert round(100 * recall * 4 / 5, 2) == 62.51  # what five classes would make of it
    assert score(*labels_of(np.diag([5, 5, 5, 5, 0]))) == Scores(1, 1, 1, 1, 1)


def test_the_confusion_matrix_has_targets_in_rows():
    np.testing.assert_array_equal(confusion(*labels_of(PUBLISHED)), PUBLISHED)
    targets, predictions, _ = random_run(0)
    np.testing.assert_array_equal(
        confusion(targets, predictions), confusion_matrix(targets, predictions)
    )
    assert confusion(np.array([0, 6]), np.array([6, 6]), classes=7)[0, 6] == 1


@pytest.mark.parametrize("planes", [4, 5])
@pytest.mark.parametrize("seed", range(5))
def test_all_scores_agree_with_scikit_learn(seed, planes):
    targets, predictions, _ = random_run(seed, planes=planes)
    present = range(planes)
    p, r, f, _ = precision_recall_fscore_support(
        targets, predictions, labels=present, average="macro", zero_division=0
    )
    plain = np.mean([roc_auc_score(targets == c, predictions == c) for c in present])
    expected = Scores((targets == predictions).mean(), r, p, f, plain)
    assert asdict(score(targets, predictions, "plain")) == pytest.approx(
        asdict(expected), abs=1e-12
    )
    assert score(targets, predictions).auc == pytest.approx(
        np.mean(notebook_auc(targets, predictions)), abs=1e-12
    )


def test_with_every_class_among_the_targets_both_auc_definitions_are_one():
    targets, predictions, _ = random_run(1)
    assert score(targets, predictions, "notebook") == score(targets, predictions, "plain")


@pytest.mark.parametrize("planes", [4, 5])
def test_the_plain_auc_ranks_by_probabilities_where_there_are_some_and_ties_count_half(planes):
    targets, predictions, rng = random_run(2, planes=planes)
    probabilities = rng.integers(0, 8, (len(targets), 5)) + 3 * np.eye(5)[targets]  # many ties
    expected = np.mean([roc_auc_score(targets == c, probabilities[:, c]) for c in range(planes)])
    assert score(targets, predictions, "plain", probabilities).auc == pytest.approx(
        expected, abs=1e-12
    )
    assert score(targets, predictions, "notebook", probabilities) == score(
        targets, predictions, "notebook"
    )


def test_a_class_that_is_never_predicted_has_precision_zero():
    targets, predictions = labels_of(np.array([[10, 0], [10, 0]]))
    assert score(targets, predictions) == Scores(0.5, 0.5, 0.25, pytest.approx(1 / 3), 0.5)


def test_the_auc_of_a_single_class_is_undefined_and_the_rest_is_not():
    scores = score(np.zeros(4, int), np.array([0, 0, 0, 1]))
    assert np.isnan(scores.auc) and scores.accuracy == 0.75 and scores.recall == 0.75


def test_scores_are_plain_python_numbers():
    assert {type(value) for value in asdict(score(*labels_of(PUBLISHED))).values()} == {float}


@pytest.mark.parametrize(
    ("targets", "predictions", "complaint"),
    [
        ([0, 1], [0], "one index per image"),
        ([], [], "one index per image"),
        ([[0, 1]], [[0, 1]], "one index per image"),
        ([0, 5], [0, 0], r"0\.\.4"),
        ([0, 1], [0, -1], r"0\.\.4"),
    ],
)
def test_indices_that_cannot_be_are_refused(targets, predictions, complaint):
    for function in (confusion, score):
        with pytest.raises(ValueError, match=complaint):
            function(targets, predictions)
    with pytest.raises(ValueError, match="'roc' is not one of notebook, plain"):
        score([0, 1], [0, 1], "roc")


# --- bootstrap ---


def drawn_scores(targets, predictions, patients, definition, probabilities, replicates, seed):
    """The bootstrap the slow way: copy the drawn patients' images one after the other, then score
    them."""
    names = np.unique(patients)
    rng = np.random.default_rng(seed)
    scores = []
    for drawn in rng.multinomial(len(names), np.full(len(names), 1 / len(names)), replicates):
        rows = np.concatenate([np.flatnonzero(patients == name) for name in names.repeat(drawn)])
        of_rows = None if probabilities is None else probabilities[rows]
        scores.append(
            list(asdict(score(targets[rows], predictions[rows], definition, of_rows)).values())
        )
    return np.array(scores)


@pytest.mark.parametrize("definition", ["notebook", "plain", "probabilities"])
def test_a_replicate_is_the_score_of_the_drawn_patients_images(definition):
    targets, predictions, rng = random_run(3, n=60, planes=4)
    # the last plane has one patient: many replicates are without it
    targets[:58][targets[:58] == 3] = 0
    targets[58:] = 3
    patients = np.arange(60) // 3
    probabilities = rng.random((60, 5)) if definition == "probabilities" else None
    definition = "plain" if definition == "probabilities" else definition
    arguments = targets, predictions, patients, definition, probabilities
    slow = drawn_scores(*arguments, replicates=200, seed=5)
    tail = norm.cdf(t.ppf(0.05, 19) * np.sqrt(20 / 19))  # of 20 patients
    expected = np.quantile(slow, [tail, 1 - tail], axis=0).T
    intervals = bootstrap(*arguments, replicates=200, level=0.9, seed=5)
    assert list(intervals) == NAMES
    np.testing.assert_allclose(list(intervals.values()), expected, atol=1e-12)


def test_replicates_with_a_single_class_do_not_count_for_the_auc():
    targets, predictions = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    slow = drawn_scores(targets, predictions, targets, "notebook", None, replicates=50, seed=0)
    assert 0 < np.isnan(slow[:, -1]).sum() < 50
    tail = norm.cdf(t.ppf(0.025, 1) * np.sqrt(2))  # of 2 patients
    expected = np.nanquantile(slow, [tail, 1 - tail], axis=0).T
    intervals = bootstrap(targets, predictions, targets, replicates=50)
    np.testing.assert_allclose(list(intervals.values()), expected, atol=1e-12)


def test_the_intervals_hold_the_score_and_depend_on_the_seed_alone():
    targets, predictions = labels_of(PUBLISHED)
    patients = [f"patient {n % 66}" for n in range(len(targets))]
    scores, intervals = (
        asdict(score(targets, predictions)),
        bootstrap(targets, predictions, patients),
    )
    assert all(0 <= low < scores[name] < high <= 1 for name, (low, high) in intervals.items())
    assert bootstrap(targets, predictions, patients) == intervals
    assert bootstrap(targets, predictions, patients, seed=1) != intervals
    narrow = bootstrap(targets, predictions, patients, level=0.5)
    assert all(
        intervals[name][0] < narrow[name][0] < narrow[name][1] < intervals[name][1]
        for name in NAMES
    )


def test_images_that_stand_and_fall_together_make_the_interval_wider():
    """40 patients whose 9 images are all right or all wrong are worth 40 images: the interval is 3
    times as wide."""
    rng = np.random.default_rng(0)
    patients = np.arange(360) // 9
    targets = rng.integers(0, 4, 360)
    right = (rng.random(40) < 0.7)[patients]
    predictions = np.where(right, targets, 4)
    clustered = np.ptp(bootstrap(targets, predictions, patients)["accuracy"])
    independent = np.ptp(bootstrap(targets, predictions, np.arange(360))["accuracy"])
    assert clustered / independent == pytest.approx(3, rel=0.15)


def test_95_percent_intervals_hold_the_truth_about_95_times_in_100():
    """Patients differ in how often they are read right, 0.7 on average; 200 studies, binomial sd
    1.5 points."""
    rng = np.random.default_rng(1)
    patients = np.arange(240) // 4
    covered = 0
    for study in range(200):
        targets = rng.integers(0, 4, 240)
        right = rng.random(240) < rng.beta(2.1, 0.9, 60)[patients]
        predictions = np.where(right, targets, (targets + 1) % 4)
        low, high = bootstrap(targets, predictions, patients, replicates=200, seed=study)[
            "accuracy"
        ]
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_a_thousand_replicates_of_the_african_test_set_take_about_a_second():
    targets, predictions = labels_of(PUBLISHED)
    probabilities = np.random.default_rng(0).random((len(targets), len(PLANES)))
    start = time.process_time()
    bootstrap(targets, predictions, np.arange(len(targets)) // 4, "plain", probabilities)
    assert time.process_time() - start < 2

"""The metrics against the authors' published run, scikit-learn, and a bootstrap whose truth is
known."""

from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import norm, t
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

from eval.metrics import (
    Scores,
    draw_patients,
    evaluate,
    expanded_interval,
    weighted_scores,
)

# the authors' committed run: a row for each plane that the African set has, our class order in the
# columns
PUBLISHED = np.array(
    [[37, 0, 2, 1, 25], [0, 64, 0, 0, 1], [0, 0, 53, 0, 11], [0, 1, 1, 29, 8], [0, 0, 0, 0, 0]]
)


def labels_of(matrix):
    """Targets and predictions, (N,) each, that have this confusion matrix."""
    return np.indices(matrix.shape).reshape(2, -1).repeat(matrix.ravel(), axis=1)


def score(targets, predictions, probabilities=None):
    weights = np.ones((1, len(targets)))
    return Scores(*weighted_scores(weights, targets, predictions, probabilities)[0].tolist())


def random_run(seed, n=300, planes=5):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, planes, n)
    return targets, np.where(rng.random(n) < 0.6, targets, rng.integers(0, 5, n)), rng


def notebook_auc(targets, predictions):
    """The authors' rule, image by image: positive unless the prediction is another class of the
    targets."""
    classes, areas = set(targets), []
    for c in classes:
        called = [0 if p in classes - {c} else 1 for p in predictions]
        areas.append(roc_auc_score(targets == c, called))
    return areas


def test_the_published_run_gives_the_published_numbers():
    scores = asdict(score(*labels_of(PUBLISHED)))
    assert {name: round(100 * value, 2) for name, value in scores.items()} == {
        "accuracy": 78.54,
        "recall": 78.14,
        "precision": 97.44,
        "f_score": 85.85,
        "auc": 88.76,
    }
    assert {type(value) for value in scores.values()} == {float}
    areas = notebook_auc(*labels_of(PUBLISHED))
    assert np.round(areas, 5).tolist() == [0.91740, 0.86607, 0.89053, 0.87642]


@pytest.mark.parametrize("planes", [4, 5])
@pytest.mark.parametrize("seed", range(3))
def test_all_scores_agree_with_scikit_learn(seed, planes):
    targets, predictions, rng = random_run(seed, planes=planes)
    present = range(planes)
    p, r, f, _ = precision_recall_fscore_support(
        targets, predictions, labels=present, average="macro", zero_division=0
    )
    notebook = np.mean(notebook_auc(targets, predictions))
    expected = asdict(Scores((targets == predictions).mean(), r, p, f, notebook))
    assert asdict(score(targets, predictions)) == pytest.approx(expected, abs=1e-12)

    # by probabilities, where the AUC is plain; ties count half
    probabilities = rng.integers(0, 8, (len(targets), 5)) + 3 * np.eye(5)[targets]
    ranked = np.mean([roc_auc_score(targets == c, probabilities[:, c]) for c in present])
    found = asdict(score(targets, predictions, probabilities))
    assert found == pytest.approx(expected | {"auc": ranked}, abs=1e-12)


@pytest.mark.parametrize(
    "matrix, expected",
    [
        # a class without targets, and one that is never predicted
        (np.diag([5, 5, 5, 5, 0]), Scores(1, 1, 1, 1, 1)),
        ([[10, 0], [10, 0]], Scores(0.5, 0.5, 0.25, pytest.approx(1 / 3), 0.5)),
        # a class of one image
        ([[0, 1], [0, 4]], Scores(0.8, 0.5, 0.4, 4 / 9, 0.5)),
        # of one class there is no AUC
        ([[3, 1], [0, 0]], Scores(0.75, 0.75, 1, 6 / 7, pytest.approx(np.nan, nan_ok=True))),
    ],
)
def test_edges_have_these_scores(matrix, expected):
    assert score(*labels_of(np.array(matrix))) == expected


# --- bootstrap ---


def drawn_scores(targets, predictions, patients, probabilities, replicates, seed):
    """The bootstrap the slow way: copy the drawn patients' images one after the other, then score
    them."""
    names = np.unique(patients)
    rng = np.random.default_rng(seed)
    scores = []
    for drawn in rng.multinomial(len(names), np.full(len(names), 1 / len(names)), replicates):
        rows = np.concatenate([np.flatnonzero(patients == name) for name in names.repeat(drawn)])
        of_rows = None if probabilities is None else probabilities[rows]
        found = score(targets[rows], predictions[rows], of_rows)
        scores.append(list(asdict(found).values()))
    return np.array(scores)


@pytest.mark.parametrize("case", ["notebook", "probabilities", "one class"])
def test_a_replicate_is_the_score_of_the_drawn_patients_images(case):
    targets, predictions, rng = random_run(3, n=60, planes=4)
    # the last plane has one patient: many replicates are without it
    targets[:58][targets[:58] == 3] = 0
    targets[58:] = 3
    patients, count, probabilities = np.arange(60) // 3, 20, None
    if case == "probabilities":
        probabilities = rng.random((60, 5))
    if case == "one class":  # in some replicates, which do not count for the AUC
        targets, predictions = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
        patients, count = targets, 2
    arguments = targets, predictions, patients, probabilities
    slow = drawn_scores(*arguments, replicates=100, seed=5)
    assert np.isnan(slow[:, -1]).any() == (case == "one class")
    weights, clusters = draw_patients(patients, 100, seed=5)
    found = weighted_scores(weights, targets, predictions, probabilities)
    np.testing.assert_allclose(found[1:], slow, atol=1e-12)
    assert clusters == count
    tail = norm.cdf(t.ppf(0.025, count - 1) * np.sqrt(count / (count - 1)))
    expected = np.nanquantile(slow, [tail, 1 - tail], axis=0)
    np.testing.assert_allclose(expanded_interval(found[1:], clusters), expected, atol=1e-12)


def test_what_is_written_of_a_test_has_both_definitions_with_intervals_that_hold_the_scores():
    targets, predictions = labels_of(PUBLISHED)
    probabilities = 0.5 * np.eye(5)[predictions] + 0.1
    patients = [f"patient {n % 66}" for n in range(len(targets))]
    result = evaluate(targets, probabilities, patients, "abcde")
    assert result["confusion"] == PUBLISHED.tolist()
    expected = precision_recall_fscore_support(targets, predictions, labels=range(4))
    found = {"precision": [], "recall": [], "f_score": [], "support": []}
    for name, row in result["by_class"].items():
        assert name != "e" and [*row] == ["recall", "precision", "f_score", "support"]
        for key, value in row.items():
            found[key].append(value)
    np.testing.assert_allclose([*found.values()], expected)
    assert [*evaluate(targets, probabilities, patients, "abcde", False)["scores"]] == ["ranked"]
    for definition, ranked in (("notebook", None), ("ranked", probabilities)):
        scores, intervals = result["scores"][definition], result["intervals"][definition]
        assert scores == asdict(score(targets, predictions, ranked))
        assert all(0 <= low < scores[name] < high <= 1 for name, (low, high) in intervals.items())

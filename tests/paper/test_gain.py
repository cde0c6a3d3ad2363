"""Where the gain comes from: which rows a step is measured on, what adds up, and what the report's
first lines say."""

import numpy as np
import pytest

from paper.gain import ADDED, PLAIN, STEPS, STYLED, TOGETHER, VARIED, answer, measure
from paper.plan import CLASSIFIERS, DATA, ROWS
from paper.published import PUBLISHED
from paper.results import Result

N = 120  # 30 patients of 4 images
TARGETS, PATIENTS = np.arange(N) % 4, np.arange(N) // 4
RIGHT = {"ES": 0.4, "ES+DA": 0.5, "BAL+DA": 0.55, "HB+DA": 0.7, "HB-styles+DA": 0.8}


def runs(data, classifier="resnet18", right=None, seeds=(0, 1, 2)):
    """Finished runs in which this share of the images is read right, other ones with each seed and
    classifier."""
    right = RIGHT[data] if right is None else right
    found = []
    for seed in seeds:
        rng = np.random.default_rng([seed, *map(ord, data + classifier)])
        predictions = np.where(rng.permutation(N) < round(right * N), TARGETS, 4)
        names, none = np.array([str(n) for n in PATIENTS]), np.zeros(N, bool)
        row = "1", data, classifier, seed, {"sources": {"spain": 10}}
        numbers = TARGETS, predictions, np.eye(5)[predictions]
        found.append(Result(*row, *numbers, names, names, names, none))
    return found


def cells_of(*rows):
    return {(row[0].data, row[0].classifier): row for row in rows}


def said(*rows, classifiers=CLASSIFIERS, compared=False):
    return answer(cells_of(*rows), ("site A", "site B"), classifiers, compared)


def test_the_steps_hold_every_control_and_style():
    pairs = [(step.baseline, step.data) for step in STEPS]
    controls = "HB+DA", "BAL+DA", "ES+DA+balanced", "ES+DA+contrast", "BAL+DA+contrast"
    assert {("ES", "HB"), *(("ES+DA", data) for data in controls)} <= {*pairs}
    used, rows = ({*names} for names in (sum(pairs, ()), (row.data.name for row in ROWS)))
    assert rows - used == {"AF", "ES+AF"} and used <= {*DATA}
    assert len(used - rows) == 3  # of a hundred real images


def test_a_step_is_over_the_classifiers_that_both_have_and_its_parts_add_up():
    rows = [runs(data, c) for data in ("ES+DA", "HB+DA") for c in ("resnet18", "vit_b_16")]
    rows += [runs("BAL+DA"), runs("HB-styles+DA", "densenet169")]
    gains = measure(STEPS, cells_of(*rows))
    assert [(g.step.data, g.step.baseline, g.classifiers) for g in gains] == [
        ("HB+DA", "ES+DA", ("resnet18", "vit_b_16")),
        ("BAL+DA", "ES+DA", ("resnet18",)),
        ("HB+DA", "BAL+DA", ("resnet18",)),
    ]
    assert [gain.accuracy.value for gain in gains] == pytest.approx([0.2, 0.05, 0.15])
    both = [
        PUBLISHED["HB+DA", c].accuracy - PUBLISHED["ES+DA", c].accuracy
        for c in ("resnet18", "vit_b_16")
    ]
    assert gains[0].published == pytest.approx(np.mean(both)) and np.isnan(gains[1].published)
    assert measure(STEPS, cells_of(*rows), ["densenet169"]) == []


def test_the_best_without_synthesis_and_what_synthesis_adds_make_up_the_whole():
    rows = [runs("ES+DA"), runs("BAL+DA+contrast", right=0.7), runs("HB+DA+contrast", right=0.6)]
    best, added = (gain.accuracy.value for gain in measure(STEPS, cells_of(*rows)))
    assert (best, added) == pytest.approx((0.2, -0.1)) and RIGHT["ES+DA"] + best + added == 0.6


def test_a_classifier_left_out_counts_in_no_average():
    rows = [runs("ES+DA"), runs("HB+DA"), runs("ES+DA", "vit_b_16", 0.9)]
    found = said(*rows, runs("HB+DA", "vit_b_16", 0.1), classifiers=["resnet18"])[1]
    words = f"{TOGETHER}: helped, from 50.0 % with all real images to 70.0 % right (+20.0; "
    assert found.startswith(words)


def test_one_seed_cannot_tell_however_large_the_difference():
    single = runs("HB+DA", right=0.99, seeds=[0])
    (gain,) = measure(STEPS, cells_of(runs("ES+DA"), single))
    assert gain.verdict == "one seed cannot tell" and gain.seeds == 1
    _, found, sure, _ = said(runs("BAL+DA"), single)
    words = f"{PLAIN}: from 55.0 % to 99.2 % right (+44"
    assert found.startswith(words) and gain.accuracy.low > 0.3
    assert "over images alone. Networks, LoRA and synthetic images are" in sure
    assert sure.startswith("One seed cannot tell: another may turn any of these differences. In")


@pytest.mark.parametrize(
    "right, words", [(0.7, "helped"), (0.3, "did harm"), (0.525, "inconclusive")]
)
def test_the_first_lines_say_what_was_compared_what_was_found_and_how_sure_it_is(right, words):
    rights = {"ES+DA": 0.5, "HB+DA": right, "BAL+DA": 0.5}
    rows = [runs(data, c, share) for data, share in rights.items() for c in CLASSIFIERS]
    what, found, sure, best = said(*rows, compared=True)
    assert "trained on images of site A" in what and "120 images of site B, whose labels" in what
    number = f"to {100 * right:.1f} % right ({100 * right - 50:+.1f}; "
    assert f"{PLAIN}: {words}, from 50.0 % {number}" in found
    assert f"{TOGETHER}: {words}, from 50.0 % with all real images {number}" in found
    assert found.count("published") == 1 and "; published +11.84)" in found
    ends = f"seeds is 50.0 % without synthetic images, {100 * right:.1f} % with them."
    assert found.endswith(ends) and "3 seeds, averaged over 5 networks." in sure
    assert best.startswith("Best at site B: ") and f"right on {100 * max(right, 0.5):.1f} %" in best
    assert "published" not in said(*rows)[1]


def test_every_question_whose_rows_were_run_is_answered_in_turn():
    contrast = {"BAL+DA+contrast": 0.8, "HB+DA+contrast": 0.8, "HB-styles+DA+contrast": 0.5}
    rows = [runs(data) for data in RIGHT] + [runs(d, right=r) for d, r in contrast.items()]
    found = said(*rows)[1]
    subjects = [
        PLAIN,
        STYLED,
        VARIED,
        *(f"{ADDED}, {s.lower()}" for s in (PLAIN, STYLED)),
    ]
    assert TOGETHER not in found and sorted(subjects, key=found.index) == subjects
    assert "no generative model: helped, from 55.0 % to 80.0 % right (" in found
    assert said(runs("ES", "vit_b_16"), classifiers=[])[0].startswith("ViT b16: trained on images")


def test_without_any_pair_the_first_lines_say_so():
    words = "Whether synthetic images help is not told by these models."
    assert said(runs("ES+DA"))[1] == words and len(said(runs("ES+DA"))) == 3
    what, found, *_ = said(runs("BAL+DA"), runs("BAL+DA+contrast", right=0.8))
    assert "synthetic" not in what and "from 55.0 % to 80.0 % right (" in found

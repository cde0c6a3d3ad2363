"""Where the gain comes from: which rows a step is measured on, what adds up, and what the report's
first lines say."""

import numpy as np
import pytest

from paper.gain import CLAIMS, STEPS, answer, measure
from paper.plan import CLASSIFIERS, ROWS
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
    return answer(cells_of(*rows), None, classifiers, compared)


def test_the_steps_hold_the_papers_claims_and_every_control_and_style():
    pairs = [(step.baseline, step.data) for step in STEPS]
    controls = "BAL+DA", "ES+DA+balanced", "ES+DA+contrast"
    assert {*CLAIMS, *(("ES+DA", data) for data in controls)} <= {*pairs}
    assert {name for pair in pairs for name in pair} <= {row.data.name for row in ROWS}


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


def test_a_classifier_left_out_counts_in_no_average():
    rows = [runs("ES+DA"), runs("HB+DA"), runs("ES+DA", "vit_b_16", 0.9)]
    _, helped, _ = said(*rows, runs("HB+DA", "vit_b_16", 0.1), classifiers=["resnet18"])
    assert helped.startswith("Hybrid sets helped: +20.0 points of accuracy HB+DA against ES+DA (")
    assert helped.endswith("; classifiers: 1; seeds: 3).")


def test_one_seed_cannot_tell_however_large_the_difference():
    single = runs("HB+DA", right=0.99, seeds=[0])
    (gain,) = measure(STEPS, cells_of(runs("ES+DA"), single))
    assert gain.verdict == "one seed cannot tell" and gain.seeds == 1
    best, helped, _ = said(runs("ES+DA"), single)
    words = "Hybrid sets may or may not help, as one seed cannot tell; these networks alone: +49"
    assert helped.startswith(words) and gain.accuracy.low > 0.3 and "seeds: 1)" in helped
    assert "over images, of this network alone; somewhat flattered" in best


@pytest.mark.parametrize(
    "right, words",
    [(0.7, "helped"), (0.3, "did harm"), (0.525, "are not shown to help")],
)
def test_the_first_lines_say_what_was_found_and_how_sure_it_is(right, words):
    rights = {"ES+DA": 0.5, "HB+DA": right}
    rows = [runs(data, c, share) for data, share in rights.items() for c in CLASSIFIERS]
    best, helped, without = said(*rows, compared=True)
    assert best.startswith("Best at the second site, of whose labels it saw none: DenseNet169 ")
    assert f"It is right on {100 * max(right, 0.5):.1f} % of 120 images" in best
    found = f"Hybrid sets {words}: {100 * right - 50:+.1f} points of accuracy HB+DA against ES+DA"
    assert helped.startswith(found) and "; classifiers: 5; published +11.84; seeds: 3)" in helped
    ahead = "; ".join(f"{CLASSIFIERS[c]} trained on ES+DA, 50.0 %" for c in [*CLASSIFIERS][:3])
    assert without.endswith(f"better: {ahead if right < 0.5 else 'none'}.")
    assert "published" not in said(*rows)[1]


def test_without_augmentation_or_without_any_pair_the_first_lines_say_so():
    assert "points of accuracy HB against ES (" in said(runs("ES"), runs("HB", right=0.7))[1]
    assert said(runs("ES+DA"))[1:] == ["Whether synthetic images help is not told by these models."]

"""Where the gain comes from: the hybrid set against real images alone, split into its parts, beside
plain controls.

The paper compares HB+DA, 1150 balanced real images and 5000 synthetic ones, with ES+DA, 6148 real
images that are not balanced. Two things change at once; BAL+DA, the 1150 alone, stands between
them. And synthetic images are one way of augmenting: ES+DA+balanced and ES+DA+contrast are cheaper
ones.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.compare import Difference
from paper.plan import CLASSIFIERS
from paper.published import published_difference
from paper.results import Result, compare

Row = tuple[str, str]
"""A data model and a classifier, such as ("HB+DA", "resnet18")."""

Cells = Mapping[Row, Sequence[Result]]
"""The finished runs of each row, one for each seed."""


@dataclass(frozen=True)
class Step:
    """What is changed from one data model to the other.

    kind: whether synthetic or real images do it, a key of eval.figures.MARKS
    also: a third data model; only classifiers that it has too count
    """

    what: str
    baseline: str
    data: str
    kind: str = "synthetic"
    also: str = ""


STEPS: tuple[Step, ...] = (
    Step("balanced real images and synthetic ones", "ES+DA", "HB+DA"),
    # for the parts to add up
    Step("the same over its parts' classifiers", "ES+DA", "HB+DA", also="BAL+DA"),
    Step("of it: balanced real images alone", "ES+DA", "BAL+DA", "real"),
    Step("of it: synthetic images", "BAL+DA", "HB+DA"),
    Step("prompts that name the style", "HB+DA", "HB-styles+DA"),
    Step("instead: all classes drawn equally often", "ES+DA", "ES+DA+balanced", "real"),
    Step("instead: brightness and contrast varied", "ES+DA", "ES+DA+contrast", "real"),
    Step("all, with prompts that name the style", "ES+DA", "HB-styles+DA"),
    Step("the same against brightness and contrast", "ES+DA+contrast", "HB-styles+DA", "both"),
    Step("not augmented: balanced real images and synthetic ones", "ES", "HB"),
    Step("of it: balanced real images alone", "ES", "BAL", "real"),
    Step("of it: synthetic images", "BAL", "HB"),
    Step("not augmented: prompts that name the style", "HB", "HB-styles"),
    Step("not augmented: all real images and synthetic ones", "ES", "HB-all"),
)
AUGMENTED = tuple(step for step in STEPS if step.baseline.endswith("+DA"))
CLAIMS = (("ES+DA", "HB+DA"), ("ES", "HB"), ("ES", "HB-all"))
"""(baseline, data model that the paper says is better)."""
SYNTHETIC = ("HB+DA", "HB-styles+DA")
CONTROLS = ("BAL+DA", "ES+DA+balanced", "ES+DA+contrast")  # without synthetic images
VERDICTS = {
    "one seed cannot tell": "One seed cannot tell whether {} is better than {}",
    "better": "{} is better than {}",
    "worse": "{} is worse than {}",
    "not shown": "{} is not shown to differ from {}",
}
"""Of a difference in accuracy, in a word and in a sentence."""


@dataclass(frozen=True)
class Gain:
    """A step as it was found: the differences by metric, over which classifiers and how many seeds
    of each.

    seeds: how many a classifier has with either data model, such as "3" or "1 to 3"
    published: the paper's mean difference over the same classifiers, nan if it has not all of them
    """

    step: Step
    differences: Mapping[str, Difference]
    classifiers: tuple[str, ...]
    seeds: str
    published: float

    @property
    def accuracy(self) -> Difference:
        return self.differences["accuracy"]

    @property
    def verdict(self) -> str:
        found = self.accuracy
        if found.over == "patients":
            return "one seed cannot tell"
        return "better" if found.low > 0 else "worse" if found.high < 0 else "not shown"


def measure(
    steps: Iterable[Step], cells: Cells, classifiers: Collection[str] = CLASSIFIERS
) -> list[Gain]:
    """The steps that can be taken, each once: over those of the classifiers that both data models
    have."""
    found: dict[tuple, Gain] = {}
    for step in steps:
        pair = step.baseline, step.data
        needed = {*pair, step.also or step.data}
        both = tuple(c for c in classifiers if all((data, c) in cells for data in needed))
        if both and (pair, both) not in found:
            sides = [[cells[data, c] for c in both] for data in pair]
            counts = sorted({len(runs) for side in sides for runs in side})
            seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
            published = published_difference(*pair, both)
            found[pair, both] = Gain(step, compare(*sides), both, seeds, published)
    return list(found.values())


def headline(cells: Cells, classifiers: Collection[str], sites: str, compared: bool) -> str:
    """What was found and how sure it is, in a few sentences, for the report's first lines.

    classifiers: those that are averaged
    sites: where the real images come from
    compared: name the published difference too
    """
    gains = measure([Step("", "ES+DA", data) for data in SYNTHETIC], cells, classifiers)
    gains = gains or measure([Step("", *pair) for pair in CLAIMS], cells, classifiers)[:1]
    said = [_sentence(gain, compared) for gain in gains] + _controls(cells, classifiers)
    if not gains:
        said = ["no data model was run both with synthetic images and without: nothing is claimed."]
    return f"On {sites}: {' '.join(said)}"


def points_between(found: Difference) -> str:
    """The ends of an interval, in points."""
    return f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"


def _sentence(gain: Gain, compared: bool) -> str:
    found, step = gain.accuracy, gain.step
    pair = f"{step.data}, with synthetic images,", f"{step.baseline}, without"
    of = "for these trained networks" if found.over == "patients" else "95 % interval"
    numbers = f"{of} {points_between(found)}"
    numbers += f"; classifiers: {len(gain.classifiers)}; seeds: {gain.seeds}"
    if compared and not np.isnan(gain.published):
        numbers += f"; published {100 * gain.published:+.2f}"
    said = VERDICTS[gain.verdict].format(*pair)
    return f"{said}: {100 * found.value:+.1f} points of accuracy ({numbers})."


def _controls(cells: Cells, classifiers: Collection[str]) -> list[str]:
    """Names the controls that are ahead of synthetic images: first those that are so beyond
    chance."""
    pairs = [Step("", synthetic, control) for synthetic in SYNTHETIC for control in CONTROLS]
    ahead: dict[bool, list[str]] = {True: [], False: []}
    for gain in measure(pairs, cells, classifiers):
        step, found = gain.step, gain.accuracy
        if found.value > 0:
            points = f"{100 * found.value:+.1f} ({points_between(found)})"
            surely = gain.verdict == "better"
            ahead[surely].append(f"{step.data} against {step.baseline} {points}")
    words = "do better than synthetic ones", "are ahead of synthetic ones, which may be chance"
    return [
        f"Controls without synthetic images {way}: {', '.join(found)}."
        for way, found in zip(words, ahead.values())
        if found
    ]

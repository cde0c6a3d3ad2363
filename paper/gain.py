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
from paper.plan import CLASSIFIERS, DATA, MADE, Own, classifier_name, data_name
from paper.published import published_difference
from paper.results import Result, compare, estimate

Row = tuple[str, str]
"""A data model and a classifier, such as ("HB+DA", "resnet18")."""

Cells = Mapping[Row, Sequence[Result]]
"""The finished runs of each row, one for each seed."""

Recognised = Mapping[tuple[str, str], Mapping[str, float]]
"""(the data model of a judge, which synthetic images it judges) -> sampler -> fraction of them that
are taken for the class of their prompt."""


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

    def against(self, own: Own) -> str:
        """The other data model, of own sites, where `what` says enough of this one; else both."""
        baseline = data_name(self.baseline, own)
        return baseline if own else f"{self.data} less {baseline}"


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
HELPED = {
    "one seed cannot tell": "One seed cannot tell whether synthetic images{} help; for these"
    " trained networks alone",
    "better": "Synthetic images{} helped",
    "worse": "Synthetic images{} did harm",
    "not shown": "Synthetic images{} are not shown to help",
}
WITH_LORA, JUDGE = "with LoRA", "resnet18"
CONTROLS = ("BAL+DA", "ES+DA+balanced", "ES+DA+contrast")  # without synthetic images
ISOLATED = ("BAL+DA", "HB+DA"), ("BAL+DA", "HB-styles+DA"), ("BAL", "HB"), ("ES", "HB-all")
"""(baseline, data model) that differ in nothing but synthetic images."""
ONE_CLASS = 0.9  # share of the predictions, from which on a network has learned little
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


def zero_shot(cells: Cells) -> dict[Row, float]:
    """Mean accuracy of the rows that no image of the second site was trained on, best first."""
    scores = {
        row: float(np.mean([run.targets == run.predictions for run in runs]))
        for row, runs in cells.items()
        if not DATA[row[0]].target
    }
    return dict(sorted(scores.items(), key=lambda score: -score[1]))


def at_home(runs: Sequence[Result]) -> float:
    """Mean accuracy of a row's runs on held-out images of the source; nan without any."""
    return float(np.mean([run.held_out for run in runs])) if runs else np.nan


def answer(cells: Cells, own: tuple[str, str], classifiers: Collection[str]) -> list[str]:
    """Three paragraphs: the best model for the target, and where it is; whether synthetic images
    helped; what did as well without them."""
    scores, (source, target) = zero_shot(cells), own
    best = next(iter(scores))
    runs, found = cells[best], estimate(cells[best], plain=True)["accuracy"]
    over = ", of this network alone" if found.seeds == 1 else " and seeds"
    first = (
        f"Best at {target}, of whose labels it saw none: {_called(best, own)}. It is right on"
        f" {100 * found.mean:.1f} % of {len(runs[0].targets)} images (95 % interval"
        f" {100 * found.low:.1f} to {100 * found.high:.1f}, over {runs[0].units}{over}; somewhat"
        " flattered, as these images chose it), and lies in"
        f" {runs[0].folder / 'model.safetensors'}."
    )
    top = max(scores, key=lambda row: np.nan_to_num(at_home(cells[row])))
    if (home := at_home(cells[top])) > 0:
        name = _called(top, own)
        first += f" At {source}, on images held out, {name} is best: {100 * home:.1f} %."
    second = [
        f"{HELPED[gain.verdict].format(MADE[DATA[gain.step.data].synthetic])}:"
        f" {100 * gain.accuracy.value:+.1f} points of accuracy (95 % interval"
        f" {points_between(gain.accuracy)}) against {data_name(gain.step.baseline, own)}."
        for gain in measure([Step("", *pair) for pair in ISOLATED], cells, classifiers)[:2]
    ]
    second = second or ["Whether synthetic images help is not told by these models."]
    bar = max((scores[row] for row in scores if DATA[row[0]].synthetic), default=2)
    ahead = [row for row in scores if scores[row] >= bar and not DATA[row[0]].synthetic][:3]
    named = "; ".join(f"{_called(row, own)}, {100 * scores[row]:.1f} %" for row in ahead)
    third = f"As good without them as the best with them ({100 * bar:.1f} %), or better: "
    return [first, " ".join(second), *[f"{third}{named or 'none'}."] * (bar <= 1)]


def doubts(cells: Cells, own: tuple[str, str], recognised: Recognised) -> list[str]:
    """What makes an answer worth little: networks that say one class for nearly all images, and
    synthetic images that do not show their classes."""

    def most(numbers: np.ndarray) -> float:
        return np.bincount(numbers).max() / len(numbers)

    one_class = [
        _called(row, own)
        for row, runs in cells.items()
        if any(most(run.predictions) >= ONE_CLASS > most(run.targets) for run in runs)
    ]
    said = [f"One class is said of nearly all images by {'; '.join(one_class)}."] * bool(one_class)
    shown = [
        (np.mean([*shares.values()]), data)
        for (data, images), shares in recognised.items()
        if images == WITH_LORA
    ]
    share, judge = max(shown, default=(1, ""))
    home = at_home(cells.get((judge, JUDGE), []))
    chance = 1 / len(next(iter(cells.values()))[0].classes)
    if share < max(1.25 * chance, np.nan_to_num(home) / 2):
        real = f", and {100 * home:.0f} % of held-out real ones" * (home >= 0)
        said.append(
            "The synthetic images do not show their classes: a network of real images takes"
            f" {100 * share:.0f} % of them for what they shall be{real}; chance is"
            f" {100 * chance:.0f} %. Train the LoRA for longer, or with a better model, before what"
            " is said of them counts."
        )
    return said


def _called(row: Row, own: Own) -> str:
    return f"{classifier_name(row[1])} trained on {data_name(row[0], own)}"


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

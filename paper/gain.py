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
from paper.document import plural
from paper.plan import CLASSIFIERS, DATA, Own, classifier_name, data_name
from paper.published import published_difference
from paper.results import Result, compare, estimate

Row = tuple[str, str]
"""A data model and a classifier, such as ("HB+DA", "resnet18")."""

Cells = Mapping[Row, Sequence[Result]]
"""The finished runs of each row, one for each seed."""

Named = Mapping[tuple[str, str], Sequence[Result]]
"""The same, by what a report calls them."""

Recognised = Mapping[tuple[str, str], Mapping[str, float]]
"""(the data model of a judge, which synthetic images it judges and how many) -> sampler -> fraction
of them that are taken for the class of their prompt."""


PLAIN = "Synthetic images with plain prompts"
STYLED = "Synthetic images whose prompts name brightness and contrast"
VARIED = "Real images whose brightness and contrast are varied at random, with no generative model"
ADDED = "Added to real images of varied contrast"
TOGETHER = "Balanced real images and synthetic ones together"


@dataclass(frozen=True)
class Step:
    """What is changed from one data model to the other.

    kind: whether synthetic or real images do it, a key of eval.figures.MARKS
    said: what the first screen calls it, of the first such step that was taken
    """

    what: str
    baseline: str
    data: str
    kind: str = "synthetic"
    said: str = ""

    def against(self, own: Own) -> str:
        """The other data model, of own sites, where `what` says enough of this one; else both."""
        return f"{'' if own else self.data} against {data_name(self.baseline, own)}".lstrip()


def _more(baseline: str, plain: str, styled: str) -> tuple[Step, Step]:
    """What synthetic images add to varied contrast."""
    top = "on top of varied contrast: synthetic images"
    return (
        Step(top, baseline, plain, said=f"{ADDED}, {PLAIN.lower()}"),
        Step(
            f"{top}, style in the prompts",
            baseline,
            styled,
            said=f"{ADDED}, {STYLED.lower()}",
        ),
    )


STEPS: tuple[Step, ...] = (
    Step("balanced real images and synthetic ones", "ES+DA", "HB+DA", said=TOGETHER),
    Step("of it: balanced real images alone", "ES+DA", "BAL+DA", "real"),
    Step("of it: synthetic images", "BAL+DA", "HB+DA", said=PLAIN),
    Step("the same, style in the prompts", "ES+DA", "HB-styles+DA"),
    Step("of it: synthetic images", "BAL+DA", "HB-styles+DA", said=STYLED),
    Step("the best augmentation without synthesis", "ES+DA", "BAL+DA+contrast", "real"),
    Step("of it: brightness and contrast varied", "BAL+DA", "BAL+DA+contrast", "real", VARIED),
    *_more("BAL+DA+contrast", "HB+DA+contrast", "HB-styles+DA+contrast"),
    Step("instead: all classes drawn equally often", "ES+DA", "ES+DA+balanced", "real"),
    Step("instead: brightness and contrast varied", "ES+DA", "ES+DA+contrast", "real", VARIED),
    Step("not augmented: balanced real images and synthetic ones", "ES", "HB", said=TOGETHER),
    Step("of it: balanced real images alone", "ES", "BAL", "real"),
    Step("of it: synthetic images", "BAL", "HB", said=PLAIN),
    Step("of it: synthetic images, style in the prompts", "BAL", "HB-styles", said=STYLED),
    Step("not augmented: all real images and synthetic ones", "ES", "HB-all", said=PLAIN),
    Step("not augmented: brightness and contrast varied", "ES", "ES+contrast", "real", VARIED),
    *_more("ES+contrast", "HB+contrast", "HB-styles+contrast"),
)
AUGMENTED = tuple(step for step in STEPS if "+DA" in step.baseline)
SITES = "the first site", "the second site"  # where a user has not named them
WITH_LORA, JUDGE = "with LoRA", "resnet18"
ONE_CLASS = 0.9  # share of the predictions, from which on a network has learned little


@dataclass(frozen=True)
class Gain:
    """A step as it was found: the differences by metric, over which classifiers and how many seeds
    of each.

    seeds: how many every classifier has, at least, with either data model
    published: the paper's mean difference over the same classifiers, nan if it has not all of them
    """

    step: Step
    differences: Mapping[str, Difference]
    classifiers: tuple[str, ...]
    seeds: int
    published: float

    @property
    def accuracy(self) -> Difference:
        return self.differences["accuracy"]

    @property
    def verdict(self) -> str:
        found = self.accuracy
        if found.over == "patients":
            return "one seed cannot tell"
        return "helped" if found.low > 0 else "did harm" if found.high < 0 else "inconclusive"


def measure(
    steps: Iterable[Step], cells: Cells, classifiers: Collection[str] = CLASSIFIERS
) -> list[Gain]:
    """The steps that can be taken: over those of the classifiers that both data models have."""
    found = []
    for step in steps:
        pair = step.baseline, step.data
        if both := tuple(c for c in classifiers if all((data, c) in cells for data in pair)):
            sides = [[cells[data, c] for c in both] for data in pair]
            seeds = min(len(runs) for side in sides for runs in side)
            published = published_difference(*pair, both)
            found.append(Gain(step, compare(*sides), both, seeds, published))
    return found


def zero_shot(cells: Cells) -> dict[Row, float]:
    """Mean accuracy of the rows that no image of the second site was trained on, best first; of
    equal ones those without synthetic images."""
    scores = {
        row: float(np.mean([run.targets == run.predictions for run in runs]))
        for row, runs in cells.items()
        if not DATA[row[0]].target
    }
    return dict(sorted(scores.items(), key=lambda s: (-s[1], DATA[s[0][0]].synthetic)))


def at_home(runs: Sequence[Result]) -> float:
    """Mean accuracy of a row's runs on held-out images of the source; nan without any."""
    return float(np.mean([run.held_out for run in runs]))


def answer(
    cells: Cells, names: tuple[str, str], classifiers: Collection[str], compared: bool
) -> list[str]:
    """The first paragraphs of a report: what was compared with what; the answer; how sure that is;
    the best model.

    names: of source and target
    classifiers: those that are averaged
    compared: name the published difference too
    """
    (source, target), scores = names, zero_shot(cells)
    test = next(iter(cells.values()))[0]
    targets, units = test.targets, test.units
    real, drawn = ([r for r in scores if bool(DATA[r[0]].synthetic) is n] for n in (False, True))
    averaged = [classifier_name(c) for c in classifiers if any(row[1] == c for row in scores)]
    trained = ", ".join(averaged or dict.fromkeys(classifier_name(c) for _, c in scores))
    first = (
        f"{trained}: trained on images of {source}"
        f"{', with or without synthetic ones' * bool(drawn)}, and tested on"
        f" {plural(len(targets), 'image')} of {target}, whose labels trained none of the models"
        f" compared here. One class said of all would be right on"
        f" {100 * np.bincount(targets).max() / len(targets):.0f} %."
    )
    told: dict[str, Gain] = {}
    for gain in measure(STEPS, cells, classifiers):
        told.setdefault(gain.step.said, gain)
    told.pop("", None)
    if len(told) > 1 and not compared:
        told.pop(TOGETHER, None)
    if not told:
        words = "Whether synthetic images help is not told by these models."
        return [first, words, _best(cells, names)]
    seeds = sorted({gain.seeds for gain in told.values()})
    many = seeds[-1] > 1
    said = [_found(gain, scores, compared, many) for gain in told.values()]
    if real and drawn:
        ends = (f"{100 * scores[rows[0]]:.1f} %" for rows in (real, drawn))
        best = "The best {} is {} without synthetic images, {} with them."
        said.append(best.format("mean over seeds" if many else "row", *ends))
    networks = sorted({len(gain.classifiers) for gain in told.values()})
    over = f"{units} and {' or '.join(map(str, seeds))} seeds" if many else f"{units} alone"
    if networks[-1] > 1:
        over += f", averaged over {' or '.join(map(str, networks))} networks"
    kept = "The LoRA and the synthetic images" if many else "Networks, LoRA and synthetic images"
    sure = (
        f"In brackets: the difference and its 95 % interval, in points, over {over}. {kept} are"
        " taken as they are: what making them anew would change is in no interval."
    )
    if not many:
        sure = f"One seed cannot tell: another may turn any of these differences. {sure}"
    return [first, " ".join(said), sure, _best(cells, names)]


def _found(gain: Gain, scores: Mapping[Row, float], compared: bool, judged: bool) -> str:
    """What was found, in a sentence. judged: with the verdict on it."""
    sides = gain.step.data, gain.step.baseline
    right = (np.mean([scores[data, c] for c in gain.classifiers]) for data in sides)
    ours, other = (f"{100 * share:.1f} %" for share in right)
    together = gain.step.said == TOGETHER
    published = f"; published {100 * gain.published:+.2f}" * (together and compared)
    before = f"{other} with all real images" if together else other
    return (
        f"{gain.step.said}: {f'{gain.verdict}, ' * judged}from {before} to {ours} right"
        f" ({100 * gain.accuracy.value:+.1f}; {points_between(gain.accuracy)}{published})."
    )


def _best(cells: Cells, names: tuple[str, str]) -> str:
    """Which model is best at the target, and how good it is."""
    source, target = names
    best = next(iter(zero_shot(cells)))
    found, home = estimate(cells[best], "ranked")["accuracy"], at_home(cells[best])
    held_out = f", and on {100 * home:.1f} % of images held out at {source}" * (home >= 0)
    return (
        f"Best at {target}: {_called(best, names)}. It is right on {100 * found.mean:.1f} %"
        f" (95 % interval {100 * found.low:.1f} to {100 * found.high:.1f}; optimistic, as these"
        f" same images chose it){held_out}."
    )


def doubts(cells: Cells, names: tuple[str, str], recognised: Recognised) -> list[str]:
    """What makes an answer worth little: networks that say one class for nearly all images, test
    images that were trained on, and synthetic images that do not show their classes."""
    one_class = []
    for row, runs in cells.items():
        # how often the commonest class is said, and right
        most = [[run.confusion.sum(axis=n).max() for n in (0, 1)] for run in runs]
        if all(said >= ONE_CLASS * len(runs[0].targets) > right for said, right in most):
            one_class.append(_called(row, names))
    by = "; ".join(one_class) if len(one_class) < len(cells) else "every model"
    said = [f"Nearly all images are taken for one class by {by}."] * bool(one_class)
    leaked = max(run.leaked for row in zero_shot(cells) for run in cells[row])
    if leaked:
        said.append(
            f"Test images that are copies of training images: {leaked}. Each row's metrics.json has"
            " scores without them."
        )
    shown = {
        data: float(np.mean([*shares.values()]))
        for (data, images), shares in recognised.items()
        if WITH_LORA in images
    }
    for judge in sorted(shown, key=shown.get)[-1:]:
        runs = cells[judge, JUDGE]
        share, home, chance = shown[judge], at_home(runs), 1 / len(runs[0].classes)
        if share < max(1.25 * chance, np.nan_to_num(home) / 2):
            real = f", and {100 * home:.0f} % of held-out real ones" * (home >= 0)
            said.append(
                "The synthetic images do not show their classes: a network of real images takes"
                f" {100 * share:.0f} % of them for what they are meant to be{real}; chance is"
                f" {100 * chance:.0f} %. Train the LoRA for longer, or with a better model, before"
                " you conclude anything about them."
            )
    return said


def _called(row: Row, names: tuple[str, str]) -> str:
    return f"{classifier_name(row[1])} trained on {data_name(row[0], names)}"


def points_between(found: Difference) -> str:
    """The ends of an interval, in points."""
    if np.isnan(found.low):
        return "no interval"
    return f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"

"""The report of a reproduction: what was found and how sure that is; all rows; where the gain comes
from; then all else, folded away.

`build` writes report.md, report.html (which needs no other file), results.csv and figures/ into one
folder. Equal inputs give equal files.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval.figures import Point, confusion_figure, forest_figure, labelled_sheet
from harness.files import whole_file, write_table, write_text
from paper import tables
from paper.document import command, draw, plural, to_html
from paper.gain import (
    AUGMENTED,
    SITES,
    STEPS,
    Gain,
    Named,
    Row,
    Step,
    answer,
    doubts,
    measure,
    zero_shot,
)
from paper.plan import BEYOND, CLASSIFIERS, Own, classifier_name, data_name
from paper.results import Result, ResultError, require_same_test
from paper.synthetic import Findings
from planes.datasets import Record
from planes.pictures import open_image


@dataclass(frozen=True)
class Context:
    """What a reader must know beside the numbers.

    material: what drew the synthetic images; sites: where the real ones come from
    command: the line that made it all
    left_out: classifier -> why it is in no average; its rows stand in the tables all the same
    names: of source and target
    own: are they a user's own? The report then speaks to somebody who has not read the paper
    tests: the test images, in the order in which they were tested, for pictures of errors
    compared: are the published numbers of such images?
    """

    material: str
    sites: str
    command: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, str] = SITES
    own: bool = False
    tests: Sequence[Record] = ()
    compared: bool = False


LEGEND = (
    "ES: real images of the first site alone. HB: balanced ones of these, and synthetic ones. DA:"
    " augmentation. BAL: the real images of HB alone. +balanced: each class is drawn equally often."
    " +contrast: brightness, contrast and gamma are varied at random. HB-styles: the synthetic"
    " images' prompts name brightness and contrast. HB-all: all real images of the first site, and"
    " synthetic ones. AF: the second site's training images, which is no longer zero-shot and may"
    " know test images by their copies. HB-prompts, HB-token, HB-dreambooth: synthetic images by"
    " detailed prompts, Textual Inversion, DreamBooth. A linear probe is logistic regression on the"
    " features of a frozen model. The notebook's AUC takes predicted labels, and a prediction of a"
    " class that no test image has counts as positive for every class; the ranked one ranks the"
    " images by predicted probability, one class against the rest."
)
OWN_LEGEND = (
    "Balanced: as many real images of each class. Augmented: rotated and flipped at random."
    " Brightness and contrast varied: gamma too, at random. Synthetic images are drawn by Stable"
    " Diffusion with a LoRA that learned images of {0}. A linear probe is logistic regression on"
    " the features of a frozen model. Where accuracy at {0}, on images that no model was trained"
    " on, is low too, little was learned; where it is high and that at {1} is low, what was learned"
    " does not transfer. What was trained on images of {1} may know test images by their copies."
)
PUBLISHED = (
    " In brackets: the published number (docs/paper_and_code.md says what it was trained on)."
)
READING = (
    "Intervals hold 95 %: how far a mean or a difference would move with other test {0} and"
    " other seeds of the training. * marks a single seed: the interval is over {0} alone and speaks"
    " of these trained networks. The classifiers are taken as they are, and so are the LoRA and"
    " the synthetic images: what making them anew would change is in no interval. Of"
    " twenty intervals one misses the truth by chance. Recall, precision, F-score and AUC are macro"
    " averages over the classes that occur in the test."
)
GAIN = (
    "Differences between data models, averaged over the classifiers that both have; the verdict is"
    " on accuracy. Balanced real images and synthetic ones differ from all real images in two ways;"
    " 'balanced real images alone' and a part told after 'of it' add up over the same classifiers."
    " What begins with 'instead' needs no synthetic image."
)
CONFUSION = (
    "Each row of a matrix is a true class: percent of its images by prediction, over all seeds."
)
COPIES = (
    "Copies are test images whose bytes occur earlier in the test list or among their site's"
    " training images."
)
WORST_ERRORS = 20
QUALITY = (
    "Features of synthetic images against those of the first site's. FID and KID: lower is closer."
    " Precision and density: how many synthetic images lie among the real ones; recall and"
    " coverage: how much of the real set they reach. Two-sample: how often a classifier tells a"
    " synthetic image from a real one, 50 % being chance."
)
RECOGNISED = (
    "Of the synthetic images, the share that classifiers of real images alone take for the class of"
    " their prompt, in percent."
)


def build(
    out: Path, results: Sequence[Result], context: Context, found: Findings | None = None
) -> None:
    """Write the whole report into the folder `out`.

    results: in the order that their rows shall have
    found: of the synthetic images; its first figure stands on the first screen
    Raises ResultError if there is no result, or if not all were tested on the same images.
    """
    if not results:
        raise ResultError("there is nothing to report: no row is finished")
    require_same_test(results)
    found = found or Findings({}, [], {}, [])
    cells, classifiers = _cells(results), dict.fromkeys(result.classifier for result in results)
    seeds = sorted({result.seed for result in results})
    left_out = {name: why for name, why in context.left_out.items() if name in classifiers}
    averaged = [name for name in CLASSIFIERS if name not in left_out]
    own: Own = context.names if context.own else None
    compared, best = context.compared, next(iter(zero_shot(cells)), None)
    called = {row: (data_name(row[0], own), classifier_name(row[1])) for row in cells}
    named: Named = {called[row]: runs for row, runs in cells.items()}

    # the first screen: what was found, how to use it, and two pictures
    blocks = [f"# FU-LoRA on {context.sites}"]
    if best:
        names = context.names
        blocks += answer(cells, names, averaged, compared)
        blocks += doubts(cells, names, found.recognised)
        file = cells[best][0].folder / "model.safetensors"
        use = ["--classifier", str(file), "--predict", "FOLDER", "--out", "runs/new"]
        blocks += [f"With its first seed, it is {file}. To classify the images of a folder:"]
        blocks += [command(shlex.join(["python", "classify.py", *use]))]
    if shown := measure(AUGMENTED, cells, averaged):
        blocks.append(_gain_picture(out, shown, context.names))
    blocks += list(found.figures.values())[:1]

    # all rows, the best one, what they differ by, and how they were made
    blocks += ["## All rows", OWN_LEGEND.format(*own) if own else LEGEND + PUBLISHED * compared]
    blocks.append(tables.overview(named, compared, own))
    reasons = "; ".join(f"{CLASSIFIERS[name]}: {why}" for name, why in left_out.items())
    blocks += [f"Left out of averages: {reasons}."] * bool(left_out)
    if best:
        blocks += ["## The best model, class by class"]
        blocks += [tables.class_table({called[best]: cells[best]})]
        blocks += _errors_picture(out, cells[best][0], context.tests)
    steps = [*STEPS, *(Step("other synthetic images", "HB+DA", data.name) for data in BEYOND)]
    if gains := measure(steps, cells, averaged):
        blocks += ["## Where the gain comes from", GAIN]
        blocks += [tables.gain_table(gains, compared, own)]
    blocks += ["## How this was made", _how(results[0], context, seeds), command(context.command)]
    blocks += [READING.format(results[0].units), *found.notes]

    # details, folded away
    blocks += ["## In detail", "What the figures above are made of."]
    told = [(gain.step, gain.classifiers) for gain in gains]
    single = [gain for name in classifiers for gain in measure(steps, cells, [name])]
    if single := [gain for gain in single if (gain.step, gain.classifiers) not in told]:
        blocks += ["### Differences by classifier"]
        blocks.append(tables.gain_table(single, compared, own))
    blocks += ["### Confusion matrices", CONFUSION, _confusion_matrices(out, named)]
    if results[0].copies.any():
        blocks += ["### Without copies", COPIES, tables.overview(named, False, own, distinct=True)]
    if others := {names: runs for names, runs in named.items() if runs is not cells.get(best)}:
        blocks += ["### The other models, class by class", tables.class_table(others)]
    if found.quality:
        blocks += ["### How close the synthetic images are to real ones", QUALITY]
        blocks.append(tables.quality_table(found.quality))
    if found.recognised:
        blocks += ["### What the LoRA does", RECOGNISED]
        blocks.append(tables.recognised_table(found.recognised, own))
    for title, figure in list(found.figures.items())[1:]:
        blocks += [f"### {title}", figure]

    with whole_file(out / "results.csv") as part:
        write_table(part, tables.csv_rows(results))
    write_text(out / "report.md", "\n\n".join(blocks) + "\n")
    write_text(out / "report.html", to_html(blocks, out))


def _cells(results: Sequence[Result]) -> dict[Row, list[Result]]:
    cells: dict[Row, list[Result]] = {}
    for result in results:
        runs = cells.setdefault((result.data, result.classifier), [])
        if result.seed not in [run.seed for run in runs]:  # a row of two tables is one run
            runs.append(result)
    return cells


def _gain_picture(out: Path, gains: Sequence[Gain], names: tuple[str, str]) -> str:
    points = []
    for gain in gains:
        step, found = gain.step, gain.accuracy
        percent = (100 * number for number in (found.value, found.low, found.high))
        points.append(Point(f"{step.what}\n{step.against(names)}", *percent, step.kind))
    caption = "Accuracy with one training set less that with another; bars are 95 % intervals."
    return draw(out, "gain.png", forest_figure(points, "difference in accuracy, points"), caption)


def _errors_picture(out: Path, run: Result, tests: Sequence[Record]) -> list[str]:
    """The errors that the network is surest of, if there are such, and the images are at hand."""
    wrong = np.flatnonzero(run.targets != run.predictions)
    if not len(wrong) or [record.name for record in tests] != run.images.tolist():
        return []
    sure = run.probabilities.max(axis=1)
    images, labels = [], []
    for n in sorted(wrong, key=lambda n: -sure[n])[:WORST_ERRORS]:
        images.append(open_image(tests[n].path, tests[n].levels))
        images[-1].thumbnail((256, 256))
        said, right = run.classes[run.predictions[n]], run.classes[run.targets[n]]
        labels.append(f"said {said}, {100 * sure[n]:.0f} %\nis {right}")
    caption = f"Its surest errors, with seed {run.seed}: {len(images)} of {len(wrong)}."
    return [draw(out, "errors.png", labelled_sheet(images, labels), caption)]


def _confusion_matrices(out: Path, cells: Named) -> str:
    matrices = {names: sum(run.confusion for run in runs) for names, runs in cells.items()}
    classes = next(iter(cells.values()))[0].classes
    figure = confusion_figure(matrices, classes, percent=True)
    return draw(out, "confusion.png", figure, "Confusion matrices of every row.")


def _how(test: Result, context: Context, seeds: Sequence[int]) -> str:
    counts = [plural(len(test.targets), "image")]
    counts += [plural(len({*test.patients}), "patient")] * (test.units == "patients")
    centers, copies = len({*test.centers}), int(test.copies.sum())
    nobody = " No patient is named, so nothing is claimed of patients, only of images."
    return (
        f"Synthetic images: {context.material}. Seeds:"
        f" {', '.join(map(str, seeds))}. Test: {' of '.join(counts)} at {plural(centers, 'site')},"
        f" {copies or 'none'} of them identical copies of others."
        f"{nobody * (test.units == 'images')} The command:"
    )

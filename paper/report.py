"""The report of a reproduction: what was found and how sure that is; all rows; where the gain comes
from; then all else, folded away.

`build` writes report.md, report.html (which needs no other file), results.csv and figures/ into one
folder. Equal inputs give equal files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sklearn.metrics import confusion_matrix

from eval.figures import Point, confusion_figure, forest_figure, save
from harness.files import whole_file, write_table, write_text
from paper import tables
from paper.document import FIGURES, picture, to_html
from paper.gain import AUGMENTED, STEPS, Cells, Gain, Row, Step, headline, measure
from paper.plan import BEYOND, CLASSIFIERS, classifier_name
from paper.results import Result, ResultError, require_same_test
from paper.synthetic import Findings


@dataclass(frozen=True)
class Context:
    """What a reader must know beside the numbers.

    material: what drew the synthetic images; sites: where the real ones come from
    phantoms: whether the test images are phantoms, or others of which the paper says nothing
    recipe: "paper" or "notebook"
    seeds: those that every row was asked for
    command: the line that made it all
    left_out: classifier -> why it is in no average; its rows stand in the tables all the same
    title: of the report, if the usual one is not right
    """

    material: str
    sites: str
    phantoms: bool
    recipe: str
    seeds: Sequence[int]
    command: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    title: str = ""


LEGEND = (
    "ES: real images of the first site alone. HB: balanced ones of these, and synthetic ones. DA:"
    " augmentation. BAL: the real images of HB alone. +balanced: each class is drawn equally often."
    " +contrast: brightness, contrast and gamma are varied at random. HB-styles: the synthetic"
    " images' prompts name brightness and contrast. HB-all: all real images of the first site, and"
    " synthetic ones. AF: the second site's training images, which is no longer zero-shot and may"
    " know test images by their copies. HB-prompts, HB-token, HB-dreambooth: synthetic images by"
    " detailed prompts, Textual Inversion, DreamBooth. A linear probe is logistic regression on the"
    " features of a frozen model. Tables 1 and 2 are the paper's; ES with ViT b16 is in both."
)
PUBLISHED = (
    " In brackets: the published number (docs/paper_and_code.md says what it was trained on)."
)
READING = (
    "Intervals hold 95 %: how far a mean or a difference would move with other test patients and"
    " other seeds of the training. Of three seeds that is wide, and rightly so. * marks a single"
    " seed: the interval is over patients alone and speaks of these trained networks, not of the"
    " data that trained them. The five classifiers are taken as they are, and so are the LoRA and"
    " the synthetic images, made once: what making them anew would change is in no interval. Of"
    " twenty intervals one misses the truth by chance. Recall, precision, F-score and AUC are macro"
    " averages over the classes that occur in the test."
)
GAIN = (
    "Differences between data models, averaged over the classifiers that both have; the verdict is"
    " on accuracy. HB+DA differs from ES+DA in two ways, balanced real images and synthetic ones;"
    " BAL+DA stands between them, so that over the same classifiers the two parts add up. What"
    " begins with 'instead' needs no synthetic image. AUC is the notebook's."
)
MCNEMAR = (
    "Both classifiers see the same images. McNemar's exact test counts those that only one of them"
    " gets right, for two trained networks of one seed; the differences are over all seeds of both."
)
CONFUSION = (
    "Each row of a matrix is a true class: percent of its images by prediction, over all seeds."
)
VARIANTS = (
    "The notebook's AUC takes predicted labels, and a prediction of a class that no test image has,"
    " as Other in the paper's, counts as positive for every class. The plain one ranks the images"
    " by predicted probability, one class against the rest. Copies are test images whose bytes"
    " occur earlier in the test list or among their site's training images."
)
GROUPS = "Percent of images classified rightly, over all seeds."
QUALITY = (
    "Features of synthetic images against those of real ones. FID and KID: lower is closer."
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
    cells: dict[Row, list[Result]] = {}
    for result in results:
        runs = cells.setdefault((result.data, result.classifier), [])
        if result.seed not in [run.seed for run in runs]:  # a row of two tables is one run
            runs.append(result)
    classifiers = dict.fromkeys(result.classifier for result in results)
    left_out = {name: why for name, why in context.left_out.items() if name in classifiers}
    averaged, compared = [c for c in CLASSIFIERS if c not in left_out], not context.phantoms
    (out / FIGURES).mkdir(parents=True, exist_ok=True)

    # the first screen: what was found, and two pictures
    title = context.title or f"FU-LoRA{' on phantoms' if context.phantoms else ', reproduced'}"
    blocks = [f"# {title}", headline(cells, averaged, context.sites, compared)]
    if shown := measure(AUGMENTED, cells, averaged):
        blocks.append(_gain_picture(out, shown))
    blocks += list(found.figures.values())[:1]

    # all rows, what they differ by, and how they were made
    blocks += ["## All rows", LEGEND + PUBLISHED * compared]
    blocks.append(tables.overview(cells, context.seeds, compared))
    reasons = "; ".join(f"{CLASSIFIERS[name]}: {why}" for name, why in left_out.items())
    blocks += [f"Left out of averages: {reasons}."] * bool(left_out)
    steps = [*STEPS, *(Step("other synthetic images", "HB+DA", data.name) for data in BEYOND)]
    if gains := measure(steps, cells, averaged):
        blocks += ["## Where the gain comes from", GAIN, tables.gain_table(gains, compared)]
    blocks += ["## How this was made", _how(results[0], context), READING, *found.notes]

    # details, folded away
    blocks += ["## In detail", "What the figures above are made of."]
    if single := [gain for name in classifiers for gain in measure(steps, cells, [name])]:
        blocks += ["### Differences by classifier", MCNEMAR]
        blocks.append(tables.gain_table(single, compared, cells))
    blocks += ["### Confusion matrices", CONFUSION, _confusion_matrices(out, cells)]
    blocks += ["### Two definitions of AUC; without copies", VARIANTS, tables.variants_table(cells)]
    blocks += ["### By class and by center", GROUPS, tables.group_table(cells)]
    if found.quality:
        blocks += ["### How close the synthetic images are to real ones", QUALITY]
        blocks.append(tables.quality_table(found.quality))
    if found.recognised:
        blocks += ["### What the LoRA does", RECOGNISED]
        blocks.append(tables.recognised_table(found.recognised))
    for title, figure in list(found.figures.items())[1:]:
        blocks += [f"### {title}", figure]

    with whole_file(out / "results.csv") as part:
        write_table(part, tables.csv_rows(results))
    write_text(out / "report.md", "\n\n".join(blocks) + "\n")
    write_text(out / "report.html", to_html(blocks, out))


def _gain_picture(out: Path, gains: Sequence[Gain]) -> str:
    points = []
    for gain in gains:
        step, found = gain.step, gain.accuracy
        percent = (100 * number for number in (found.value, found.low, found.high))
        points.append(Point(f"{step.what}\n{step.data} − {step.baseline}", *percent, step.kind))
    save(forest_figure(points, "difference in accuracy, points"), out / FIGURES / "gain.png")
    caption = "Where the gain comes from: accuracy of one data model less another's."
    return picture("gain.png", caption)


def _confusion_matrices(out: Path, cells: Cells) -> str:
    classes = next(iter(cells.values()))[0].classes
    matrices = {
        (data, classifier_name(classifier)): sum(
            confusion_matrix(run.targets, run.predictions, labels=range(len(classes)))
            for run in runs
        )
        for (data, classifier), runs in cells.items()
    }
    save(confusion_figure(matrices, classes, percent=True), out / FIGURES / "confusion.png")
    return picture("confusion.png", "Confusion matrices of every row.")


def _how(test: Result, context: Context) -> str:
    seeds, patients, centers = context.seeds, len({*test.patients}), len({*test.centers})
    return (
        f"Synthetic images: {context.material}. Real images: {context.sites}. Recipe of the"
        f" classifiers: {context.recipe}. Seeds: {', '.join(map(str, seeds))}. Test:"
        f" {len(test.targets)} images of {patients} patients at {centers} sites,"
        f" {test.copies.sum()} of them identical copies of others. Command: {context.command}"
    )

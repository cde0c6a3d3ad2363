"""The report of a reproduction: the paper's tables, the published numbers beside them, and which differences count.

`build` writes report.md, report.html (which needs no other file), results.csv and figures/ into one folder. Equal
inputs give equal files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.document import Block, Code, Heading, Paragraph, Picture, Table, to_html, to_markdown
from eval.figures import confusion_grid, interval_figure, save
from eval.metrics import confusion
from eval.plan import CLASSIFIERS, TABLE_2
from eval.published import CLAIMS, DIFFERENCES, NOTEBOOK_RUN, TABLE_1, TRAINING
from eval.record import write_atomically
from eval.results import METRICS, Result, ResultError, estimate, require_same_test
from eval.tables import (
    NAMES,
    Row,
    auc_table,
    compare,
    comparison_table,
    distinct_table,
    group_table,
    metric_table,
    overview,
    percent,
    published_difference,
    quality_table,
    recognised_table,
    results_csv,
)
from planes import PLANES

Cells = Mapping[Row, Sequence[Result]]


@dataclass(frozen=True)
class Context:
    """What a reader must know before the numbers.

    material: what drew the synthetic images; sites: where the real ones come from
    phantoms: whether the test images are phantoms, of which the paper says nothing
    recipe: "paper" or "notebook"
    seeds: those that every row was asked for
    command: the line that made it all
    notes: further paragraphs
    """

    material: str
    sites: str
    phantoms: bool
    recipe: str
    seeds: Sequence[int]
    command: str
    notes: Sequence[str] = ()


def build(
    out: Path,
    results: Sequence[Result],
    context: Context,
    *,
    quality: Sequence[Mapping[str, object]] = (),
    recognised: Mapping[str, Mapping[str, float]] | None = None,
    figures: Sequence[tuple[str, Path, str]] = (),
) -> None:
    """Write the whole report into the folder `out`.

    quality: a mapping for each plane and sampler; its keys are those of `quality_table`
    recognised: label, such as "ES, with LoRA" -> sampler -> share of synthetic images taken for their prompt's plane
    figures: title, PNG file somewhere in `out`, caption
    Raises ResultError if there is no result, or if not all were tested on the same images.
    """
    if not results:
        raise ResultError("there is nothing to report: no row is finished")
    require_same_test(results)
    results = sorted(results, key=lambda result: (result.table, result.data, result.classifier, result.seed))
    cells: dict[Row, list[Result]] = {}
    for result in results:
        same = cells.setdefault((result.data, result.classifier), [])
        if result.seed not in [other.seed for other in same]:  # a row of both tables is one run
            same.append(result)

    first = list(TABLE_1)
    second_classifiers = ["vit_b_16", *(result.classifier for result in results if result.table == "2")]
    second = list(dict.fromkeys((model.name, c) for c in second_classifiers for model in TABLE_2))
    paper = list(dict.fromkeys(first + second))
    beyond = [row for row in cells if row not in paper]

    blocks: list[Block] = [*_opening(cells, context), *_tables(first, second, cells, context)]
    blocks += [Heading("Does synthetic data help?"), *_comparison(CLAIMS, cells)]
    blocks += [*_pictures(out, first, second, cells, context), *_robustness(paper, cells)]
    if beyond:
        blocks += [Heading("Beyond the paper"), overview(beyond, cells, context.seeds)]
        blocks += _comparison([("HB+DA", data) for data in dict.fromkeys(data for data, _ in beyond)], cells)
    if quality:
        blocks += [Heading("How close the synthetic images are to real ones"), Paragraph(QUALITY)]
        blocks += [quality_table(quality)]
    if recognised:
        blocks += [Heading("What the LoRA does"), Paragraph(RECOGNISED), recognised_table(recognised)]
    for title, path, caption in figures:
        blocks += [Heading(title), Picture(path, caption)]
    blocks += _recipe(context)

    write_atomically(out / "results.csv", results_csv(results))
    write_atomically(out / "report.md", to_markdown(blocks, out))
    write_atomically(out / "report.html", to_html(blocks))


QUALITY = (
    "Features of synthetic images against those of real ones. FID and KID: lower is closer. Precision and density: "
    "how many synthetic images lie among the real ones; recall and coverage: how much of the real set they reach. "
    "Two-sample: how often a classifier tells a synthetic image from a real one, 50 % being chance."
)
RECOGNISED = (
    "Of the synthetic images, the share that classifiers of real images alone take for the plane of their prompt, "
    f"in percent (chance: {100 / len(PLANES):.0f})."
)
READING = (
    "Intervals hold 95 % of a bootstrap over the test patients: how far a mean over seeds would move with other "
    "patients. The standard deviation over seeds is what training alone changes. Recall, precision, F-score and AUC "
    "are macro averages over the planes that occur in the test."
)
PHANTOMS = "The published numbers belong to the real datasets, this test to phantoms: no difference is claimed."


def _opening(cells: Cells, context: Context) -> list[Block]:
    test = next(iter(cells.values()))[0]
    seeds = ", ".join(map(str, context.seeds))
    patients, countries = len(set(test.patients)), len(set(test.centers))
    blocks: list[Block] = [
        Heading("FU-LoRA, reproduced", 1),
        Paragraph(
            f"Synthetic images: {context.material}. Real images: {context.sites}. Recipe of the classifiers: "
            f"{context.recipe}. Seeds: {seeds}. Test: {len(test.targets)} images of {patients} patients at "
            f"{countries} sites, {test.copies.sum()} of them identical copies of others."
        ),
        Code(context.command),
        Paragraph(READING),
    ]
    if context.phantoms:
        blocks.append(Paragraph(PHANTOMS))
    return blocks + [Paragraph(note) for note in context.notes]


def _tables(first: Sequence[Row], second: Sequence[Row], cells: Cells, context: Context) -> list[Block]:
    trained = "; ".join(
        f"{data} on {t.real} real images of {t.patients} patients and {t.synthetic} synthetic ones"
        for data, t in TRAINING.items()
        if "+DA" not in data
    )
    notebook = ", ".join(f"{NAMES[metric]} {percent(getattr(NOTEBOOK_RUN, metric))}" for metric in METRICS)
    introductions = {
        "Table 1: zero-shot classification": (
            "ES: real images of the first site alone; HB: these and synthetic ones; DA: augmentation. The paper "
            f"trained {trained}. In brackets: the published number."
        ),
        "Table 2: with and without African training images": (
            "AF: the African training images alone, which is no longer zero-shot and knows some test images by their "
            "copies; HB-all: all Spanish images and the synthetic ones, the paper's HB of this table. The paper's "
            "numbers are in no file of its repository, so only table 1's ES has any here. The authors' "
            f"committed notebook, ViT on HB-all with augmentation, prints {notebook}."
        ),
    }
    blocks: list[Block] = []
    for (title, text), rows in zip(introductions.items(), (first, second)):
        estimates = {row: estimate(cells[row]) for row in rows if row in cells}
        text += f" {PHANTOMS}" * context.phantoms
        blocks += [Heading(title), Paragraph(text), overview(rows, cells, context.seeds)]
        for metric in METRICS:
            blocks += [Heading(f"{title.split(':')[0]}, {NAMES[metric]}", 3)]
            blocks += [metric_table(metric, rows, estimates, compared=not context.phantoms)]
    return blocks


def _comparison(claims: Sequence[tuple[str, str]], cells: Cells) -> list[Block]:
    """For each (baseline, data model): what the classifiers say together, and the table of each."""
    blocks: list[Block] = [
        Paragraph(
            "Both classifiers see the same images. McNemar's exact test counts those that only one of them gets right; "
            "the bootstrap draws patients and takes the difference of the scores, in points. Numbers over several "
            "classifiers average the scores of their common seeds; AUC is the notebook's."
        )
    ]
    for baseline, data in claims:
        both = [c for c in CLASSIFIERS if (baseline, c) in cells and (data, c) in cells]
        found = compare([cells[baseline, c] for c in both], [cells[data, c] for c in both]) if both else None
        if found is None:
            verdict = "cannot be compared: rows are missing"
        else:
            accuracy = found["accuracy"]
            way = (
                "is better"
                if accuracy.low > 0
                else "is worse"
                if accuracy.high < 0
                else "is not shown to be better or worse"
            )
            verdict = (
                f"{way}: {100 * accuracy.value:+.2f} points of accuracy ({100 * accuracy.low:+.1f} to "
                f"{100 * accuracy.high:+.1f}) over {len(both)} of {len(CLASSIFIERS)} classifiers; published: "
                f"{published_difference(baseline, data, both)}"
            )
        blocks += [Heading(f"{data} against {baseline}", 3), Paragraph(f"{data} {verdict}.")]
        blocks += [comparison_table(baseline, data, cells)]
    return blocks


def _pictures(out: Path, first: Sequence[Row], second: Sequence[Row], cells: Cells, context: Context) -> list[Block]:
    """Accuracy with intervals, and confusion matrices, drawn into out/figures."""
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, dict[str, tuple | None]] = {}
    for row in dict.fromkeys([*first, *second]):
        entry = None
        if row in cells:
            accuracy = estimate(cells[row])["accuracy"]
            published = 100 * TABLE_1[row].accuracy if row in TABLE_1 and not context.phantoms else None
            entry = 100 * accuracy.mean, 100 * accuracy.low, 100 * accuracy.high, published
        groups.setdefault(row[0], {})[CLASSIFIERS[row[1]]] = entry
    save(interval_figure(groups, "accuracy, %"), folder / "accuracy.png")
    blocks: list[Block] = [Heading("Accuracy"), Picture(folder / "accuracy.png", "Accuracy of every row.")]

    blocks += [Heading("Confusion matrices")]
    caption = "Each row of a matrix is a true plane: percent of its images by prediction, over all seeds. Table {}."
    for number, rows in (1, first), (2, second):
        matrices = {
            (data, CLASSIFIERS[classifier]): sum(confusion(r.targets, r.predictions) for r in cells[data, classifier])
            for data, classifier in rows
            if (data, classifier) in cells
        }
        if matrices:
            down, across = (list(dict.fromkeys(names)) for names in zip(*rows))
            across = [CLASSIFIERS[name] for name in across]
            if len(down) > len(across):  # lie it down
                matrices = {(column, row): matrix for (row, column), matrix in matrices.items()}
                down, across = across, down
            figure = confusion_grid(matrices, down, across, PLANES)
            save(figure, folder / f"confusion_{number}.png")
            blocks += [Picture(folder / f"confusion_{number}.png", caption.format(number))]
    return blocks


def _robustness(rows: Sequence[Row], cells: Cells) -> list[Block]:
    test = next(iter(cells.values()))[0]
    blocks: list[Block] = [
        Heading("Two definitions of AUC"),
        Paragraph(
            "The notebook's takes predicted labels, and a prediction of Other, which no African image is, counts as "
            "positive for every class. The plain one ranks the images by predicted probability, one class against the "
            "rest. In the published HB rows, AUC and recall together imply a specificity that their precision rules "
            "out: treat these five AUCs as irreproducible."
        ),
        auc_table(rows, cells),
        Heading("Without identical copies"),
    ]
    if test.copies.any():
        text = "Left out: test images whose bytes occur earlier in the test list or among the African training images"
        blocks += [Paragraph(f"{text}; {(~test.copies).sum()} remain."), distinct_table(rows, cells)]
    else:
        blocks += [Paragraph("No test image is an identical copy: all results stand as they are.")]
    blocks += [Heading("By plane and by country"), Paragraph("Percent of images classified rightly, over all seeds.")]
    return [*blocks, group_table(rows, cells, "plane"), group_table(rows, cells, "country")]


def _recipe(context: Context) -> list[Block]:
    text = (
        f"The classifiers were trained by the recipe of the {context.recipe}. The paper and what its authors' "
        "repository does are not the same:"
    )
    table = Table(["Setting", "Paper", "Authors' repository"], DIFFERENCES, labels=3)
    return [Heading("Where paper and notebook differ"), Paragraph(text), table]

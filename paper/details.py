"""What the report folds away: metrics, classifiers, confusion matrices, robustness, the paper's own
numbers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from eval.figures import Point, confusion_grid, interval_figure, save
from eval.metrics import confusion
from paper.document import Block, Details, Heading, Paragraph, Picture, Table
from paper.gain import Cells, Row
from paper.plan import CLASSIFIERS, classifier_name
from paper.published import CLAIMS, DIFFERENCES, TABLE_1, TABLE_2, TRAINING
from paper.results import METRICS, estimate
from paper.tables import (
    NAMES,
    auc_table,
    comparison_table,
    distinct_table,
    group_table,
    metric_table,
    points,
    published_table,
)


def by_metric(out: Path, cells: Cells, compared: bool) -> list[Block]:
    """A part for each metric, that of accuracy with a picture in out/figures.

    compared: with the published numbers
    """
    estimates = {row: estimate(runs) for row, runs in cells.items()}
    groups: dict[str, list[Point]] = {}
    for (data, classifier), found in estimates.items():
        ours = found["accuracy"]
        numbers = [100 * number for number in (ours.mean, ours.low, ours.high)]
        theirs = (TABLE_1 | TABLE_2).get((data, classifier)) if compared else None
        published = 100 * theirs.accuracy if theirs else None
        point = Point(classifier_name(classifier), *numbers, published, len(ours.values) > 1)
        groups.setdefault(data, []).append(point)
    save(interval_figure(groups, "accuracy, %"), out / "figures" / "accuracy.png")
    picture = Picture(out / "figures" / "accuracy.png", "Accuracy of every row.")
    return [
        Details(
            f"{NAMES[m]} of every row",
            [picture] * (m == "accuracy") + [metric_table(m, estimates, compared)],
        )
        for m in METRICS
    ]


def by_classifier(
    pairs: Iterable[tuple[str, str]], cells: Cells, left_out: Mapping[str, str], compared: bool
) -> Details:
    """For each (baseline, data model) that were both run, what every classifier says."""
    blocks: list[Block] = [
        Paragraph(
            "Both classifiers see the same images. McNemar's exact test counts those that only one"
            " of them gets right, for two trained networks of one seed number; the differences, in"
            " points, are over all seeds of both. AUC is the notebook's."
        )
    ]
    for baseline, data in pairs:
        table = comparison_table(baseline, data, cells, left_out, compared)
        if table.rows:
            blocks += [Heading(f"{data} against {baseline}", 3), table]
    return Details("Differences by classifier", blocks)


def confusion_matrices(out: Path, tables: Mapping[str, Sequence[Row]], cells: Cells) -> Details:
    """A grid of matrices for each table, drawn into out/figures."""
    classes = next(iter(cells.values()))[0].classes
    blocks: list[Block] = [
        Paragraph(
            "Each row of a matrix is a true class: percent of its images by prediction, over all"
            " seeds."
        )
    ]
    for name, rows in tables.items():
        matrices = {
            (data, classifier_name(classifier)): sum(
                confusion(r.targets, r.predictions, len(classes)) for r in cells[data, classifier]
            )
            for data, classifier in rows
        }
        down, across = (list(dict.fromkeys(names)) for names in zip(*matrices))
        if len(down) > len(across):  # lie it down
            matrices = {(column, row): matrix for (row, column), matrix in matrices.items()}
            down, across = across, down
        path = out / "figures" / f"confusion_{name}.png"
        save(confusion_grid(matrices, down, across, classes), path)
        blocks += [Picture(path, f"Confusion matrices, table {name}.")]
    return Details("Confusion matrices", blocks)


def robustness(cells: Cells) -> list[Block]:
    """Another definition of AUC, other test images, and each plane and country."""
    rows, test = list(cells), next(iter(cells.values()))[0]
    auc = Paragraph(
        "The notebook's takes predicted labels, and a prediction of a class that no test image has,"
        " as Other in the paper's, counts as positive for every class. The plain one ranks the"
        " images by predicted probability, one class against the rest."
    )
    if test.copies.any():
        text = (
            "Left out: test images whose bytes occur earlier in the test list or among their site's"
            " training images"
        )
        copies: list[Block] = [
            Paragraph(f"{text}; {(~test.copies).sum()} remain."),
            distinct_table(rows, cells),
        ]
    else:
        copies = [Paragraph("No test image is an identical copy: all results stand as they are.")]
    shares = [Paragraph("Percent of images classified rightly, over all seeds.")]
    return [
        Details("Two definitions of AUC", [auc, auc_table(rows, cells)]),
        Details("Without identical copies", copies),
        Details(
            "By class and by center",
            shares + [group_table(rows, cells, key) for key in ("class", "center")],
        ),
    ]


def published_numbers(phantoms: bool) -> Details:
    """The paper's two tables and what is to be known of them."""
    claims = ", ".join(
        f"{data} less {baseline} {points(gain)}" for (baseline, data), gain in CLAIMS.items()
    )
    best = max(TABLE_1, key=lambda row: TABLE_1[row].accuracy)
    notes = (
        (
            "Mean differences in accuracy, the first two over five classifiers, the last with ViT"
            f" b16: {claims}. The abstract's 13.73 points are of two classifiers: {best[0]} with"
            f" {CLASSIFIERS[best[1]]} less ES+DA with DenseNet169. Every accuracy is a whole number"
            " of the 233 test images: one run of each row. In table 1's HB rows AUC and recall"
            " together imply a specificity that their precision rules out: treat these five AUCs"
            " as irreproducible."
        ),
        (
            "Table 2's HB, here HB-all, has 6148 real images, though the text on it says 1150; with"
            " 1150 it is table 1's HB. All five numbers are those that the authors' committed"
            " notebook prints for ViT on 6148 real and 5000 synthetic images with augmentation; so"
            " by its own code this row is augmented, the ES above it is not."
        ),
    )
    start = "Of the real datasets: nothing to compare phantoms with. " * phantoms
    return Details(
        "What the paper printed",
        [
            Paragraph(start + notes[0]),
            published_table(TABLE_1),
            Paragraph(notes[1]),
            published_table(TABLE_2),
        ],
    )


def differences(recipe: str) -> Details:
    """The settings of the paper beside those of its authors' code."""
    text = (
        f"The classifiers were trained by the recipe of the {recipe}. The paper and what its"
        " authors' repository does are not the same:"
    )
    table = Table(["Setting", "Paper", "Authors' repository"], DIFFERENCES, labels=3)
    return Details("Where paper and notebook differ", [Paragraph(text), table])


def trained_on(names: Iterable[str]) -> str:
    """What the paper trained these data models on, in words; those alike are named together."""
    alike: dict[object, list[str]] = {}
    for name in names:
        if name in TRAINING:
            alike.setdefault(TRAINING[name], []).append(name)
    parts = []
    for t, models in alike.items():
        kinds = {"Spanish": t.spanish, "synthetic": t.synthetic, "African": t.african}
        images = " and ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        parts.append(f"{' and '.join(models)} on {images} images ({t.patients} patients)")
    return "; ".join(parts)

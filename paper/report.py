"""The report of a reproduction: what was found and how sure that is; then the tables; then all
else, folded away.

`build` writes report.md, report.html (which needs no other file), results.csv and figures/ into one
folder. Equal inputs give equal files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.figures import Point, forest_figure, save
from harness.files import write_text
from paper.details import (
    by_classifier,
    by_metric,
    confusion_matrices,
    differences,
    published_numbers,
    robustness,
    trained_on,
)
from paper.document import (
    Beside,
    Block,
    Code,
    Details,
    Heading,
    Paragraph,
    Picture,
    to_html,
    to_markdown,
)
from paper.gain import NOT_AUGMENTED, STEPS, Cells, Gain, Row, Step, headline, measure
from paper.plan import CLASSIFIERS
from paper.published import PUBLISHED
from paper.results import Result, ResultError, require_same_test
from paper.tables import (
    gain_table,
    overview,
    probe_table,
    quality_table,
    recognised_table,
    results_csv,
)


@dataclass(frozen=True)
class Context:
    """What a reader must know beside the numbers.

    material: what drew the synthetic images; sites: where the real ones come from
    phantoms: whether the test images are phantoms, or others of which the paper says nothing
    own: whether the sites are a user's own, of whatever classes: the paper's tables are then left
        out
    recipe: "paper" or "notebook"
    seeds: those that every row was asked for
    command: the line that made it all
    notes: further paragraphs
    left_out: classifier -> why it is in no average; its rows stand in the tables all the same
    title: of the report, if the usual one is not right
    """

    material: str
    sites: str
    phantoms: bool
    recipe: str
    seeds: Sequence[int]
    command: str
    notes: Sequence[str] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    title: str = ""
    own: bool = False


TITLES = {  # of the tables of paper.plan, in their order here
    "1": "Table 1: zero-shot classification",
    "controls": "Controls that the paper left out",
    "styles": "Style words: ours, not the paper's",
    "2": "Table 2: with and without training images of the second site",
    "beyond": "Beyond the paper",
    "probes": "Frozen vision models",
}
WORDS = {
    "1": (
        "ES: real images of the first site alone; HB: balanced ones of these and synthetic ones;"
        " DA: augmentation."
    ),
    "controls": (
        "None has a synthetic image. BAL: the real images of HB alone; +balanced: each class drawn"
        " equally often; +contrast: brightness, contrast and gamma varied at random."
    ),
    "styles": (
        "HB with synthetic images whose prompts name brightness and contrast, the paper's future"
        " work."
    ),
    "2": (
        "AF: the second site's training images alone, which is no longer zero-shot and may know"
        " test images by their copies; HB-all: all real images of the first site and the synthetic"
        " ones, the paper's HB of this table, which by its authors' code was augmented; here it is"
        " not."
    ),
    "probes": (
        "Nothing of these is trained: logistic regression or nearest neighbours on their features,"
        " or the text nearest to an image. They are in no average."
    ),
    "beyond": (
        "In the place of HB's synthetic images those by detailed prompts, Textual Inversion or"
        " DreamBooth."
    ),
}
PHANTOMS = (
    "The paper's numbers belong to its own datasets and not to this test: they are folded away at"
    " the end."
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
    "Differences in accuracy between data models, averaged over the classifiers that both have."
    " HB+DA differs from ES+DA in two ways, balanced real images and synthetic ones; BAL+DA stands"
    " between them, so that over the same classifiers the two parts add up. What begins with"
    " 'instead' needs no synthetic image."
)
QUALITY = (
    "Features of synthetic images against those of real ones. FID and KID: lower is closer."
    " Precision and density: how many synthetic images lie among the real ones; recall and"
    " coverage: how much of the real set they reach. Two-sample: how often a classifier tells a"
    " synthetic image from a real one, 50 % being chance."
)
RECOGNISED = (
    "Of the synthetic images, the share that classifiers of real images alone take for the class of"
    " their prompt, in percent (chance: {chance:.0f})."
)


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
    recognised: label, such as "ES, with LoRA" -> sampler -> share of synthetic images taken for
        their prompt's plane
    figures: title, PNG file somewhere in `out`, caption; the first stands on the first screen
    Raises ResultError if there is no result, or if not all were tested on the same images.
    """
    if not results:
        raise ResultError("there is nothing to report: no row is finished")
    require_same_test(results)
    results = sorted(results, key=_place)
    cells, tables = _group(results)
    compared, run = not context.phantoms, {classifier for _, classifier in cells}
    left_out = {name: reason for name, reason in context.left_out.items() if name in run}
    (out / "figures").mkdir(parents=True, exist_ok=True)

    gains = measure(STEPS, cells, left_out)
    pictures = [_gain_picture(out, gains, compared)] if gains else []
    pictures += [Picture(path, f"{title}. {caption}") for title, path, caption in figures[:1]]
    blocks: list[Block] = [
        Heading(
            context.title or ("FU-LoRA on phantoms" if context.phantoms else "FU-LoRA, reproduced"),
            1,
        ),
        Paragraph(headline(cells, left_out, context.sites, compared)),
        *([Beside(pictures)] if pictures else []),
    ]
    sections = {table: _table(table, rows, cells, context) for table, rows in tables.items()}
    blocks += sections.pop("1", [])
    gains += measure(NOT_AUGMENTED, cells, left_out)
    if gains:
        blocks += [
            Heading("Where the gain comes from"),
            Paragraph(GAIN),
            gain_table(gains, compared),
        ]
        blocks += _left_out(left_out)
    blocks += [block for section in sections.values() for block in section]
    blocks += _how(cells, context)

    beyond = [
        Step("", "HB+DA", data)
        for data in dict.fromkeys(data for data, _ in tables.get("beyond", ()))
    ]
    pairs = [(step.baseline, step.data) for step in (*STEPS, *NOT_AUGMENTED, *beyond)]
    blocks += [Heading("In detail"), *by_metric(out, cells, compared)]
    blocks += [
        by_classifier(pairs, cells, left_out, compared),
        confusion_matrices(out, tables, cells),
    ]
    blocks += robustness(cells)
    if quality:
        title = "How close the synthetic images are to real ones"
        blocks += [Details(title, [Paragraph(QUALITY), quality_table(quality)])]
    if recognised:
        words = Paragraph(RECOGNISED.format(chance=100 / len(results[0].classes)))
        blocks += [Details("What the LoRA does", [words, recognised_table(recognised)])]
    blocks += [Details(title, [Picture(path, caption)]) for title, path, caption in figures[1:]]
    blocks += (
        [] if context.own else [published_numbers(context.phantoms), differences(context.recipe)]
    )

    write_text(out / "results.csv", results_csv(results))
    write_text(out / "report.md", to_markdown(blocks, out))
    write_text(out / "report.html", to_html(blocks))


def _place(result: Result) -> tuple:
    """Where a run stands in the report."""
    table = [*TITLES, result.table].index(result.table)
    place = [*CLASSIFIERS, result.classifier].index(result.classifier)
    return table, result.table, result.data, place, result.classifier, result.seed


def _group(results: Sequence[Result]) -> tuple[dict[Row, list[Result]], dict[str, list[Row]]]:
    """The runs of each row, and the rows of each table."""
    cells: dict[Row, list[Result]] = {}
    tables: dict[str, list[Row]] = {}
    for result in results:
        row = result.data, result.classifier
        same, rows = cells.setdefault(row, []), tables.setdefault(result.table, [])
        if result.seed not in [other.seed for other in same]:  # a row of two tables is one run
            same.append(result)
        if row not in rows:
            rows.append(row)
    return cells, tables


def _table(table: str, rows: Sequence[Row], cells: Cells, context: Context) -> list[Block]:
    compared = not context.phantoms
    text = WORDS.get(table, "")
    if compared and any(row in PUBLISHED for row in rows):
        text += (
            " In brackets: the published number. The paper trained"
            f" {trained_on(dict.fromkeys(d for d, _ in rows))}."
        )
    blocks = [
        Heading(TITLES.get(table, table)),
        Paragraph(text),
        overview(rows, cells, context.seeds, compared),
    ]
    steps = [
        Step("other synthetic images", "HB+DA", data)
        for data in dict.fromkeys(data for data, _ in rows)
    ]
    gains = measure(steps, cells, context.left_out) if table == "beyond" else []
    if table == "probes":
        data = [
            name
            for name in ("HB+DA", "HB-styles+DA", "ES+DA")
            if any(name == other for other, _ in cells)
        ]
        blocks += [probe_table(data, cells, context.left_out)] if data else []
    return [*blocks, gain_table(gains, compared)] if gains else blocks


def _gain_picture(out: Path, gains: Sequence[Gain], compared: bool) -> Picture:
    points = []
    for gain in gains:
        label, found = f"{gain.step.what}\n{gain.step.data} − {gain.step.baseline}", gain.accuracy
        numbers = [100 * number for number in (found.value, found.low, found.high)]
        published = 100 * gain.published if compared else None
        points.append(Point(label, *numbers, published, found.over != "patients", gain.step.kind))
    save(forest_figure(points, "difference in accuracy, points"), out / "figures" / "gain.png")
    return Picture(
        out / "figures" / "gain.png",
        "Where the gain comes from: accuracy of one data model less another's.",
    )


def _left_out(left_out: Mapping[str, str]) -> list[Block]:
    reasons = "; ".join(f"{CLASSIFIERS[name]}: {reason}" for name, reason in left_out.items())
    return [Paragraph(f"Left out of averages: {reasons}.")] if reasons else []


def _how(cells: Cells, context: Context) -> list[Block]:
    test = next(iter(cells.values()))[0]
    seeds = ", ".join(map(str, context.seeds))
    patients, countries = len(set(test.patients)), len(set(test.centers))
    text = (
        f"Synthetic images: {context.material}. Real images: {context.sites}. Recipe of the"
        f" classifiers: {context.recipe}. Seeds: {seeds}. Test: {len(test.targets)} images of"
        f" {patients} patients at {countries} sites, {test.copies.sum()} of them identical copies"
        " of others."
    )
    blocks: list[Block] = [
        Heading("How this was made"),
        Paragraph(text),
        Code(context.command),
        Paragraph(READING),
    ]
    blocks += [Paragraph(PHANTOMS)] if context.phantoms and not context.own else []
    return blocks + [Paragraph(note) for note in context.notes]

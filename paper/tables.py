"""The report's tables, of what was run and nothing else. Fractions become percent here."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from itertools import product

import numpy as np

from eval.compare import Difference, mcnemar
from eval.metrics import METRICS
from paper.document import table
from paper.gain import Cells, Gain, Row, points_between
from paper.plan import classifier_name
from paper.published import PUBLISHED
from paper.results import Estimate, Result, estimate

NAMES = dict(zip(METRICS, ("ACC", "Recall", "Precision", "F-score", "AUC")))
NONE = "–"
ONE_SEED = "*"  # marks an interval over patients alone
SOURCES = {"real": ("spain", "source"), "synthetic": ("synthetic",), "second": ("africa", "target")}
"""A column of the tables -> the sources of its images."""
COMPARED = ("accuracy", "f_score", "auc")


def percent(value: float) -> str:
    """A fraction as percent."""
    return f"{100 * value:.2f}"


def p_value(p: float) -> str:
    """A p-value to three decimals."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def interval(found: Estimate) -> str:
    """Bounds of an interval in percent."""
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}{ONE_SEED * (found.seeds == 1)}"


def difference(found: Difference) -> str:
    """In points, with its interval and p-value."""
    text = f"{100 * found.value:+.2f} ({points_between(found)})"
    return text + ONE_SEED if found.over == "patients" else f"{text}, {p_value(found.p_value)}"


def overview(cells: Cells, seeds: Sequence[int], compared: bool) -> str:
    """All metrics of all rows.

    compared: with the published number of each in brackets
    """
    header = ["Data", "Classifier", "Table", "Seeds", *(f"# {kind}" for kind in SOURCES)]
    header += ["95 % interval of ACC", *NAMES.values()]
    body = []
    for row, runs in cells.items():
        found, counts = estimate(runs), _counts(runs[0])
        values = [percent(found[metric].mean) for metric in METRICS]
        if compared and row in PUBLISHED:
            theirs = map(percent, astuple(PUBLISHED[row]))
            values = [f"{ours} ({number})" for ours, number in zip(values, theirs)]
        seen = runs[0].table, f"{len(runs)} of {len(seeds)}"
        body.append([*_names(row), *seen, *counts, interval(found["accuracy"]), *values])
    return table(header, body, labels=3)


def gain_table(gains: Sequence[Gain], compared: bool, cells: Cells | None = None) -> str:
    """Differences between data models, over the classifiers that both have.

    compared: with the paper's difference in accuracy over the same classifiers
    cells: where each gain is of one classifier: also McNemar's test of each seed
    """
    header = ["What is changed", "Difference", "Classifiers", "Seeds", "Verdict"]
    header += [f"{NAMES[metric]}, points" for metric in COMPARED]
    header += ["Right only before : only after, by seed"] * bool(cells)
    body = []
    for gain in gains:
        step, names = gain.step, gain.classifiers
        name = classifier_name(names[0]) if len(names) == 1 else str(len(names))
        line = [step.what, f"{step.data} less {step.baseline}", name, gain.seeds, gain.verdict]
        line += [difference(gain.differences[metric]) for metric in COMPARED]
        if cells:
            pairs = [
                mcnemar(one.targets, one.predictions, other.predictions)
                for one in cells[step.baseline, names[0]]
                for other in cells[step.data, names[0]]
                if one.seed == other.seed
            ]
            tests = (f"{before} : {after}, {p_value(p)}" for before, after, p in pairs)
            line.append("; ".join(tests) or NONE)
        published = NONE if np.isnan(gain.published) else f"{100 * gain.published:+.2f}"
        body.append(line + [published] * compared)
    return table(header + ["Published ACC"] * compared, body, labels=3)


def variants_table(cells: Cells) -> str:
    """AUC by both definitions, and scores on the test images that are no copies, with intervals."""
    header = ["AUC, notebook", "AUC, plain", *(f"{NAMES[m]}, no copies" for m in COMPARED)]
    body = []
    for row, runs in cells.items():
        found = [estimate(runs, plain)["auc"] for plain in (False, True)]
        distinct = estimate(runs, distinct=True)
        found += [distinct[metric] for metric in COMPARED]
        body.append([*_names(row), *(f"{percent(e.mean)} ({interval(e)})" for e in found)])
    return table(["Data", "Classifier", *header], body)


def group_table(cells: Cells) -> str:
    """Share of the images of each class and center that are classified rightly, over all seeds, in
    percent."""
    test = next(iter(cells.values()))[0]
    classes = np.array(test.classes)[test.targets]
    groups = [(name, classes == name) for name in test.classes if name in classes]
    groups += [(name, test.centers == name) for name in sorted({*test.centers})]
    body = []
    for row, runs in cells.items():
        right = np.mean([run.targets == run.predictions for run in runs], axis=0)
        body.append([*_names(row), *(percent(right[group].mean()) for _, group in groups)])
    header = (f"{name} ({group.sum()})" for name, group in groups)
    return table(["Data", "Classifier", *header], body)


def quality_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Fréchet and kernel distances, precision, recall, density, coverage, two-sample test, by class
    and sampler: rows of eval.quality.quality_table."""
    header = ["Class", "Sampler", "# synthetic", "# real", "FID", "KID", "Precision", "Recall"]
    header += ["Density", "Coverage", "Two-sample ACC", "p"]
    body = [[f"{v:.3g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    return table(header, body)


def recognised_table(recognised: Mapping[str, Mapping[str, float]]) -> str:
    """Shares in percent: label, such as "ES, with LoRA" -> sampler -> fraction."""
    rows = [[label, *map(percent, shares.values())] for label, shares in recognised.items()]
    samplers = next(iter(recognised.values()))
    return table(["Classifier of real images; synthetic images", *samplers], rows, labels=1)


def csv_rows(results: Sequence[Result]) -> list[dict[str, object]]:
    """A row of results.csv for each row and seed: metrics as fractions with 95 % intervals over
    patients, by both definitions of AUC, on all test images (all_...) and on those that are no
    copies (distinct_...)."""
    rows = []
    for result in results:
        line = {key: getattr(result, key) for key in ("table", "data", "classifier", "seed")}
        line |= {f"n_{kind}": count for kind, count in zip(SOURCES, _counts(result))}
        line |= {"n_test": len(result.targets), "n_copies": int(result.copies.sum())}
        for images, definition in product(("all", "distinct"), ("notebook", "plain")):
            for metric, ours in estimate(
                [result], definition == "plain", images == "distinct"
            ).items():
                for end, value in ("", ours.mean), ("_low", ours.low), ("_high", ours.high):
                    line[f"{images}_{definition}_{metric}{end}"] = f"{value:.6f}"
        rows.append(line)
    return rows


def _counts(result: Result) -> list[int]:
    """Training images of each kind in SOURCES."""
    counts = result.training["sources"]
    return [sum(counts.get(source, 0) for source in names) for names in SOURCES.values()]


def _names(row: Row) -> tuple[str, str]:
    return row[0], classifier_name(row[1])

"""The report's tables, of what was run and nothing else. Fractions become percent here."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from itertools import product

import numpy as np
from sklearn.metrics import confusion_matrix

from eval.compare import Difference, mcnemar
from eval.metrics import METRICS, class_scores
from paper.document import table
from paper.gain import Cells, Gain, Recognised, Row, at_home, points_between
from paper.plan import Own, classifier_name, data_name
from paper.published import PUBLISHED
from paper.results import Estimate, Result, estimate

NAMES = dict(zip(METRICS, ("Accuracy", "Recall", "Precision", "F-score", "AUC")))
LABELS = "Trained on", "Classifier"
NONE = "–"
ONE_SEED = "*"  # marks an interval over patients alone
SOURCES = {"real": ("spain", "source"), "synthetic": ("synthetic",), "second": ("africa", "target")}
"""A column of the tables -> the sources of its images."""
COMPARED = ("accuracy", "f_score", "auc")


def percent(value: float) -> str:
    """A fraction as percent; NONE for nan."""
    return NONE if np.isnan(value) else f"{100 * value:.2f}"


def p_value(p: float) -> str:
    """A p-value to three decimals."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def interval(found: Estimate) -> str:
    """Bounds of an interval in percent; NONE for nan."""
    if np.isnan(found.low):
        return NONE
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}{ONE_SEED * (found.seeds == 1)}"


def difference(found: Difference) -> str:
    """In points, with its interval and p-value."""
    text = f"{100 * found.value:+.2f} ({points_between(found)})"
    return text + ONE_SEED if found.over == "patients" else f"{text}, {p_value(found.p_value)}"


def overview(cells: Cells, seeds: Sequence[int], compared: bool, own: Own = None) -> str:
    """All metrics of all rows, and how many images of each kind they were trained on.

    compared: with the published number of each in brackets
    """
    known = any(at_home(runs) >= 0 for runs in cells.values())  # not nan
    source, target = own or ("the first site", "the second")
    header = [*LABELS, *["Table"] * (not own), "Seeds"]
    header += ["# real", "# synthetic", f"# of {target}"]
    header += [f"Accuracy at {source}, held out"] * known
    header += [f"Accuracy at {target}", "95 % interval", *[*NAMES.values()][1:]]
    body = []
    for row, runs in cells.items():
        found = estimate(runs, bool(own))
        values = [percent(found[metric].mean) for metric in METRICS]
        if compared and row in PUBLISHED:
            theirs = map(percent, astuple(PUBLISHED[row]))
            values = [f"{ours} ({number})" for ours, number in zip(values, theirs)]
        values.insert(1, interval(found["accuracy"]))
        line = [*_names(row), *[runs[0].table] * (not own), f"{len(runs)} of {len(seeds)}"]
        line += [*_counts(runs[0]), *[percent(at_home(runs))] * known]
        body.append(line + values)
    return table(header, body, labels=2 + (not own))


def gain_table(
    gains: Sequence[Gain], compared: bool, cells: Cells | None = None, own: Own = None
) -> str:
    """Differences between data models, over the classifiers that both have.

    compared: with the paper's difference in accuracy over the same classifiers
    cells: where each gain is of one classifier: also McNemar's test of each seed
    """
    metrics = COMPARED[: 2 if own else 3]
    header = [
        "What is changed",
        "Against" if own else "Difference",
        "Classifiers",
        "Seeds",
        "Verdict",
    ]
    header += [f"{NAMES[metric]}, points" for metric in metrics]
    header += ["Right only before : only after, by seed"] * bool(cells)
    body = []
    for gain in gains:
        step, names = gain.step, gain.classifiers
        name = classifier_name(names[0]) if len(names) == 1 else str(len(names))
        line = [step.what, step.against(own), name, gain.seeds, gain.verdict]
        line += [difference(gain.differences[metric]) for metric in metrics]
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
    return table(header + ["Published accuracy"] * compared, body, labels=3)


def variants_table(cells: Cells, own: Own = None) -> str:
    """AUC by both definitions, and scores on the test images that are no copies, with intervals.
    Of own sites the latter alone."""
    header = ["AUC, notebook", "AUC, plain"] * (not own)
    header += [f"{NAMES[metric]}, no copies" for metric in COMPARED]
    body = []
    for row, runs in cells.items():
        found = [estimate(runs, plain)["auc"] for plain in (False, True) if not own]
        distinct = estimate(runs, bool(own), distinct=True)
        found += [distinct[metric] for metric in COMPARED]
        body.append([*_names(row), *(f"{percent(e.mean)} ({interval(e)})" for e in found)])
    return table([*LABELS, *header], body)


def class_table(cells: Cells) -> str:
    """Of each class that the test has: how many images, and recall, precision and F-score in
    percent, means over all seeds."""
    body = []
    for row, runs in cells.items():
        names, classes = _names(row), range(len(runs[0].classes))
        counts = [confusion_matrix(run.targets, run.predictions, labels=classes) for run in runs]
        scores = np.mean(class_scores(np.stack(counts)), axis=1).T
        for name, images, line in zip(runs[0].classes, counts[0].sum(axis=1), scores):
            if images:
                body.append([*names, name, images, *map(percent, line)])
                names = "", ""
    header = [*LABELS, "Class", "# images", "Recall", "Precision", "F-score"]
    return table(header, body, labels=3)


def center_table(cells: Cells) -> str:
    """Share of the images of each center that are classified rightly, over all seeds, in
    percent."""
    test = next(iter(cells.values()))[0]
    centers = {name: test.centers == name for name in sorted({*test.centers})}
    body = []
    for row, runs in cells.items():
        right = np.mean([run.targets == run.predictions for run in runs], axis=0)
        shares = (percent(right[there].mean()) for there in centers.values())
        body.append([*_names(row), *shares])
    header = (f"{name} ({there.sum()})" for name, there in centers.items())
    return table([*LABELS, *header], body)


def folders_table(cells: Cells) -> str:
    """The folder of each row's first run."""
    lines = [[*_names(row), runs[0].folder] for row, runs in cells.items()]
    return table([*LABELS, "Folder"], lines, labels=3)


def quality_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Fréchet and kernel distances, precision, recall, density, coverage, two-sample test, by class
    and sampler: rows of eval.quality.quality_table."""
    header = ["Class", "Sampler", "# synthetic", "# real", "FID", "KID", "Precision", "Recall"]
    header += ["Density", "Coverage", "Two-sample ACC", "p"]
    body = [[f"{v:.3g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    return table(header, body)


def recognised_table(recognised: Recognised, own: Own = None) -> str:
    """Shares in percent."""
    rows = [
        [f"{data_name(data, own)}; {images}", *map(percent, shares.values())]
        for (data, images), shares in recognised.items()
    ]
    samplers = next(iter(recognised.values()))
    return table(["Classifier of real images; synthetic images", *samplers], rows, labels=1)


def csv_rows(results: Sequence[Result], own: Own = None) -> list[dict[str, object]]:
    """A row of results.csv for each row and seed: metrics as fractions with 95 % intervals over
    patients, by both definitions of AUC (of own sites by the plain one), on all test images
    (all_...) and on those that are no copies (distinct_...)."""
    rows = []
    for result in results:
        line = {key: getattr(result, key) for key in ("table", "data", "classifier", "seed")}
        line |= {f"n_{kind}": count for kind, count in zip(SOURCES, _counts(result))}
        line |= {"n_test": len(result.targets), "n_copies": int(result.copies.sum())}
        for images, definition in product(("all", "distinct"), ("notebook", "plain")[bool(own) :]):
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

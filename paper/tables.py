"""The report's tables, of what was run and nothing else. Fractions become percent here."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple

import numpy as np

from eval.compare import Difference
from eval.metrics import METRICS, class_scores
from paper.document import table
from paper.gain import SITES, Gain, Named, Recognised, at_home, points_between
from paper.plan import Own, classifier_name, data_name
from paper.published import PUBLISHED
from paper.results import Estimate, Result, estimate

NAMES = dict(zip(METRICS, ("Accuracy", "Recall", "Precision", "F-score", "AUC")))
LABELS = "Trained on", "Classifier"
NONE = "–"
COMPARED = ("accuracy", "f_score")
ONE_SEED = "*"  # marks an interval over patients alone
SOURCES = {"real": ("spain", "source"), "synthetic": ("synthetic",), "second": ("africa", "target")}
"""A column of the tables -> the sources of its images."""


def percent(value: float) -> str:
    """A fraction as percent; NONE for nan."""
    return NONE if np.isnan(value) else f"{100 * value:.2f}"


def interval(found: Estimate) -> str:
    """Bounds of an interval in percent; NONE for nan."""
    if np.isnan(found.low):
        return NONE
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}{ONE_SEED * (found.seeds == 1)}"


def difference(found: Difference) -> str:
    """In points, with its interval and p-value."""
    text = f"{100 * found.value:+.2f} ({points_between(found)})"
    p = "p < 0.001" if found.p_value < 0.001 else f"p = {found.p_value:.3f}"
    if found.over == "patients":
        return text + ONE_SEED
    return text if np.isnan(found.p_value) else f"{text}, {p}"


def overview(cells: Named, compared: bool, own: Own, distinct: bool = False) -> str:
    """All metrics of all rows, and how many images of each kind they were trained on.

    compared: with the published number of each in brackets
    distinct: of the test images that are no copies
    """
    definitions = next(iter(cells.values()))[0].definitions
    known = any(at_home(runs) >= 0 for runs in cells.values())  # not nan
    source, target = own or SITES
    header = [*LABELS, "Seeds", "# real", "# synthetic", f"# of {target}"]
    header += [f"Accuracy at {source}, held out"] * known
    header += [f"Accuracy at {target}", "95 % interval", *[*NAMES.values()][1:4]]
    header += [f"AUC, {definition}" for definition in definitions]
    body = []
    for names, runs in cells.items():
        found, *others = (estimate(runs, definition, distinct) for definition in definitions)
        row = runs[0].data, runs[0].classifier
        values = [percent(found[metric].mean) for metric in METRICS]
        if compared and row in PUBLISHED:
            theirs = map(percent, astuple(PUBLISHED[row]))
            values = [f"{ours} ({number})" for ours, number in zip(values, theirs)]
        values.insert(1, interval(found["accuracy"]))
        home = [percent(at_home(runs))] * known
        values += [percent(other["auc"].mean) for other in others]
        body.append([*names, len(runs), *_counts(runs[0]), *home, *values])
    return table(header, body)


def gain_table(gains: Sequence[Gain], compared: bool, own: Own) -> str:
    """Differences between data models, over the classifiers that both have.

    compared: with the paper's difference in accuracy over the same classifiers
    """
    header = ["What is changed", "Difference", "Classifiers", "Seeds", "Verdict"]
    header += [f"{NAMES[metric]}, points" for metric in COMPARED]
    header += ["Published accuracy"] * compared
    body = []
    for gain in gains:
        step, names = gain.step, gain.classifiers
        name = len(names) if len(names) > 1 else classifier_name(names[0])
        line = [step.what, step.against(own), name, gain.seeds, gain.verdict]
        line += [difference(gain.differences[metric]) for metric in COMPARED]
        published = NONE if np.isnan(gain.published) else f"{100 * gain.published:+.2f}"
        body.append(line + [published] * compared)
    return table(header, body, labels=3)


def class_table(cells: Named) -> str:
    """Of each class that the test has: how many images, and recall, precision and F-score in
    percent, means over all seeds. Then, where there are several centers, how many images of each,
    and the share of these that is classified rightly."""
    body = []
    for names, runs in cells.items():
        counts = np.stack([run.confusion for run in runs])
        scores = np.mean(class_scores(counts), axis=1)
        lines = [*zip(runs[0].classes, counts[0].sum(axis=1), *scores)]
        right = np.mean([run.targets == run.predictions for run in runs], axis=0)
        centers = np.unique(runs[0].centers)
        for center in centers[len(centers) == 1 :]:
            there = runs[0].centers == center
            lines.append((center, there.sum(), right[there].mean(), np.nan, np.nan))
        for name, images, *values in lines:
            if images:
                body.append([*names, name, images, *map(percent, values)])
                names = "", ""
    header = [*LABELS, "Class or center", "# images", "Recall", "Precision", "F-score"]
    return table(header, body, labels=3)


def quality_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Fréchet and kernel distances, precision, recall, density, coverage, two-sample test, by class
    and sampler: rows of eval.quality.quality_table."""
    header = ["Class", "Sampler", "# synthetic", "# real", "FID", "KID", "Precision", "Recall"]
    header += ["Density", "Coverage", "Two-sample ACC", "p"]
    body = [[f"{v:.3g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    return table(header, body)


def recognised_table(recognised: Recognised, own: Own) -> str:
    """Shares in percent."""
    rows = [
        [f"{data_name(data, own)}; {images}", *map(percent, shares.values())]
        for (data, images), shares in recognised.items()
    ]
    samplers = next(iter(recognised.values()))
    return table(["Classifier of real images; synthetic images", *samplers], rows, labels=1)


def csv_rows(results: Sequence[Result]) -> list[dict[str, object]]:
    """A row of results.csv for each row and seed: metrics as fractions with 95 % intervals over
    patients, by each definition of the AUC, on all test images (all_...) and on those that are no
    copies (distinct_...)."""
    rows = []
    for result in results:
        line = {key: getattr(result, key) for key in ("table", "data", "classifier", "seed")}
        line |= {f"n_{kind}": count for kind, count in zip(SOURCES, _counts(result))}
        line |= {"n_test": len(result.targets), "n_copies": int(result.copies.sum())}
        for images in ("all", "distinct"):
            for definition in result.definitions:
                found = estimate([result], definition, images == "distinct")
                for metric, ours in found.items():
                    for end, value in ("", ours.mean), ("_low", ours.low), ("_high", ours.high):
                        line[f"{images}_{definition}_{metric}{end}"] = f"{value:.6f}"
        rows.append(line)
    return rows


def _counts(result: Result) -> list[int]:
    """Training images of each kind in SOURCES."""
    counts = result.training["sources"]
    return [sum(counts.get(source, 0) for source in names) for names in SOURCES.values()]

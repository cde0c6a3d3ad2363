"""The report's tables. A row that was not run is shown as missing; fractions become percent here."""

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np

from eval.compare import Difference, by_group, mcnemar, paired_bootstrap, spread
from eval.document import Table
from eval.metrics import Scores
from eval.plan import CLASSIFIERS
from eval.published import TABLE_1
from eval.results import METRICS, Estimate, Result, estimate
from planes import PLANES

NAMES = {"accuracy": "ACC", "recall": "Recall", "precision": "Precision", "f_score": "F-score", "auc": "AUC"}
MISSING, NONE = "missing", "–"
SOURCES = {"real": "spain", "synthetic": "synthetic", "african": "africa"}

Row = tuple[str, str]
"""A data model and a classifier, such as ("HB+DA", "resnet18")."""


def percent(value: float) -> str:
    """A fraction as percent; a dash if it is nan."""
    return NONE if np.isnan(value) else f"{100 * value:.2f}"


def interval(low: float, high: float) -> str:
    """Bounds of an interval in percent."""
    return NONE if np.isnan(low) else f"{100 * low:.1f} to {100 * high:.1f}"


def p_value(p: float) -> str:
    """A p-value to three decimals."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def overview(rows: Sequence[Row], cells: Mapping[Row, Sequence[Result]], seeds: Sequence[int]) -> Table:
    """All metrics of all rows, the published number of each in brackets."""
    header = ["Data", "Classifier", "Seeds", "# real", "# synthetic", "# African", *NAMES.values()]
    body = []
    for row in rows:
        published = TABLE_1.get(row)
        if row in cells:
            sources = cells[row][0].training["sources"]
            counts = [sources.get(source, 0) for source in SOURCES.values()]
            scores = {metric: entry.mean for metric, entry in estimate(cells[row]).items()}
        else:
            counts, scores = [NONE] * 3, {}
        values = []
        for metric in METRICS:
            ours = percent(scores[metric]) if scores else MISSING
            values.append(ours if published is None else f"{ours} ({percent(getattr(published, metric))})")
        body.append([*_names(row), f"{len(cells.get(row, ()))} of {len(seeds)}", *counts, *values])
    return Table(header, body, labels=2)


def metric_table(
    metric: str, rows: Sequence[Row], estimates: Mapping[Row, Mapping[str, Estimate]], compared: bool
) -> Table:
    """One metric of all rows: mean and standard deviation over seeds, interval of the mean, the published number.

    compared: also the difference to the published number, and whether the interval covers it
    """
    header = ["Data", "Classifier", NAMES[metric], "SD over seeds", "95 % interval", "Published"]
    header += ["Difference", "Interval covers it"] * compared
    body = []
    for row in rows:
        published: Scores | None = TABLE_1.get(row)
        theirs = None if published is None else getattr(published, metric)
        line = [*_names(row), MISSING, NONE, NONE, NONE if theirs is None else percent(theirs)]
        difference = [NONE, NONE]
        if row in estimates:
            ours = estimates[row][metric]
            deviation = percent(spread(ours.values)[1]) if len(ours.values) > 1 else NONE
            line[2:5] = percent(ours.mean), deviation, interval(ours.low, ours.high)
            if theirs is not None:
                difference = [f"{100 * (ours.mean - theirs):+.2f}", "yes" if ours.covers(theirs) else "no"]
        body.append(line + difference * compared)
    return Table(header, body, labels=2)


def auc_table(rows: Sequence[Row], cells: Mapping[Row, Sequence[Result]]) -> Table:
    """AUC by both definitions, with intervals."""
    body = []
    for row in rows:
        line = [MISSING, NONE, MISSING, NONE]
        if row in cells:
            both = [estimate(cells[row], definition)["auc"] for definition in ("notebook", "plain")]
            line = [text for auc in both for text in (percent(auc.mean), interval(auc.low, auc.high))]
        body.append([*_names(row), *line])
    header = ["Data", "Classifier", "AUC, notebook", "95 % interval", "AUC, plain", "95 % interval"]
    return Table(header, body, labels=2)


def distinct_table(rows: Sequence[Row], cells: Mapping[Row, Sequence[Result]]) -> Table:
    """Accuracy, F-score and AUC on all test images and on those that are no copies."""
    metrics = ("accuracy", "f_score", "auc")
    header = ["Data", "Classifier"]
    for metric in metrics:
        header += [f"{NAMES[metric]}, all", "without copies", "95 % interval"]
    body = []
    for row in rows:
        line = [MISSING, MISSING, NONE] * len(metrics)
        if row in cells:
            everything, rest = estimate(cells[row]), estimate(cells[row], distinct=True)
            line = []
            for metric in metrics:
                kept = rest[metric]
                line += [percent(everything[metric].mean), percent(kept.mean), interval(kept.low, kept.high)]
        body.append([*_names(row), *line])
    return Table(header, body, labels=2)


def group_table(rows: Sequence[Row], cells: Mapping[Row, Sequence[Result]], key: str) -> Table:
    """Share of the images of each "plane" or "country" that are classified rightly, over all seeds, in percent."""

    def groups(result: Result) -> np.ndarray:
        return np.array(PLANES)[result.targets] if key == "plane" else result.centers

    test = groups(next(iter(cells.values()))[0])
    names = [name for name in PLANES if name in test] if key == "plane" else sorted(set(test))
    body = []
    for row in rows:
        line = [MISSING] * len(names)
        if row in cells:
            counts = [by_group(result.targets, result.predictions, test) for result in cells[row]]
            sums = {name: np.sum([count[name] for count in counts], axis=0) for name in names}
            line = [percent(correct / total) for correct, total in sums.values()]
        body.append([*_names(row), *line])
    return Table(["Data", "Classifier", *(f"{name} ({(test == name).sum()})" for name in names)], body, labels=2)


def compare(first: Sequence[Sequence[Result]], second: Sequence[Sequence[Result]]) -> dict[str, Difference] | None:
    """Paired bootstrap of two data models, second less first, by metric; None if they have no seed in common.

    first, second: for each classifier, its results; the seeds that all of them have are compared, so that every
        classifier weighs the same
    """
    seeds = set.intersection(*({result.seed for result in row} for row in (*first, *second)))
    stacks = [
        np.array([result.predictions for row in rows for result in row if result.seed in seeds])
        for rows in (first, second)
    ]
    test = first[0][0]
    return paired_bootstrap(test.targets, *stacks, test.patients) if seeds else None


def comparison_table(baseline: str, data: str, cells: Mapping[Row, Sequence[Result]]) -> Table:
    """Two data models on the same images, by classifier: exact McNemar test of each seed, paired bootstrap of all."""
    metrics = ("accuracy", "f_score", "auc")
    header = ["Classifier", f"Right only with {baseline} : only with {data}, by seed"]
    header += [f"{NAMES[metric]}, {data} less {baseline}" for metric in metrics] + ["Published ACC"]
    pairs, body = {}, []
    for classifier, name in CLASSIFIERS.items():
        published = published_difference(baseline, data, [classifier])
        if (baseline, classifier) not in cells or (data, classifier) not in cells:
            body.append([name, MISSING, *[MISSING] * len(metrics), published])
            continue
        pairs[classifier] = first, second = cells[baseline, classifier], cells[data, classifier]
        tests = []
        for one in first:
            for other in second:
                if one.seed == other.seed:
                    test = mcnemar(one.targets, one.predictions, other.predictions)
                    tests.append(f"{test.only_first} : {test.only_second}, {p_value(test.p_value)}")
        body.append([name, "; ".join(tests) or NONE, *_differences(compare([first], [second]), metrics), published])
    if len(pairs) > 1:
        together = _differences(compare(*zip(*pairs.values())), metrics)
        body.append([f"all {len(pairs)}", NONE, *together, published_difference(baseline, data, list(pairs))])
    return Table(header, body, labels=2)


def published_difference(baseline: str, data: str, classifiers: Sequence[str]) -> str:
    """The paper's accuracy of `data` less that of `baseline`, in points, averaged over classifiers."""
    if not {(name, c) for name in (baseline, data) for c in classifiers} <= TABLE_1.keys():
        return NONE
    return f"{100 * np.mean([TABLE_1[data, c].accuracy - TABLE_1[baseline, c].accuracy for c in classifiers]):+.2f}"


def quality_table(rows: Sequence[Mapping[str, object]]) -> Table:
    """Fréchet and kernel distances, precision, recall, density, coverage, two-sample test, by plane and sampler."""
    names = {
        "plane": "Plane",
        "sampler": "Sampler",
        "images": "Images",
        "fid": "FID",
        "kid": "KID x 1000",
        "precision": "Precision",
        "recall": "Recall",
        "density": "Density",
        "coverage": "Coverage",
        "two_sample": "Two-sample ACC, %",
        "p_value": "p",
    }

    def cell(key: str, value: object) -> str:
        """A number with the digits of its column."""
        if value is None or (isinstance(value, float) and np.isnan(value)):
            return NONE
        if not isinstance(value, float):
            return str(value)
        if key == "p_value":
            return p_value(value).removeprefix("p ").removeprefix("= ")
        scale, digits = {"fid": (1, 1), "kid": (1000, 1), "two_sample": (100, 1)}.get(key, (1, 3))
        return f"{scale * value:.{digits}f}"

    return Table(list(names.values()), [[cell(key, row.get(key)) for key in names] for row in rows], labels=2)


def recognised_table(recognised: Mapping[str, Mapping[str, float]]) -> Table:
    """Shares in percent: label, such as "ES, with LoRA" -> sampler -> fraction."""
    samplers = list(dict.fromkeys(sampler for shares in recognised.values() for sampler in shares))
    rows = [
        [label, *(percent(shares[sampler]) if sampler in shares else MISSING for sampler in samplers)]
        for label, shares in recognised.items()
    ]
    return Table(["Classifier of real images; synthetic images", *samplers], rows)


def results_csv(results: Sequence[Result]) -> str:
    """A line for each row and seed: metrics as fractions with 95 % intervals, by both definitions of AUC, on all test
    images (all_...) and on those that are no copies (distinct_...)."""
    file = io.StringIO()
    writer = None
    for result in results:
        sources = result.training["sources"]
        line = {key: getattr(result, key) for key in ("table", "data", "classifier", "seed")}
        line |= {f"n_{name}": sources.get(key, 0) for name, key in SOURCES.items()}
        line |= {"n_test": len(result.targets), "n_copies": int(result.copies.sum())}
        for images in ("all", "distinct"):
            for definition in ("notebook", "plain"):
                for metric, ours in estimate([result], definition, images == "distinct").items():
                    stem = f"{images}_{definition}_{metric}"
                    values = {stem: ours.mean, f"{stem}_low": ours.low, f"{stem}_high": ours.high}
                    line |= {key: "" if np.isnan(value) else f"{value:.6f}" for key, value in values.items()}
        if writer is None:
            writer = csv.DictWriter(file, list(line), lineterminator="\n")
            writer.writeheader()
        writer.writerow(line)
    return file.getvalue()


def _names(row: Row) -> tuple[str, str]:
    return row[0], CLASSIFIERS[row[1]]


def _differences(found: Mapping[str, Difference] | None, metrics: Sequence[str]) -> list[str]:
    if found is None:
        return [MISSING] * len(metrics)
    return [
        f"{100 * d.value:+.2f} ({100 * d.low:+.1f} to {100 * d.high:+.1f}), {p_value(d.p_value)}"
        for d in (found[metric] for metric in metrics)
    ]

"""The report's tables, of what was run and nothing else. Fractions become percent here."""

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np

from eval.compare import Difference, by_group, mcnemar, spread
from eval.metrics import Scores
from paper.document import Table
from paper.gain import Cells, Gain, Row
from paper.plan import CLASSIFIERS, classifier_name
from paper.published import PUBLISHED, TRAINING, published_difference
from paper.results import METRICS, Estimate, Result, compare, estimate

NAMES = {
    "accuracy": "ACC",
    "recall": "Recall",
    "precision": "Precision",
    "f_score": "F-score",
    "auc": "AUC",
}
NONE = "–"
ONE_SEED = "*"  # marks an interval over patients alone
SOURCES = {
    "real": ("spain", "source"),
    "synthetic": ("synthetic",),
    "african": ("africa",),
    "target": ("target",),
}
"""A column of the tables -> the sources of its images."""
COMPARED = ("accuracy", "f_score", "auc")


def percent(value: float) -> str:
    """A fraction as percent; a dash if it is nan."""
    return NONE if np.isnan(value) else f"{100 * value:.2f}"


def points(value: float) -> str:
    """A difference of fractions in points; a dash if it is nan."""
    return NONE if np.isnan(value) else f"{100 * value:+.2f}"


def interval(found: Estimate) -> str:
    """Bounds of an interval in percent."""
    if np.isnan(found.low):
        return NONE
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}{ONE_SEED * (len(found.values) == 1)}"


def p_value(p: float) -> str:
    """A p-value to three decimals."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def overview(rows: Sequence[Row], cells: Cells, seeds: Sequence[int], compared: bool) -> Table:
    """All metrics of all rows.

    compared: with the published number of each in brackets
    """
    seen = {source for row in rows for source in cells[row][0].training["sources"]}
    kinds = [kind for kind in SOURCES if kind in ("real", "synthetic") or seen & {*SOURCES[kind]}]
    names = list(NAMES.values())
    header = [
        "Data",
        "Classifier",
        "Seeds",
        *(f"# {kind}" for kind in kinds),
        names[0],
        "95 % interval",
        *names[1:],
    ]
    body = []
    for row in rows:
        sources, found = cells[row][0].training["sources"], estimate(cells[row])
        values = [percent(found[metric].mean) for metric in METRICS]
        if compared and row in PUBLISHED:
            theirs = [percent(getattr(PUBLISHED[row], metric)) for metric in METRICS]
            values = [f"{ours} ({number})" for ours, number in zip(values, theirs)]
        values.insert(1, interval(found["accuracy"]))
        counts = [_count(sources, kind) for kind in kinds]
        body.append([*_names(row), f"{len(cells[row])} of {len(seeds)}", *counts, *values])
    return Table(header, body, labels=2)


def metric_table(
    metric: str, estimates: Mapping[Row, Mapping[str, Estimate]], compared: bool
) -> Table:
    """One metric of all rows: mean and standard deviation over seeds, interval of the mean.

    compared: also the published number, the difference to it, and whether one more seed of ours
        might give it
    """
    header = ["Data", "Classifier", NAMES[metric], "SD over seeds", "95 % interval"]
    header += ["Published", "Difference", "Another seed might give it"] * compared
    body = []
    for row, found in estimates.items():
        ours = found[metric]
        line = [*_names(row), percent(ours.mean), percent(spread(ours.values)[1]), interval(ours)]
        if compared and row in PUBLISHED:
            theirs = getattr(PUBLISHED[row], metric)
            reached = {True: "yes", False: "no", None: NONE}[ours.reaches(theirs)]
            line += [percent(theirs), points(ours.mean - theirs), reached]
        elif compared:
            line += [NONE] * 3
        body.append(line)
    return Table(header, body, labels=2)


def published_table(rows: Mapping[Row, Scores]) -> Table:
    """The paper's own numbers, with what it trained on."""
    body = []
    for (data, classifier), scores in rows.items():
        t = TRAINING[data]
        numbers = [percent(getattr(scores, metric)) for metric in METRICS]
        body.append(
            [data, CLASSIFIERS[classifier], t.spanish, t.synthetic, t.african, t.patients, *numbers]
        )
    header = [
        "Data",
        "Classifier",
        "# Spanish",
        "# synthetic",
        "# African",
        "# patients",
        *NAMES.values(),
    ]
    return Table(header, body, labels=2)


def gain_table(gains: Sequence[Gain], compared: bool) -> Table:
    """Differences in accuracy between data models, over the classifiers that both have.

    compared: with the paper's difference over the same classifiers
    """
    header = [
        "What is changed",
        "Difference",
        "Verdict",
        "ACC, points",
        "95 % interval",
        "p",
        "Classifiers",
        "Seeds",
    ]
    body = []
    for gain in gains:
        found, (low, high) = gain.accuracy, gain.seeds
        patients = found.over == "patients"
        line = [
            gain.step.what,
            f"{gain.step.data} less {gain.step.baseline}",
            gain.verdict,
            points(found.value),
        ]
        line += [f"{100 * found.low:+.1f} to {100 * found.high:+.1f}{ONE_SEED * patients}"]
        line += [NONE if patients else p_value(found.p_value).removeprefix("p ").removeprefix("= ")]
        line += [len(gain.classifiers), low if low == high else f"{low} to {high}"]
        body.append(line + [points(gain.published)] * compared)
    return Table(header + ["Published"] * compared, body, labels=3)


def comparison_table(
    baseline: str, data: str, cells: Cells, left_out: Mapping[str, str], compared: bool
) -> Table:
    """Two data models on the same images, by classifier: McNemar's test of each seed, the
    difference over all seeds.

    left_out: classifiers that are not in the last line, the average
    compared: with the paper's difference in accuracy
    """
    header = ["Classifier", f"Right only with {baseline} : only with {data}, by seed"]
    header += [f"{NAMES[metric]}, {data} less {baseline}" for metric in COMPARED] + [
        "Published ACC"
    ] * compared
    every = dict.fromkeys((*CLASSIFIERS, *(classifier for _, classifier in cells)))
    both = [c for c in every if (baseline, c) in cells and (data, c) in cells]
    averaged, body = [c for c in both if c in CLASSIFIERS and c not in left_out], []
    for classifiers in [[c] for c in both] + [averaged] * (len(averaged) > 1):
        first, second = ([cells[name, c] for c in classifiers] for name in (baseline, data))
        tests = [
            mcnemar(one.targets, one.predictions, other.predictions)
            for one in first[0]
            for other in second[0]
            if one.seed == other.seed and len(classifiers) == 1
        ]
        pairs = [
            f"{test.only_first} : {test.only_second}, {p_value(test.p_value)}" for test in tests
        ]
        found = compare(first, second)
        name = (
            classifier_name(classifiers[0]) if len(classifiers) == 1 else f"all {len(classifiers)}"
        )
        line = [
            name,
            "; ".join(pairs) or NONE,
            *(_difference(found[metric]) for metric in COMPARED),
        ]
        body.append(line + [points(published_difference(baseline, data, classifiers))] * compared)
    return Table(header, body, labels=2)


def probe_table(data: Sequence[str], cells: Cells, left_out: Mapping[str, str]) -> Table:
    """Data models, averaged over the trained classifiers, less each frozen model's row on the same
    images.

    data: those data models; left_out: classifiers in no average
    """
    header = [
        "Frozen model",
        "on",
        *(f"{NAMES[metric]}, {name} less it" for name in data for metric in COMPARED[:2]),
    ]
    body = []
    for row in (row for row in cells if row[1] not in CLASSIFIERS):
        line = [classifier_name(row[1]), row[0]]
        for name in data:
            trained = [
                cells[name, c] for c in CLASSIFIERS if (name, c) in cells and c not in left_out
            ]
            found = compare([cells[row]], trained) if trained else None
            line += [_difference(found[metric]) if found else NONE for metric in COMPARED[:2]]
        body.append(line)
    return Table(header, body, labels=2)


def auc_table(rows: Sequence[Row], cells: Cells) -> Table:
    """AUC by both definitions, with intervals."""
    body = []
    for row in rows:
        both = [estimate(cells[row], definition)["auc"] for definition in ("notebook", "plain")]
        body.append(
            [*_names(row), *(text for auc in both for text in (percent(auc.mean), interval(auc)))]
        )
    header = ["Data", "Classifier", "AUC, notebook", "95 % interval", "AUC, plain", "95 % interval"]
    return Table(header, body, labels=2)


def distinct_table(rows: Sequence[Row], cells: Cells) -> Table:
    """Accuracy, F-score and AUC on all test images and on those that are no copies."""
    header = ["Data", "Classifier"]
    for metric in COMPARED:
        header += [f"{NAMES[metric]}, all", "without copies", "95 % interval"]
    body = []
    for row in rows:
        everything, rest = estimate(cells[row]), estimate(cells[row], distinct=True)
        line = [*_names(row)]
        for metric in COMPARED:
            line += [
                percent(everything[metric].mean),
                percent(rest[metric].mean),
                interval(rest[metric]),
            ]
        body.append(line)
    return Table(header, body, labels=2)


def group_table(rows: Sequence[Row], cells: Cells, key: str) -> Table:
    """Share of the images of each "class" or "center" that are classified rightly, over all seeds,
    in percent."""
    first = cells[rows[0]][0]
    test = np.array(first.classes)[first.targets] if key == "class" else first.centers
    names = (
        [name for name in first.classes if name in test] if key == "class" else sorted(set(test))
    )
    body = []
    for row in rows:
        counts = [by_group(result.targets, result.predictions, test) for result in cells[row]]
        sums = [np.sum([count[name] for count in counts], axis=0) for name in names]
        body.append([*_names(row), *(percent(correct / total) for correct, total in sums)])
    return Table(
        ["Data", "Classifier", *(f"{name} ({(test == name).sum()})" for name in names)],
        body,
        labels=2,
    )


def quality_table(rows: Sequence[Mapping[str, object]]) -> Table:
    """Fréchet and kernel distances, precision, recall, density, coverage, two-sample test, by plane
    and sampler."""
    names = {
        "plane": "Class",
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

    return Table(
        list(names.values()), [[cell(key, row.get(key)) for key in names] for row in rows], labels=2
    )


def recognised_table(recognised: Mapping[str, Mapping[str, float]]) -> Table:
    """Shares in percent: label, such as "ES, with LoRA" -> sampler -> fraction."""
    samplers = list(dict.fromkeys(sampler for shares in recognised.values() for sampler in shares))
    rows = [
        [label, *(percent(shares.get(sampler, np.nan)) for sampler in samplers)]
        for label, shares in recognised.items()
    ]
    return Table(["Classifier of real images; synthetic images", *samplers], rows)


def results_csv(results: Sequence[Result]) -> str:
    """A line for each row and seed: metrics as fractions with 95 % intervals over patients, by both
    definitions of AUC, on all test images (all_...) and on those that are no copies
    (distinct_...)."""
    file = io.StringIO()
    writer = None
    for result in results:
        sources = result.training["sources"]
        line = {key: getattr(result, key) for key in ("table", "data", "classifier", "seed")}
        line |= {f"n_{name}": _count(sources, name) for name in ("real", "synthetic")}
        line |= {"n_second": _count(sources, "african") + _count(sources, "target")}
        line |= {"n_test": len(result.targets), "n_copies": int(result.copies.sum())}
        for images in ("all", "distinct"):
            for definition in ("notebook", "plain"):
                for metric, ours in estimate([result], definition, images == "distinct").items():
                    stem = f"{images}_{definition}_{metric}"
                    values = {stem: ours.mean, f"{stem}_low": ours.low, f"{stem}_high": ours.high}
                    line |= {
                        key: "" if np.isnan(value) else f"{value:.6f}"
                        for key, value in values.items()
                    }
        if writer is None:
            writer = csv.DictWriter(file, list(line), lineterminator="\n")
            writer.writeheader()
        writer.writerow(line)
    return file.getvalue()


def _count(sources: Mapping[str, int], kind: str) -> int:
    return sum(sources.get(source, 0) for source in SOURCES[kind])


def _names(row: Row) -> tuple[str, str]:
    return row[0], classifier_name(row[1])


def _difference(found: Difference) -> str:
    if np.isnan(found.value):
        return NONE
    text = f"{points(found.value)} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    return text + ONE_SEED if found.over == "patients" else f"{text}, {p_value(found.p_value)}"

"""The report: published numbers, finished rows read back, scores over seeds, and every table made
of them."""

import argparse
import csv
import json
import re
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import t

from eval.metrics import bootstrap, confusion, score
from harness.record import code_version, record_environment
from paper import tables
from paper.details import trained_on
from paper.document import (
    Beside,
    Code,
    Details,
    Heading,
    Paragraph,
    Picture,
    Table,
    to_html,
    to_markdown,
)
from paper.gain import STEPS, measure
from paper.plan import CLASSIFIERS
from paper.published import CLAIMS, PUBLISHED, TABLE_1, TABLE_2, TRAINING, published_difference
from paper.report import PHANTOMS, TITLES, Context, build
from paper.results import (
    METRICS,
    Estimate,
    ResultError,
    compare,
    estimate,
    read_result,
    require_same_test,
)
from planes import PLANES

pytestmark = pytest.mark.slow

SHARED = Path(__file__).resolve().parents[3] / "shared"
COUNTRIES = ("Algeria", "Egypt", "Ghana")
N = 48  # four planes of twelve patients
TARGETS = np.tile(np.arange(4), 12)
COPIES = np.arange(N) % 8 == 0


def finish(
    root, data="HB+DA", classifier="resnet18", seed=0, right=0.7, table="1", copies=True, order=None
):
    """A finished row as classify.py leaves it, read back: the first `right` of the images are read
    right."""
    folder = root / "rows" / data / classifier / f"seed{seed}"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    predictions = np.where(
        rng.permutation(N) < round(right * N), TARGETS, (TARGETS + rng.integers(1, 5, N)) % 5
    )
    probabilities = rng.dirichlet(np.ones(5), N) + 2 * np.eye(5)[predictions]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    with open(folder / "predictions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        names = [
            "image",
            "patient",
            "center",
            "target",
            "prediction",
            *(["copy"] if copies else []),
            *PLANES,
        ]
        writer.writerow(names)
        for n in range(N) if order is None else order:
            patient = n // 4
            row = [f"image{n}", f"{COUNTRIES[patient % 3]}-{patient}", COUNTRIES[patient % 3]]
            row += [
                PLANES[TARGETS[n]],
                PLANES[predictions[n]],
                *([int(COPIES[n])] if copies else []),
            ]
            writer.writerow([*row, *(f"{p:.6f}" for p in probabilities[n])])
    sources = {"spain": 60, "synthetic": 40} if "HB" in data else {"spain": 60}
    metrics = {
        "confusion": confusion(TARGETS, predictions).tolist(),
        "training": {"images": 100, "sources": sources},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return read_result(folder, table, data, classifier, seed)


def context(phantoms=False, seeds=(0, 1), left_out=()):
    text = (
        "a tiny model",
        "two sites",
        phantoms,
        "notebook",
        seeds,
        "python reproduce.py",
        ("A note.",),
    )
    return Context(*text, dict(left_out))


def line(text, *start):
    """The cells of the first line of a Markdown text that begins with these."""
    found = next(
        part for part in text.splitlines() if part.startswith("| " + " | ".join(start) + " |")
    )
    return [cell.strip() for cell in found.strip("|").split("|")]


def section(text, title):
    return text.split(f"# {title}\n")[1].split("\n#")[0]


# --- the published numbers ---


def test_every_published_accuracy_is_a_whole_number_of_233_images():
    assert len(TABLE_1) == 20 and {classifier for _, classifier in TABLE_1} == set(CLASSIFIERS)
    assert len(TABLE_2) == 4 and {classifier for _, classifier in TABLE_2} == {"vit_b_16"}
    assert len(PUBLISHED) == 23  # ES with ViT is in both
    for row, scores in PUBLISHED.items():
        cut = 5e-5 * (row[0] == "AF")  # 213 of 233 are 91.416 %, printed as 91.41
        assert round(round(scores.accuracy * 233) / 233 - cut, 4) == pytest.approx(
            scores.accuracy, abs=1e-9
        )
    best = max(TABLE_1, key=lambda row: TABLE_1[row].accuracy)
    assert best == ("HB+DA", "resnet18") and TABLE_1[best].accuracy == pytest.approx(
        192 / 233, abs=5e-5
    )


def test_the_published_table_is_the_authors_file():
    path = SHARED / "data" / "manifests" / "published_overall_performance.csv"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    keys = {name: key for key, name in CLASSIFIERS.items()}
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    for row in rows:
        scores = TABLE_1[row["Data"], keys[row["Model"]]]
        theirs = [float(row[name]) for name in ("ACC", "Recall", "Precision", "F-score", "AUC")]
        assert [100 * getattr(scores, metric) for metric in METRICS] == pytest.approx(
            theirs, abs=1e-9
        )


def test_the_papers_text_follows_from_its_tables():
    means = {
        data: 100 * np.mean([TABLE_1[data, c].f_score for c in CLASSIFIERS])
        for data in ("HB+DA", "HB", "ES")
    }
    assert means == pytest.approx({"HB+DA": 81.86, "HB": 78.0, "ES": 72.95}, abs=0.005)
    best = TABLE_1["HB+DA", "resnet18"].accuracy - TABLE_1["ES+DA", "densenet169"].accuracy
    assert best == pytest.approx(0.1373)
    less = [
        getattr(TABLE_2["AF", "vit_b_16"], m) - getattr(TABLE_2["HB-all", "vit_b_16"], m)
        for m in ("f_score", "auc")
    ]
    assert less == pytest.approx([0.046, 0.05], abs=6e-4)


def test_the_claims_carry_the_published_mean_differences():
    points = {pair: round(100 * gain, 2) for pair, gain in CLAIMS.items()}
    assert points == {("ES+DA", "HB+DA"): 11.84, ("ES", "HB"): 7.38, ("ES", "HB-all"): 10.30}
    assert published_difference("ES+DA", "HB+DA", ["resnet18"]) == pytest.approx(0.1931)
    assert np.isnan(published_difference("ES", "HB-all", ["resnet18", "vit_b_16"]))
    assert np.isnan(published_difference("ES", "BAL"))


def test_training_counts_are_the_papers_and_those_alike_are_named_together():
    assert {data for data, _ in PUBLISHED} == set(TRAINING)
    assert TRAINING["ES+AF"].patients == TRAINING["ES"].patients + TRAINING["AF"].patients == 673
    assert (
        trained_on(["ES", "ES+DA", "HB", "BAL", "ES+AF"])
        == "ES and ES+DA on 6148 Spanish images (612 patients); HB on 1150 Spanish and 5000"
        " synthetic images (486 patients); ES+AF on 6148 Spanish and 217 African images (673"
        " patients)"
    )


def test_the_notebooks_confusion_matrix_gives_table_2s_hybrid_row():
    matrix = [[37, 0, 2, 1, 25], [0, 64, 0, 0, 1], [0, 0, 53, 0, 11], [0, 1, 1, 29, 8]]
    targets, predictions = np.repeat(
        [(i, j) for i in range(4) for j in range(5)], np.ravel(matrix), axis=0
    ).T
    found = score(targets, predictions)
    for metric in METRICS:
        assert getattr(found, metric) == pytest.approx(
            getattr(TABLE_2["HB-all", "vit_b_16"], metric), abs=5e-5
        )


# --- finished rows ---


def test_a_finished_row_is_read_back_whole(tmp_path):
    result = finish(tmp_path, seed=3)
    assert (result.table, result.name) == ("1", "HB+DA/resnet18/seed3")
    assert result.targets.tolist() == TARGETS.tolist() and result.copies.tolist() == COPIES.tolist()
    assert (
        result.images[5] == "image5"
        and result.patients[5] == "Egypt-1"
        and result.centers[5] == "Egypt"
    )
    assert result.probabilities.shape == (N, 5)
    assert result.probabilities.argmax(axis=1).tolist() == result.predictions.tolist()
    assert result.training["sources"] == {"spain": 60, "synthetic": 40}
    assert not finish(tmp_path, seed=4, copies=False).copies.any()


def test_an_unfinished_or_mixed_row_is_one_line_that_names_its_folder(tmp_path):
    finish(tmp_path)
    folder = tmp_path / "rows" / "HB+DA" / "resnet18" / "seed0"
    table = (folder / "predictions.csv").read_text()

    def refused(match):
        with pytest.raises(ResultError, match=match) as error:
            read_result(folder, "1", "HB+DA", "resnet18", 0)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)

    (folder / "predictions.csv").write_text(table.rsplit("\n", 3)[0] + "\n")
    refused("different runs")
    header, _, body = table.partition("\n")
    (folder / "predictions.csv").write_text(f"{header}\n{body.replace('brain', 'head')}")
    refused("not a finished row")
    (folder / "predictions.csv").unlink()
    refused("not a finished row")


def test_rows_of_different_test_sets_are_refused(tmp_path):
    first = finish(tmp_path)
    require_same_test([first, finish(tmp_path, seed=1)])
    shuffled = finish(tmp_path, seed=2, order=[*range(4, N), *range(4)])
    with pytest.raises(
        ResultError, match=r"HB\+DA/resnet18/seed2: its test images are not those of .*seed0"
    ):
        require_same_test([first, shuffled])
    with pytest.raises(ResultError, match="nothing to report"):
        build(tmp_path, [], context())


# --- scores over seeds ---


@pytest.mark.parametrize("definition", ["notebook", "plain"])
def test_with_one_seed_the_interval_is_the_bootstraps(tmp_path, definition):
    r = finish(tmp_path)
    found = estimate([r], definition)
    intervals = bootstrap(r.targets, r.predictions, r.patients, definition, r.probabilities)
    for metric in METRICS:
        value = getattr(score(r.targets, r.predictions, definition, r.probabilities), metric)
        assert found[metric].mean == pytest.approx(value, abs=1e-12)
        assert (found[metric].low, found[metric].high) == pytest.approx(
            intervals[metric], abs=1e-12
        )


def test_the_interval_of_several_seeds_reckons_with_their_spread(tmp_path):
    a, b = finish(tmp_path, right=0.9), finish(tmp_path, seed=1, right=0.5)
    both, one, other = (
        estimate([a, b])["accuracy"],
        estimate([a])["accuracy"],
        estimate([b])["accuracy"],
    )
    assert both.values == (one.mean, other.mean) and both.mean == pytest.approx(
        (one.mean + other.mean) / 2
    )
    # two seeds 40 points apart say nothing, and no accuracy is beyond 0 and 1
    assert (both.low, both.high) == (0, 1)
    # a seed paired with itself has no spread: the same patients, a t interval in the place of
    # percentiles
    twice = estimate([b, b])["accuracy"]
    assert (
        twice.high - twice.low == pytest.approx(other.high - other.low, rel=0.2) and twice.low > 0
    )


def test_a_published_number_is_reached_where_one_more_seed_might_give_it():
    values = 0.70, 0.74, 0.78
    half = t.ppf(0.975, 2) * 0.04 * np.sqrt(4 / 3)
    found = Estimate(values, 0.6, 0.9)
    assert [
        found.reaches(0.74 + sign * (half + more)) for sign in (-1, 1) for more in (-1e-6, 1e-6)
    ] == [
        True,
        False,
    ] * 2
    assert Estimate((0.7,), 0.6, 0.8).reaches(0.7) is None


def test_copies_are_left_out_on_request(tmp_path):
    r = finish(tmp_path)
    kept = ~COPIES
    found = estimate([r], "plain", distinct=True)["auc"].mean
    assert found == pytest.approx(
        score(r.targets[kept], r.predictions[kept], "plain", r.probabilities[kept]).auc
    )
    assert found != estimate([r], "plain")["auc"].mean


# --- tables ---


def cells_of(*results):
    cells = {}
    for result in results:
        cells.setdefault((result.data, result.classifier), []).append(result)
    return cells


def test_a_metric_table_says_how_far_the_published_number_is_and_whether_another_seed_might_give_it(
    tmp_path,
):
    row, own = ("HB+DA", "resnet18"), ("HB-token+DA", "resnet18")
    estimates = {row: estimate([finish(tmp_path, right=0.75), finish(tmp_path, seed=1, right=0.7)])}
    estimates[own] = estimate([finish(tmp_path, "HB-token+DA", right=0.75)])
    table = tables.metric_table("accuracy", estimates, compared=True)
    low, high = estimates[row]["accuracy"].low, estimates[row]["accuracy"].high
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    # of two seeds 37 points wide
    assert table.rows[0][2:] == ["72.92", "2.95", interval, "82.40", "-9.48", "yes"]
    assert (
        table.rows[1][3] == "–"
        and table.rows[1][4].endswith("*")
        and table.rows[1][5:] == ["–"] * 3
    )
    close = {row: Estimate((0.72, 0.721, 0.719), 0.6, 0.8)}
    assert (
        tables.metric_table("accuracy", {row: dict.fromkeys(METRICS, close[row])}, True).rows[0][-1]
        == "no"
    )
    assert (
        len(tables.metric_table("accuracy", estimates, compared=False).header)
        == len(table.header) - 3
    )


def test_a_comparison_counts_discordant_images_by_seed_and_averages_classifiers_that_are_not_left_out(
    tmp_path,
):
    results = [finish(tmp_path, "ES+DA", "resnet18", seed, 0.5) for seed in (0, 1, 2)]
    results += [finish(tmp_path, "HB+DA", "resnet18", seed, 0.9) for seed in (0, 1)]
    results += [
        finish(tmp_path, "ES+DA", "vit_b_16", 1, 0.5),
        finish(tmp_path, "HB+DA", "vit_b_16", 1, 0.75),
    ]
    cells = cells_of(*results)
    table = tables.comparison_table("ES+DA", "HB+DA", cells, {}, compared=True)
    rows = {row[0]: row for row in table.rows}
    # in the plan's order, nothing that was not run
    assert list(rows) == ["ResNet18", "ViT b16", "all 2"]
    # with equal seeds the images that are read right are nested: 24 of 48, then 43 or 36
    assert rows["ResNet18"][1] == "0 : 19, p < 0.001; 0 : 19, p < 0.001"
    assert re.fullmatch(r"\+39\.58 \(\+\S+ to \+\S+\), p < 0\.001", rows["ResNet18"][2])
    assert rows["ResNet18"][-1] == "+19.31"
    assert re.fullmatch(r"\+25\.00 \(\S+ to \S+\)\*", rows["ViT b16"][2])  # one seed: no p-value
    assert rows["all 2"][2].startswith("+32.29 (") and rows["all 2"][2].endswith("*")
    assert rows["all 2"][-1] == f"{(19.31 + 7.29) / 2:+.2f}"
    table = tables.comparison_table(
        "ES+DA", "HB+DA", cells, {"vit_b_16": "a reason"}, compared=False
    )
    assert [row[0] for row in table.rows] == ["ResNet18", "ViT b16"] and len(table.header) == 5


def test_seeds_of_two_data_models_are_compared_though_their_numbers_differ(tmp_path):
    first = [finish(tmp_path, "ES", seed=seed, right=0.5) for seed in (0, 1)]
    second = [finish(tmp_path, "HB", seed=seed, right=0.75) for seed in (2, 3, 4)]
    found = compare([first], [second])["accuracy"]
    assert found.value == pytest.approx(0.25) and found.over == "patients and seeds"
    (row,) = tables.comparison_table("ES", "HB", cells_of(*first, *second), {}, compared=False).rows
    assert row[1] == "–" and row[2].startswith("+25.00 (")


def test_the_table_of_gains_has_verdicts_and_stars_for_one_seed(tmp_path):
    results = [finish(tmp_path, "ES+DA", seed=seed, right=0.5) for seed in (0, 1)]
    results += [finish(tmp_path, "HB+DA", seed=seed, right=0.9) for seed in (0, 1)]
    results += [finish(tmp_path, "BAL+DA", right=0.5)]
    rows = tables.gain_table(measure(STEPS, cells_of(*results), {}), compared=True).rows
    assert [row[1:4] for row in rows] == [
        ["HB+DA less ES+DA", "better", "+39.58"],
        ["BAL+DA less ES+DA", "one seed cannot tell", "+0.00"],
        ["HB+DA less BAL+DA", "one seed cannot tell", "+39.58"],
    ]
    assert rows[0][5:] == ["< 0.001", 1, 2, "+19.31"] and rows[1][5:] == ["–", 1, "1 to 2", "–"]
    assert not rows[0][4].endswith("*") and rows[1][4].endswith("*")


def test_groups_are_counted_over_all_seeds(tmp_path):
    a, b = finish(tmp_path, right=0.9), finish(tmp_path, seed=1, right=0.6)
    row = ("HB+DA", "resnet18")
    table = tables.group_table([row], cells_of(a, b), "center")
    assert table.header[2:] == ["Algeria (16)", "Egypt (16)", "Ghana (16)"]
    for name, cell in zip(COUNTRIES, table.rows[0][2:]):
        right = [(r.targets == r.predictions)[r.centers == name].mean() for r in (a, b)]
        assert cell == f"{100 * np.mean(right):.2f}"
    header = tables.group_table([row], cells_of(a), "class").header
    assert header[2:] == ["abdomen (12)", "brain (12)", "femur (12)", "thorax (12)"]


def test_quality_and_recognised_shares_show_what_is_there_and_dashes_for_what_is_not():
    row = {
        "plane": "brain",
        "sampler": "unipc",
        "images": 20,
        "fid": 12.34,
        "kid": 0.0123,
        "two_sample": 0.75,
    }
    cells = tables.quality_table([row | {"p_value": 1e-9, "recall": float("nan")}]).rows[0]
    assert cells == ["brain", "unipc", "20", "12.3", "12.3", "–", "–", "–", "–", "75.0", "< 0.001"]
    assert tables.quality_table([{"p_value": 0.25}]).rows[0][-1] == "0.250"
    table = tables.recognised_table(
        {"with": {"euler": 0.5, "unipc": 1.0}, "without": {"unipc": 0.0}}
    )
    assert table.rows == [["with", "50.00", "100.00"], ["without", "–", "0.00"]]


def test_results_csv_has_a_line_for_each_row_and_seed_with_both_definitions(tmp_path):
    results = [finish(tmp_path), finish(tmp_path, seed=1, right=0.5)]
    rows = list(csv.DictReader(tables.results_csv(results).splitlines()))
    assert [
        (row["data"], row["seed"], row["n_real"], row["n_synthetic"], row["n_second"])
        for row in rows
    ] == [
        ("HB+DA", "0", "60", "40", "0"),
        ("HB+DA", "1", "60", "40", "0"),
    ]
    assert len(rows[0]) == 9 + 2 * 2 * 5 * 3 and rows[0]["n_copies"] == "6"
    for definition in ("notebook", "plain"):
        ours = estimate(results[1:], definition, distinct=True)["auc"]
        found = [float(rows[1][f"distinct_{definition}_auc{end}"]) for end in ("", "_low", "_high")]
        assert found == pytest.approx([ours.mean, ours.low, ours.high], abs=1e-6)
    assert rows[0]["all_notebook_auc"] != rows[0]["all_plain_auc"] != rows[0]["distinct_plain_auc"]


# --- the document ---


class Checker(HTMLParser):
    """Refuses an element that is not closed in order; collects text and what the page would
    load."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_document_is_escaped_in_both_forms_and_its_pictures_are_inlined(tmp_path):
    (tmp_path / "a folder").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "a folder" / "b.png")
    table = Table(["name", "n"], [["a|b", "<1"]])
    blocks = [Heading("T & U", 1), Paragraph("x < y"), Code("run > it"), table]
    blocks += [Picture(tmp_path / "a folder" / "b.png", 'a "b"')]
    assert (
        to_markdown(blocks, tmp_path)
        == "# T & U\n\nx < y\n\n```\nrun > it\n```\n\n| name | n |\n| --- | --: |\n| a\\|b | <1"
        " |\n\n"
        '![a "b"](a%20folder/b.png)\n'
    )
    page = Checker()
    page.feed(to_html(blocks))
    assert (
        not page.open
        and len(page.sources) == 1
        and page.sources[0].startswith("data:image/png;base64,iVBOR")
    )
    assert {"T & U", "x < y", "run > it", "a|b", "<1", 'a "b"'} <= set(page.text)
    folded = [
        Heading("T", 1),
        Details("More & more", [Paragraph("inside"), Beside(blocks[-1:] * 2)]),
    ]
    picture = '![a "b"](a%20folder/b.png)'
    assert (
        to_markdown(folded, tmp_path)
        == f"# T\n\n### More & more\n\ninside\n\n{picture}\n\n{picture}\n"
    )
    page = Checker()
    page.feed(to_html(folded))
    assert not page.open and len(page.sources) == 2
    assert "<details><summary>More &amp; more</summary>\n<p>inside</p>" in to_html(folded)
    with pytest.raises(ValueError, match="1 cells under 2 headings: only one"):
        Table(["a", "b"], [["only one"]])


# --- the whole ---


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """One report on real data and one on phantoms, of the same few rows."""
    root = tmp_path_factory.mktemp("report")
    results = [finish(root, "ES+DA", "resnet18", seed, 0.5) for seed in (1, 0)]
    results += [finish(root, "HB+DA", "resnet18", seed, 0.9) for seed in (0, 1)]
    results += [finish(root, "HB-styles+DA", "resnet18", seed, 0.8, "styles") for seed in (0, 1)]
    results += [
        finish(root, "ES+DA+contrast", "resnet18", seed, 0.95, "controls") for seed in (0, 1)
    ]
    results += [
        finish(root, "AF", "vit_b_16", 0, 0.8, "2"),
        finish(root, "HB-token+DA", "resnet18", 0, 0.9, "beyond"),
    ]
    for name in ("figure", "second"):
        Image.new("L", (4, 4)).save(root / f"{name}.png")
    parts = {
        "quality": [{"plane": "brain", "sampler": "euler", "fid": 1.5}],
        "recognised": {"ES, with LoRA": {"euler": 0.9}},
        "figures": [
            ("Figure 2", root / "figure.png", "Samples."),
            ("Figure 3", root / "second.png", "Points."),
        ],
    }
    build(root, results, context(), **parts)
    files = {
        name: (root / name).read_bytes() for name in ("report.md", "report.html", "results.csv")
    }
    build(root, results[::-1], context(), **parts)
    again = {name: (root / name).read_bytes() for name in files}
    rows = [r for r in results if r.table != "beyond"]
    left_out = {"vit_b_16": "it stays near chance", "densenet169": "it was not run"}
    build(root, rows, context(phantoms=True, left_out=left_out))
    return root, files, again, (root / "report.md").read_text()


def test_equal_results_in_any_order_give_equal_files(reports):
    _, files, again, _ = reports
    assert files == again


def test_the_first_screen_is_what_was_found_the_gains_the_samples_and_table_1(reports):
    blocks = reports[1]["report.md"].decode().split("\n\n")
    assert blocks[0] == "# FU-LoRA, reproduced"
    assert blocks[1].startswith(
        "On two sites: HB+DA, with synthetic images, is better than ES+DA, without: +39.6 points"
    )
    assert "published +19.31)" in blocks[1]
    assert (
        "Controls without synthetic images" in blocks[1]
        and "ES+DA+contrast against HB+DA +6.2 (" in blocks[1]
    )
    assert (
        blocks[2].endswith("(figures/gain.png)")
        and blocks[3] == "![Figure 2. Samples.](figure.png)"
    )
    assert blocks[4] == "## Table 1: zero-shot classification"


def test_rows_that_were_not_run_are_nowhere_and_those_that_were_are_under_their_own_heading(
    reports,
):
    text = reports[1]["report.md"].decode()
    ours = text.split("### What the paper printed")[0]
    rows = {
        tuple(row)
        for row in re.findall(r"^\| ((?:ES|HB|AF|BAL)\S*) \| (\S+(?: \S+)?) \|", ours, re.M)
    }
    names = ("ES+DA", "HB+DA", "HB-styles+DA", "ES+DA+contrast", "HB-token+DA")
    assert rows == {(name, "ResNet18") for name in names} | {("AF", "ViT b16")}
    assert "missing" not in text
    first = section(text, TITLES["1"])
    assert line(first, "HB+DA", "ResNet18")[2:6] == ["2 of 2", "60", "40", "89.58 (82.40)"]
    assert (
        "ES+DA on 6148 Spanish images (612 patients); HB+DA on 1150 Spanish and 5000 synthetic"
        " images" in first
    )
    assert line(section(text, TITLES["2"]), "AF", "ViT b16")[2:7] == [
        "1 of 2",
        "60",
        "0",
        "79.17 (91.41)",
        "62.5 to 91.7*",
    ]
    assert line(section(text, TITLES["controls"]), "ES+DA+contrast", "ResNet18")[5] == "95.83"
    assert line(section(text, TITLES["styles"]), "HB-styles+DA", "ResNet18")[5] == "79.17"
    assert line(section(text, "ACC of every row"), "HB+DA", "ResNet18")[5:7] == ["82.40", "+7.18"]


def test_the_gains_are_in_a_table_and_a_picture(reports):
    table = section(reports[1]["report.md"].decode(), "Where the gain comes from")
    total = line(table, "balanced real images and synthetic ones", "HB+DA less ES+DA", "better")
    assert total[3] == "+39.58" and total[-3:] == ["1", "2", "+19.31"]
    assert line(table, "prompts that name the style", "HB-styles+DA less HB+DA")[3:4] == ["-10.42"]
    beyond = section(reports[1]["report.md"].decode(), TITLES["beyond"])
    assert (
        line(beyond, "other synthetic images", "HB-token+DA less HB+DA")[2]
        == "one seed cannot tell"
    )


def test_the_report_is_two_files_that_need_nothing_outside_their_folder(reports):
    root, files, _, _ = reports
    html = files["report.html"].decode()
    page = Checker()
    page.feed(html)
    links = re.findall(r"^!\[.*\]\((.*)\)$", files["report.md"].decode(), re.M)
    assert not page.open and len(page.sources) == len(links)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert (
        links[:3] == ["figures/gain.png", "figure.png", "figures/accuracy.png"]
        and links[-1] == "second.png"
    )
    assert all((root / link).exists() for link in links)
    titles = re.findall(r"^##+ (.*)$", files["report.md"].decode(), re.M)
    assert [title for title in titles if title in page.text] == titles and len(titles) > 20
    shown = html.split("<details>")[0]
    assert all(
        f"<h2>{title}</h2>" in shown
        for title in (
            "In detail",
            "How this was made",
            *(escape(t) for key, t in TITLES.items() if key != "probes"),
        )
    )
    assert html.count("<details>") == html.count("</details>") == 15


def test_the_papers_tables_are_folded_away_whole(reports):
    part = section(reports[1]["report.md"].decode(), "What the paper printed")
    assert len(re.findall(r"^\| (?:ES|HB|AF)", part, re.M)) == 24
    assert "HB+DA less ES+DA +11.84, HB less ES +7.38, HB-all less ES +10.30" in part
    assert line(part, "HB-all", "ViT b16")[2:7] == ["6148", "5000", "0", "612", "78.54"]


def test_beside_phantoms_stands_no_published_number(reports):
    text = reports[3]
    ours, printed = text.split("### What the paper printed")
    assert PHANTOMS in ours and PHANTOMS not in reports[1]["report.md"].decode()
    assert all(word not in ours for word in ("(82.40)", "ublished", "+19.31", "6148"))
    assert "Of the real datasets" in printed and "82.40" in printed
    assert (
        "Beyond the paper" not in text
        and "\n\nLeft out of averages: ViT b16: it stays near chance.\n" in ours
    )
    assert "was not run" not in text


def test_a_single_row_makes_a_report_that_claims_nothing(tmp_path):
    build(
        tmp_path,
        [finish(tmp_path, table="1")],
        context(seeds=(0,), left_out={"vit_b_16": "near chance"}),
    )
    text = (tmp_path / "report.md").read_text()
    assert "nothing is claimed" in text and "Where the gain comes from" not in text
    assert line(text, "HB+DA", "ResNet18")[6].endswith("*")


# --- what a run was ---


def git(folder, *command):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *command], check=True, capture_output=True)


def test_the_environment_says_machine_versions_hashes_and_commit(tmp_path):
    args = argparse.Namespace(out=tmp_path, seed=3)
    record_environment(tmp_path, args, {"weights.pth": "abc"})
    record = json.loads((tmp_path / "environment.json").read_text())
    assert record["arguments"] == {"out": str(tmp_path), "seed": 3} and record["inputs"] == {
        "weights.pth": "abc"
    }
    assert record["versions"]["numpy"] == np.__version__
    assert (
        record["machine"]["cpu"]
        and record["machine"]["cpus"] >= 1
        and isinstance(record["machine"]["gpus"], list)
    )
    assert "code" in record


def test_the_code_version_is_the_commit_and_whether_tracked_files_differ(tmp_path):
    assert code_version(tmp_path) is None
    git(tmp_path, "init")
    assert code_version(tmp_path) is None  # nothing committed
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    (tmp_path / "untracked").write_text("1")
    found = code_version(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", found["commit"]) and found["modified"] is False
    (tmp_path / "a").write_text("2")
    assert code_version(tmp_path) == {"commit": found["commit"], "modified": True}

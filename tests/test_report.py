"""The report: published numbers, finished rows read back, scores over seeds, and every table made of them."""

import argparse
import csv
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import tables
from eval.document import Code, Heading, Paragraph, Picture, Table, to_html, to_markdown
from eval.metrics import bootstrap, confusion, score
from eval.plan import CLASSIFIERS
from eval.published import NOTEBOOK_RUN, TABLE_1
from eval.record import code_version, record_environment
from eval.report import PHANTOMS, Context, build
from eval.results import METRICS, ResultError, estimate, read_result, require_same_test
from planes import PLANES

pytestmark = pytest.mark.slow

SHARED = Path(__file__).resolve().parents[2] / "shared"
COUNTRIES = ("Algeria", "Egypt", "Ghana")
N = 48  # four planes of twelve patients
TARGETS = np.tile(np.arange(4), 12)
COPIES = np.arange(N) % 8 == 0


def finish(root, data="HB+DA", classifier="resnet18", seed=0, right=0.7, table="1", copies=True, order=None):
    """A finished row as classify.py leaves it, read back: the first `right` of the images are read right."""
    folder = root / "rows" / data / classifier / f"seed{seed}"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    predictions = np.where(rng.permutation(N) < round(right * N), TARGETS, (TARGETS + rng.integers(1, 5, N)) % 5)
    probabilities = rng.dirichlet(np.ones(5), N) + 2 * np.eye(5)[predictions]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    with open(folder / "predictions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        names = ["image", "patient", "center", "target", "prediction", *(["copy"] if copies else []), *PLANES]
        writer.writerow(names)
        for n in range(N) if order is None else order:
            patient = n // 4
            row = [f"image{n}", f"{COUNTRIES[patient % 3]}-{patient}", COUNTRIES[patient % 3]]
            row += [PLANES[TARGETS[n]], PLANES[predictions[n]], *([int(COPIES[n])] if copies else [])]
            writer.writerow([*row, *(f"{p:.6f}" for p in probabilities[n])])
    sources = {"spain": 60, "synthetic": 40} if "HB" in data else {"spain": 60}
    metrics = {"confusion": confusion(TARGETS, predictions).tolist(), "training": {"images": 100, "sources": sources}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return read_result(folder, table, data, classifier, seed)


def context(phantoms=False, seeds=(0, 1)):
    return Context("a tiny model", "two sites", phantoms, "notebook", seeds, "python reproduce.py", ("A note.",))


def line(text, *start):
    """The cells of the first line of a Markdown text that begins with these."""
    found = next(part for part in text.splitlines() if part.startswith("| " + " | ".join(start) + " |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def section(text, title):
    return text.split(f"# {title}\n")[1].split("\n#")[0]


# --- the published numbers ---


def test_every_published_accuracy_is_a_whole_number_of_233_images():
    assert len(TABLE_1) == 20 and {classifier for _, classifier in TABLE_1} == set(CLASSIFIERS)
    for scores in TABLE_1.values():
        assert round(round(scores.accuracy * 233) / 233, 4) == pytest.approx(scores.accuracy, abs=1e-9)
    best = max(TABLE_1, key=lambda row: TABLE_1[row].accuracy)
    assert best == ("HB+DA", "resnet18") and TABLE_1[best].accuracy == pytest.approx(192 / 233, abs=5e-5)


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
        assert [100 * getattr(scores, metric) for metric in METRICS] == pytest.approx(theirs, abs=1e-9)


def test_the_notebooks_numbers_follow_from_its_confusion_matrix():
    matrix = [[37, 0, 2, 1, 25], [0, 64, 0, 0, 1], [0, 0, 53, 0, 11], [0, 1, 1, 29, 8]]
    targets, predictions = np.repeat([(i, j) for i in range(4) for j in range(5)], np.ravel(matrix), axis=0).T
    found = score(targets, predictions)
    for metric in METRICS:
        assert getattr(found, metric) == pytest.approx(getattr(NOTEBOOK_RUN, metric), abs=5e-5)


# --- finished rows ---


def test_a_finished_row_is_read_back_whole(tmp_path):
    result = finish(tmp_path, seed=3)
    assert (result.table, result.name) == ("1", "HB+DA/resnet18/seed3")
    assert result.targets.tolist() == TARGETS.tolist() and result.copies.tolist() == COPIES.tolist()
    assert result.images[5] == "image5" and result.patients[5] == "Egypt-1" and result.centers[5] == "Egypt"
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
    (folder / "predictions.csv").write_text(table.replace("brain", "head"))
    refused("not a finished row")
    (folder / "predictions.csv").unlink()
    refused("not a finished row")


def test_rows_of_different_test_sets_are_refused(tmp_path):
    first = finish(tmp_path)
    require_same_test([first, finish(tmp_path, seed=1)])
    shuffled = finish(tmp_path, seed=2, order=[*range(4, N), *range(4)])
    with pytest.raises(ResultError, match=r"HB\+DA/resnet18/seed2: its test images are not those of .*seed0"):
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
        assert (found[metric].low, found[metric].high) == pytest.approx(intervals[metric], abs=1e-12)


def test_seeds_are_averaged_in_every_replicate(tmp_path):
    a, b = finish(tmp_path, right=0.9), finish(tmp_path, seed=1, right=0.5)
    both, one, other = estimate([a, b])["accuracy"], estimate([a])["accuracy"], estimate([b])["accuracy"]
    assert both.values == (one.mean, other.mean) and both.mean == pytest.approx((one.mean + other.mean) / 2)
    assert both.high - both.low < other.high - other.low  # errors of two seeds partly cancel
    # the same patients drawn for both: a seed paired with itself is no more certain than alone
    twice = estimate([b, b])["accuracy"]
    assert (twice.low, twice.high) == pytest.approx((other.low, other.high), abs=1e-12)


def test_copies_are_left_out_on_request(tmp_path):
    r = finish(tmp_path)
    kept = ~COPIES
    found = estimate([r], "plain", distinct=True)["auc"].mean
    assert found == pytest.approx(score(r.targets[kept], r.predictions[kept], "plain", r.probabilities[kept]).auc)
    assert found != estimate([r], "plain")["auc"].mean


# --- tables ---


def cells_of(*results):
    cells = {}
    for result in results:
        cells.setdefault((result.data, result.classifier), []).append(result)
    return cells


def test_a_metric_table_says_how_far_the_published_number_is_and_whether_it_is_covered(tmp_path):
    row = ("HB+DA", "resnet18")
    estimates = {row: estimate([finish(tmp_path, right=0.75), finish(tmp_path, seed=1, right=0.5)])}
    table = tables.metric_table("accuracy", [row, ("HB", "resnet18"), ("AF", "resnet18")], estimates, compared=True)
    low, high = estimates[row]["accuracy"].low, estimates[row]["accuracy"].high
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    assert table.rows[0][2:] == ["62.50", "17.68", interval, "82.40", "-19.90", "no"] and high < 0.824
    assert table.rows[1][2:] == ["missing", "–", "–", "64.81", "–", "–"]
    assert table.rows[2][2:] == ["missing", "–", "–", "–", "–", "–"]

    single = {row: estimate([finish(tmp_path, seed=2, right=0.8)])}
    cells = tables.metric_table("accuracy", [row], single, compared=True).rows[0]
    assert cells[3] == "–" and cells[-1] == "yes"  # no spread of one seed
    assert len(tables.metric_table("accuracy", [row], single, compared=False).header) == len(table.header) - 2


def test_the_comparison_counts_discordant_images_by_seed_and_joins_classifiers_on_common_seeds(tmp_path):
    results = [finish(tmp_path, "ES+DA", "resnet18", seed, 0.5) for seed in (0, 1, 2)]
    results += [finish(tmp_path, "HB+DA", "resnet18", seed, 0.9) for seed in (0, 1)]
    results += [finish(tmp_path, "ES+DA", "vit_b_16", 1, 0.5), finish(tmp_path, "HB+DA", "vit_b_16", 1, 0.75)]
    cells = cells_of(*results)
    table = tables.comparison_table("ES+DA", "HB+DA", cells)
    rows = {row[0]: row for row in table.rows}
    # with equal seeds the images that are read right are nested: 24 of 48, then 43 or 36
    assert rows["ResNet18"][1] == "0 : 19, p < 0.001; 0 : 19, p < 0.001"
    assert rows["ResNet18"][2].startswith("+39.58 (") and rows["ResNet18"][-1] == "+19.31"
    assert rows["ViT b16"][1] == "0 : 12, p < 0.001" and rows["ViT b16"][2].startswith("+25.00 (")
    assert rows["DenseNet169"][1:-1] == ["missing"] * 4 and rows["DenseNet169"][-1] == "+11.59"
    assert rows["all 2"][2].startswith("+32.29 (")  # of seed 1 alone, each classifier weighing the same
    assert rows["all 2"][-1] == f"{(19.31 + 7.29) / 2:+.2f}"
    disjoint = [[results[0]], [results[1]]]
    assert tables.compare([disjoint[0]], [disjoint[1]]) is None


def test_groups_are_counted_over_all_seeds(tmp_path):
    a, b = finish(tmp_path, right=0.9), finish(tmp_path, seed=1, right=0.6)
    row = ("HB+DA", "resnet18")
    table = tables.group_table([row, ("ES", "resnet18")], cells_of(a, b), "country")
    assert table.header[2:] == ["Algeria (16)", "Egypt (16)", "Ghana (16)"]
    for name, cell in zip(COUNTRIES, table.rows[0][2:]):
        right = [(r.targets == r.predictions)[r.centers == name].mean() for r in (a, b)]
        assert cell == f"{100 * np.mean(right):.2f}"
    assert table.rows[1][2:] == ["missing"] * 3
    header = tables.group_table([row], cells_of(a), "plane").header
    assert header[2:] == ["abdomen (12)", "brain (12)", "femur (12)", "thorax (12)"]


def test_quality_and_recognised_shares_show_what_is_there_and_dashes_for_what_is_not():
    row = {"plane": "brain", "sampler": "unipc", "images": 20, "fid": 12.34, "kid": 0.0123, "two_sample": 0.75}
    cells = tables.quality_table([row | {"p_value": 1e-9, "recall": float("nan")}]).rows[0]
    assert cells == ["brain", "unipc", "20", "12.3", "12.3", "–", "–", "–", "–", "75.0", "< 0.001"]
    assert tables.quality_table([{"p_value": 0.25}]).rows[0][-1] == "0.250"
    table = tables.recognised_table({"with": {"euler": 0.5, "unipc": 1.0}, "without": {"unipc": 0.0}})
    assert table.rows == [["with", "50.00", "100.00"], ["without", "missing", "0.00"]]


def test_results_csv_has_a_line_for_each_row_and_seed_with_both_definitions(tmp_path):
    results = [finish(tmp_path), finish(tmp_path, seed=1, right=0.5)]
    rows = list(csv.DictReader(tables.results_csv(results).splitlines()))
    assert [(row["data"], row["seed"], row["n_real"], row["n_synthetic"], row["n_african"]) for row in rows] == [
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
    """Refuses an element that is not closed in order; collects text and what the page would load."""

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
    assert to_markdown(blocks, tmp_path) == (
        "# T & U\n\nx < y\n\n```\nrun > it\n```\n\n| name | n |\n| --- | --: |\n| a\\|b | <1 |\n\n"
        '![a "b"](a%20folder/b.png)\n'
    )
    page = Checker()
    page.feed(to_html(blocks))
    assert not page.open and len(page.sources) == 1 and page.sources[0].startswith("data:image/png;base64,iVBOR")
    assert {"T & U", "x < y", "run > it", "a|b", "<1", 'a "b"'} <= set(page.text)
    with pytest.raises(ValueError, match="1 cells under 2 headings: only one"):
        Table(["a", "b"], [["only one"]])


# --- the whole ---


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """One report on real data and one on phantoms, of the same few rows."""
    root = tmp_path_factory.mktemp("report")
    results = [finish(root, "ES+DA", "resnet18", seed, 0.5) for seed in (1, 0)]
    results += [finish(root, "HB+DA", "resnet18", seed, 0.9) for seed in (0, 1)]
    results += [finish(root, "AF", "vit_b_16", 0, 0.8, "2"), finish(root, "HB-token+DA", "resnet18", 0, 0.9, "beyond")]
    Image.new("L", (4, 4)).save(root / "figure.png")
    parts = {
        "quality": [{"plane": "brain", "sampler": "euler", "fid": 1.5}],
        "recognised": {"ES, with LoRA": {"euler": 0.9}},
    }
    build(root, results, context(), **parts, figures=[("Figure 2", root / "figure.png", "Samples.")])
    files = {name: (root / name).read_bytes() for name in ("report.md", "report.html", "results.csv")}
    build(root, results[::-1], context(), **parts, figures=[("Figure 2", root / "figure.png", "Samples.")])
    again = {name: (root / name).read_bytes() for name in files}
    build(root, [r for r in results if r.table != "beyond"], context(phantoms=True))
    return root, files, again, (root / "report.md").read_text()


def test_equal_results_in_any_order_give_equal_files(reports):
    _, files, again, _ = reports
    assert files == again


def test_the_report_shows_every_row_of_the_paper_and_those_not_run_as_missing(reports):
    text = reports[1]["report.md"].decode()
    first = section(text, "Table 1: zero-shot classification")
    assert len(re.findall(r"^\| (?:ES|HB)", first, re.M)) == 20
    assert line(first, "HB+DA", "ResNet18")[2:7] == ["2 of 2", "60", "40", "0", "89.58 (82.40)"]
    assert line(first, "ES", "ViT b16")[2:7] == ["0 of 2", "–", "–", "–", "missing (68.24)"]
    second = section(text, "Table 2: with and without African training images")
    assert [row.split(" | ")[0] for row in second.splitlines() if "ViT b16 |" in row] == [
        "| AF",
        "| ES",
        "| ES+AF",
        "| HB-all",
    ]
    assert line(second, "AF", "ViT b16")[2] == "1 of 2" and "78.54" in second
    assert line(section(text, "Table 1, ACC"), "HB+DA", "ResNet18")[-2] == "+7.18"
    assert "0.00" not in line(first, "HB", "ResNet18")


def test_the_report_judges_the_papers_claims(reports):
    text = reports[1]["report.md"].decode()
    claim = section(text, "HB+DA against ES+DA")
    assert "HB+DA is better: +39.58 points" in claim and "1 of 5 classifiers; published: +19.31." in claim
    assert "HB cannot be compared" in section(text, "HB against ES")
    assert "not shown to be better or worse: +" in section(text, "HB-token+DA against HB+DA")


def test_the_report_is_two_files_that_need_nothing_outside_their_folder(reports):
    root, files, _, _ = reports
    page = Checker()
    page.feed(files["report.html"].decode())
    assert not page.open and len(page.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    links = re.findall(r"^!\[.*\]\((.*)\)$", files["report.md"].decode(), re.M)
    assert links[0] == "figures/accuracy.png" and links[-1] == "figure.png" and len(links) == 4
    assert all((root / link).exists() for link in links)
    titles = re.findall(r"^## (.*)$", files["report.md"].decode(), re.M)
    assert [title for title in titles if title in page.text] == titles and len(titles) == 13


def test_against_phantoms_published_numbers_stand_but_no_difference_is_claimed(reports):
    text = reports[3]
    table = section(text, "Table 1, ACC")
    assert PHANTOMS in text and PHANTOMS not in reports[1]["report.md"].decode()
    assert "Difference" not in table and line(table, "HB+DA", "ResNet18")[-1] == "82.40"
    assert "Beyond the paper" not in text


# --- what a run was ---


def git(folder, *command):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *command], check=True, capture_output=True)


def test_the_environment_says_machine_versions_hashes_and_commit(tmp_path):
    args = argparse.Namespace(out=tmp_path, seed=3)
    record_environment(tmp_path, args, {"weights.pth": "abc"})
    record = json.loads((tmp_path / "environment.json").read_text())
    assert record["arguments"] == {"out": str(tmp_path), "seed": 3} and record["inputs"] == {"weights.pth": "abc"}
    assert record["versions"]["numpy"] == np.__version__
    assert record["machine"]["cpu"] and record["machine"]["cpus"] >= 1 and isinstance(record["machine"]["gpus"], list)
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

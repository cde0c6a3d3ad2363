"""The report: published numbers, finished rows read back, scores over seeds, and every table made
of them."""

import json
import re
from dataclasses import astuple, replace

import numpy as np
import pytest
from PIL import Image
from shorthand import refused
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from eval.metrics import METRICS, evaluate
from harness.files import write_table
from paper import tables
from paper.document import picture, table, to_html
from paper.gain import STEPS, measure
from paper.plan import CLASSIFIERS, DATA, Row
from paper.published import PUBLISHED, published_difference
from paper.report import Context, build
from paper.results import ResultError, estimate, read_result, require_same_test
from paper.synthetic import Findings
from planes import PLANES
from planes.datasets import Record

COUNTRIES = ("Algeria", "Egypt", "Ghana")
N = 48  # four planes of twelve patients
TARGETS = np.tile(np.arange(4), 12)
COPIES = np.arange(N) % 8 == 0


def finish(root, data="HB+DA", classifier="resnet18", seed=0, right=0.7, table="1", first=0):
    """A finished row as classify.py leaves it, read back: `right` of the images are read right.
    first: the image that its files begin with."""
    folder = root / "rows" / data / classifier / f"seed{seed}"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    hits = rng.permutation(N) < round(right * N)
    predictions = np.where(hits, TARGETS, (TARGETS + rng.integers(1, 5, N)) % 5)
    probabilities = rng.dirichlet(np.ones(5), N) + 2 * np.eye(5)[predictions]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    rows = []
    for n in np.roll(np.arange(N), -first):
        country = COUNTRIES[n // 4 % 3]
        row = {"image": f"image{n}", "patient": f"{country}-{n // 4}", "center": country}
        row |= {"target": PLANES[TARGETS[n]], "prediction": PLANES[predictions[n]]}
        row |= {"copy": int(COPIES[n]), **dict(zip(PLANES, probabilities[n].round(6)))}
        rows.append(row)
    write_table(folder / "predictions.csv", rows)
    sources = {"spain": 60, "synthetic": 40} if "HB" in data else {"spain": 60}
    counts = confusion_matrix(TARGETS, predictions, labels=range(5)).tolist()
    metrics = {"confusion": counts, "training": {"images": 100, "sources": sources}}
    metrics["scores"] = {"notebook": {}, "ranked": {}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return read_result(root, Row(table, DATA[data], classifier), seed)


def cells_of(*results):
    cells = {}
    for result in results:
        cells.setdefault((result.data, result.classifier), []).append(result)
    return cells


def lines(text, *start):
    """The cells of the lines of a Markdown text that begin with these."""
    begin = "| " + "".join(f"{cell} | " for cell in start)
    return [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith(begin)]


def section(text, title):
    return text.split(f"# {title}\n")[1].split("\n#")[0]


# --- the published numbers ---


@pytest.mark.parametrize(
    ("row", "percent"),
    [
        ("ES/densenet169", [61.37, 62.38, 96.46, 73.31, 80.50]),
        ("ES+DA/mobilenet_v2", [69.96, 69.05, 95.27, 78.95, 83.93]),
        ("HB/efficientnet_b0", [72.96, 69.81, 97.50, 79.45, 77.65]),
        ("HB+DA/resnet18", [82.40, 81.56, 89.15, 84.90, 89.29]),
        ("AF/vit_b_16", [91.41, 88.71, 93.23, 90.44, 93.81]),
        ("HB-all/vit_b_16", [78.54, 78.14, 97.44, 85.85, 88.76]),
    ],
)
def test_the_published_numbers_are_those_of_the_papers_tables(row, percent):
    assert 100 * np.array(astuple(PUBLISHED[tuple(row.split("/"))])) == pytest.approx(percent)


def test_every_published_accuracy_is_a_whole_number_of_233_images():
    for row, scores in PUBLISHED.items():
        cut = 5e-5 * (row[0] == "AF")  # 213 of 233 are 91.416 %, printed as 91.41
        whole = round(round(scores.accuracy * 233) / 233 - cut, 4)
        assert whole == pytest.approx(scores.accuracy, abs=1e-9)
    assert len(PUBLISHED) == 23  # ES with ViT is in both tables
    best = PUBLISHED["HB+DA", "resnet18"].accuracy - PUBLISHED["ES+DA", "densenet169"].accuracy
    assert best == pytest.approx(0.1373)  # the abstract's
    # over five classifiers, but for the last
    pairs = ("ES+DA", "HB+DA"), ("ES", "HB")
    claims = [100 * published_difference(*pair, CLASSIFIERS) for pair in pairs]
    claims += [100 * published_difference("ES", "HB-all", ["vit_b_16"])]
    assert claims == pytest.approx([11.84, 7.38, 10.30], abs=0.005)
    assert np.isnan(published_difference("ES", "HB-all", ["resnet18", "vit_b_16"]))


# --- finished rows ---


def test_a_finished_row_is_read_back_whole(tmp_path):
    result = finish(tmp_path, seed=3)
    assert (result.table, result.name) == ("1", "HB+DA/resnet18/seed3")
    assert result.targets.tolist() == TARGETS.tolist() and result.copies.tolist() == COPIES.tolist()
    names = result.images[5], result.patients[5], result.centers[5]
    assert names == ("image5", "Egypt-1", "Egypt") and result.probabilities.shape == (N, 5)
    assert result.probabilities.argmax(axis=1).tolist() == result.predictions.tolist()
    assert result.classes == PLANES and result.training["sources"]["synthetic"] == 40


@pytest.mark.parametrize(
    "broken, words",
    [
        (lambda text: text.rsplit("\n", 3)[0] + "\n", "different runs"),
        (lambda text: text.replace(",brain,", ",head,"), "not a finished row"),
        (lambda text: "", "not a finished row"),
    ],
)
def test_an_unfinished_or_mixed_row_is_one_line_that_names_its_folder(tmp_path, broken, words):
    finish(tmp_path)
    folder = tmp_path / "rows" / "HB+DA" / "resnet18" / "seed0"
    file = folder / "predictions.csv"
    file.write_text(broken(file.read_text()))
    with refused(ResultError, words, folder):
        read_result(tmp_path, Row("1", DATA["HB+DA"], "resnet18"), 0)


def test_rows_of_different_test_sets_are_refused(tmp_path):
    first = finish(tmp_path)
    require_same_test([first, finish(tmp_path, seed=1)])
    words = r"HB\+DA/resnet18/seed2: its test images are not those of .*seed0"
    with refused(ResultError, words):
        require_same_test([first, finish(tmp_path, seed=2, first=4)])
    with refused(ResultError, "nothing to report"):
        build(tmp_path, [], Context("", "", ""))


# --- scores over seeds ---


def test_an_interval_is_over_images_where_no_patient_is_named(tmp_path):
    result = finish(tmp_path, "ES")
    patients = np.array([f"target/b/{name}.png" for name in result.images])
    alone = replace(result, patients=patients, copies=COPIES | True, definitions=("ranked",))
    assert (result.units, alone.units) == ("patients", "images")
    build(tmp_path, [alone], Context("", "", "", names=("a", "b"), own=True))
    text = (tmp_path / "report.md").read_text()
    assert "over images alone" in text
    assert "48 images at 3 sites" in text and "nothing is claimed of patients" in text
    assert "patients" not in text.replace("claimed of patients", "")
    assert lines(section(text, "Without copies"))[-1][6:] == ["–"] * 6


@pytest.mark.parametrize("definition", ["notebook", "ranked"])
@pytest.mark.parametrize("distinct", [False, True])
def test_with_one_seed_the_interval_is_the_bootstraps(tmp_path, definition, distinct):
    r, kept = finish(tmp_path), ~COPIES if distinct else COPIES | True
    found = estimate([r], definition, distinct)
    written = evaluate(r.targets[kept], r.probabilities[kept], r.patients[kept], r.classes)
    scores, intervals = (written[key][definition] for key in ("scores", "intervals"))
    for metric in METRICS:
        ours = found[metric].mean, found[metric].low, found[metric].high
        wanted = scores[metric], *intervals[metric]
        assert ours == pytest.approx(wanted, abs=1e-12) and found[metric].seeds == 1


def test_the_interval_of_several_seeds_reckons_with_their_spread(tmp_path):
    a, b = finish(tmp_path, right=0.9), finish(tmp_path, seed=1, right=0.5)
    both, other = (estimate(runs, "ranked")["accuracy"] for runs in ([a, b], [b]))
    # two seeds 40 points apart say nothing, and no accuracy is beyond 0 and 1
    assert (both.mean, both.low, both.high) == pytest.approx((67 / 96, 0, 1))
    # a seed paired with itself has no spread: the patients', a t interval for percentiles
    twice = estimate([b, b], "ranked")["accuracy"]
    assert twice.high - twice.low == pytest.approx(other.high - other.low, rel=0.2)


# --- tables ---


def test_the_gains_have_verdicts_and_stars_for_one_seed(tmp_path):
    results = [finish(tmp_path, "ES+DA", seed=seed, right=0.5) for seed in (0, 1, 2)]
    results += [finish(tmp_path, "HB+DA", seed=seed, right=0.9) for seed in (0, 1)]
    results += [finish(tmp_path, "BAL+DA", right=0.5)]
    results += [finish(tmp_path, "ES+DA", "vit_b_16", 1, 0.5)]
    results += [finish(tmp_path, "HB+DA", "vit_b_16", 1, 0.75)]
    cells = cells_of(*results)
    text = tables.gain_table(measure(STEPS, cells), True, None)
    whole = lines(text, "balanced real images and synthetic ones", "HB+DA against ES+DA")[0]
    assert whole[2:5] == ["2", "1", "one seed cannot tell"]
    assert re.fullmatch(r"\+32\.29 \(\+\S+ to \+\S+\)\*", whole[5])
    assert whole[-1] == f"{(19.31 + 7.29) / 2:+.2f}"
    text = tables.gain_table(measure(STEPS, cells, ["resnet18"]), True, None)
    same = lines(text, "balanced real images and synthetic ones")[0]
    assert same[2:5] == ["ResNet18", "2", "helped"] and same[-1] == "+19.31"
    assert re.fullmatch(r"\+39\.58 \(\+\S+ to \+\S+\), p < 0\.001", same[5])
    parts = [line[4:6] for line in lines(text, "of it: balanced real images alone")]
    assert parts[0][0] == "one seed cannot tell" and parts[0][1].startswith("+0.00 (")


def test_classes_and_centers_are_counted_over_all_seeds(tmp_path):
    a, b = finish(tmp_path, right=0.9), finish(tmp_path, seed=1, right=0.6)
    rows = lines(tables.class_table(cells_of(a, b)))[2:]
    right = np.mean([r.targets == r.predictions for r in (a, b)], axis=0)
    assert [row[2:] for row in rows[4:]] == [
        [name, "16", f"{100 * right[a.centers == name].mean():.2f}", "–", "–"] for name in COUNTRIES
    ]
    scores = [
        precision_recall_fscore_support(r.targets, r.predictions, labels=range(4)) for r in (a, b)
    ]
    precision, recall, f_score, _ = 100 * np.mean(scores, axis=0)
    assert [row[2:] for row in rows[:4]] == [
        [name, "12", *(f"{values[n]:.2f}" for values in (recall, precision, f_score))]
        for n, name in enumerate(PLANES[:4])
    ]


def test_results_csv_has_a_line_for_each_row_and_seed_with_both_definitions(tmp_path):
    results = [finish(tmp_path), finish(tmp_path, seed=1, right=0.5)]
    first, second = tables.csv_rows(results)
    assert [*first.values()][:9] == ["1", "HB+DA", "resnet18", 0, 60, 40, 0, N, 6]
    assert len(first) == 9 + 2 * 2 * 5 * 3 and second["seed"] == 1
    for definition in ("notebook", "ranked"):
        ours = estimate(results[1:], definition, distinct=True)["auc"]
        found = [float(second[f"distinct_{definition}_auc{end}"]) for end in ("", "_low", "_high")]
        assert found == pytest.approx([ours.mean, ours.low, ours.high], abs=1e-6)
    assert first["all_notebook_auc"] != first["all_ranked_auc"] != first["distinct_ranked_auc"]


# --- the whole ---


def pictures(page):
    """What a page loads; its elements are closed in order."""
    left = []
    for end, tag in re.findall(r"<(/?)(\w+)", page):
        if end:
            assert left.pop() == tag
        elif tag not in ("meta", "img", "wbr"):
            left.append(tag)
    assert not left
    return re.findall(r'(?:src|href)="([^"]*)"', page)


def test_a_page_is_escaped_and_its_pictures_are_inlined(tmp_path):
    (tmp_path / "figures").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "figures" / "b.png")
    cells = table(["name", "n"], [["a & b", "<1"]], labels=1)
    assert cells == "| name | n |\n| --- | --: |\n| a & b | <1 |"
    shown = picture("b.png", 'a "b"')
    text = to_html(["# T & U", "x < y", "### More", cells, "### Most", shown, "## End"], tmp_path)
    (source,) = pictures(text)
    assert source.startswith("data:image/png;base64,iVBOR") and 'alt="a &quot;b&quot;"' in text
    assert "<h1>T &amp; U</h1>\n<p>x &lt; y</p>" in text
    assert '<tr><td class="label">a &amp; b</td><td>&lt;1</td></tr>' in text
    assert text.count("<details>") == 2 and "</details>\n<h2>End</h2>\n</body>" in text


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A report on real data, one on phantoms, and one of two sites of a user's own."""
    root, dot = tmp_path_factory.mktemp("report"), Image.new("L", (4, 4))
    (root / "figures").mkdir()
    results = []
    for data, right, number in (
        ("ES+DA", 0.5, "1"),
        ("HB+DA", 0.9, "1"),
        ("ES+DA+contrast", 0.95, "controls"),
        ("HB-styles+DA", 0.8, "styles"),
    ):
        results += [finish(root, data, "resnet18", seed, right, number) for seed in (0, 1)]
    results += [finish(root, "AF", "vit_b_16", 0, 0.8, "2")]
    results += [finish(root, "HB-token+DA", "resnet18", 0, 0.9, "beyond")]
    for name in ("figure", "second"):
        dot.save(root / "figures" / f"{name}.png")
    measures = dict.fromkeys(("precision", "recall", "density", "coverage", "two_sample"), 0.75)
    row = {"plane": "brain", "sampler": "unipc", "images": 20, "real": 9, "fid": 12.34}
    row["kid"] = 0.0123
    found = Findings(
        {("ES+DA", "with LoRA"): {"euler": 0.5, "unipc": 1.0}},
        [row | measures | {"p_value": 1e-9}],
        {
            "Figure 2": picture("figure.png", "Samples."),
            "Figure 3": picture("second.png", "Points."),
        },
        ["A note."],
    )
    about = "a tiny model", "two sites", "python reproduce.py"
    phantoms = Context(*about, {"vit_b_16": "it is near chance"})
    for n in range(N):
        dot.save(root / f"image{n}.png")
    tests = [
        Record(root / f"image{n}.png", PLANES[t], "", False, "", "") for n, t in enumerate(TARGETS)
    ]
    own = Context(*about, names=("clinic_a", "clinic_b"), own=True, tests=tests)
    one_class = finish(root, "ES", right=0), {"held_out": 0.75, "predictions": 0 * TARGETS}
    at_home = [replace(one_class[0], **one_class[1])]
    unlike = {"recognised": {("ES", "with LoRA"): {"unipc": 0.3}}}
    unlike = replace(found, **unlike, figures=dict(zip("ab", found.figures.values())))
    at_home += [replace(result, held_out=0.8) for result in results]
    at_home = [replace(result, definitions=("ranked",)) for result in at_home]
    texts = []
    with pytest.MonkeyPatch.context() as patch:  # to draw takes seconds
        patch.setattr("paper.document.save", lambda figure, path: dot.save(path) or "")
        for context, findings, rows in (
            (Context(*about, compared=True), found, results),
            (own, unlike, at_home),
            (phantoms, None, results),
        ):
            build(root, rows, context, findings)
            texts.append((root / "report.md").read_text())
    assert len(pictures((root / "report.html").read_text())) == 2
    return texts


@pytest.mark.slow
def test_the_first_screen_is_what_was_found_the_gains_and_the_samples(reports):
    title, what, found, sure, best, use, _, gains, *after = reports[0].split("\n\n")
    assert title == "# FU-LoRA on two sites" and what.startswith("ResNet18: trained on images of")
    words = "ones together: helped, from 50.0 % with all real images to 89.6 % right (+39.6; "
    assert words in found and "; published +19.31). Real images whose brightness and" in found
    assert found.endswith("over seeds is 95.8 % without synthetic images, 89.6 % with them.")
    assert "2 seeds" in sure and best.startswith(
        "Best at the second site: ResNet18 trained on real"
    )
    assert use.startswith("With its first seed, it is ") and gains.endswith("(figures/gain.png)")
    assert after[:2] == ["![Samples.](figures/figure.png)", "## All rows"]


@pytest.mark.slow
def test_all_rows_stand_in_one_table_with_the_published_numbers_beside_them(reports):
    text = section(reports[0], "All rows")
    rows = {line[0]: line[1:] for line in lines(text)[2:]}
    assert len(rows) == 6
    assert rows["HB+DA"][:6] == ["ResNet18", "2", "60", "40", "0", "89.58 (82.40)"]
    assert rows["AF"][1] == "1" and rows["AF"][5:7] == ["79.17 (91.41)", "62.5 to 91.7*"]
    assert rows["ES+DA+contrast"][5] == "95.83"


@pytest.mark.slow
def test_the_decomposition_and_the_details_are_of_what_was_run(reports):
    text = reports[0]
    gains = section(text, "Where the gain comes from")
    (whole,) = lines(gains, "balanced real images and synthetic ones", "HB+DA against ES+DA")
    assert whole[2:5] == ["ResNet18", "2", "helped"] and whole[-1] == "+19.31"
    (token,) = lines(gains, "other synthetic images", "HB-token+DA against HB+DA")
    assert token[4] == "one seed cannot tell"
    titles = re.findall(r"^### (.*)$", text, re.M)
    assert len(titles) == 6 and titles[-1] == "Figure 3"
    quality = section(text, "How close the synthetic images are to real ones")
    numbers = ["20", "9", "12.3", "0.0123", *["0.75"] * 5, "1e-09"]
    assert lines(quality, "brain") == [["brain", "unipc", *numbers]]
    assert "| ES+DA; with LoRA | 50.00 | 100.00 |" in section(text, "What the LoRA does")
    assert "\n\nA note.\n\n## In detail" in text and "48 images of 12 patients at 3 sites" in text


@pytest.mark.slow
def test_own_sites_have_their_answer_in_plain_words_and_no_word_of_the_paper(reports):
    text = reports[1]
    title, _, helped, _, best, one_class, unlike, use, command, *_ = text.split("\n\n")
    file = "rows/ES+DA+contrast/resnet18/seed0/model.safetensors"
    contrast = (
        "ResNet18 trained on real images of clinic_a, augmented, brightness and contrast varied"
    )
    assert best.startswith(f"Best at clinic_b: {contrast}. It is right on 95.8 % (95 % interval")
    assert best.endswith(", and on 80.0 % of images held out at clinic_a.") and file in use
    assert "varied at random, with no generative model: helped, from 50.0 % to 95.8 %" in helped
    assert title and helped.endswith("is 95.8 % without synthetic images, 89.6 % with them.")
    words = "Nearly all images are taken for one class by"
    assert one_class == f"{words} ResNet18 trained on real images of clinic_a."
    assert (
        "takes 30 % of them for what they are meant to be, and 75 % of held-out real ones;"
        in unlike
    )
    assert file in command and command.endswith("--predict FOLDER --out runs/new\n```")
    abbreviations = r"\b(ES|HB|BAL|DA|AF|Africa\w*)\b|[Ff]igure \d|notebook|paper's"
    assert not re.search(abbreviations, re.sub(r"\S*/\S*|python reproduce.*", "", text))
    (row,) = lines(section(text, "All rows"), contrast.split(" on ")[1])
    assert row[3:8] == ["60", "0", "0", "80.00", "95.83"]
    assert "surest errors, with seed 0: 2 of 2." in text


@pytest.mark.slow
def test_beside_phantoms_stands_no_published_number(reports):
    text = reports[2]
    assert all(word not in text for word in ("(82.40)", "ublished", "+19.31"))
    assert "\n\nLeft out of averages: ViT b16: it is near chance.\n" in text

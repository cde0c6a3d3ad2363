"""One whole reproduction, interrupted once: two folders of hardware in the place of fetuses, on a
tiny Stable Diffusion; and what finished classifiers say at another site."""

import io
import re
import runpy
from contextlib import redirect_stdout

import numpy as np
import pytest
from shorthand import ROOT, read_json, refused, table, write_site

import paper.elsewhere
import reproduce
from classify import ClassifyError
from paper.plan import Scale
from paper.results import ResultError
from paper.stages import Stages
from planes.phantoms.phantom import write_african_layout, write_spanish_layout
from planes.phantoms.sites import SITES

pytestmark = pytest.mark.slow

CLASSES = ("bolt", "hex nut", "washer")
SCALE = Scale(
    per_plane={"all": None, "balanced": 23, "lora": 20},
    train_lora="--layers transformer --batch-size 6",
    repeats=1,
    rank=4,
    sample="--steps 2",
    count=3,
    classify="--size 64 --batch-size 6 --workers 0",
    passes={"resnet18": 12},
)


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """The run's folder, its flags, and what was said when it was stopped, when it went on, and when
    it was asked for once more."""
    root = tmp_path_factory.mktemp("reproduction")
    shop = write_site(root / "workshop", dict(zip(CLASSES, (3, 4, 8))), 240)
    shed = write_site(root / "shed", {"bolt": 3, "hex nut": 3}, 120)
    flags = ["--quick", "--seeds", "0", "--device", "cpu", "--source", shop, "--target", shed]
    flags += ["--out", root / "run", "--prompt-template", "a photograph of a {class}"]
    flags += ["--processes", "1", "--probe", "probe:mobilenet_v2"]  # frozen, and of random weights
    args = [str(flag) for flag in flags]
    other = root / "run/rows/ES/resnet18/seed0/model.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"of an earlier run of other rows")

    def no_weights(**_):
        raise ClassifyError("no network")

    run, said = Stages.run, []

    def stop_at_the_third_row(stages, script, out, *flags, **settings):
        if "BAL+DA" in str(out):
            raise KeyboardInterrupt
        return run(stages, script, out, *flags, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.cli.MINI", tiny_model)
        patch.setattr("paper.synthetic.inception", no_weights)
        patch.setattr(reproduce, "QUICK", SCALE)
        for number in range(3):
            patch.setattr(Stages, "run", run if number else stop_at_the_third_row)
            if number == 2:
                patch.setattr(reproduce, "describe", lambda *_: None)
                patch.setattr(reproduce, "build", lambda *_: None)
            with redirect_stdout(io.StringIO()) as spoken:
                try:
                    reproduce.main(reproduce.parse_args(args))
                except KeyboardInterrupt:
                    assert number == 0
            said.append(spoken.getvalue())
    return root / "run", args, said


def test_a_run_goes_on_where_it_was_stopped_and_does_nothing_twice(made):
    stopped, went_on, again = made[2]
    assert (stopped.count("\n$ python"), stopped.count("done before")) == (6, 0)
    # two LoRAs, two sets of images, two rows
    assert (went_on.count("\n$ python"), went_on.count("done before")) == (13, 6)
    assert again.count("\n$ python") == again.count("done before") == 13
    numbers = [f"stage {n} of 13 (" for n in range(1, 14)]
    assert re.findall(r"^stage \d+ of \d+ \(", again, re.M) == numbers
    assert "left out, as the second site has no training images: AF/mobilenet_v2" in again


def test_the_plan_counts_what_is_there_and_what_is_left(made, capsys):
    out, args, _ = made
    file = out / "rows/HB+DA/resnet18/seed0/args.json"
    away = file.rename(file.with_suffix(".away"))
    reproduce.main(reproduce.parse_args([*args, "--plan"]))
    away.rename(file)
    said = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split()[1:] for line in said.splitlines() if "/" in line}
    assert rows["ES+DA/ResNet18"][-4:] == ["15", "0", "0", "done"]
    assert rows["HB+DA/ResNet18"] == ["9", "96", "0", "1"]
    assert "shop: 15 images" in said and "- processes: 1, as --processes says, each" in said


def test_the_report_is_of_these_sites_and_classes_and_of_nothing_fetal(made):
    out, _, _ = made
    report = (out / "report.md").read_text(encoding="utf-8")
    said = report + (out / "results.csv").read_text(encoding="utf-8")
    fetal = r"fetal|fetus|abdomen|thorax|spanish|spain|africa|phantom|published"
    assert not re.search(fetal, said, re.IGNORECASE)
    assert report.startswith("# FU-LoRA on workshop and shed\n\nResNet18: trained on images")
    assert "shed has no washer" in report
    real = "real images of workshop"
    probe, augmented = f"{real} | mobilenet_v2 (linear probe)", f"{real}, augmented; 18 with LoRA"
    for cells in (probe, augmented, "hex nut | 3"):
        assert f"| {cells} |" in report
    names = {path.stem for path in (out / "figures").iterdir()}
    assert names == {"gain", "samples", "sources", "closest_pairs", "confusion", "errors"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == page.count("src=") == 6
    rows = table(out / "results.csv")
    assert [row["data"] for row in rows if row["classifier"] != "resnet18"] == ["ES", "HB"]
    assert {row["data"]: row["n_real"] for row in rows}["HB+DA"] == "9"  # by the rarest class
    assert [*read_json(out / "environment.json")["inputs"]] == ["workshop", "shed"]


def test_captions_images_and_classifiers_have_the_sites_classes(made):
    out, _, _ = made
    prompts = read_json(out / "lora_r4" / "prompts.json")
    assert prompts["hex nut"] == ["a photograph of a hex nut"]
    rows = table(out / "synthetic_r4" / "manifest.csv")
    assert {row["prompt"] for row in rows} == {f"a photograph of a {name}" for name in CLASSES}
    assert {row["plane"] for row in rows} == {*CLASSES} and len(rows) == 2 * 3 * 3
    assert all(", " in row["prompt"] for row in table(out / "synthetic_styles" / "manifest.csv"))
    row = out / "rows" / "HB+DA" / "resnet18" / "seed0"
    predictions = table(row / "predictions.csv")
    assert tuple(predictions[0])[-3:] == CLASSES and len(predictions) == 6
    metrics = read_json(row / "metrics.json")
    assert metrics["training"]["sources"] == {"source": 9, "synthetic": 18}
    assert np.array(metrics["confusion"]).shape == (3, 3)
    for name, read in (("lora_r4", "images model"), ("synthetic_without_lora", "model prompts")):
        assert [*read_json(out / name / "inputs.json")] == [*read.split(), "arguments"]


# --- at one more site ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one row of ResNet18, a few steps long, and the datasets it was made of."""
    root = tmp_path_factory.mktemp("elsewhere")
    write_spanish_layout(root / "spanish", train=2, test=0, seed=0)
    write_african_layout(root / "b", patients=2, seed=0)
    write_african_layout(root / "c", patients=4, seed=1, site=SITES["C"])
    classify = runpy.run_path(str(ROOT / "classify.py"), run_name="classify_script")
    flags = f"--spanish {root}/spanish --african {root}/b --weights none --size 64 --epochs 1"
    flags += f" --workers 0 --seed 3 --out {root}/run/rows/ES/resnet18/seed3"
    classify["main"](classify["parse_args"](flags.split()))
    return root


def retest(run, site, out, flag="--african"):
    args = [str(run), flag, str(site), "--out", str(out)]
    paper.elsewhere.main(paper.elsewhere.parse_args(args))


def test_elsewhere_a_row_says_of_the_same_images_what_it_said_and_of_others_makes_a_report(
    run, tmp_path
):
    retest(run / "run", run / "b", tmp_path / "b")
    said = table(run / "run/rows/ES/resnet18/seed3/predictions.csv")
    share = np.mean([row["prediction"] == row["target"] for row in said])
    (row,) = {line["all_ranked_accuracy"] for line in table(tmp_path / "b" / "results.csv")}
    assert float(row) == pytest.approx(share, abs=1e-6)
    retest(run / "run", run / "c", tmp_path / "c")
    text = (tmp_path / "c" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# FU-LoRA on ") and "Seeds: 3. Test: 36 images of" in text


def test_elsewhere_a_site_of_its_own_has_the_classes_of_the_rows(made, run, tmp_path):
    out = made[0]
    retest(out, out.with_name("shed"), tmp_path / "x", "--target")
    before, again = (table(place / "results.csv") for place in (out, tmp_path / "x"))
    same = "data", "seed", "all_ranked_accuracy"
    before = [[row[key] for key in same] for row in before if row["classifier"] == "resnet18"]
    assert before == [[row[key] for key in same] for row in again]
    with refused(ResultError, "has abdomen, .* know bolt, hex nut, washer alone"):
        retest(out, run / "b", tmp_path / "y")


def test_elsewhere_a_folder_without_rows_and_a_broken_classifier_are_named(run, tmp_path):
    with refused(ResultError, "no finished row"):
        retest(tmp_path, run / "b", tmp_path / "x")
    row = "rows/ES/resnet18/seed3"
    (tmp_path / row).mkdir(parents=True)
    for file in (run / "run" / row).glob("*.*"):
        broken = b"x" if file.suffix == ".safetensors" else file.read_bytes()
        (tmp_path / row / file.name).write_bytes(broken)
    with refused(ClassifyError, r"model\.safetensors"):
        retest(tmp_path, run / "b", tmp_path / "x")
    assert not (tmp_path / "x").exists()

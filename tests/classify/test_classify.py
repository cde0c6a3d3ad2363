"""classify.py as its user meets it: a run, a run that goes on, mistakes, and a trained classifier
at work."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from shorthand import ROOT, exits, read_json, refused, table
from small import write_site
from torch.nn.functional import cross_entropy

from classify import ClassifyError
from classify.data import RECIPES, draw_augmentation, draw_contrast
from classify.images import choose_records
from classify.models import load
from classify.predict import temperature
from classify.train import train_epoch

BOTH = torch.tensor([0, 5])


@pytest.fixture(scope="module")
def flags(sites):
    return ("--augment", "--validation", 4, "--lr", 0.02)


def test_a_run_writes_scores_of_what_its_saved_model_predicts(classify, sites, flags, tmp_path):
    result = classify(tmp_path, *flags)
    names = "args.json confusion.png metrics.json model.safetensors predictions.csv train.csv"
    assert sorted(path.name for path in tmp_path.iterdir()) == names.split()
    metrics = read_json(tmp_path / "metrics.json")
    assert np.sum(metrics["validation"]["confusion"]) == 4
    assert metrics == json.loads(json.dumps(result)) and "without_copies" not in metrics
    assert (metrics["test"]["images"], metrics["test"]["patients"]) == (8, 4)
    rows = table(tmp_path / "predictions.csv")
    hits = [row["target"] == row["prediction"] for row in rows]
    assert len(rows) == 8 and np.mean(hits) == metrics["scores"]["ranked"]["accuracy"]

    probabilities = np.array([[float(row[name]) for name in "ab"] for row in rows])
    assert [row["prediction"] for row in rows] == ["ab"[n] for n in probabilities.argmax(axis=1)]
    description = load(tmp_path / "model.safetensors")[1]
    assert description["training"] == metrics["training"] and description["epochs"] == 2
    assert description["augment"] and not description["contrast"]

    losses = table(tmp_path / "train.csv")
    assert [row["epoch"] for row in losses] == ["1", "2"]
    assert {float(row["validation_accuracy"]) * 4 % 1 for row in losses} == {0}
    record = read_json(tmp_path / "args.json")
    assert record["arguments"]["lr"] == 0.02
    assert [*record["inputs"]] == ["training images", "validation images", "test images"]


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(classify, flags, tmp_path):
    flags = (*flags, "--balanced-sampling", "--contrast", "--schedule", "cosine", "--epochs", 3)
    classify(tmp_path / "whole", *flags)
    done = []

    def asked_in_the_second_epoch(*args):
        done.append(train_epoch(*args))
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return done[-1]

    classify.globals["train_epoch"] = asked_in_the_second_epoch
    cut = tmp_path / "cut"
    with pytest.raises(SystemExit) as stop:
        classify(cut, *flags)
    assert stop.value.code == 128 + signal.SIGTERM
    assert [p.name for p in cut.iterdir()] == ["checkpoint.pt"]
    classify.globals["train_epoch"] = train_epoch
    with refused(ClassifyError, r"other settings \(--lr was 0\.02, is 0\.5\)"):
        classify(cut, *flags, "--lr", 0.5, "--resume")
    classify(cut, *flags, "--resume")
    for name in ("model.safetensors", "predictions.csv", "train.csv", "metrics.json"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (cut / "checkpoint.pt").exists()


def test_every_flag_reaches_the_epoch(classify, tmp_path):
    """16 images in batches of 8: two steps an epoch."""
    seen, orders = [], []

    def epoch(model, loader, optimizer, input_range, augmentation, dtype, contrast, rates):
        drawn = [draw and draw(BOTH) for draw in (augmentation, contrast)]
        orders.append(loader.iterable.generator.initial_seed())
        seen.append([input_range, dtype, *drawn, [*islice(rates, len(loader))]])
        return 1.0

    classify.globals["train_epoch"] = epoch
    classify(tmp_path / "plain")
    assert seen == [["minus-one-one", torch.float32, None, None, [1e-3] * 2]] * 2
    seen.clear()
    more = "--augment --contrast --recipe notebook --seed 3 --dtype bf16 --schedule cosine --lr 0.4"
    classify(tmp_path / "all", *more.split(), "--passes", 47)  # rounded to 3 epochs of 16
    assert orders == [0, 0, 3, 3, 3]
    assert len(seen) == 3 and {tuple(row[:2]) for row in seen} == {("zero-one", torch.bfloat16)}
    for n, (*_, affine, contrast, _) in enumerate(seen):
        assert torch.equal(affine, draw_augmentation(RECIPES["notebook"], 3, n, BOTH))
        assert torch.equal(contrast, draw_contrast(3, n, BOTH))
    rates = [0.4, 0.373205, 0.3, 0.2, 0.1, 0.026795]
    np.testing.assert_allclose([rate for row in seen for rate in row[-1]], rates, atol=1e-6)


def test_a_recipe_sets_size_and_range_and_flags_override_it(classify):
    def size(*flags):
        args = classify.globals["parse_args"](["--target", "x", "--out", "y", *flags])
        return args.size, args.input_range

    assert size() == (512, "minus-one-one") and size("--recipe", "notebook") == (224, "zero-one")
    assert size("--size", "64", "--input-range", "imagenet") == (64, "imagenet")


def test_copies_are_marked_and_scores_without_them_are_given(classify, sites, tmp_path, capsys):
    target = tmp_path / "target"
    shutil.copytree(sites / "target", target)
    shutil.copy(target / "0.png", target / "6.png")  # of training, under another patient
    shutil.copy(target / "5.png", target / "7.png")  # of an earlier test image
    places = ("--source", sites / "source", "--target", target)
    metrics = classify(tmp_path / "out", "--target-train", places=places)
    assert (
        "warning: 1 of 8 test images are in training; metrics.json has scores of the others"
        in capsys.readouterr().out
    )
    assert metrics["test"]["copies_of_training"] == 1
    assert np.sum(metrics["confusion"]) == 8 and np.sum(metrics["without_copies"]["confusion"]) == 7
    assert metrics["training"]["sources"] == {"source": 16, "target": 4}
    rows = table(tmp_path / "out" / "predictions.csv")
    assert [row["image"] for row in rows if row["copy"] == "1"] == ["6", "7"]
    # all of them copies: no scores without
    shutil.copytree(target, tmp_path / "same")
    (tmp_path / "same" / "images.csv").write_text(
        (target / "images.csv").read_text().replace("test", "train")
    )
    metrics = classify(tmp_path / "b", places=("--source", tmp_path / "same", *places[2:]))
    assert metrics["test"]["copies_of_training"] == 8 and "without_copies" not in metrics
    assert "warning: 8 of 8 test images are in training" in capsys.readouterr().out


def test_a_sources_own_test_images_are_held_out_and_told_where_they_are_trained_on(
    classify, sites, tmp_path, capsys
):
    write_site(tmp_path / "a", 2, 8, 4)
    shutil.copy(tmp_path / "a" / "0.png", tmp_path / "a" / "9.png")
    table = tmp_path / "a" / "images.csv"
    table.write_text(table.read_text().replace("7.png,b,3", "7.png,b,4"))
    args = classify.globals["parse_args"]

    def chosen(*flags):
        line = "--source", tmp_path / "a", "--target", sites / "target", "--out", "x", *flags
        return choose_records(args([*map(str, line)]), print)

    assert [record.name for record in chosen().validation] == ["8", "9", "10", "11"]
    said = capsys.readouterr().out
    assert "warning: 2 held-out images share a patient or file with training\n" in said
    assert "leak check: training and test share no file, and no patient of one site\n" in said
    table.write_text(table.read_text().replace("test", "").replace("train", ""))
    held = chosen("--held-out", "0.4").validation
    assert [record.patient[7:] for record in held] == ["1", "1", "4", "4", "4"]
    assert len(chosen("--validation", 5).validation) == 5 and not chosen().validation
    table.write_text("image,class\n" + "\n".join(f"{n}.png,{'ab'[n > 1]}" for n in range(4)))
    with refused(ClassifyError, "^no training image is left of a; give some .*, hold fewer out"):
        chosen("--validation", 3)


@pytest.mark.filterwarnings("error:All-NaN slice encountered")
def test_a_test_set_of_one_class_has_no_auc_which_json_says_by_null(classify, sites, tmp_path):
    write_site(tmp_path / "target", 2, 3, 1)
    places = ("--source", sites / "source", "--target", tmp_path / "target")
    classify(tmp_path / "out", places=places)
    text = (tmp_path / "out" / "metrics.json").read_text()
    metrics = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert metrics["scores"]["ranked"]["auc"] is None
    assert metrics["intervals"]["ranked"]["auc"] == [None, None]
    assert 0 <= metrics["scores"]["ranked"]["accuracy"] <= 1


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--epochs", 0], "--epochs 0: at least 1"),
        (["--validation", -1], "--validation -1: at least 0"),
        (["--lr", "inf"], "--lr inf: at least"),
        (["--model", "vgg"], "--model vgg: choose from"),
        (["--predict", "x"], "--classifier FILE and --predict FOLDER"),
        (["--classifier", "x"], "--classifier FILE and --predict FOLDER"),
        (["--african", "b"], "--spanish belongs to --african"),
        (["--manifest", "x", "--per-plane", 2], "not allowed with"),
    ],
)
def test_flags_that_cannot_be_are_one_line(classify, tmp_path, flags, words, capsys):
    with exits(capsys, words):
        classify(tmp_path / "out", *flags)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--source", "{nowhere}"], "nowhere"),
        (["--weights", "{nowhere}"], "nowhere"),
        (["--per-plane", 9], "9 of each"),
        (["--validation", 20], "20"),
        (["--held-out", 1], r"--held-out 1\.0: choose a number from 0 to less than 1"),
        (["--size", 32], "at least 64"),
        (["--out", "{table}"], "images.csv"),
        (["--target", "{cut}"], r"9\.png: not a readable image"),
        (["--target", "{shared}", "--target-train"], "target/0 is in training and in test"),
        (["--classifier", "{table}", "--export"], r"not a classifier written by classify\.py"),
        (["--model", "probe:x", "--augment"], "is frozen; leave --augment"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(classify, sites, tmp_path, flags, words):
    for name in ("cut", "shared"):
        shutil.copytree(sites / "target", tmp_path / name)
    cut, shared = tmp_path / "cut" / "9.png", tmp_path / "shared" / "images.csv"
    cut.write_bytes(cut.read_bytes()[:100])
    shared.write_text(shared.read_text().replace("a,2,test", "a,0,test"))
    places = {name: tmp_path / name for name in ("nowhere", "cut", "shared")}
    flags = [str(flag).format(table=sites / "source" / "images.csv", **places) for flag in flags]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=words) as error:
        classify(tmp_path / "out", *flags)
    named = ("ClassifyError", "DatasetError", "ImageError", "NotADirectoryError")
    assert type(error.value).__name__ in named and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_on_the_command_line_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "classify.py", "--target", "nowhere", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("classify.py: nowhere: no such")


# --- a trained classifier at work ---


def test_a_folder_gets_the_probabilities_of_the_test_to_the_bit_and_a_confidence(
    classify, sites, flags, tmp_path, capsys
):
    classify(tmp_path / "run", *flags)
    file = tmp_path / "run" / "model.safetensors"
    classify(tmp_path, "--classifier", file, "--predict", sites / "target", places=())
    rows = {row["image"]: row for row in table(tmp_path / "predictions.csv")}
    assert [*rows] == sorted(f"{n}.png" for n in range(12))
    for row in table(tmp_path / "run" / "predictions.csv"):
        found = rows[f"{row['image']}.png"]
        assert all(found[key] == row[key] for key in ("a", "b", "prediction"))
    warmth = load(file)[1]["temperature"]
    p = np.array([[float(row[name]) for name in "ab"] for row in rows.values()])
    cooled = p ** (1 / warmth) / (p ** (1 / warmth)).sum(axis=1, keepdims=True)
    confidence = [float(row["confidence"]) for row in rows.values()]
    np.testing.assert_allclose(confidence, cooled.max(axis=1), atol=1e-4)
    said = capsys.readouterr().out
    assert 1 <= warmth <= 20 and f"temperature {warmth:.3g}, set on 4" in said
    assert Image.open(tmp_path / "least_sure.png").width > 500
    assert "set on 4 images of its own site; elsewhere it may be off" in said
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for flags in (["--export"], ["--predict", sites / "target"]):
        with refused(FileExistsError, "holds a run, whose record would go"):
            classify(tmp_path / "run", "--classifier", file, *flags, places=())
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with refused(FileExistsError, r"other settings \(--predict was .*target, is .*source\)"):
        classify(tmp_path, "--classifier", file, "--predict", sites / "source", places=())
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "none"):
        with refused(ClassifyError, "no folder with images"):
            flags = "--classifier", file, "--predict", tmp_path / folder
            classify(tmp_path / "out", *flags, places=())


def test_a_finished_run_is_not_replaced_by_another_unasked(classify, tmp_path):
    classify(tmp_path, "--epochs", 1)
    with refused(FileExistsError, r"finished run of other settings \(--lr was 0\.001, is 0\.5\)"):
        classify(tmp_path, "--epochs", 1, "--lr", 0.5)
    classify(tmp_path, "--epochs", 1, "--workers", 0, "--resume")
    classify(tmp_path, "--epochs", 1, "--lr", 0.5, "--overwrite")
    assert read_json(tmp_path / "args.json")["arguments"]["lr"] == 0.5


def test_a_network_that_says_one_class_is_told(classify, tmp_path, capsys):
    classify.globals["predict"] = lambda *_: torch.tensor([[0.9, 0.1]]).repeat(8, 1)
    result = classify(tmp_path)
    assert "warning: 8 of 8 test images are taken for a\n" in capsys.readouterr().out
    expected = {"recall": 1.0, "precision": 0.5, "f_score": pytest.approx(2 / 3), "support": 4}
    assert result["by_class"]["a"] == expected and [*result["scores"]] == ["ranked"]


def test_the_temperature_is_the_most_probable():
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    targets = torch.tensor([0, 1, 1, 0])

    def loss(t):
        return cross_entropy(p.log() / t, targets, reduction="sum") + math.log(t) ** 2 / 2 / 0.5**2

    found = temperature(p, targets)
    assert found > 1 and loss(found) < min(loss(0.99 * found), loss(1.01 * found))
    # many images outweigh the prior, a network that hardly tells classes apart is not sharpened,
    # nor is one that is always right
    assert temperature(p.repeat(9000, 1), targets.repeat(9000)) > 1.2 * found
    flat = torch.tensor([[0.501, 0.499]]).repeat(3, 1)
    assert temperature(flat, torch.tensor([0, 0, 1])) == pytest.approx(1, abs=0.01)
    assert temperature(p[3:].repeat(90, 1), targets[3:].repeat(90)) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_onnx_agrees_with_torch_and_says_what_feeds_it(classify, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    classify(tmp_path, "--input-range", "imagenet", "--validation", 4)
    file = tmp_path / "model.safetensors"
    classify(tmp_path / "out", "--classifier", file, "--export", places=())
    path = tmp_path / "out" / "model.onnx"
    assert sorted(p.name for p in path.parent.iterdir()) == ["args.json", "model.onnx"]
    facts = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert facts["classes"] == ["a", "b"] and facts["size"] == 64
    images = torch.rand(3, 3, 64, 64)  # another number than it was exported with
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    logits = load(file)[0]((images - mean) / std).detach()
    confidence = (logits / facts["temperature"]).softmax(dim=1).max(dim=1).values
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})
    for ours, expected in zip(found, (logits.softmax(dim=1), confidence), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)

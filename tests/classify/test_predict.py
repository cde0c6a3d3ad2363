"""A trained classifier at work: probabilities to the bit, confidence set right, ONNX, and the
mistakes around them."""

import csv
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from classify import ClassifyError
from classify.models import build, load, save
from classify.predict import export, temperature
from planes import PLANES
from planes.phantoms.phantom import write_african_layout, write_spanish_layout

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
SCRIPT = runpy.run_path(str(ROOT / "classify.py"), run_name="script")


def run(*flags):
    return SCRIPT["main"](
        SCRIPT["parse_args"]([*map(str, flags), "--device", "cpu", "--workers", "0"])
    )


def table(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on phantoms, with validation images."""
    root = tmp_path_factory.mktemp("trained")
    write_spanish_layout(root / "es", 5, test=0, seed=0)
    write_african_layout(root / "af", patients=4, seed=0)
    flags = [
        "--spanish",
        root / "es",
        "--african",
        root / "af",
        "--weights",
        "none",
        "--model",
        "mobilenet_v2",
    ]
    run(
        *flags,
        "--size",
        64,
        "--passes",
        200,
        "--batch-size",
        7,
        "--validation",
        4,
        "--lr",
        0.02,
        "--out",
        root / "run",
    )
    return root


@pytest.mark.slow
def test_a_folder_gets_the_probabilities_of_the_test_to_the_bit_and_a_confidence(trained, tmp_path):
    file = trained / "run" / "model.safetensors"
    run("--classifier", file, "--predict", trained / "af", "--out", tmp_path)
    tested = {row["image"]: row for row in table(trained / "run" / "predictions.csv")}
    rows = {Path(row["image"]).stem: row for row in table(tmp_path / "predictions.csv")}
    assert len(rows) == len([*(trained / "af").rglob("*.png")]) > len(tested) > 20
    for name, row in tested.items():
        assert {plane: rows[name][plane] for plane in PLANES} == {
            plane: row[plane] for plane in PLANES
        }
        assert rows[name]["prediction"] == row["prediction"]
    warmth = load(file)[1]["temperature"]
    p = np.array([[float(row[plane]) for plane in PLANES] for row in rows.values()])
    cooled = p ** (1 / warmth) / (p ** (1 / warmth)).sum(axis=1, keepdims=True)
    confidence = [float(row["confidence"]) for row in rows.values()]
    np.testing.assert_allclose(confidence, cooled.max(axis=1), atol=1e-4)
    assert 1 / 20 <= warmth <= 20 and warmth != 1
    assert Image.open(tmp_path / "least_sure.png").width > 500


def test_the_temperature_is_the_likeliest():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(4000, 4)))
    targets = torch.multinomial(
        (logits / 2.5).softmax(dim=1), 1, generator=torch.Generator().manual_seed(0)
    )[:, 0]
    found = temperature(logits.softmax(dim=1), targets)
    assert found == pytest.approx(2.5, rel=0.1)
    losses = [
        torch.nn.functional.cross_entropy(logits / t, targets)
        for t in (found, found * 1.05, found / 1.05)
    ]
    assert min(losses) == losses[0]
    # at its end
    assert temperature(torch.tensor([[0.6, 0.4]] * 3), torch.tensor([0, 0, 0])) == pytest.approx(
        1 / 20
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18"])
def test_onnx_agrees_with_torch_and_says_what_feeds_it(tmp_path, name):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    description = {"model": name, "size": 64, "input_range": "imagenet"}
    save(tmp_path / "model.safetensors", build(name, "none", 64), description)
    model, description = load(tmp_path / "model.safetensors")
    path, seconds, difference = export(model, description, tmp_path)
    assert path == tmp_path / "model.onnx" and difference < 1e-4 and 0 < seconds < 1
    facts = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert facts["classes"] == [*PLANES] and facts["size"] == 64
    images = torch.rand(3, 3, 64, 64)  # another number than it was exported with
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        expected = model((images - mean) / std).softmax(dim=1).numpy()
    (found,) = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"images": images.numpy()}
    )
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert [file.name for file in tmp_path.iterdir() if "part" in file.name] == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--predict", "x"], "of a trained --classifier FILE, which is not given"),
        (["--export"], "of a trained --classifier FILE, which is not given"),
        (["--classifier", "x"], "for --predict FOLDER or --export, of which neither is given"),
        (["--african", "a", "--target", "b"], "to be tested on"),
        (["--spanish", "a", "--target", "b"], "--spanish belongs to --african"),
        (["--african", "a", "--model", "vgg"], "--model vgg: choose from"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        SCRIPT["parse_args"]([*flags, "--out", "o"])
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_without_images_or_a_file_that_is_no_classifier_is_one_line(trained, tmp_path):
    file = trained / "run" / "model.safetensors"
    (tmp_path / "empty").mkdir()
    for flags, words in (
        (["--classifier", file, "--predict", tmp_path / "empty"], "no images in it or below it"),
        (["--classifier", file, "--predict", tmp_path / "none"], "no such folder"),
        (
            ["--classifier", trained / "run" / "args.json", "--export"],
            r"not a classifier written by classify\.py",
        ),
    ):
        with pytest.raises(ClassifyError, match=words):
            run(*flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not here")
def test_on_the_233_african_images_a_folder_gets_what_testing_gave_to_the_bit(tmp_path):
    (weights,) = (SHARED / "weights").glob("*.pth")
    flags = [
        "--spanish",
        SHARED / "FETAL_PLANES_ZENODO",
        "--manifest",
        SHARED / "manifests" / "lora_train_data.csv",
    ]
    flags += [
        "--african",
        SHARED / "Zenodo_dataset",
        "--weights",
        weights,
        "--model",
        "mobilenet_v2",
        "--size",
        96,
    ]
    run(*flags, "--passes", 100, "--out", tmp_path / "run")
    run(
        "--classifier",
        tmp_path / "run" / "model.safetensors",
        "--predict",
        SHARED / "Zenodo_dataset",
        "--out",
        tmp_path,
    )
    tested = table(tmp_path / "run" / "predictions.csv")
    rows = {Path(row["image"]).stem: row for row in table(tmp_path / "predictions.csv")}
    assert len(tested) == 233 and len(rows) == 450
    assert all(rows[row["image"]][plane] == row[plane] for row in tested for plane in PLANES)

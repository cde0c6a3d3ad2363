"""Features of frozen networks and the linear probe on them: tiny random models of each family,
scikit-learn on the same features, and the real MobileNet."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.models as tv
from PIL import Image
from shorthand import DATA, real_data, refused, table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small import noise_records, tiny

from classify import ClassifyError
from classify.data import PlaneImages, prepare
from classify.features import Extractor, classifier, features, inception
from classify.models import build, load, save
from classify.probe import fit, kept_features, open_frozen
from planes import PLANES
from planes.datasets import read_african, read_manifest, read_spanish

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = SIZES | {"image_size": 32, "patch_size": 8}
TEXT = SIZES | {"intermediate_size": 32, "vocab_size": 9}
STD = [0.5, 0.25, 1.0]


def family(name: str, folder: Path) -> str:
    """A tiny random model saved as transformers does, with its image processor."""
    import transformers as t

    torch.manual_seed(0)
    vision, size = SMALL | {"intermediate_size": 32}, {"height": 32, "width": 32}
    models = {
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**SMALL)),
        "beit": lambda: t.BeitModel(t.BeitConfig(**vision)),
        "vit": lambda: t.ViTModel(t.ViTConfig(**vision), add_pooling_layer=False),
        "resnet": lambda: t.ResNetModel(
            t.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
        ),
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=vision)),
        "siglip": lambda: t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=vision)),
        "mae": lambda: t.ViTMAEModel(t.ViTMAEConfig(**vision)),
    }
    models[name]().save_pretrained(folder)
    processor = t.ViTImageProcessor(size=size, image_std=STD)
    if name in ("dinov2", "clip"):  # which crop
        shortest = {"shortest_edge": 40}
        processor = t.BitImageProcessor(size=shortest, crop_size=size, image_std=STD)
    processor.save_pretrained(folder)
    return str(folder)


def probabilities(probe, features):
    return probe(torch.tensor(features)).softmax(dim=1).detach().numpy()


# --- features ---


def test_features_of_our_own_classifier_are_what_enters_its_head(tmp_path):
    model = build("tiny", "none", 64, 2).eval()
    description = {"model": "tiny", "size": 64, "input_range": "minus-one-one"}
    save(tmp_path / "model.safetensors", model, description, "ab")
    records = noise_records(tmp_path / "images", 5)
    images = PlaneImages(records, 64, "ab")
    x = prepare(torch.stack([images[n][0] for n in range(5)]), "minus-one-one")
    extractor = classifier(tmp_path / "model.safetensors")
    assert extractor.name == "tiny trained here, penultimate layer"
    found = features(extractor, records)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, model[:-1](x).detach(), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_inception_gives_logits_or_pooled_features(tmp_path):
    torch.manual_seed(0)
    state = tv.inception_v3(weights=None, init_weights=False).state_dict()
    torch.save(state, tmp_path / "inception.pth")
    records = noise_records(tmp_path / "a", 2)
    for layer, width in (("logits", 1000), ("penultimate", 2048)):
        extractor = inception(tmp_path / "inception.pth", layer, size=96)
        assert features(extractor, records).shape == (2, width) and str(width) in extractor.name
        assert extractor.model.transform_input and not extractor.model.training


# --- the probe ---


def test_the_probe_is_scikit_learns_logistic_regression_on_standardised_features():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 60)
    train, test = rng.normal(size=(60, 8)) + targets[:, None], rng.normal(size=(11, 8)) + 1
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    expected = model.fit(train, targets).predict_proba(test)
    # classes 1, 3 and 5 are in no training image
    found = probabilities(fit(train, targets * 2, 6), test)
    assert found.shape == (11, 6) and not found[:, 1::2].any()
    np.testing.assert_allclose(found[:, ::2], expected, atol=1e-12)
    expected = model.fit(train, targets > 1).predict_proba(test)
    found = probabilities(fit(train, 2 * (targets > 1), 3), test)
    np.testing.assert_allclose(found[:, ::2], expected, atol=1e-12)
    with refused(ClassifyError, "all of one class"):
        fit(train, np.zeros(60, int), 3)


def test_features_are_kept_for_these_images_and_this_network_alone(tmp_path):
    records = noise_records(tmp_path / "images", 9)
    extractor, digest = open_frozen("tiny", "none", 64, "cpu")
    assert extractor.size == 64
    found = kept_features(extractor, digest, tmp_path / "kept", 0, records)
    expected = features(Extractor(extractor.model, 64, "imagenet", "as it is"), records)
    np.testing.assert_array_equal(found, expected)
    assert found.shape == (9, 128)
    (file,) = (tmp_path / "kept").iterdir()
    np.save(file, found + 1)
    # read, not computed
    again = kept_features(extractor, digest, tmp_path / "kept", 0, records)
    assert np.array_equal(again, found + 1)
    kept_features(extractor, digest, tmp_path / "kept", 0, records[:7])
    other, another = open_frozen("tiny", "none", 64, "cpu")  # of other random weights
    assert another != digest
    kept_features(other, another, tmp_path / "kept", 0, records)
    assert len([*(tmp_path / "kept").iterdir()]) == 3

    broken = tiny(2)
    broken[0].weight.data.fill_(torch.nan)
    with refused(ClassifyError, "output is not finite"):
        kept_features(Extractor(broken, 64, "imagenet", ""), "x", tmp_path / "kept", 0, records)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2", "beit", "vit", "resnet", "clip", "siglip"])
def test_each_family_is_fed_as_its_own_processor_says_with_the_whole_image(tmp_path, name):
    extractor, _ = open_frozen(family(name, tmp_path / name), "none", 64, "cpu")
    assert extractor.size == 32
    records = noise_records(tmp_path / "images", 3)
    found = features(extractor, records)
    assert found.shape == (3, 8 if name == "resnet" else 16) and found.std(axis=0).max() > 0

    squashed = [Image.open(r.path).resize((32, 32), Image.Resampling.BILINEAR) for r in records]
    mean = json.loads((tmp_path / name / "preprocessor_config.json").read_text())["image_mean"]
    x = torch.tensor(np.stack(squashed))[:, None] / 255
    x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(STD)[:, None, None]
    out = extractor.model.vision(pixel_values=x)
    expected = out.last_hidden_state[:, 0] if name == "vit" else out.pooler_output.flatten(1)
    np.testing.assert_allclose(found, expected.detach(), atol=1e-5)


@pytest.mark.slow
def test_what_is_no_vision_model_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    edge, bare = (family("vit", tmp_path / name) for name in ("edge", "bare"))
    file = Path(edge) / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"shortest_edge": 40}}))
    (Path(bare) / file.name).unlink()
    for name, words in (
        (family("mae", tmp_path / "mae"), "two answers"),
        (edge, "40\\*40"),
        (bare, r"no preprocessor_config\.json"),
        (str(tmp_path / "empty"), "cannot be opened by transformers"),
        ("nowhere", "cannot be opened by transformers"),
    ):
        with refused(ClassifyError, words):
            open_frozen(name, "none", 64, "cpu")


def test_classify_writes_the_tables_of_a_frozen_model(classify, sites, tmp_path):
    result = classify(tmp_path / "out", "--model", "probe:tiny", "--features", tmp_path / "kept")
    rows = table(tmp_path / "out" / "predictions.csv")
    probabilities = np.array([[float(row[name]) for name in "ab"] for row in rows])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert [row["prediction"] for row in rows] == ["ab"[n] for n in probabilities.argmax(axis=1)]
    # bright above or below: what a random network's features tell apart
    assert result["training"]["images"] == 16 and result["scores"]["ranked"]["accuracy"] == 1
    names = "args.json confusion.png metrics.json model.safetensors predictions.csv"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names.split()
    assert len([*(tmp_path / "kept").iterdir()]) == 2
    # at work, as any other
    file = tmp_path / "out" / "model.safetensors"
    flags = "--classifier", file, "--predict", sites / "target"
    classify(tmp_path / "new", *flags, places=())
    found = {row["image"]: row for row in table(tmp_path / "new" / "predictions.csv")}
    for row in rows:
        assert all(found[f"{row['image']}.png"][key] == row[key] for key in ("a", "b"))
    save(file, *(lambda net, about: (net[-1], about | {"digest": "x"}))(*load(file)), "ab")
    with refused(ClassifyError, "tiny is another model than this probe was fitted on"):
        load(file)


@pytest.mark.slow
@pytest.mark.long
@real_data
def test_a_probe_of_imagenets_mobilenet_is_as_good_on_the_real_images_as_was_measured_elsewhere():
    (weights,) = (DATA / "weights").glob("*.pth*")
    spanish = read_spanish(DATA / "FETAL_PLANES_ZENODO")
    train = read_manifest(DATA / "manifests" / "lora_train_data.csv", spanish)
    test = [record for record in read_african(DATA / "Zenodo_dataset") if not record.train]
    frozen, _ = open_frozen("mobilenet_v2", str(weights), 224, "cpu")
    a, b = (np.array([PLANES.index(record.plane) for record in each]) for each in (train, test))
    found = probabilities(fit(features(frozen, train), a, 5), features(frozen, test))
    accuracy = (found.argmax(axis=1) == b).mean()
    assert len(train) == 100 and len(test) == 233 and accuracy == pytest.approx(0.575, abs=0.04)

"""Frozen vision models: tiny random ones of each family, scikit-learn on the same features, and the
real MobileNet."""

import csv
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from classify import ClassifyError
from classify.probe import NEIGHBOURS, features, fit, open_tower, parts
from ldm import MINI
from planes import PLANES
from planes.datasets import read_african, read_manifest, read_spanish
from planes.phantoms.phantom import write_african_layout, write_spanish_layout

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
CPU = torch.device("cpu")
pytestmark = pytest.mark.slow
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
FAMILIES = ("dinov2", "beit", "vit", "clip", "clip_vision")


def build(family: str, folder: Path) -> str:
    import transformers as t

    torch.manual_seed(0)
    wide = SMALL | {"intermediate_size": 32}
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    if family == "clip":
        words = len(t.CLIPTokenizer.from_pretrained(MINI / "tokenizer"))
        config = t.CLIPConfig(
            text_config=text
            | {
                "vocab_size": words,
                "max_position_embeddings": 64,
                "eos_token_id": words - 1,
            },
            vision_config=wide,
            projection_dim=8,
        )
        model = t.CLIPModel(config)
        t.CLIPTokenizer.from_pretrained(MINI / "tokenizer").save_pretrained(folder)
    elif family == "bert":
        model = t.BertModel(t.BertConfig(vocab_size=9, **text))
    else:
        name = {"dinov2": "Dinov2", "beit": "Beit", "vit": "ViT", "clip_vision": "CLIPVision"}[
            family
        ]
        config = getattr(t, f"{name}Config")(**(SMALL if family == "dinov2" else wide))
        model = getattr(t, f"{name}Model")(config)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: build(family, root / family) for family in (*FAMILIES, "bert")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_spanish_layout(root / "es", 4, test=0, seed=0)
    write_african_layout(root / "af", patients=3, seed=0)
    return root


def test_kinds_and_models_are_told_apart():
    assert parts("probe:facebook/dinov2-base") == ("probe", "facebook/dinov2-base")
    assert parts("knn:C:\\models\\x") == ("knn", "C:\\models\\x") and parts("resnet18") == (
        "",
        "resnet18",
    )
    assert parts("probe:") == ("", "probe:") and parts("other:x") == ("", "other:x")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_features_that_are_kept_and_its_own(models, data, tmp_path, family):
    records = read_spanish(data / "es")
    tower = open_tower(models[family], "none", 64, CPU)
    assert tower.size == 32
    found = features(tower, records, tmp_path, CPU, 0)
    assert found.shape == (20, 16) and found.std(axis=0).min() > 0
    (kept,) = tmp_path.iterdir()
    np.save(kept, found + 1)
    # read, not computed
    assert np.array_equal(features(tower, records, tmp_path, CPU, 0), found + 1)
    features(tower, records[:7], tmp_path, CPU, 0)
    assert len([*tmp_path.iterdir()]) == 2  # other images are other features


def test_a_model_feeds_on_what_its_own_preprocessing_says(models, tmp_path):
    folder = Path(build("vit", tmp_path / "vit"))
    said = {
        "size": {"height": 48, "width": 48},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1.0, 2.0, 3.0],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    tower = open_tower(str(folder), "none", 64, CPU)
    assert tower.size == 48 and [*map(list, tower.normal)] == [
        said["image_mean"],
        said["image_std"],
    ]


def test_both_heads_are_scikit_learns_on_the_same_features():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 60)
    train, test = rng.normal(size=(60, 8)) + targets[:, None], rng.normal(size=(11, 8)) + 1
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000)).fit(
        train, targets
    )
    near = KNeighborsClassifier(NEIGHBOURS, metric="cosine", weights="distance").fit(train, targets)
    for head, model in (("probe", linear), ("knn", near)):
        # classes 1, 3 and 5 are in no training image
        found = fit(head, train, targets * 2, 6)(test)
        assert found.shape == (11, 6) and not found[:, 1::2].any()
        np.testing.assert_array_equal(found[:, ::2], model.predict_proba(test))
    with pytest.raises(ClassifyError, match="all of one class"):
        fit("probe", train, np.zeros(60, int), 3)


@pytest.mark.parametrize(
    ("family", "with_text", "words"),
    [
        ("bert", False, "bert is no vision model"),
        ("dinov2", True, "has no text tower; give a CLIP"),
        ("nowhere", False, "cannot be opened by transformers"),
        ("resnet18", True, "has no text tower"),
    ],
)
def test_what_is_no_vision_model_is_refused_in_one_line(
    models, tmp_path, monkeypatch, family, with_text, words
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ClassifyError, match=words) as error:
        open_tower(models.get(family, family), "none", 64, CPU, with_text=with_text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model", ["probe:dinov2", "knn:beit", "prompts:clip", "probe:mobilenet_v2"]
)
def test_classify_writes_the_tables_of_a_frozen_model(models, data, tmp_path, model):
    kind, _, family = model.partition(":")
    script = runpy.run_path(str(ROOT / "classify.py"), run_name="script")
    flags = [
        "--spanish",
        data / "es",
        "--african",
        data / "af",
        "--weights",
        "none",
        "--size",
        64,
        "--device",
        "cpu",
    ]
    flags += [
        "--workers",
        0,
        "--out",
        tmp_path / "out",
        "--model",
        f"{kind}:{models.get(family, family)}",
    ]
    result = script["main"](script["parse_args"]([*map(str, flags)]))
    with open(tmp_path / "out" / "predictions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    probabilities = np.array([[float(row[plane]) for plane in PLANES] for row in rows])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert [row["prediction"] for row in rows] == [PLANES[n] for n in probabilities.argmax(axis=1)]
    assert result["training"]["images"] == 20 and (tmp_path / "out" / "confusion.png").exists()
    with pytest.raises(ClassifyError, match="is frozen; leave --augment"):
        script["main"](script["parse_args"]([*map(str, flags), "--augment"]))


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "weights").is_dir(), reason="the real images and weights are not here"
)
def test_a_linear_probe_of_imagenets_mobilenet_is_as_good_on_the_real_images_as_was_measured_elsewhere(
    tmp_path,
):
    (weights,) = (SHARED / "weights").glob("*.pth*")
    spanish = read_spanish(SHARED / "FETAL_PLANES_ZENODO")
    train = read_manifest(SHARED / "manifests" / "lora_train_data.csv", spanish)
    test = [record for record in read_african(SHARED / "Zenodo_dataset") if not record.train]
    tower = open_tower("mobilenet_v2", str(weights), 224, CPU)
    found, targets = (
        [features(tower, records, tmp_path, CPU, 2) for records in (train, test)],
        [np.array([PLANES.index(record.plane) for record in records]) for records in (train, test)],
    )
    accuracy = (fit("probe", found[0], targets[0], 5)(found[1]).argmax(axis=1) == targets[1]).mean()
    assert len(train) == 100 and len(test) == 233 and accuracy == pytest.approx(0.575, abs=0.04)

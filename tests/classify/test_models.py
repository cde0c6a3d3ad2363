"""The five networks, weights from everywhere, and the trained file."""

import argparse
import re
import urllib.error
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision.models as tv
from shorthand import DATA, refused
from small import tiny

from classify import ClassifyError
from classify.models import MODELS, build, find_head, load, read_weights, save
from planes import PLANES

FILE = DATA / "weights" / "mobilenet_v2-keras_imagenet-int8deq.pth"
PARAMETERS = {  # torchvision's published numbers of the 1000-class networks
    "densenet169": 14_149_480,
    "resnet18": 11_689_512,
    "efficientnet_b0": 5_288_548,
    "mobilenet_v2": 3_504_872,
    "vit_b_16": 86_567_656,
}


@pytest.mark.parametrize("name", MODELS)
def test_each_network_has_a_five_way_head_and_else_the_published_parameters(name):
    with torch.device("meta"):
        model = build(name, "none", 224)
        assert model.eval()(torch.zeros(2, 3, 224, 224)).shape == (2, 5)
    width = find_head(model)[1].in_features
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS[name] - (width + 1) * 1000 + (width + 1) * 5


@pytest.mark.parametrize(
    "name, size, words",
    [("vit_b_16", 100, "multiple of 16"), ("resnet18", 63, "at least 64")],
)
def test_a_size_that_cannot_be_is_refused(name, size, words):
    with refused(ClassifyError, words):
        build(name, "none", size)


def test_a_thousand_class_file_gets_a_new_head_and_another_keeps_its_own(tmp_path):
    whole = tiny().state_dict()
    torch.save(whole, tmp_path / "whole.pth")
    model = build("tiny", tmp_path / "whole.pth", 96, 7)
    state = model.state_dict()
    assert state.pop("5.weight").shape == (7, 128) and state.pop("5.bias").shape == (7,)
    assert all(torch.equal(value, whole[key]) for key, value in state.items())

    # in either format, told by what is in the file whatever its name
    torch.save(model.state_dict(), tmp_path / "a.safetensors")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.pth")
    for file in ("a.pth", "a.safetensors"):
        loaded = build("tiny", tmp_path / file, 64, 7).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_the_old_key_names_of_densenet_files_are_understood(tmp_path):
    names = tv.DenseNet(2, (1, 1), 4).state_dict().keys()
    layer = r"(denselayer\d+\.)(norm|conv)(\d)"
    old = {re.sub(layer, r"\1\2.\3", name): torch.zeros(1) for name in names}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "old.pth")
    assert read_weights("densenet169", tmp_path / "old.pth")[0].keys() == names


def test_position_embeddings_are_interpolated_to_the_image_size(tmp_path, monkeypatch):
    def small(num_classes=1000, image_size=224):
        return tv.VisionTransformer(image_size, 16, 1, 2, 8, 16, num_classes=num_classes)

    monkeypatch.setitem(MODELS, "vit_b_16", small)
    state = small().state_dict()
    ramp = torch.linspace(0, 1, 14)[:, None].expand(14, 14)  # from top to bottom
    grid = ramp.reshape(1, 196, 1).expand(1, 196, 8)
    state["encoder.pos_embedding"] = torch.cat([torch.full((1, 1, 8), 7.0), grid], 1)
    torch.save(state, tmp_path / "vit.pth")
    embedding = build("vit_b_16", tmp_path / "vit.pth", 512).encoder.pos_embedding[0, :, 0]
    assert embedding.shape == (1 + 32 * 32,) and embedding[0] == 7  # the class token has no place
    assert embedding[[1, 32]].tolist() == [0, 0] and embedding[[-32, -1]].tolist() == [1, 1]


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path):
    state = tiny().state_dict()
    torch.save(state, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:10_000])
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1  # which torch would read
    (tmp_path / "damaged.pth").write_bytes(damaged)
    torch.save({"state_dict": state}, tmp_path / "nested.pth")
    del state["0.weight"]
    torch.save(state, tmp_path / "incomplete.pth")
    torch.save(argparse.Namespace(), tmp_path / "pickled.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    wrong = {
        "incomplete.pth": r"Missing key.*0\.weight",
        "nested.pth": "state dict of tensors",
        "pickled.pth": "safely",
        "text.safetensors": "safely",
        "cut.pth": "safely",
        "damaged.pth": "is damaged",
        "absent.pth": "No such file",
    }
    for file, words in wrong.items():
        with refused(ClassifyError, f"{file}.*{words}"):
            build("tiny", tmp_path / file, 64)
    with refused(ClassifyError, "not weights of resnet18"):
        build("resnet18", tmp_path / "whole.pth", 64)


def test_imagenet_weights_come_through_torchvision_or_the_error_says_where_to_put_them(
    tmp_path, monkeypatch
):
    state = tv.mobilenet_v2().state_dict()
    hub = "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(hub, lambda url, **settings: state)
    model = build("mobilenet_v2", "imagenet", 64)
    assert torch.equal(model.state_dict()["features.0.0.weight"], state["features.0.0.weight"])

    def offline(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(hub, offline)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    url = tv.ResNet18_Weights.IMAGENET1K_V1.url
    with refused(ClassifyError, f"fetch {url} to {tmp_path / 'checkpoints' / Path(url).name}"):
        build("resnet18", "imagenet", 64)


@pytest.mark.skipif(not FILE.is_file(), reason="the real weights are not here")
def test_real_imagenet_weights_load_and_keep_their_batch_norm():
    model = build("mobilenet_v2", FILE, 224)
    state = torch.load(FILE, weights_only=True)
    assert torch.equal(model.features[0][1].running_mean, state["features.0.1.running_mean"])


def test_a_saved_classifier_is_read_back_with_its_description(tmp_path):
    model = build("mobilenet_v2", "none", 64).eval()
    path, facts = tmp_path / "model.safetensors", {"model": "mobilenet_v2", "size": 64}
    save(path, model, facts | {"input_range": "zero-one"})
    again, description = load(path)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(again(x), model(x)) and not again.training
    assert description["input_range"] == "zero-one" and description["classes"] == list(PLANES)

    safetensors.torch.save_file(model.state_dict(), tmp_path / "bare.safetensors")
    with refused(ClassifyError, r"bare\.safetensors: not a classifier"):
        load(tmp_path / "bare.safetensors")

"""The classifiers: networks and weights, images and augmentation, training, and classify.py as its
user meets it."""

import argparse
import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision.models as tv
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw
from torch import nn
from torchvision.transforms import RandomResizedCrop

from classify import ClassifyError
from classify.data import (
    INPUT_RANGES,
    RECIPES,
    PlaneImages,
    batches,
    decode,
    draw_augmentation,
    prepare,
)
from classify.models import MODELS, build, find_head, load, read_weights, save
from classify.train import MOMENTUM, predict, train_epoch
from planes import PLANES, Plane
from planes.datasets import Record
from planes.pictures import ImageError

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FILE = DATA / "weights" / "mobilenet_v2-keras_imagenet-int8deq.pth"


# --- networks ---

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
    width = find_head(model)[1].in_features
    assert find_head(model)[1].out_features == len(PLANES) == 5
    assert (
        sum(p.numel() for p in model.parameters())
        == PARAMETERS[name] - (width + 1) * 1000 + (width + 1) * 5
    )


@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit_b_16"])
def test_a_convolutional_network_takes_any_size(name):
    with torch.device("meta"):
        logits = build(name, "none", 97).eval()(torch.zeros(2, 3, 97, 97))
    assert logits.shape == (2, 5)


@pytest.mark.parametrize("size", [64, 224, 512])
def test_vit_takes_any_multiple_of_sixteen(size):
    with torch.device("meta"):
        model = build("vit_b_16", "none", size).eval()
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 5)
    assert model.encoder.pos_embedding.shape == (1, (size // 16) ** 2 + 1, 768)


@pytest.mark.parametrize(
    ("name", "size", "words"), [("vit_b_16", 100, "16"), ("resnet18", 63, "64"), ("vgg", 64, "vgg")]
)
def test_a_size_or_name_that_cannot_be_is_refused(name, size, words):
    with pytest.raises(ClassifyError, match=words):
        build(name, "none", size)


def imagenet_like(name, path, **size):
    """A 1000-class state dict as torchvision publishes it, random."""
    state = MODELS[name](**size).state_dict()
    torch.save(state, path)
    return state


def test_a_thousand_class_file_keeps_its_backbone_and_gets_a_new_head(tmp_path):
    state = imagenet_like("mobilenet_v2", tmp_path / "weights.pth")
    model = build("mobilenet_v2", tmp_path / "weights.pth", 96)
    loaded = model.state_dict()
    assert loaded["classifier.1.weight"].shape == (5, 1280)
    assert all(
        torch.equal(loaded[key], value)
        for key, value in state.items()
        if not key.startswith("classifier")
    )


def test_a_five_class_file_keeps_its_head_in_either_format(tmp_path):
    trained = build("mobilenet_v2", "none", 64)
    torch.save(trained.state_dict(), tmp_path / "a.pth")
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "a.safetensors")
    for file in ("a.pth", "a.safetensors"):
        loaded = build("mobilenet_v2", tmp_path / file, 64).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in trained.state_dict().items())


def test_the_old_key_names_of_densenet_files_are_understood(tmp_path):
    with torch.device("meta"):
        names = tv.densenet169().state_dict().keys()
    old = {
        re.sub(r"(denselayer\d+\.)(norm|conv)(\d)", r"\1\2.\3", name): torch.zeros(1)
        for name in names
    }
    assert (
        "features.denseblock1.denselayer1.norm.1.weight" in old and "features.norm5.weight" in old
    )
    torch.save(old, tmp_path / "old.pth")
    assert read_weights("densenet169", tmp_path / "old.pth")[0].keys() == names


def test_position_embeddings_are_interpolated_to_the_image_size(tmp_path, monkeypatch):
    # one encoder layer: the embeddings are what this is about
    monkeypatch.setitem(
        MODELS,
        "vit_b_16",
        lambda num_classes=1000, image_size=224: tv.VisionTransformer(
            image_size, 16, 1, 2, 8, 16, num_classes=num_classes
        ),
    )
    state = imagenet_like("vit_b_16", tmp_path / "vit.pth")
    ramp = torch.linspace(0, 1, 14)[:, None].expand(14, 14)  # from top to bottom
    state["encoder.pos_embedding"] = torch.cat(
        [torch.full((1, 1, 8), 7.0), ramp.reshape(1, 196, 1).expand(1, 196, 8)], 1
    )
    torch.save(state, tmp_path / "vit.pth")

    embedding = build("vit_b_16", tmp_path / "vit.pth", 512).encoder.pos_embedding
    assert embedding.shape == (1, 32 * 32 + 1, 8)
    assert torch.equal(embedding[0, 0], torch.full((8,), 7.0))  # the class token has no place
    grid = embedding[0, 1:, 0].reshape(32, 32)
    torch.testing.assert_close(grid[[0, -1]], ramp[[0, -1]][:, :1].expand(2, 32))
    assert (grid.diff(dim=0) > 0).all() and grid.std(dim=1).max() < 1e-6

    same = build("vit_b_16", tmp_path / "vit.pth", 224).encoder.pos_embedding
    assert torch.equal(same, state["encoder.pos_embedding"])


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path):
    state = imagenet_like("mobilenet_v2", tmp_path / "whole.pth")
    del state["features.0.0.weight"]
    torch.save(state, tmp_path / "incomplete.pth")
    torch.save({"state_dict": state}, tmp_path / "nested.pth")
    torch.save(argparse.Namespace(), tmp_path / "pickled.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:100_000])
    wrong = {
        "incomplete.pth": "features.0.0.weight",
        "nested.pth": "state dict of tensors",
        "pickled.pth": "safely",
        "text.pth": "safely",
        "text.safetensors": "safely",
        "cut.pth": "safely",
        "absent.pth": "no such file",
    }
    for file, words in wrong.items():
        with pytest.raises(ClassifyError, match=words) as error:
            build("mobilenet_v2", tmp_path / file, 64)
        assert file in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ClassifyError, match="not weights of resnet18"):
        build("resnet18", tmp_path / "whole.pth", 64)


def test_imagenet_weights_come_through_torchvision(tmp_path, monkeypatch):
    state = tv.mobilenet_v2().state_dict()
    asked = []
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url",
        lambda url, **kw: asked.append(url) or state,
    )
    model = build("mobilenet_v2", "imagenet", 64)
    assert asked == [tv.MobileNet_V2_Weights.IMAGENET1K_V1.url]
    assert torch.equal(model.state_dict()["features.0.0.weight"], state["features.0.0.weight"])


def test_without_a_network_the_error_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    tried = []

    def offline(*_, **__):
        tried.append(1)
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("classify.models._failed", {})
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(ClassifyError) as error:
        build("resnet18", "imagenet", 64)
    url = tv.ResNet18_Weights.IMAGENET1K_V1.url
    assert url in str(error.value) and str(tmp_path / "checkpoints" / Path(url).name) in str(
        error.value
    )
    assert "\n" not in str(error.value)
    # which does not wait for the network again
    with pytest.raises(ClassifyError, match=re.escape(str(error.value))):
        build("resnet18", "imagenet", 64)
    assert len(tried) == 1


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_weights_are_opened_by_what_is_in_the_file_whatever_its_name(tmp_path, name):
    state = tv.mobilenet_v2().state_dict()
    torch.save(state, tmp_path / name)
    assert read_weights("mobilenet_v2", tmp_path / name)[0].keys() == state.keys()
    safetensors.torch.save_file(state, tmp_path / name)
    assert read_weights("mobilenet_v2", tmp_path / name)[0].keys() == state.keys()


@pytest.mark.skipif(
    not FILE.is_file(), reason="needs ../shared/data/weights, which is not part of the project"
)
def test_real_imagenet_weights_load_and_keep_their_batch_norm():
    model = build("mobilenet_v2", FILE, 224)
    state = torch.load(FILE, weights_only=True)
    assert torch.equal(model.features[0][1].running_mean, state["features.0.1.running_mean"])
    assert find_head(model)[1].out_features == 5


def test_a_saved_classifier_is_read_back_with_its_description(tmp_path):
    model = build("mobilenet_v2", "none", 64).eval()
    save(
        tmp_path / "model.safetensors",
        model,
        {"model": "mobilenet_v2", "size": 64, "input_range": "zero-one"},
    )
    again, description = load(tmp_path / "model.safetensors")
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(again(x), model(x)) and not again.training
    assert description["input_range"] == "zero-one" and description["classes"] == list(PLANES)

    safetensors.torch.save_file(model.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(ClassifyError, match=r"bare\.safetensors: not a classifier"):
        load(tmp_path / "bare.safetensors")


# --- images ---


def records_of(folder, images, planes, source="spain"):
    folder.mkdir(exist_ok=True)
    records = []
    for n, (image, plane) in enumerate(zip(images, planes)):
        path = folder / f"{source}{n}.png"
        Image.fromarray(image).save(path)
        records.append(Record(path, plane, f"{source}/{n}", True, source, "Spain"))
    return records


def test_grey_and_colour_images_become_three_channels_of_the_size_asked_for(tmp_path):
    grey = np.arange(40 * 60, dtype=np.uint8).reshape(40, 60)
    colour = np.zeros((50, 50, 3), np.uint8)
    colour[..., 0] = 200
    images = PlaneImages(records_of(tmp_path / "a", [grey, colour], PLANES), 32)
    first, target, index = images[0]
    assert first.shape == (1, 32, 32) and first.dtype == torch.uint8 and (target, index) == (0, 0)
    assert images[1][0].float().mean(dim=(1, 2)).tolist() == [200, 0, 0]  # RGB, not BGR
    ((alone, *_), _), ((both, targets, indices),) = batches(images, 1), batches(images, 2)
    assert alone.shape == (1, 1, 32, 32) and both.shape == (2, 3, 32, 32)
    assert torch.equal(both[0], first.expand(3, -1, -1)) and torch.equal(both[1], images[1][0])
    assert torch.equal(prepare(alone, "imagenet"), prepare(both[:1], "imagenet"))
    assert (targets.tolist(), indices.tolist()) == ([0, 1], [0, 1])


def test_images_that_were_moved_to_a_device_give_the_same_batches(tmp_path):
    rng = np.random.default_rng(0)
    records = records_of(
        tmp_path / "a",
        [rng.integers(0, 255, (20, 20), dtype=np.uint8) for _ in range(7)],
        PLANES * 2,
    )
    here, there = PlaneImages(records, 16), PlaneImages(records, 16)
    there.move(torch.device("cpu"), 1 << 20)
    assert there.moved is None  # nothing is kept yet
    list(there.preload())
    there.move(torch.device("cpu"), 7 * 16 * 16 - 1)
    assert there.moved is None  # a byte too little
    there.move(torch.device("cpu"), 7 * 16 * 16)
    there.kept = []  # what is not moved would be decoded again, from files that are gone
    expected = [*batches(here, 3, shuffle_seed=2)]
    for record in records:
        record.path.unlink()
    found = [*batches(there, 3, shuffle_seed=2)]
    assert len(found) == 3
    for one, other in zip(found, expected):
        assert all(map(torch.equal, one, other))


def test_preloading_changes_no_image_and_stops_at_its_budget(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (30, 30), dtype=np.uint8) for _ in range(7)]
    records = records_of(tmp_path / "a", pictures, PLANES * 2)
    disk, memory = PlaneImages(records, 16), PlaneImages(records, 16)
    assert len(list(memory.preload(memory=5 * 16 * 16, threads=3))) == 5 == len(memory.kept)
    assert all(torch.equal(disk[n][0], memory[n][0]) for n in range(7))


@pytest.mark.parametrize("kind", ["absent", "text", "cut", "deep"])
def test_an_image_that_cannot_be_used_is_named(tmp_path, kind):
    path = tmp_path / "scan.png"
    rng = np.random.default_rng(0)
    if kind == "text":
        path.write_text("no image")
    elif kind == "cut":
        Image.fromarray(rng.integers(0, 255, (90, 90), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    elif kind == "deep":
        Image.fromarray(rng.integers(0, 65535, (9, 9), dtype=np.uint16)).save(path)
    with pytest.raises(ImageError, match=r"scan\.png") as error:
        decode(path, 32)
    assert "\n" not in str(error.value)


def test_input_ranges_are_the_paper_s_the_notebook_s_and_imagenet_s():
    x = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)
    assert prepare(x, "minus-one-one").aminmax() == (-1, 1)
    assert prepare(x, "zero-one").aminmax() == (0, 1)
    expected = TF.normalize(x / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(prepare(x, "imagenet"), expected)
    assert set(INPUT_RANGES) == {"minus-one-one", "zero-one", "imagenet"}


def angle_and_flips(affine):
    """Degrees, and whether flipped in x and in y, of (B, 2, 3) matrices: rotation times diag(+-1,
    +-1)."""
    a, b, c, d = affine[:, 0, 0], affine[:, 0, 1], affine[:, 1, 0], affine[:, 1, 1]
    x, y = a < 0, d < 0  # the cosine of 25 degrees is positive
    sine = torch.where(x, -c, c)
    torch.testing.assert_close(torch.where(y, -b, b), -sine)
    return torch.rad2deg(torch.asin(sine)), x, y


def test_augmentation_has_the_paper_s_statistics():
    affine = draw_augmentation(RECIPES["paper"], 3, 0, torch.arange(4000))
    angle, x, y = angle_and_flips(affine)
    assert affine[:, :, 2].abs().max() == 0
    assert 24.9 < angle.max() < 25.001 and -25.001 < angle.min() < -24.9
    # four standard errors of 4000 draws
    assert abs(angle.mean()) < 4 * 25 / 3**0.5 / 4000**0.5
    assert abs(x.float().mean() - 0.5) < 4 * (0.25 / 4000) ** 0.5
    assert abs(y.float().mean() - 0.1) < 4 * (0.09 / 4000) ** 0.5
    assert abs((x & y).float().mean() - 0.05) < 4 * (0.0475 / 4000) ** 0.5


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    whole = draw_augmentation(RECIPES["paper"], 0, 1, torch.arange(6))
    assert torch.equal(
        draw_augmentation(RECIPES["paper"], 0, 1, torch.tensor([4, 2])), whole[[4, 2]]
    )
    assert not torch.equal(draw_augmentation(RECIPES["paper"], 0, 2, torch.arange(6)), whole)
    assert not torch.equal(draw_augmentation(RECIPES["paper"], 1, 1, torch.arange(6)), whole)


def test_flips_and_rotation_move_the_pixels_as_their_names_say():
    rng = np.random.default_rng(0)
    blocks = torch.from_numpy(rng.integers(0, 255, (1, 3, 8, 8), dtype=np.uint8))
    x = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    flat = prepare(x, "zero-one")
    for diagonal, axes in (((-1, 1), [3]), ((1, -1), [2]), ((-1, -1), [2, 3])):
        affine = torch.tensor([[[diagonal[0], 0, 0], [0, diagonal[1], 0]]]).float()
        torch.testing.assert_close(
            prepare(x, "zero-one", affine), flat.flip(axes), atol=1e-4, rtol=0
        )
    affine = draw_augmentation(RECIPES["paper"], 0, 0, torch.tensor([0]))
    angle, flip_x, flip_y = angle_and_flips(affine)
    moved = TF.rotate(flat, angle.item(), TF.InterpolationMode.BILINEAR)
    moved = moved.flip([axis for axis, flip in ((3, flip_x), (2, flip_y)) if flip])
    torch.testing.assert_close(prepare(x, "zero-one", affine), moved, atol=1e-3, rtol=0)


def test_the_notebook_s_augmentation_crops_what_torchvision_would_and_turns_by_at_most_15_degrees():
    recipe = RECIPES["notebook"]
    affine = draw_augmentation(recipe, 0, 0, torch.arange(3000))
    sides = affine[:, :, :2].norm(dim=1)  # of the crop, in units of the image's
    angle = torch.rad2deg(torch.asin((affine[:, 1, 0] / sides[:, 0]).clamp(-1, 1)))
    assert 14.5 < angle.abs().max() < 15.001
    area, aspect = sides.prod(dim=1), sides[:, 0] / sides[:, 1]
    assert 0.08 <= area.min() < 0.1 and 0.95 < area.max() <= 1.0001
    assert aspect.min() > 0.749 and aspect.max() < 1.334
    corners = torch.tensor([[x, y, 1.0] for x in (-1, 1) for y in (-1, 1)])
    turn = affine[:, :, 0] / sides[:, :1]  # back to the turned image, in which the crop lies
    turn = turn * torch.sign(turn[:, :1])
    back = torch.stack([turn[:, 0], turn[:, 1]], 1), torch.stack([-turn[:, 1], turn[:, 0]], 1)
    reach = torch.stack([torch.einsum("bi,bij,cj->bc", axis, affine, corners) for axis in back])
    assert reach.abs().max() <= 1.0001  # no crop sticks out
    assert abs((affine[:, 0, 0] < 0).float().mean() - 0.5) < 4 * (0.25 / 3000) ** 0.5
    assert (affine[:, 1, 1] > 0).all()  # never upside down

    theirs = torch.stack(  # the areas that torchvision's own crop draws have the same distribution
        [
            torch.tensor(
                RandomResizedCrop.get_params(torch.empty(1, 400, 400), [0.08, 1.0], [3 / 4, 4 / 3])[
                    2:
                ]
            )
            for _ in range(3000)
        ]
    )
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    difference = area.quantile(quantiles) - (theirs.prod(dim=1) / 400**2).quantile(quantiles)
    assert difference.abs().max() < 0.05  # four standard errors of a quantile of 3000


def test_a_notebook_augmentation_is_its_rotation_crop_and_flip_one_after_the_other():
    rng = np.random.default_rng(0)
    smooth = torch.from_numpy(rng.integers(0, 255, (1, 3, 4, 4), dtype=np.uint8)).float()
    x = torch.nn.functional.interpolate(smooth, 256, mode="bicubic").clamp(0, 255).byte()
    affine = draw_augmentation(RECIPES["notebook"], 0, 0, torch.tensor([1]))
    sides = affine[0, :, :2].norm(dim=0)
    flip = bool(affine[0, 0, 0] < 0)
    angle = torch.rad2deg(torch.atan2(-affine[0, 0, 1], affine[0, 1, 1])).item()
    cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    middle = torch.tensor([[cosine, sine], [-sine, cosine]]).float() @ affine[0, :, 2]
    left, top = ((middle - sides + 1) * 128).round().int().tolist()
    width, height = (sides * 256).round().int().tolist()
    turned = TF.rotate(prepare(x, "zero-one"), angle, TF.InterpolationMode.BILINEAR)
    moved = TF.resized_crop(turned, top, left, height, width, [256, 256], antialias=False)
    moved = TF.hflip(moved) if flip else moved
    difference = (prepare(x, "zero-one", affine) - moved).abs()
    assert difference.mean() < 0.01  # whole pixels of the crop


def test_a_recipe_sets_size_and_range_and_flags_override_it():
    base = ["--african", "x", "--out", "y"]
    script = runpy.run_path(str(ROOT / "classify.py"), run_name="classify_script")
    args = script["parse_args"]([*base, "--recipe", "notebook"])
    assert (args.size, args.input_range) == (224, "zero-one")
    args = script["parse_args"](base)
    assert (args.size, args.input_range) == (512, "minus-one-one")
    assert script["parse_args"]([*base, "--size", "64"]).size == 64


def test_what_rotation_brings_in_is_black_in_every_range():
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    turned = torch.tensor([[[0.9, -0.43, 0], [0.43, 0.9, 0]]])
    assert prepare(white, "minus-one-one", turned)[0, :, 0, 0].tolist() == [-1, -1, -1]
    assert prepare(white, "zero-one", turned)[0, :, 0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path, workers):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (20, 20), dtype=np.uint8) for _ in range(10)]
    images = PlaneImages(records_of(tmp_path / "a", pictures, PLANES * 2), 16)
    alone, helped = (
        batches(images, 4, 0, shuffle_seed=5),
        batches(images, 4, workers, shuffle_seed=5),
    )
    orders = []
    for _ in range(2):  # epochs
        pairs = list(zip(alone, helped, strict=True))
        assert all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two))
        orders.append(torch.cat([one[2] for one, _ in pairs]).tolist())
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(10))


# --- training ---


def shapes(count, rng):
    """Five kinds of white figures on black: disc, ring, bar, square, nothing."""
    images = []
    for n in range(count):
        image = Image.new("L", (64, 64))
        draw = ImageDraw.Draw(image)
        x, y, r = *rng.integers(20, 44, 2).tolist(), int(rng.integers(10, 16))
        box = (x - r, y - r, x + r, y + r)
        kind = n % 5
        if kind == 0:
            draw.ellipse(box, fill=255)
        elif kind == 1:
            draw.ellipse(box, outline=255, width=3)
        elif kind == 2:
            draw.line((x - r, y, x + r, y), fill=255, width=4)
        elif kind == 3:
            draw.rectangle(box, fill=255)
        images.append(np.array(image))
    return images


def tiny_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, 2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 6 * 6, 5),
    )


def test_training_learns_shapes_that_it_can_tell_apart(tmp_path):
    rng = np.random.default_rng(0)
    images = PlaneImages(records_of(tmp_path / "a", shapes(120, rng), PLANES * 24), 32)
    list(images.preload())
    model = tiny_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=MOMENTUM)
    loader = batches(images, 24, shuffle_seed=0)
    losses = [train_epoch(model, loader, optimizer, "minus-one-one") for _ in range(25)]
    probabilities = predict(model, batches(images, 50), "minus-one-one")
    assert losses[-1] < 0.3 * losses[0]
    assert probabilities.shape == (120, 5)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(120))
    assert (probabilities.argmax(1) == torch.tensor(images.targets)).float().mean() > 0.95


def test_the_loss_of_an_epoch_is_the_mean_over_images_not_over_batches(tmp_path):
    images = PlaneImages(
        records_of(tmp_path / "a", shapes(7, np.random.default_rng(0)), PLANES * 2), 32
    )
    model = tiny_network()
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    whole = train_epoch(model, batches(images, 7), frozen, "zero-one")
    assert train_epoch(model, batches(images, 3), frozen, "zero-one") == pytest.approx(
        whole, rel=1e-5
    )
    expected = (
        -predict(model, batches(images, 7), "zero-one")[torch.arange(7), images.targets]
        .log()
        .mean()
        .item()
    )
    assert whole == pytest.approx(expected, rel=1e-5)


def test_an_epoch_trains_and_prediction_does_not(tmp_path):
    images = PlaneImages(
        records_of(tmp_path / "a", shapes(5, np.random.default_rng(0)), PLANES), 32
    )
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    predict(model, batches(images, 5), "zero-one")
    assert norm.running_mean.abs().max() == 0
    train_epoch(model, batches(images, 5), torch.optim.SGD(model.parameters(), lr=0.0), "zero-one")
    assert norm.running_mean.min() > 0


def test_the_augmentation_gets_the_indices_of_the_batch(tmp_path):
    images = PlaneImages(
        records_of(tmp_path / "a", shapes(7, np.random.default_rng(0)), PLANES * 2), 32
    )
    model, seen = tiny_network(), []

    def black(indices):
        seen.extend(indices.tolist())
        # far outside the image
        return torch.tensor([[1.0, 0, 9], [0, 1, 9]]).expand(len(indices), 2, 3)

    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = train_epoch(model, batches(images, 2, shuffle_seed=1), frozen, "zero-one", black)
    assert sorted(seen) == list(range(7))
    blank = model(torch.zeros(1, 3, 32, 32)).expand(7, -1)
    assert loss == pytest.approx(
        nn.functional.cross_entropy(blank, torch.tensor(images.targets)).item(), rel=1e-5
    )


def test_a_loss_that_explodes_ends_the_run(tmp_path):
    images = PlaneImages(
        records_of(tmp_path / "a", shapes(10, np.random.default_rng(0)), PLANES * 2), 32
    )
    model = tiny_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    with pytest.raises(ClassifyError, match="learning rate"):
        for _ in range(3):
            train_epoch(model, batches(images, 5), optimizer, "zero-one")


# --- the script ---


def script():
    return runpy.run_path(str(ROOT / "classify.py"), run_name="classify_script")


def run(*flags):
    module = script()
    return module["main"](module["parse_args"]([str(flag) for flag in flags]))


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """Both datasets' layouts with drawn shapes, and a list of synthetic ones: 4 + 2 images a
    plane."""
    root = tmp_path_factory.mktemp("sites")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(p) for p in shapes(50, rng)]
    (root / "spanish" / "Images").mkdir(parents=True)
    lines = ["Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train "]
    for n in range(20):
        name = f"Patient{n // 2 + 1:05}_Plane1_{n}"
        label = "Other" if PLANES[n % 5] is Plane.OTHER else f"Fetal {PLANES[n % 5]}"
        lines.append(f"{name};{n // 2 + 1};{label};Not A Brain;Op. 1;Aloka;1 ")
        pictures[n].save(root / "spanish" / "Images" / f"{name}.png")
    (root / "spanish" / "FETAL_PLANES_DB_data.csv").write_text("\n".join(lines) + "\n")

    (root / "african" / "Ghana").mkdir(parents=True)
    lines = ["Patient_num,Plane,Train,Center,Filename"]
    for n in range(16):
        train, kind = int(n < 8), n % 4
        lines.append(f"{n // 4},Fetal {PLANES[kind]},{train},Ghana,scan{n}")
        pictures[20 + n // 4 * 5 + kind].save(root / "african" / "Ghana" / f"scan{n}.png")
    # an image of the test is a copy of one in training, under another patient number
    shutil.copy(root / "african" / "Ghana" / "scan0.png", root / "african" / "Ghana" / "scan12.png")
    (root / "african" / "African_planes_database.csv").write_text("\n".join(lines) + "\n")

    (root / "synthetic").mkdir()
    lines = ["image,plane,sampler"]
    for n in range(10):
        lines.append(f"{n}.png,{PLANES[n % 5]},euler")
        pictures[40 + n].save(root / "synthetic" / f"{n}.png")
    (root / "synthetic" / "manifest.csv").write_text("\n".join(lines) + "\n")
    return root


def flags(sites, out, *more):
    places = [
        "--spanish",
        sites / "spanish",
        "--african",
        sites / "african",
        "--out",
        out,
        "--device",
        "cpu",
    ]
    small = [
        "--model",
        "mobilenet_v2",
        "--weights",
        "none",
        "--size",
        64,
        "--epochs",
        1,
        "--batch-size",
        8,
    ]
    return [*places, *small, *more]


@pytest.fixture(scope="module")
def trained(sites, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    mix = [
        "--synthetic",
        sites / "synthetic" / "manifest.csv",
        "--augment",
        "--validation",
        4,
        "--workers",
        1,
    ]
    return out, mix, run(*flags(sites, out, *mix))


# of several steps a later one finds it, after a single one the test does
@pytest.mark.parametrize("batch", [4, 999])
def test_a_training_gone_wrong_is_said_and_leaves_no_scores(sites, tmp_path, batch, capsys):
    with pytest.raises(ClassifyError, match=r"not? (longer )?finite; lower the learning rate"):
        run(*flags(sites, tmp_path / "out", "--lr", 1e30, "--batch-size", batch))
    with pytest.raises(SystemExit):
        run(*flags(sites, tmp_path / "out", "--lr", "inf"))
    assert (
        "--lr inf: must be positive" in capsys.readouterr().err and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(
    "number, more",
    [
        (signal.SIGINT, ["--schedule", "cosine", "--augment"]),
        (signal.SIGTERM, ["--balanced-sampling", "--contrast"]),
    ],
)
def test_a_run_that_is_asked_to_stop_goes_on_from_its_last_epoch_to_the_same_bits(
    sites, tmp_path, number, more
):
    more = [*more, "--epochs", 3, "--validation", 4]  # dropout makes it random besides
    run(*flags(sites, tmp_path / "whole", *more))
    done = []

    def asked_in_the_second_epoch(*args):
        done.append(train_epoch(*args))
        if len(done) == 2:
            os.kill(os.getpid(), number)
        return done[-1]

    module = script()
    module["parse_args"].__globals__["train_epoch"] = asked_in_the_second_epoch
    out = [str(flag) for flag in flags(sites, tmp_path / "cut", *more)]
    with pytest.raises(SystemExit) as stop:
        module["main"](module["parse_args"](out))
    assert stop.value.code == 128 + number and [p.name for p in (tmp_path / "cut").iterdir()] == [
        "checkpoint.pt"
    ]
    with pytest.raises(
        ClassifyError, match=r"other settings \(--lr was 0\.001, is 0\.5\): use its own"
    ):
        run(*out, "--lr", 0.5, "--resume")
    run(*out, "--resume")
    for name in ("model.safetensors", "predictions.csv", "train.csv", "metrics.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
def test_a_test_set_of_one_plane_has_no_auc_which_json_says_by_null(sites, tmp_path, capsys):
    shutil.copytree(sites / "african", tmp_path / "african")
    table = tmp_path / "african" / "African_planes_database.csv"
    header, *rows = table.read_text().splitlines()
    test = [row for row in rows if ",0," in row]
    plane = test[0].split(",")[1]
    table.write_text(
        "\n".join([header, *(row for row in rows if row not in test or plane in row)]) + "\n"
    )
    run(*flags(sites, tmp_path / "out", "--african", tmp_path / "african"))
    text = (tmp_path / "out" / "metrics.json").read_text()
    metrics = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert metrics["scores"]["plain"]["auc"] is None and metrics["intervals"]["notebook"][
        "auc"
    ] == [None, None]
    assert 0 <= metrics["scores"]["plain"]["accuracy"] <= 1
    assert "AUC: none, since the test images are all" in capsys.readouterr().out


def test_a_run_writes_its_model_predictions_metrics_figure_losses_and_arguments(trained):
    out, _, result = trained
    names = {
        "model.safetensors",
        "predictions.csv",
        "metrics.json",
        "confusion.png",
        "train.csv",
        "args.json",
    }
    assert {path.name for path in out.iterdir()} == names
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result))
    assert metrics["test"]["images"] == 8 and metrics["test"]["patients"] == 2
    assert metrics["training"]["sources"] == {"spain": 16, "synthetic": 10}
    assert sum(metrics["training"]["planes"]["synthetic"].values()) == 10
    for definition in ("notebook", "plain"):
        low, high = metrics["intervals"][definition]["accuracy"]
        assert low <= metrics["scores"][definition]["accuracy"] <= high

    rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    hits = [row["target"] == row["prediction"] for row in rows]
    assert len(rows) == 8 and np.mean(hits) == metrics["scores"]["plain"]["accuracy"]
    for row in rows:
        values = [float(row[plane]) for plane in PLANES]
        assert (
            sum(values) == pytest.approx(1, abs=1e-5)
            and PLANES[int(np.argmax(values))] == row["prediction"]
        )
    losses = list(csv.DictReader((out / "train.csv").read_text().splitlines()))
    assert [row["epoch"] for row in losses] == ["1"] and 0 <= float(
        losses[0]["validation_accuracy"]
    ) <= 1
    record = json.loads((out / "args.json").read_text())
    assert (
        record["arguments"]["lr"] == 1e-3
        and record["versions"]["torchvision"]
        and len(record["inputs"]) == 4
    )


def test_the_saved_model_predicts_what_the_table_says(trained, sites):
    out, _, _ = trained
    model, description = load(out / "model.safetensors")
    rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    paths = [sites / "african" / row["center"] / f"{row['image']}.png" for row in rows]
    records = [Record(path, Plane.BRAIN, "", False, "africa", "") for path in paths]
    images = PlaneImages(records, description["size"])
    probabilities = predict(model, batches(images, 8), description["input_range"])
    written = torch.tensor([[float(row[plane]) for plane in PLANES] for row in rows])
    torch.testing.assert_close(probabilities, written, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files_whatever_the_number_of_workers(
    trained, sites, tmp_path
):
    out, mix, _ = trained
    run(*flags(sites, tmp_path / "again", *mix[:-1], 3))
    for path in out.iterdir():
        if path.name != "args.json":  # it names --out and --workers
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    run(*flags(sites, tmp_path / "other", *mix, "--seed", 1))
    assert (tmp_path / "other" / "train.csv").read_bytes() != (out / "train.csv").read_bytes()


def test_copies_of_training_images_are_reported_with_scores_without_them(sites, tmp_path, capsys):
    metrics = run(*flags(sites, tmp_path / "out", "--african-train"))
    assert "warning: 1 test image" in capsys.readouterr().out
    assert metrics["test"]["copies_of_training"] == 1
    assert np.sum(metrics["confusion"]) == 8 and np.sum(metrics["without_copies"]["confusion"]) == 7
    assert metrics["training"]["sources"] == {"spain": 20, "africa": 8}


def test_repeated_test_images_are_marked_whatever_was_trained_on(trained):
    rows = csv.DictReader((trained[0] / "predictions.csv").read_text().splitlines())
    assert [row["image"] for row in rows if row["copy"] == "1"] == ["scan12"]


def test_a_number_of_passes_becomes_whole_epochs(sites, tmp_path):
    run(*flags(sites, tmp_path / "out")[:-4], "--batch-size", 8, "--passes", 47)
    # 47 of 20 images
    assert len((tmp_path / "out" / "train.csv").read_text().splitlines()) == 1 + 2


def test_a_patient_on_both_sides_is_refused(sites, tmp_path):
    african = tmp_path / "african"
    shutil.copytree(sites / "african", african)
    table = african / "African_planes_database.csv"
    table.write_text(table.read_text().replace("2,Fetal abdomen,0", "1,Fetal abdomen,0"))
    with pytest.raises(ClassifyError, match="africa/Ghana/1"):
        run(*flags(sites, tmp_path / "out", "--african", african, "--african-train"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--spanish", "{nowhere}"], "nowhere"),
        (["--african", "{nowhere}"], "nowhere"),
        (["--synthetic", "{nowhere}"], "nowhere"),
        (["--weights", "{nowhere}"], "nowhere"),
        (["--per-plane", "5"], "5"),
        (["--validation", "20"], "20"),
        (["--size", "32"], "32"),
        (["--model", "vit_b_16", "--size", "72"], "72"),
        (["--out", "{table}"], "table.csv"),
        (["--synthetic", "{list}", "--synthetic", "{list}"], "2 times"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(sites, tmp_path, more, words):
    (tmp_path / "table.csv").touch()
    places = {"nowhere": tmp_path / "nowhere", "table": tmp_path / "table.csv"}
    places["list"] = sites / "synthetic" / "manifest.csv"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=words) as error:
        run(*flags(sites, tmp_path / "out", *(flag.format(**places) for flag in more)))
    assert type(error.value).__name__ in (
        "ClassifyError",
        "DatasetError",
        "NotADirectoryError",
    ) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_broken_test_image_is_refused_before_training(sites, tmp_path):
    shutil.copytree(sites / "african", tmp_path / "african")
    scan = tmp_path / "african" / "Ghana" / "scan9.png"
    scan.write_bytes(scan.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"scan9\.png: not a readable image"):
        run(*flags(sites, tmp_path / "out", "--african", tmp_path / "african"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more", [["--epochs", "0"], ["--lr", "0"], ["--seed", "-1"], ["--model", "vgg"]]
)
def test_flags_out_of_range_are_refused(sites, tmp_path, more, capsys):
    with pytest.raises(SystemExit) as stop:
        script()["parse_args"]([str(flag) for flag in flags(sites, tmp_path, *more)])
    assert stop.value.code == 2 and more[0] in capsys.readouterr().err


@pytest.mark.slow
def test_on_the_command_line_a_mistake_is_one_line_and_exit_code_2(sites, tmp_path):
    (sites / "african" / "Ghana" / "scan15.png").rename(tmp_path / "away.png")
    try:
        command = [sys.executable, ROOT / "classify.py", *map(str, flags(sites, tmp_path / "out"))]
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        (tmp_path / "away.png").rename(sites / "african" / "Ghana" / "scan15.png")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.count("\n") == 1
        and done.stderr.startswith("classify.py: ")
        and "scan15" in done.stderr
    )
    assert not (tmp_path / "out").exists()

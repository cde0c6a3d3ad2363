"""What the paper left out of its classifiers: contrast drawn at random, classes drawn equally
often, a falling rate."""

import json
import math
import runpy
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from classify.data import (
    CONTRAST_GAIN,
    RECIPES,
    BalancedSampler,
    PlaneImages,
    batches,
    draw_augmentation,
    draw_contrast,
    prepare,
)
from classify.train import train_epoch
from planes.phantoms.phantom import write_african_layout, write_spanish_layout

ROOT = Path(__file__).resolve().parents[2]
GREY = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(4, 3, -1, -1)


def images(counts):
    """A data set with so many images of each class, all black."""
    dataset = PlaneImages([], 64)
    dataset.targets = [n for n, count in enumerate(counts) for _ in range(count)]
    dataset.paths = [None] * len(dataset.targets)
    dataset.kept = [torch.zeros(1, 64, 64, dtype=torch.uint8)] * len(dataset.targets)
    return dataset


def test_contrast_depends_on_seed_epoch_and_index_alone():
    drawn = draw_contrast(3, 5, torch.arange(6))
    assert torch.equal(draw_contrast(3, 5, torch.tensor([4, 1])), drawn[[4, 1]])
    for other in (
        draw_contrast(4, 5, torch.arange(6)),
        draw_contrast(3, 6, torch.arange(6)),
        drawn.roll(1, 0),
    ):
        assert not torch.isclose(other, drawn).any()


def test_contrast_has_the_ranges_that_it_says():
    gamma, gain, offset = draw_contrast(0, 0, torch.arange(4000)).T.numpy()
    for values, low, high in (
        (np.log(gamma), -0.7, 0.7),
        (gain, *CONTRAST_GAIN),
        (offset, -0.12, 0.12),
    ):
        assert low <= values.min() and values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low) + 1e-6)
        assert values.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.05)


def test_contrast_is_gamma_then_gain_then_offset_and_stays_within_black_and_white():
    drawn = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 1.4, -0.1], [0.5, 1.4, 0.1]])
    x = prepare(GREY, "zero-one", contrast=drawn)
    one = GREY[:, 0].numpy() / 255
    expected = [one[0], one[1] ** 2, 1.4 * one[2] - 0.1, 1.4 * np.sqrt(one[3]) + 0.1]
    np.testing.assert_allclose(x[:, 0].numpy(), np.clip(expected, 0, 1), atol=1e-6)
    assert x.min() == 0 and x.max() == 1


def test_what_rotation_brings_in_stays_black_where_contrast_lifts_black():
    turned = torch.tensor([[[0.8, -0.6, 0.0], [0.6, 0.8, 0.0]]]).expand(4, -1, -1)
    x = prepare(GREY, "zero-one", turned, torch.tensor([[1.0, 1.0, 0.12]]).expand(4, -1))
    assert (x[:, :, 0, 0] == 0).all() and (x[:, :, 8, 8] > 0.12).all()


def test_balanced_batches_draw_every_class_equally_often_and_as_many_images_as_there_are():
    dataset = images((35, 162, 52, 106, 260))  # the paper's proportions: 615, so 123 of each
    loader = batches(dataset, 24, shuffle_seed=0, balanced=True)
    passes = [
        [torch.cat(column).tolist() for column in zip(*((t, i) for _, t, i in loader))]
        for _ in range(2)
    ]
    for targets, indices in passes:
        assert Counter(targets) == dict.fromkeys(range(5), 123)
        assert [dataset.targets[index % 615] for index in indices] == targets
        assert len({*targets[:24]}) == 5  # mixed
    assert passes[0] != passes[1]
    assert (
        [*BalancedSampler(dataset.targets, 0)]
        == passes[0][1]
        != [*BalancedSampler(dataset.targets, 1)]
    )


def test_what_is_left_over_goes_to_some_classes_and_one_that_is_absent_gets_nothing():
    drawn = [index % 7 for index in BalancedSampler([0, 0, 0, 0, 0, 1, 3], seed=0)]
    assert sorted(Counter([0, 0, 0, 0, 0, 1, 3][n] for n in drawn).items()) in (
        [(0, 3), (1, 2), (3, 2)],
        [(0, 2), (1, 3), (3, 2)],
        [(0, 2), (1, 2), (3, 3)],
    )


def test_an_image_that_is_drawn_again_is_augmented_anew():
    dataset = images((1, 9))  # the only one of its class is drawn five times
    ((_, targets, indices),) = batches(dataset, 10, shuffle_seed=0, balanced=True)
    assert (targets == 0).sum() == 5 and len(indices.unique()) == 10
    for draw in (draw_contrast, partial(draw_augmentation, RECIPES["paper"])):
        assert len(draw(0, 0, indices[targets == 0]).unique(dim=0)) == 5


def test_batches_that_are_not_balanced_see_every_image_once():
    dataset = images((3, 9, 1, 2, 6))
    indices = torch.cat([indices for *_, indices in batches(dataset, 4, shuffle_seed=0)])
    assert sorted(indices.tolist()) == list(range(len(dataset)))


def test_the_rate_is_asked_before_every_step():
    dataset, rates, used = images((2, 2, 2, 2, 2)), iter((0.3, 0.2, 0.1)), []
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=7.0)
    optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))
    train_epoch(model, batches(dataset, 4), optimizer, "zero-one", rate=lambda: next(rates))
    assert used == [0.3, 0.2, 0.1]


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    root = tmp_path_factory.mktemp("sites")
    write_spanish_layout(root / "spanish", train=2, test=0, seed=0)
    write_african_layout(root / "african", patients=2, seed=0)
    return root


def classify(sites, out, *flags, epoch=None):
    script = runpy.run_path(str(ROOT / "classify.py"), run_name="classify_script")
    if epoch:
        script["parse_args"].__globals__["train_epoch"] = epoch
    flags = [
        "--spanish",
        sites / "spanish",
        "--african",
        sites / "african",
        "--weights",
        "none",
        "--size",
        64,
        *flags,
    ]
    flags += ["--batch-size", 5, "--device", "cpu", "--out", out]
    script["main"](script["parse_args"]([str(flag) for flag in flags]))


@pytest.mark.slow
def test_a_cosine_falls_from_the_rate_to_nearly_nothing_over_all_steps(sites, tmp_path):
    rates = []

    def epoch(model, loader, *settings):
        rates.extend(settings[-1]() for _ in range(len(loader)))
        return 1.0

    classify(
        sites, tmp_path / "out", "--epochs", 4, "--lr", 0.01, "--schedule", "cosine", epoch=epoch
    )
    assert len(rates) == 8 and rates[0] == 0.01 and 0 < rates[-1] < 0.0005
    np.testing.assert_allclose(rates[4], 0.005)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.slow
def test_each_flag_changes_the_training_and_stands_in_the_file(sites, tmp_path):
    flags = {
        "plain": [],
        "contrast": ["--contrast"],
        "balanced_sampling": ["--balanced-sampling"],
        "schedule": ["--schedule", "cosine"],
    }
    weights, said = {}, {}
    for name, more in flags.items():
        classify(sites, tmp_path / name, "--epochs", 2, *more)
        file = tmp_path / name / "model.safetensors"
        weights[name] = file.read_bytes()
        head = int.from_bytes(weights[name][:8], "little")
        said[name] = json.loads(
            json.loads(weights[name][8 : 8 + head])["__metadata__"]["classifier"]
        )
    assert len({data[8 + int.from_bytes(data[:8], "little") :] for data in weights.values()}) == 4
    for name in ("contrast", "balanced_sampling", "schedule"):
        assert said[name][name] == ("cosine" if name == "schedule" else True)
        assert said["plain"][name] == ("constant" if name == "schedule" else False)

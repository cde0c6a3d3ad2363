"""Images, augmentation, and one epoch of training."""

from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from shorthand import agree, refused
from small import noise_records, tiny
from torch import nn
from torchvision.transforms import RandomResizedCrop

from classify import ClassifyError
from classify.data import (
    INPUT_RANGES,
    RECIPES,
    BalancedSampler,
    PlaneImages,
    batches,
    draw_augmentation,
    draw_contrast,
    prepare,
)
from classify.train import MOMENTUM, predict, train_epoch
from planes.datasets import Record

PAPER, NOTEBOOK = RECIPES["paper"], RECIPES["notebook"]
CLASSES = "a", "b"

# --- images ---


def test_grey_and_colour_images_become_batches_of_the_size_asked_for(tmp_path):
    (grey,) = noise_records(tmp_path, 1)
    colour = np.zeros((50, 50, 3), np.uint8)
    colour[..., 0] = 200
    Image.fromarray(colour).save(tmp_path / "colour.png")
    red = Record(tmp_path / "colour.png", "b", "", True, "source", "")
    images = PlaneImages([grey, red], 32, CLASSES)
    first, target, index = images[0]
    assert first.shape == (1, 32, 32) and first.dtype == torch.uint8 and (target, index) == (0, 0)
    squashed = Image.open(grey.path).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(first[0], squashed)
    assert images[1][0].float().mean(dim=(1, 2)).tolist() == [200, 0, 0]  # RGB, not BGR
    ((alone, *_), _), ((both, targets, indices),) = batches(images, 1), batches(images, 2)
    assert alone.shape == (1, 1, 32, 32) and both.shape == (2, 3, 32, 32)
    assert torch.equal(both[0], first.expand(3, -1, -1)) and torch.equal(both[1], images[1][0])
    assert torch.equal(prepare(alone, "imagenet"), prepare(both[:1], "imagenet"))
    assert (targets.tolist(), indices.tolist()) == ([0, 1], [0, 1])


def test_images_in_memory_give_the_same_batches_as_those_on_disk(tmp_path):
    records = noise_records(tmp_path, 7)
    disk, memory = (PlaneImages(records, 16, CLASSES) for _ in range(2))
    # a fixed budget of bytes
    assert len(list(memory.preload(memory=5 * 16 * 16, threads=3))) == 5 == len(memory.kept)
    expected = [*batches(disk, 3, shuffle_seed=2)]
    assert len(expected) == 3 and torch.cat([i for *_, i in expected]).tolist() != [*range(7)]
    for found, one in zip(batches(memory, 3, shuffle_seed=2), expected, strict=True):
        assert all(map(torch.equal, found, one))


@pytest.mark.slow
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    images = PlaneImages(noise_records(tmp_path, 10), 16, CLASSES)
    alone, helped = (batches(images, 4, workers, shuffle_seed=5) for workers in (0, 2))
    for _ in range(2):  # epochs
        for one, two in zip(alone, helped, strict=True):
            assert all(map(torch.equal, one, two))


def test_input_ranges_are_the_paper_s_the_notebook_s_and_imagenet_s():
    x = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)
    assert prepare(x, "minus-one-one").aminmax() == (-1, 1)
    assert prepare(x, "zero-one").aminmax() == (0, 1)
    expected = TF.normalize(x / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(prepare(x, "imagenet"), expected)
    assert set(INPUT_RANGES) == {"minus-one-one", "zero-one", "imagenet"}


# --- augmentation ---


def test_what_is_drawn_is_a_function_of_seed_epoch_and_index_with_these_values():
    paper = [[-0.976907, 0.213667, 0], [0.213667, 0.976907, 0]]
    notebook = [[-0.689848, 0.087648, 0.231289], [0.089625, 0.674633, -0.140521]]
    draws = (
        (lambda *at: draw_augmentation(PAPER, *at), paper),
        (lambda *at: draw_augmentation(NOTEBOOK, *at), notebook),
        (draw_contrast, [0.656205, 1.071536, 0.118880]),
    )
    for draw, expected in draws:
        drawn = draw(3, 1, torch.tensor([7, 0]))
        agree(drawn[1], torch.tensor(expected), 1e-6)
        for other in (draw(4, 1, torch.tensor([0])), draw(3, 2, torch.tensor([0])), drawn[:1]):
            assert not torch.equal(other[0], drawn[1])


def test_augmentation_has_the_paper_s_statistics():
    affine = draw_augmentation(PAPER, 3, 0, torch.arange(4000))
    x, y = affine[:, 0, 0] < 0, affine[:, 1, 1] < 0  # the cosine of 25 degrees is positive
    angle = torch.rad2deg(torch.asin(torch.where(x, -affine[:, 1, 0], affine[:, 1, 0])))
    assert affine[:, :, 2].abs().max() == 0 and 24.9 < angle.abs().max() < 25.001
    # four standard errors of 4000 draws
    for values, mean, deviation in ((angle, 0, 25 / 3**0.5), (x, 0.5, 0.5), (y, 0.1, 0.3)):
        assert abs(values.float().mean() - mean) < 4 * deviation / 4000**0.5


def test_the_notebook_s_crops_are_those_that_torchvision_draws():
    assert (NOTEBOOK.horizontal_flip, NOTEBOOK.vertical_flip) == (0.5, 0)
    affine = draw_augmentation(NOTEBOOK, 0, 0, torch.arange(3000))
    sides = affine[:, :, :2].norm(dim=1)  # of the crop, in units of the image's
    area, aspect = sides.prod(dim=1), sides[:, 0] / sides[:, 1]
    assert aspect.min() > 0.749 and aspect.max() < 1.334 and (affine[:, 1, 1] > 0).all()
    image, scale, ratio = torch.empty(1, 400, 400), [0.08, 1.0], [3 / 4, 4 / 3]
    crops = [RandomResizedCrop.get_params(image, scale, ratio)[2:] for _ in range(3000)]
    theirs = torch.tensor(crops).prod(dim=1) / 400**2
    quantiles = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99])
    # four standard errors of a quantile of 3000
    assert (area.quantile(quantiles) - theirs.quantile(quantiles)).abs().max() < 0.05


def test_an_augmentation_is_rotation_crop_and_flip_one_after_the_other():
    rng = np.random.default_rng(0)
    smooth = torch.from_numpy(rng.integers(0, 255, (1, 3, 4, 4), dtype=np.uint8)).float()
    x = torch.nn.functional.interpolate(smooth, 256, mode="bicubic").clamp(0, 255).byte()
    for recipe, index in ((PAPER, 0), (NOTEBOOK, 1)):
        affine = draw_augmentation(recipe, 3, 1, torch.tensor([index]))
        sides, flip = affine[0, :, :2].norm(dim=0), bool(affine[0, 0, 0] < 0)
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


def test_contrast_is_gamma_then_gain_then_offset_and_leaves_what_rotation_brings_in_black():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(3, -1, -1, -1)
    drawn = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.4, -0.1], [0.5, 1.4, 0.1]])
    one = grey[0, 0].numpy() / 255
    expected = np.clip([one**2, 1.4 * one - 0.1, 1.4 * np.sqrt(one) + 0.1], 0, 1)
    x = prepare(grey, "zero-one", contrast=drawn)
    np.testing.assert_allclose(x[:, 2].numpy(), expected, atol=1e-6)
    turned = torch.tensor([[[0.8, -0.6, 0.0], [0.6, 0.8, 0.0]]])
    x = prepare(grey[2:], "minus-one-one", turned, drawn[2:])
    assert (x[..., 0, 0] == -1).all() and (x[..., 8, 8] > -0.8).all()


# --- every class equally often ---


def test_balanced_batches_draw_every_class_equally_often_and_each_image_anew():
    dataset = PlaneImages([], 64)
    dataset.targets = [0] * 2 + [1] * 9 + [2] * 5  # of 16 images, so 5 or 6 of each class
    dataset.kept = [torch.zeros(1, 64, 64, dtype=torch.uint8)] * 16
    loader = batches(dataset, 5, shuffle_seed=0, balanced=True)
    passes = [torch.cat([indices for *_, indices in loader]).tolist() for _ in range(2)]
    for indices in passes:
        counts = Counter(dataset.targets[index % 16] for index in indices)
        assert sorted(counts.values()) == [5, 5, 6]
        assert len({*indices}) == 16  # one that is drawn again has another index
    assert passes[0] != passes[1] and passes[0] == [*BalancedSampler(dataset.targets, 0)]
    sampler = BalancedSampler([0, 0, 0, 1, 1, 2], 5)
    assert [[*sampler] for _ in range(2)] == [[29, 19, 11, 0, 15, 33], [29, 31, 11, 4, 22, 14]]


# --- training ---


def test_an_epoch_is_torchs_own_sgd_on_the_augmented_images(tmp_path):
    """The same steps written out: mean loss per image, a rate for each step, autocast left out."""
    images = PlaneImages(noise_records(tmp_path, 7), 32, CLASSES)
    torch.manual_seed(0)
    model, other = tiny(2), tiny(2)
    other.load_state_dict(model.state_dict())
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=7.0, momentum=MOMENTUM) for m in (model, other)
    ]
    assert MOMENTUM == 0.9
    torch.manual_seed(1)  # of dropout
    loss = train_epoch(
        model,
        batches(images, 3, shuffle_seed=1),
        optimizers[0],
        "zero-one",
        lambda indices: draw_augmentation(PAPER, 0, 0, indices),
        contrast=lambda indices: draw_contrast(0, 0, indices),
        rates=iter((0.3, 0.2, 0.1)),
    )
    torch.manual_seed(1)
    total = 0
    for (x, targets, indices), rate in zip(batches(images, 3, shuffle_seed=1), (0.3, 0.2, 0.1)):
        affine, contrast = draw_augmentation(PAPER, 0, 0, indices), draw_contrast(0, 0, indices)
        logits = other(prepare(x, "zero-one", affine, contrast))
        step = nn.functional.cross_entropy(logits, targets)
        optimizers[1].param_groups[0]["lr"] = rate
        optimizers[1].zero_grad()
        step.backward()
        optimizers[1].step()
        total += step.item() * len(targets)
    assert loss == total / 7
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_prediction_is_the_softmax_in_the_loaders_order_and_leaves_the_network_alone(tmp_path):
    images = PlaneImages(noise_records(tmp_path, 5), 32, CLASSES)
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    found = predict(model, batches(images, 2), "zero-one")
    assert norm.running_mean.abs().max() == 0
    x = torch.stack([images[n][0] for n in range(5)])
    torch.testing.assert_close(found, model(prepare(x, "zero-one")).softmax(dim=1))
    half = predict(model, batches(images, 2), "zero-one", torch.bfloat16)
    assert 0 < (half - found).abs().max() < 0.01 and half.dtype == torch.float32


def test_a_loss_or_prediction_that_explodes_ends_the_run(tmp_path):
    images = PlaneImages(noise_records(tmp_path, 10), 32, CLASSES)
    model = tiny(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    with refused(ClassifyError, "loss is no longer finite; lower the learning rate"):
        for _ in range(3):
            train_epoch(model, batches(images, 5), optimizer, "zero-one")
    with refused(ClassifyError, "output is not finite; lower the learning rate"):
        predict(model, batches(images, 5), "zero-one")

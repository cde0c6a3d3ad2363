"""FID, KID and PRDC against closed forms and independent programs; which copies of training images
are found."""

import json
import runpy
from math import erfc, isnan, sqrt

import numpy as np
import pytest
from PIL import Image
from shorthand import DATA, REFERENCES, real_data, refused

from eval.quality import (
    MEASURES,
    closest_pairs_figure,
    fid,
    kid,
    memorisation,
    pixel_features,
    prdc,
    quality_table,
    two_sample,
)
from planes.datasets import Record, read_african
from planes.leaks import leaks

SCRIPT = runpy.run_path(str(REFERENCES / "make_quality.py"))
CASES = SCRIPT["cases"]()


def gaussian(seed, count, width, mean=0.0):
    return mean + np.random.default_rng(seed).standard_normal((count, width))


# --- distances ---


@pytest.mark.parametrize("live", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_fid_kid_and_prdc_are_those_of_torch_fidelity_and_prdc_stored_and_live_within_1e_6(
    case, live
):
    real, synthetic, k = CASES[case]
    found = {"fid": fid(real, synthetic), "kid": kid(real, synthetic)}
    if live:
        [pytest.importorskip(package) for package in ("torch_fidelity", "prdc")]
        expected = SCRIPT["reference"](real, synthetic, k)
    else:
        expected = json.loads((REFERENCES / "quality.json").read_text())["values"][case]
    assert found | prdc(real, synthetic, k) == pytest.approx(expected, rel=1e-6)


def test_prdc_of_points_on_a_line_is_what_one_counts():
    # balls for k = 1, real: [-1, 1], [0, 2], [7, 13], [10, 16]; synthetic: [0.5, 1.5], [1, 2], [-2,
    # 1]
    real, synthetic = np.array([[0], [1], [10], [13]]), np.array([[1], [1.5], [-0.5]])
    expected = {"precision": 1.0, "recall": 0.5, "density": 4 / 3, "coverage": 0.5}
    assert prdc(real, synthetic, k=1) == expected
    x = gaussian(0, 40, 6)
    # each ball holds its centre and the five neighbours
    assert [*prdc(x, x).values()] == pytest.approx([1, 1, 6 / 5, 1])


# --- the two-sample test ---


def test_two_sample_is_fair_and_its_p_value_is_the_normal_tail_of_its_accuracy():
    accuracy, p_value = two_sample(gaussian(0, 50, 3), gaussian(1, 50, 3, mean=0.4))
    deviations = (accuracy - 0.5) / sqrt(0.25 / 100)
    assert 0.5 < accuracy < 0.75 and p_value == pytest.approx(erfc(deviations / sqrt(2)) / 2)
    few, many = gaussian(0, 30, 5), gaussian(1, 600, 5)
    assert two_sample(many, few)[0] < 0.7  # always guessing the larger set would give 0.95
    assert two_sample(many, few) != two_sample(many, few, seed=1)
    scales = np.array([1e-4, 1.0, 1e4, 1.0, 1.0])
    assert two_sample(many * scales, few * scales) == two_sample(many, few)


# --- the table ---


def test_quality_table_has_every_plane_and_sampler_and_all_of_them():
    real, synthetic = gaussian(0, 60, 3), gaussian(1, 46, 3, mean=0.3)
    real_planes = ["brain"] * 30 + ["femur"] * 30
    planes = ["brain"] * 20 + ["femur"] * 26
    samplers = ["euler", "unipc"] * 10 + ["euler"] * 10 + ["unipc"] * 10 + ["euler"] * 6
    rows = quality_table(real, synthetic, real_planes, planes, samplers, seed=3)
    assert [[*row.values()][:4] for row in rows[2:]] == [
        ["brain", "all", 20, 30],
        ["femur", "euler", 16, 30],
        ["femur", "unipc", 10, 30],
        ["femur", "all", 26, 30],
        ["all", "euler", 26, 60],
        ["all", "unipc", 20, 60],
        ["all", "all", 46, 60],
    ]
    a, b = real[30:], synthetic[30:40]
    values = [fid(a, b), kid(a, b), *prdc(a, b).values(), *two_sample(a, b, 3)]
    assert list(rows[4].items())[4:] == list(zip(MEASURES, values))

    # too few images for a measure, and one sampler alone
    planes = ["brain"] * 6 + ["femur"] * 5
    rows = quality_table(real, synthetic[:11], real_planes, planes, ["euler"] * 11)
    assert [isnan(row["kid"]) for row in rows] == [False, True, False]


# --- copies of training images ---


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """50 training images, and 25 synthetic ones of which the last ten are copies: five exact, five
    with noise."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)

    def write(name, pixels):
        path = folder / f"{name}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        return Record(path, "a", name, True, "source", "")

    coarse = rng.integers(0, 200, (65, 8, 8)).repeat(8, axis=1).repeat(8, axis=2)
    noisy = coarse[20:25] + rng.integers(0, 20, (5, 64, 64))
    train = [write(f"train{n}", pixels) for n, pixels in enumerate(coarse[:50])]
    made = np.concatenate([coarse[50:], coarse[10:15], noisy])
    return train, [write(f"synthetic{n}", pixels) for n, pixels in enumerate(made)]


def test_memorisation_finds_copies_with_and_without_noise_and_nothing_else(images):
    train, synthetic = map(pixel_features, images)
    found = memorisation(train, synthetic)
    np.testing.assert_array_equal(found.copied, [False] * 15 + [True] * 10)
    np.testing.assert_array_equal(found.index[15:], [*range(10, 15), *range(20, 25)])
    assert found.ratio[:15].min() > 0.6 and found.ratio[15:20].max() == 0
    assert found.ratio[20:].max() < 0.25
    between = np.linalg.norm(train[:, None] - train, axis=2) + 9 * np.eye(50)
    distance = np.linalg.norm(synthetic - train[found.index], axis=1)
    np.testing.assert_allclose(distance / np.median(between.min(axis=0)), found.ratio)
    # whatever the scale of the features
    np.testing.assert_allclose(memorisation(1e3 * train, 1e3 * synthetic).ratio, found.ratio)

    figure = closest_pairs_figure(found, *images)
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert [axes.get_title() for axes in figure.axes].count("0.00") == 5
    assert len(shown) == 16 and all(map(np.array_equal, shown[:5], shown[8:13]))


def test_memorisation_bears_training_images_that_repeat_each_other_and_distances_of_nearly_0():
    train = gaussian(0, 40, 30, mean=1e3)
    near = train[30:32].copy()
    near[:, 3] += 2.0**-20
    found = memorisation(np.concatenate([train, train[:10]]), near)
    assert found.copied.all() and found.index.tolist() == [30, 31]
    # both at exactly this distance, half of whose digits a difference of large squares would lose
    assert found.ratio[0] == pytest.approx(found.ratio[1], rel=1e-6)
    # each training image twice, the second as a network in another batch sees it
    twice = np.concatenate([train, train * (1 + 2.0**-20)])
    np.testing.assert_array_equal(memorisation(twice, train + 0.1).copied, [True] * 40)
    np.testing.assert_allclose(
        memorisation(twice, train + 0.1).ratio, memorisation(train, train + 0.1).ratio, rtol=0.05
    )
    for few in (np.repeat(train[:1], 3, axis=0), train[:1], 0 * train):
        with refused(ValueError, "are all one"):
            memorisation(few, train)


@pytest.mark.slow
@real_data
def test_memorisation_finds_the_african_test_images_known_to_repeat_training_ones_and_no_others():
    records = read_african(DATA)
    train, test = ([record for record in records if record.train is flag] for flag in (True, False))
    found = memorisation(pixel_features(train), pixel_features(test))
    pairs = {(test[n].name, train[found.index[n]].name) for n in np.flatnonzero(found.copied)}
    known = [leak for leak in leaks(train, test) if leak.kind == "file"]
    files = {(leak.test.name, leak.train.name) for leak in known}
    assert len(files) == 22
    # the same frames stored anew: equal to the eye, not byte for byte
    frames = [[f"patient00{a}_EGY_plane{n}" for a in pair] for *pair, n in ("581", "582", "161")]
    again = {tuple(pair) for pair in frames}
    assert pairs == files | again


def test_pixel_features_are_small_images_of_mean_0_and_norm_1(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 200, (64, 64), dtype=np.uint8)
    for n, image in enumerate((pixels, np.stack([pixels] * 3, axis=2), np.full_like(pixels, 7))):
        Image.fromarray(image).save(tmp_path / f"{n}.png")
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    grey, colour, flat = pixel_features([Record(path, "a", "", True, "", "") for path in paths])
    small = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR), float)
    expected = (small - small.mean()).flatten()
    np.testing.assert_allclose(grey, expected / np.linalg.norm(expected), atol=1e-6)
    np.testing.assert_allclose(colour, grey, atol=1e-6)
    assert not flat.any()


# --- what cannot be measured ---


@pytest.mark.parametrize("measure, least", [(fid, 2), (kid, 2), (prdc, 6), (two_sample, 5)])
def test_too_few_images_are_refused(measure, least):
    enough, too_few = gaussian(0, 8, 3), gaussian(1, least - 1, 3)
    measure(enough[:least], enough[-least:])
    for pair in ((too_few, enough), (enough, too_few)):
        with refused(ValueError, f"at least {least} of each are needed"):
            measure(*pair)

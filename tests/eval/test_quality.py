"""FID, KID and PRDC against closed forms and independent programs; which copies of training images
are found."""

import json
import runpy
from dataclasses import astuple
from math import isnan
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn

from classify.features import Extractor, features
from eval.quality import (
    PRDC,
    closest_pairs_figure,
    fid,
    kid,
    memorisation,
    nearest,
    pixel_features,
    prdc,
    quality_table,
    two_sample,
)
from planes import PLANES
from planes.datasets import Record, read_african
from planes.leaks import leaks
from planes.phantoms.phantom import phantom
from planes.phantoms.sites import SITE_A

REFERENCES = Path(__file__).parents[1] / "references"
AFRICAN = Path(__file__).resolve().parents[3] / "shared" / "data" / "Zenodo_dataset"
SCRIPT = runpy.run_path(str(REFERENCES / "make_quality.py"))
CASES = SCRIPT["cases"]()


def gaussian(seed, count, width, mean=0.0):
    return mean + np.random.default_rng(seed).standard_normal((count, width))


def with_moments(mean, covariance, count=50, seed=0):
    """Features that have exactly these mean and unbiased covariance."""
    x = gaussian(seed, count, len(mean))
    x -= x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


# --- against independent programs ---


def assert_agrees(case, expected):
    real, synthetic, k = CASES[case]
    found = {"fid": fid(real, synthetic), "kid": kid(real, synthetic)} | vars(
        prdc(real, synthetic, k)
    )
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_fid_kid_and_prdc_agree_with_stored_values_of_torch_fidelity_and_prdc_within_1e_6(case):
    assert_agrees(case, json.loads((REFERENCES / "quality.json").read_text())["values"][case])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_fid_kid_and_prdc_agree_with_torch_fidelity_and_prdc_run_now_within_1e_6(case):
    pytest.importorskip("torch_fidelity")
    pytest.importorskip("prdc")
    assert_agrees(case, SCRIPT["reference"](*CASES[case]))


# --- FID ---


def test_fid_of_gaussians_with_diagonal_covariances_is_the_closed_form():
    a, b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25])
    real, synthetic = (
        with_moments(np.zeros(3), np.diag(a)),
        with_moments([1.0, 2.0, 0.5], np.diag(b), seed=1),
    )
    assert fid(real, synthetic) == pytest.approx(
        5.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-9
    )


def test_fid_of_gaussians_whose_covariances_do_not_commute_is_the_equation_with_scipys_root():
    a, b = (x.T @ x for x in (gaussian(0, 9, 6), gaussian(1, 9, 6)))
    expected = np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert fid(with_moments(np.zeros(6), a), with_moments(np.zeros(6), b, seed=1)) == pytest.approx(
        expected, rel=1e-8
    )


def test_fid_does_not_change_when_features_are_turned_into_a_space_wider_than_there_are_images():
    real, synthetic = gaussian(0, 25, 8), 0.5 + 0.7 * gaussian(1, 40, 8)
    turn = np.linalg.qr(gaussian(2, 100, 8))[0].T
    assert fid(real @ turn, synthetic @ turn) == pytest.approx(fid(real, synthetic), rel=1e-9)


def test_fid_of_a_set_with_itself_is_zero_even_with_fewer_images_than_features():
    x = gaussian(0, 10, 50, mean=3)
    assert fid(x, x) == pytest.approx(0, abs=1e-9)


# --- KID ---


def test_kid_is_the_sum_over_pairs_written_out():
    x, y = gaussian(0, 5, 3), gaussian(1, 7, 3, mean=0.5)

    def mean(pairs):
        return np.mean([(a @ b / 3 + 1) ** 3 for a, b in pairs])

    within_x = mean([(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    within_y = mean([(y[i], y[j]) for i in range(7) for j in range(7) if i != j])
    between = mean([(a, b) for a in x for b in y])
    assert kid(x, y) == pytest.approx(within_x + within_y - 2 * between, rel=1e-10)


def test_kid_of_sets_of_one_distribution_is_zero_on_average_however_small_they_are():
    values = np.array([kid(gaussian([n, 0], 8, 4), gaussian([n, 1], 8, 4)) for n in range(2000)])
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean()) < 3 * error  # the biased estimate is 60 such errors away
    assert values.min() < 0


# --- precision, recall, density, coverage ---


def test_prdc_of_points_on_a_line_is_what_one_counts():
    # balls for k = 1, real: [-1, 1], [0, 2], [7, 13], [10, 16]; synthetic: [0.5, 1.5], [1, 2], [-2,
    # 1]
    real, synthetic = np.array([[0], [1], [10], [13]]), np.array([[1], [1.5], [-0.5]])
    assert prdc(real, synthetic, k=1) == PRDC(
        precision=1.0, recall=0.5, density=4 / 3, coverage=0.5
    )
    # for k = 2: [-10, 10], [-8, 10], [1, 19], [1, 25]; [-0.5, 2.5], [-0.5, 3.5], [-2.5, 1.5]
    assert prdc(real, synthetic, k=2) == PRDC(
        precision=1.0, recall=0.5, density=10 / 6, coverage=1.0
    )


def test_prdc_of_a_distant_set_is_all_zero_and_of_the_set_itself_all_covered():
    x = gaussian(0, 40, 6)
    assert astuple(prdc(x, x + 100)) == (0, 0, 0, 0)
    itself = prdc(x, x)
    assert (itself.precision, itself.recall, itself.coverage) == (1, 1, 1)
    # each ball holds its centre and the five neighbours
    assert itself.density == pytest.approx(6 / 5)


def test_prdc_tells_few_kinds_of_images_from_blurred_ones():
    real = gaussian(0, 200, 4)
    narrow, wide = prdc(real, 0.3 * gaussian(1, 200, 4)), prdc(real, 3 * gaussian(1, 200, 4))
    assert narrow.precision > 0.95 and narrow.recall < 0.3
    assert wide.precision < 0.4 and wide.recall > 0.8


# --- the two-sample test ---


@pytest.mark.slow
def test_two_sample_tells_sets_apart_that_differ_and_no_others():
    real = gaussian(0, 60, 10)
    apart = two_sample(real, gaussian(1, 60, 10, mean=2))
    assert apart.accuracy > 0.98 and apart.p_value < 1e-20
    p_values = [
        two_sample(gaussian([n, 0], 40, 5), gaussian([n, 1], 40, 5), seed=n).p_value
        for n in range(100)
    ]
    # two standard errors of 100 draws
    assert np.mean(np.array(p_values) < 0.1) == pytest.approx(0.1, abs=0.07)
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.1)


def test_two_sample_p_value_is_the_normal_tail_of_its_accuracy():
    found = two_sample(gaussian(0, 50, 3), gaussian(1, 50, 3, mean=0.4))
    deviations = (found.accuracy - 0.5) / np.sqrt(0.25 / 100)
    tail = np.mean(np.random.default_rng(0).standard_normal(1_000_000) >= deviations)
    assert 0.5 < found.accuracy < 0.75
    assert found.p_value == pytest.approx(tail, abs=2e-3)


def test_two_sample_draws_no_advantage_from_unequal_numbers_or_scales():
    few, many = gaussian(0, 30, 5), gaussian(1, 600, 5)
    assert two_sample(many, few).accuracy < 0.7  # always guessing the larger set would give 0.95
    scales = np.array([1e-4, 1.0, 1e4, 1.0, 1.0])
    assert two_sample(many * scales, few * scales) == two_sample(many, few)


# --- the table ---


def test_quality_table_has_a_row_for_each_plane_and_sampler_and_for_all_of_them():
    real, synthetic = gaussian(0, 60, 4), gaussian(1, 46, 4, mean=0.5)
    real_planes = ["brain"] * 30 + ["femur"] * 30
    planes = ["brain"] * 20 + ["femur"] * 26
    samplers = (["euler"] * 10 + ["unipc"] * 10) * 2 + ["euler"] * 6
    rows = quality_table(real, synthetic, real_planes, planes, samplers)
    keys = [(row["plane"], row["sampler"]) for row in rows]
    assert keys == [
        (plane, sampler)
        for plane in ("brain", "femur", "all")
        for sampler in ("euler", "unipc", "all")
    ]
    assert [row["images"] for row in rows] == [10, 10, 20, 16, 10, 26, 26, 20, 46]
    assert [row["real"] for row in rows] == [30, 30, 30, 30, 30, 30, 60, 60, 60]

    femur_unipc, everything = rows[4], rows[8]
    a, b = real[30:], synthetic[30:40]
    measured = [fid(a, b), kid(a, b), *astuple(prdc(a, b)), *astuple(two_sample(a, b))]
    assert list(femur_unipc)[4:] == [
        "fid",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
        "two_sample",
        "p_value",
    ]
    assert list(femur_unipc.values())[4:] == pytest.approx(measured)
    assert everything["fid"] == pytest.approx(fid(real, synthetic))


def test_quality_table_leaves_measures_of_too_few_images_open_and_a_single_sampler_alone():
    real, synthetic = gaussian(0, 20, 3), gaussian(1, 9, 3)
    rows = quality_table(
        real, synthetic, ["brain"] * 20, ["brain"] * 5 + ["femur"] * 4, ["euler"] * 9
    )
    assert [(row["plane"], row["sampler"], row["real"]) for row in rows] == [
        ("brain", "euler", 20),
        ("femur", "euler", 0),
        ("all", "euler", 20),
    ]
    assert [isnan(row["fid"]) and isnan(row["p_value"]) for row in rows] == [True, True, False]


# --- copies of training images ---


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """50 training images, and 25 synthetic ones of which the last ten are copies: five exact, five
    with noise."""
    folder, rng = tmp_path_factory.mktemp("phantoms"), np.random.default_rng(0)

    def write(name, image, plane):
        Image.fromarray(image).save(folder / f"{name}.png")
        return Record(folder / f"{name}.png", plane, name, True, "spain", "Spain")

    def draw(seed, n):
        image = phantom(
            PLANES[n % 5],
            SITE_A,
            np.random.default_rng([seed, 1, n]),
            np.random.default_rng([seed, 2, n]),
        )
        return np.asarray(Image.fromarray(image).resize((64, 64)))

    train = [draw(0, n) for n in range(50)]
    noisy = [
        np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)
        for image in train[20:25]
    ]
    synthetic = [draw(1, n) for n in range(15)] + train[10:15] + noisy
    return (
        [write(f"train{n}", image, PLANES[n % 5]) for n, image in enumerate(train)],
        [write(f"synthetic{n}", image, PLANES[n % 5]) for n, image in enumerate(synthetic)],
    )


def untrained_features(records):
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU()]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 5)).eval()
    return features(
        Extractor(model, 64, "minus-one-one", "penultimate", "an untrained network"), records
    )


@pytest.mark.parametrize("extract", [pixel_features, untrained_features])
def test_memorisation_finds_copies_with_and_without_noise_and_nothing_else(phantoms, extract):
    train, synthetic = map(extract, phantoms)
    found = memorisation(train, synthetic)
    np.testing.assert_array_equal(found.copied, [False] * 15 + [True] * 10)
    np.testing.assert_array_equal(found.index[15:], [*range(10, 15), *range(20, 25)])
    assert (
        found.ratio[:15].min() > 0.6
        and found.ratio[15:20].max() == 0
        and found.ratio[20:].max() < 0.25
    )


def test_memorisation_finds_the_african_test_images_known_to_repeat_training_ones_and_nothing_else():
    if not AFRICAN.is_dir():
        pytest.skip("needs the African set in ../shared/data")
    records = read_african(AFRICAN)
    train, test = ([record for record in records if record.train is flag] for flag in (True, False))
    found = memorisation(pixel_features(train), pixel_features(test))
    pairs = {(test[n].name, train[found.index[n]].name) for n in np.flatnonzero(found.copied)}
    files = {
        (leak.test.name, leak.train.name) for leak in leaks(train, test) if leak.kind == "file"
    }
    assert len(files) == 22
    # the same frames stored anew: equal to the eye, not byte for byte
    again = {
        (f"patient00{a}_EGY_plane{n}", f"patient00{b}_EGY_plane{n}")
        for a, b, n in ("581", "582", "161")
    }
    assert pairs == files | again


def test_memorisation_bears_training_images_that_repeat_each_other():
    train = gaussian(0, 40, 30)
    found = memorisation(
        np.concatenate([train, train[:10]]),
        np.concatenate([gaussian(1, 10, 30), train[30:32] + 0.05]),
    )
    np.testing.assert_array_equal(found.copied, [False] * 10 + [True] * 2)
    with pytest.raises(ValueError, match="copies of others"):
        memorisation(np.repeat(train, 2, axis=0), train)


def test_memorisation_does_not_depend_on_the_scale_of_the_features():
    train, synthetic = gaussian(0, 30, 5), gaussian(1, 10, 5)
    np.testing.assert_allclose(
        memorisation(1e3 * train, 1e3 * synthetic).ratio, memorisation(train, synthetic).ratio
    )


def test_nearest_gives_index_and_distance_to_the_last_digit_even_of_near_copies():
    train = gaussian(0, 20, 50, mean=1e3)
    step = np.zeros(50)
    step[3] = 2.0**-20
    index, distance = nearest(train, np.stack([train[7], train[4] + step]))
    np.testing.assert_array_equal(index, [7, 4])
    np.testing.assert_allclose(distance, [0, 2.0**-20], rtol=1e-6)


def test_pixel_features_know_no_brightness_or_contrast(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 100, (32, 32), dtype=np.uint8)
    records = []
    for name, image in {
        "image": pixels,
        "brighter": 2 * pixels + 50,
        "flat": np.full_like(pixels, 7),
    }.items():
        Image.fromarray(image).save(tmp_path / f"{name}.png")
        records.append(Record(tmp_path / f"{name}.png", PLANES[0], name, True, "spain", "Spain"))
    image, brighter, flat = pixel_features(records)
    np.testing.assert_allclose(image, brighter, atol=1e-6)
    assert np.linalg.norm(image) == pytest.approx(1) and not flat.any()


def test_closest_pairs_figure_shows_the_copies_above_their_originals(phantoms):
    train, synthetic = phantoms
    found = memorisation(pixel_features(train), pixel_features(synthetic))
    figure = closest_pairs_figure(found, train, synthetic, pairs=6)
    assert isinstance(figure, Figure) and len(figure.axes) == 12
    assert [axes.get_title() for axes in figure.axes[:5]] == ["0.00"] * 5 and figure.axes[
        5
    ].get_title() != "0.00"
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    for n in range(5):
        np.testing.assert_array_equal(shown[n], shown[6 + n])
    assert (shown[5] != shown[11]).any()


# --- what cannot be measured ---


@pytest.mark.parametrize(
    ("measure", "least"), [(fid, 2), (kid, 2), (prdc, 6), (two_sample, 5), (memorisation, 2)]
)
def test_too_few_images_of_either_set_are_refused_in_one_line(measure, least):
    enough, too_few = gaussian(0, 8, 3), gaussian(1, least - 1, 3)
    measure(enough[:least], enough[-least:])
    with pytest.raises(ValueError, match=f"at least {least} of each are needed") as error:
        measure(too_few, enough)
    assert "\n" not in str(error.value)
    if measure is not memorisation:  # one synthetic image is enough for it
        with pytest.raises(ValueError, match=f"at least {least}"):
            measure(enough, too_few)


def test_matrices_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="equally many columns"):
        fid(gaussian(0, 8, 3), gaussian(0, 8, 4))
    with pytest.raises(ValueError, match="nan or infinity"):
        kid(gaussian(0, 8, 3), np.full((8, 3), np.nan))
    with pytest.raises(ValueError, match="one label per image"):
        quality_table(
            gaussian(0, 8, 3), gaussian(1, 8, 3), ["brain"] * 8, ["brain"] * 8, ["euler"] * 7
        )
    with pytest.raises(ValueError, match="at least 1, not 0"):
        prdc(gaussian(0, 8, 3), gaussian(1, 8, 3), k=0)

"""The phantoms: speckle statistics, shadows, geometry, what tells the planes and the sites apart,
files on disk."""

import csv
import hashlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from planes import PLANES, Plane
from planes.datasets import read_spanish
from planes.phantoms.__main__ import main
from planes.phantoms.phantom import COUNTRIES, phantom, write_african_layout, write_spanish_layout
from planes.phantoms.scanner import BONE, FLUID, Probe, Tissue, scan, speckle
from planes.phantoms.sites import SITE_A, SITE_B, SITES

PROBE = Probe(
    width=200,
    height=160,
    half_angle=0.6,
    radius=0.4,
    axial=0.004,
    lateral=0.012,
    dynamic_range=60,
    gain=5,
    tgc=0,
    noise=-70,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_envelope_of_uniform_tissue_is_rayleigh_distributed():
    envelope = np.concatenate(
        [np.abs(speckle(np.ones((300, 300)), PROBE, rng(n))).ravel() for n in range(20)]
    )
    assert np.mean(envelope**2) == pytest.approx(1, rel=0.03)
    # 1.913
    assert envelope.mean() / envelope.std() == pytest.approx(np.sqrt(np.pi / (4 - np.pi)), rel=0.02)
    for q in (0.1, 0.5, 0.9):
        assert np.quantile(envelope, q) == pytest.approx(np.sqrt(-np.log(1 - q)), rel=0.03)


def test_speckle_is_as_coarse_as_the_point_spread_function_says():
    # lag at which the autocorrelation falls to 1/2, of a Gaussian of twice the variance
    def width(values):
        centred = values - values.mean()
        power = np.abs(np.fft.fft(centred, axis=0)) ** 2
        correlation = np.fft.ifft(power, axis=0).real.mean(axis=1)
        return np.argmax(correlation / correlation[0] < 0.5)

    fine, coarse = (
        np.abs(
            speckle(
                np.ones((400, 300)), Probe(200, 400, 0.6, 0.4, axial, 0.01, 60, 0, 0, -90), rng()
            )
        )
        ** 2
        for axial in (0.004, 0.012)
    )
    assert width(coarse) == pytest.approx(3 * width(fine), abs=2)


def test_compounding_averages_the_speckle_away():
    def contrast(looks):
        probe = Probe(200, 160, 0.6, 0.4, 0.004, 0.012, 60, 5, 0, -70, looks=looks)
        tissue = Tissue(probe, rng())
        return scan(tissue, probe, rng(1))[80:120, 80:120].std()

    assert contrast(4) < 0.7 * contrast(1)


def test_bone_is_bright_and_throws_a_shadow_and_fluid_is_black():
    def image(paint):
        tissue = Tissue(PROBE, rng())
        paint(tissue)
        return scan(tissue, PROBE, rng(1)).astype(float)

    plain = image(lambda tissue: None)
    bone = image(lambda tissue: tissue.paint(tissue.rod(0, 0.4, 0.2, 0.05, 0), BONE, 160))
    fluid = image(lambda tissue: tissue.paint(tissue.ellipse(0, 0.5, 0.2, 0.15), FLUID))
    middle = slice(90, 110)
    assert bone[58:70, middle].max() > plain[58:70, middle].max() + 20
    assert bone[100:140, middle].mean() < 0.6 * plain[100:140, middle].mean()
    assert fluid[75:85, middle].mean() < 0.2 * plain[75:85, middle].mean()


def test_outside_the_sector_all_is_black():
    image = scan(Tissue(PROBE, rng()), PROBE, rng(1))
    assert image.shape == (160, 200) and image.dtype == np.uint8
    assert image[:40, :30].max() == 0 and image[:40, -30:].max() == 0
    assert image[60:140, 90:110].mean() > 50


@pytest.mark.parametrize("plane", PLANES)
def test_a_phantom_depends_on_its_generators_alone(plane):
    one, two, other = (phantom(plane, SITE_A, rng(1), rng(n)) for n in (2, 2, 3))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


@pytest.mark.slow
def test_the_planes_can_be_told_apart_at_a_glance():
    """Nearest mean image of 24 x 24 pixels: crude, yet far above the chance of one in five."""

    def small(plane, n):
        image = Image.fromarray(phantom(plane, SITE_A, rng([1, n]), rng([2, n])))
        return np.asarray(image.resize((24, 24)), dtype=float)

    means = {plane: np.mean([small(plane, n) for n in range(12)], axis=0) for plane in PLANES}
    hits = [
        min(means, key=lambda candidate: ((means[candidate] - small(plane, n)) ** 2).sum()) == plane
        for plane in PLANES
        for n in range(100, 108)
    ]
    assert np.mean(hits) > 0.5


def test_the_sites_differ_in_size_and_contrast():
    a, b = (
        [phantom(Plane.BRAIN, site, rng([1, n]), rng([2, n])) for n in range(8)]
        for site in (SITE_A, SITE_B)
    )
    assert {im.shape for im in a}.isdisjoint(im.shape for im in b)
    contrast = [
        np.mean([(patch := im[40:80, 60:90].astype(float)).std() / patch.mean() for im in site])
        for site in (a, b)
    ]
    assert contrast[1] > 1.3 * contrast[0]


def test_the_spanish_layout_has_the_datasets_columns_names_and_counts(tmp_path):
    write_spanish_layout(tmp_path, train=3, test=2, seed=0)
    text = (tmp_path / "FETAL_PLANES_DB_data.csv").read_text()
    assert text.startswith("Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train \n")
    rows = list(csv.DictReader(text.splitlines(), delimiter=";"))
    assert len(rows) == 25 and len({row["Image_name"] for row in rows}) == 25
    for label in ("Fetal abdomen", "Fetal brain", "Fetal femur", "Fetal thorax", "Other"):
        assert [row["Train "] for row in rows if row["Plane"] == label].count("1 ") == 3
    train, test = (
        {row["Patient_num"] for row in rows if row["Train "] == flag} for flag in ("1 ", "0 ")
    )
    assert train.isdisjoint(test)
    assert all((tmp_path / "Images" / f"{row['Image_name']}.png").exists() for row in rows)


def test_the_spanish_layout_has_as_many_training_images_of_each_plane_as_it_is_told(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "planes.phantoms.phantom.phantom",
        lambda plane, site, patient, image: np.zeros((2, 2), np.uint8),
    )
    counts = {Plane.ABDOMEN: 1, Plane.BRAIN: 5, Plane.FEMUR: 2, Plane.THORAX: 3, Plane.OTHER: 8}
    write_spanish_layout(tmp_path / "each", train=counts, test=1, seed=0)
    records = read_spanish(tmp_path / "each")
    assert Counter(record.plane for record in records if record.train) == counts
    assert Counter(record.plane for record in records if not record.train) == dict.fromkeys(
        PLANES, 1
    )
    for name, train in (("number", 2), ("mapping", dict.fromkeys(PLANES, 2))):
        write_spanish_layout(tmp_path / name, train=train, test=1, seed=0)
    tables = [
        (tmp_path / name / "FETAL_PLANES_DB_data.csv").read_bytes()
        for name in ("number", "mapping")
    ]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("site", SITES)
def test_the_african_layout_is_written_of_any_site(site, tmp_path):
    main(
        [
            "--out",
            str(tmp_path),
            "--train",
            "0",
            "--test",
            "0",
            "--patients",
            "1",
            "--african-site",
            site,
        ]
    )
    sizes = {Image.open(path).size for path in (tmp_path / "african").glob("*/*.png")}
    assert sizes and sizes <= {*SITES[site].sizes}


def test_the_african_layout_has_no_other_and_no_thorax_in_ghana_and_uganda(tmp_path):
    write_african_layout(tmp_path, patients=2, seed=0)
    with open(tmp_path / "African_planes_database.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["Patient_num", "Plane", "Train", "Center", "Filename"]
    assert len(rows) == 2 * (3 * 4 + 2 * 3) and {row["Center"] for row in rows} == set(COUNTRIES)
    assert {row["Center"] for row in rows if row["Plane"] == "Fetal thorax"} == {
        "Algeria",
        "Egypt",
        "Malawi",
    }
    assert all((tmp_path / row["Center"] / f"{row['Filename']}.png").exists() for row in rows)


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    def digest(root):
        write_african_layout(root, patients=1, seed=5)
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.rglob("*.*"))]

    assert digest(tmp_path / "a") == digest(tmp_path / "b")

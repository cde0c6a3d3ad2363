"""The phantoms: speckle statistics, shadows, geometry, what they were when results were measured on
them, files on disk."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from harness.files import folder_hash
from planes import PLANES, Plane
from planes.datasets import read_african, read_spanish
from planes.phantoms.__main__ import main, parse_args
from planes.phantoms.phantom import phantom, write_african_layout, write_spanish_layout
from planes.phantoms.scanner import BONE, FLUID, Probe, Tissue, scan, speckle
from planes.phantoms.sites import SITES

PROBE = Probe(200, 160, 0.6, 0.4, 0.004, 0.012, dynamic_range=60, gain=5, tgc=0, noise=-70)


def rng(*seed):
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


def test_bone_is_bright_and_throws_a_shadow_fluid_and_what_lies_outside_the_sector_are_black():
    def image(paint):
        tissue = Tissue(PROBE, rng(0))
        paint(tissue)
        return scan(tissue, PROBE, rng(1)).astype(float)

    plain = image(lambda tissue: None)
    bone = image(lambda tissue: tissue.rod(0, 0.4, 0.2, 0.05, 0, BONE, 160))
    fluid = image(lambda tissue: tissue.ellipse(0, 0.5, 0.2, 0.15, 0, FLUID))
    middle = slice(90, 110)
    assert bone[58:70, middle].max() > plain[58:70, middle].max() + 20
    assert bone[100:140, middle].mean() < 0.6 * plain[100:140, middle].mean()
    assert fluid[75:85, middle].mean() < 0.2 * plain[75:85, middle].mean()
    assert plain.shape == (160, 200) and plain[60:140, middle].mean() > 50
    assert plain[:40, :30].max() == plain[:40, -30:].max() == 0


# means over four images each; of Other they show all kinds that there are
LEVELS = {
    "A": (99.72, 94.687, 86.474, 95.469, 73.318),
    "B": (74.878, 66.74, 54.095, 67.991, 48.233),
    "C": (87.558, 79.369, 66.334, 80.712, 58.772),
    "D": (95.04, 89.373, 78.659, 90.929, 72.499),
}


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_a_phantom_is_what_it_was_when_results_were_measured_on_it_by_its_mean_grey(site):
    def grey(plane, n):
        return phantom(plane, SITES[site], rng(1, n), rng(2, n)).mean()

    found = [np.mean([grey(plane, n) for n in (2, 4, 6, 7)]) for plane in PLANES]
    assert found == pytest.approx(LEVELS[site], abs=0.003)


def test_the_spanish_layout_is_the_datasets_own(tmp_path, four_pixels):
    counts = {Plane.ABDOMEN: 1, Plane.BRAIN: 3, Plane.FEMUR: 2, Plane.THORAX: 0, Plane.OTHER: 1}
    write_spanish_layout(tmp_path, train=counts, test=1, seed=0)
    lines = (tmp_path / "FETAL_PLANES_DB_data.csv").read_text().splitlines()
    assert lines[:3] == [
        "Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train ",
        "Patient00001_Plane5_1_of_1;1;Fetal femur;Not A Brain;Other;Other;1 ",
        "Patient00002_Plane2_1_of_1;2;Fetal abdomen;Not A Brain;Other;Other;1 ",
    ]
    records = read_spanish(tmp_path)
    train, test = ([r for r in records if r.train is flag] for flag in (True, False))
    assert Counter(r.plane for r in train) == {p: n for p, n in counts.items() if n}
    assert Counter(r.plane for r in test) == dict.fromkeys(PLANES, 1)
    assert not {r.patient for r in train} & {r.patient for r in test}
    assert all(r.path.is_file() for r in records)


def test_the_african_layout_has_no_other_and_no_thorax_in_ghana_and_uganda(tmp_path, four_pixels):
    write_african_layout(tmp_path, patients=2, seed=0)
    lines = (tmp_path / "African_planes_database.csv").read_text().splitlines()
    assert lines[0] == "Patient_num,Plane,Train,Center,Filename"
    assert lines[5] == "2,Fetal abdomen,0,Algeria,patient002_DZA_plane0"
    records = read_african(tmp_path)
    centers = {r.center for r in records if r.plane is Plane.THORAX}
    assert centers == {"Algeria", "Egypt", "Malawi"}
    assert len(records) == 2 * (3 * 4 + 2 * 3) and all(r.path.is_file() for r in records)


@pytest.mark.slow
def test_the_phantoms_of_any_site_are_written_by_one_command_by_seed(tmp_path, monkeypatch):
    for name, value in {"TRAIN": 1, "TEST": 0, "PATIENTS": 1}.items():
        monkeypatch.setattr(f"planes.phantoms.__main__.{name}", value)
    for name in "ab":
        flags = f"--out {tmp_path / name} --seed 5 --african-site C"
        main(parse_args(flags.split()))
    sizes = {Image.open(path).size for path in (tmp_path / "a/african").rglob("*.png")}
    assert len(list((tmp_path / "a").rglob("*.png"))) == 5 + 18 and sizes <= {*SITES["C"].sizes}
    assert folder_hash(tmp_path / "a") == folder_hash(tmp_path / "b")

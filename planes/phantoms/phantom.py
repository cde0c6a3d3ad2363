"""Procedural ultrasound phantoms: the anatomy of five planes, and images of it in the two datasets'
own layouts.

The anatomy follows the paper's descriptions of the planes; `scanner.py` makes the images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from harness.files import write_text
from planes import PLANES, Plane
from planes.phantoms.scanner import BONE, BRIGHT, DIM, FLUID, TISSUE, Rng, Tissue, annotate, scan
from planes.phantoms.sites import SITES, Site

# --- anatomy: how the paper describes the planes, one function each ---


class Pose(NamedTuple):
    """Where a structure lies in one image of one patient."""

    cx: float
    cy: float
    size: float  # half axis, depths
    angle: float

    def at(self, u: float, v: float) -> tuple[float, float]:
        """A point given in the structure's own frame (units of its size), in image coordinates."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        return self.cx + self.size * (c * u - s * v), self.cy + self.size * (s * u + c * v)


def _pose(rng: Rng, growth: float, tilt: float, size: float) -> Pose:
    cx, cy = rng.normal(0, 0.05), 0.52 + rng.normal(0, 0.04)
    return Pose(cx, cy, size * growth * rng.uniform(0.94, 1.06), rng.uniform(-tilt, tilt))


def brain(tissue: Tissue, rng: Rng, growth: float) -> None:
    """A bright elliptical skull, the midline echo broken by the cavum, two dark thalami, a
    ventricle."""
    p = cx, cy, size, angle = _pose(rng, growth, 0.6, 0.41)
    skull = cx, cy, size, rng.uniform(0.74, 0.82) * size, angle
    tissue.ellipse(*skull, DIM + 2, 1.0)
    for side in (-1, 1):
        tissue.ellipse(*p.at(0.02, 0.13 * side), 0.2 * size, 0.1 * size, angle, DIM - 10)
    tissue.ellipse(*p.at(0.5, 0.33), 0.26 * size, 0.08 * size, angle + 0.2, FLUID + 12)
    tissue.rod(cx, cy, 0.86 * size, 0.014, angle, BRIGHT + 2)
    tissue.rod(*p.at(-0.45, 0), 0.1 * size, 0.07 * size, angle, FLUID + 8)
    tissue.ellipse(*skull, BONE, 9.0, line=rng.uniform(0.022, 0.034))


def femur(tissue: Tissue, rng: Rng, growth: float) -> None:
    """One bright rod, a little bent, with its shadow, in the soft tissue of the thigh."""
    cx, cy, size, angle = _pose(rng, growth, 0.5, 0.29)
    thigh = cx, cy, 1.6 * size, 0.62 * size, angle
    tissue.ellipse(*thigh, DIM + 5)
    tissue.ellipse(*thigh, BRIGHT - 6, line=0.016)
    thick, bend = rng.uniform(0.036, 0.05), rng.uniform(0.1, 0.5)
    tissue.rod(cx, cy, size, thick, angle, BONE + 2, 160, bend=bend)


def abdomen(tissue: Tissue, rng: Rng, growth: float) -> None:
    """A round section: thin wall, liver, the dark stomach bubble, the umbilical vein, the spine
    with its shadow."""
    p = cx, cy, size, angle = _pose(rng, growth, 3.14, 0.39)
    wall = cx, cy, size, rng.uniform(0.9, 1.0) * size, angle
    tissue.ellipse(*wall, TISSUE + 3, 1.0)
    tissue.ellipse(*wall, BRIGHT - 1, line=0.018)
    stomach, turn = rng.uniform(0.17, 0.25), rng.uniform(0, 3)
    tissue.ellipse(*p.at(-0.42, 0.25), stomach * size, 0.8 * stomach * size, turn, FLUID)
    tissue.rod(*p.at(0.18, -0.12), 0.26 * size, 0.09 * size, angle + 0.9, FLUID + 8, bend=2.0)
    tissue.ellipse(*p.at(0.1, 0.78), 0.12 * size, 0.1 * size, 0, BONE - 2, 45)


def thorax(tissue: Tissue, rng: Rng, growth: float) -> None:
    """A round section: ribs as short bright arcs with shadows, grey lungs, the heart's four
    chambers, the spine."""
    p = cx, cy, size, angle = _pose(rng, growth, 3.14, 0.39)
    tissue.ellipse(cx, cy, size, 0.93 * size, angle, TISSUE, 1.0)
    for turn in np.arange(0, 2 * np.pi, 2 * np.pi / 7) + rng.uniform(-0.1, 0.1, 7):
        u, v = np.cos(turn), 0.93 * np.sin(turn)
        along = angle + turn + np.pi / 2
        tissue.rod(*p.at(u, v), 0.15 * size, 0.028, along, BONE - 1, 28, bend=2.5)
    heart, tilt = size * rng.uniform(0.46, 0.54), angle + rng.uniform(0.6, 0.95)
    h = Pose(*p.at(-0.16, -0.06), heart, tilt)
    tissue.ellipse(h.cx, h.cy, heart, 0.8 * heart, tilt, BRIGHT - 4)
    for u, v, part in ((-0.36, 0.34, 0.33), (0.38, 0.3, 0.31)):  # atria, ventricles
        for side in (-1, 1):
            half = part * heart
            tissue.ellipse(*h.at(u, side * v), half, 0.8 * half, tilt, FLUID + 6)
    tissue.ellipse(*p.at(0.1, 0.74), 0.11 * size, 0.1 * size, 0, BONE - 2, 40)


def other(tissue: Tissue, rng: Rng, growth: float) -> None:
    """None of the four: a profile, limbs in fluid, the placenta, or a coiled cord."""
    kind = rng.integers(4)
    if kind == 0:  # a face in profile at the edge of the amniotic fluid
        tissue.ellipse(rng.uniform(-0.3, 0.3), 0.2, 0.55, 0.2 * growth, rng.normal(0, 0.2), FLUID)
        x0 = rng.uniform(-0.1, 0.1)
        for k, size in enumerate((0.11, 0.055, 0.05, 0.06)):
            center = (x0 - 0.2 + 0.13 * k, 0.46 + 0.02 * k)
            tissue.ellipse(*center, size * growth, size * growth, 0, BRIGHT + 2, 8, line=0.02)
    elif kind == 1:  # hands and feet: small bright parts in fluid
        tissue.ellipse(rng.normal(0, 0.05), 0.5, 0.5, 0.3 * growth, rng.normal(0, 0.3), FLUID)
        for _ in range(rng.integers(5, 9)):
            center = (rng.uniform(-0.3, 0.3), rng.uniform(0.36, 0.66))
            half, angle = rng.uniform(0.02, 0.05), rng.uniform(0, 3.1)
            tissue.rod(*center, half, 0.025, angle, BRIGHT + 4, 12)
    elif kind == 2:  # the placenta: a thick layer over dark fluid
        edge = rng.uniform(0.38, 0.5)
        wave = 0.03 * np.sin(rng.uniform(5, 9) * tissue.x + rng.uniform(0, 6))
        tissue.paint(edge + wave - tissue.y, FLUID, soft=0.01)
        tissue.paint(rng.uniform(0.72, 0.85) + wave - tissue.y, TISSUE + 4, soft=0.02)
    else:  # the cord: rows of small loops in fluid
        tissue.ellipse(0, 0.5, 0.45, 0.32 * growth, 0, FLUID)
        start = rng.uniform(-0.3, -0.2)
        for k in range(rng.integers(5, 8)):
            center = (start + 0.085 * k, 0.5 + 0.05 * np.sin(1.3 * k + rng.uniform(0, 0.8)))
            tissue.ellipse(*center, 0.045, 0.05, 0, BRIGHT, line=0.018)


ANATOMY = dict(zip(PLANES, (abdomen, brain, femur, thorax, other)))


# --- images, and the datasets' layouts ---


def phantom(plane: Plane, site: Site, patient: Rng, image: Rng) -> np.ndarray:
    """One image (height, width) uint8 of a plane. `patient` draws what a patient's images share,
    `image` the rest."""
    probe, growth = site.probe(patient), patient.uniform(0.85, 1.1)
    tissue = Tissue(probe, image, level=TISSUE + patient.normal(0, 2))
    ANATOMY[plane](tissue, image, growth)
    return annotate(scan(tissue, probe, image), image, letters=image.integers(*site.letters))


def write_spanish_layout(
    root: Path, train: int | Mapping[Plane, int], test: int, seed: int, site: Site = SITES["A"]
) -> None:
    """Phantoms laid out as FETAL_PLANES_DB: `train` and `test` images per plane, one to four of a
    patient.

    train: of every plane, or of each its own
    Writes root/FETAL_PLANES_DB_data.csv and root/Images/*.png; the file's odd spaces are the
    original's.
    """
    codes = dict(zip(PLANES, (2, 3, 5, 6, 1)))
    rng, number = np.random.default_rng([seed, 1]), 0
    rows = ["Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train "]
    counts = train if isinstance(train, Mapping) else dict.fromkeys(PLANES, train)
    for flag, count_of in ((1, counts), (0, dict.fromkeys(PLANES, test))):
        queue = [plane for plane in PLANES for _ in range(count_of[plane])]
        rng.shuffle(queue)
        while queue:
            number += 1
            planes = sorted(queue.pop() for _ in range(min(len(queue), rng.integers(1, 5))))
            for n, plane in enumerate(planes):
                k, of = planes[: n + 1].count(plane), planes.count(plane)
                name = f"Patient{number:05}_Plane{codes[plane]}_{k}_of_{of}"
                path = root / "Images" / f"{name}.png"
                _draw(path, plane, site, [seed, 2, number], [seed, 3, number, n])
                label = "Other" if plane is Plane.OTHER else f"Fetal {plane}"
                sub_plane = "Other" if plane is Plane.BRAIN else "Not A Brain"
                rows.append(f"{name};{number};{label};{sub_plane};Other;Other;{flag} ")
    # last, so that a folder with its table is a whole one
    write_text(root / "FETAL_PLANES_DB_data.csv", "\n".join(rows) + "\n")


def write_african_layout(root: Path, patients: int, seed: int, site: Site = SITES["B"]) -> None:
    """Phantoms laid out as the African dataset: `patients` per country, one image of each plane;
    every other one tests.

    Writes root/African_planes_database.csv and root/<country>/*.png; no Other, and no thorax in
    Ghana and Uganda.
    """
    rows = ["Patient_num,Plane,Train,Center,Filename"]
    for c, (center, code) in enumerate(COUNTRIES.items()):
        for number in range(1, patients + 1):
            for n, plane in enumerate(PLANES[:3] if center in ("Ghana", "Uganda") else PLANES[:4]):
                name = f"patient{number:03}_{code}_plane{n}"
                path = root / center / f"{name}.png"
                _draw(path, plane, site, [seed, 4, c, number], [seed, 5, c, number, n])
                rows.append(f"{number},Fetal {plane},{number % 2},{center},{name}")
    write_text(root / "African_planes_database.csv", "\n".join(rows) + "\n")


COUNTRIES = {"Algeria": "DZA", "Egypt": "EGY", "Malawi": "MWI", "Uganda": "UGA", "Ghana": "GHA"}


def _draw(path: Path, plane: Plane, site: Site, patient: list[int], image: list[int]) -> None:
    """A phantom's file; patient, image: seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = phantom(plane, site, np.random.default_rng(patient), np.random.default_rng(image))
    Image.fromarray(pixels).save(path)

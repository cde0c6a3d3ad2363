"""The two datasets and the lists made from them, as records; selections by seed.

Readers know an image by its table alone, so they also work where only some of the files are;
`require_images` is the line that a caller gets before any work starts. Records of the maternal
cervix are left out, as in the paper.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

import numpy as np

from harness.files import file_below, walk
from planes import PLANES, Plane
from planes.tables import DatasetError, read_table

ORIGINS: dict[str, str] = {
    "spain": "download https://zenodo.org/records/3904280",
    "africa": "download https://zenodo.org/records/7540448",
    "synthetic": "make them with sample.py, or download https://zenodo.org/records/13228158",
}
"""Source of a record -> where its images come from."""

LABELS: dict[str, Plane | None] = {
    **{f"{fetal}{plane}": plane for fetal in ("", "fetal ") for plane in PLANES},
    **dict.fromkeys(("cervix", "maternal cervix")),
}
"""A plane's names in the tables, in lower case; None is left out."""

CODES: dict[str, Plane | None] = dict(zip("012345", (Plane.OTHER, *PLANES[:2], None, *PLANES[2:4])))
"""A plane's number in the authors' lists: neither our class index nor the digit in a file name."""

SPLIT: dict[str, bool] = {"1": True, "0": False}
"""Column Train: is it a training image?"""


@dataclass(frozen=True)
class Record:
    """One image and what its dataset's table says of it.

    plane: a Plane, or whatever the classes of another site are called (`planes.sites`)
    patient: unique among all sources, such as "spain/305" or "africa/Malawi/14"
    source: a key of ORIGINS, or "source" or "target"
    center: the country, the site's folder, or the sampler of a synthetic image
    levels: its site's, for more than 8 bits (`planes.pictures.levels_of`)
    """

    path: Path
    plane: str
    patient: str
    train: bool
    source: str
    center: str
    levels: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem


def read_spanish(root: str | Path) -> list[Record]:
    """FETAL_PLANES_DB (Burgos-Artizzu et al. 2020, Zenodo 3904280), both splits, in the table's
    order.

    root: the unpacked archive, or the folder that holds it as FETAL_PLANES_ZENODO/
    """
    table = _find(Path(root), "FETAL_PLANES_ZENODO", "FETAL_PLANES_DB_data.csv", "spain")
    images = table.parent / "Images"
    return [
        Record(images / f"{name}.png", plane, f"spain/{patient}", train, "spain", "Spain")
        for plane, name, patient, train in _rows(
            table, "Plane", "Image_name", "Patient_num", "Train"
        )
    ]


def read_african(root: str | Path) -> list[Record]:
    """The five-country African set (Sendra-Balcells et al. 2023, Zenodo 7540448), both splits, in
    the table's order.

    root: the unpacked archive, or the folder that holds it as Zenodo_dataset/
    A patient is (Center, Patient_num): the countries count from 1 each.
    """
    table = _find(Path(root), "Zenodo_dataset", "African_planes_database.csv", "africa")
    rows = _rows(table, "Plane", "Center", "Filename", "Patient_num", "Train", key=2)
    return [
        Record(table.parent / at / f"{name}.png", plane, f"africa/{at}/{n}", train, "africa", at)
        for plane, at, name, n, train in rows
    ]


def read_manifest(path: str | Path, records: Iterable[Record]) -> list[Record]:
    """The records that one of the authors' lists names, in the list's order.

    records: the whole dataset
    The list has columns Image_name (or Filename) and Plane (or category); it may write planes as
    CODES.
    """
    listed = _rows(Path(path), "Plane|category", "Image_name|Filename", labels=LABELS | CODES)
    there = {(record.plane, record.name): record for record in records}
    if lost := next((row for row in listed if row not in there), None):
        raise DatasetError(
            f"{path}: {lost[1]} is listed as {lost[0]}, which is not in the dataset; does the list"
            " belong to another one?"
        )
    return [there[row] for row in listed]


def read_synthetic(manifest: str | Path, classes: Sequence[str] = PLANES) -> list[Record]:
    """Synthetic images, all for training, each its own patient: of one seed there may be an image
    of every plane and sampler.

    classes: those that there may be
    manifest: the manifest.csv of sample.py beside its images, or the authors' list of those they
        published (Zenodo 13228158), put into the folder that holds them at any depth
    """
    path = Path(manifest)
    labels = LABELS if classes == PLANES else {name.lower(): name for name in classes}
    rows = _rows(path, "plane", "image|Image_name", optional=("sampler",), labels=labels)
    files = defaultdict(list)
    if not all(sampler for *_, sampler in rows):  # the authors' list has names alone
        for file in walk(path.parent).images:
            files[file.stem].append(file)
    records = []
    for plane, image, sampler in rows:
        file, *more = files.get(image, [file_below(path.parent, image)])
        if more:
            raise DatasetError(
                f"{path}: {image} is {file} and {more[0]}: move the folder that is not meant away"
            )
        by = sampler or "published"
        patient = f"synthetic/{plane}/{by}/{file.stem}"
        records.append(Record(file, plane, patient, True, "synthetic", by))
    return records


def require_images(records: Sequence[Record]) -> None:
    """DatasetError unless the file of every record is there; it says how many are missing and where
    to get the first."""
    if missing := [record for record in records if not record.path.is_file()]:
        source = missing[0].source
        remedy = ORIGINS.get(source, f"put them into the folder of the {source} site")
        raise DatasetError(
            f"{len(missing)} of {len(records)} images are missing, such as {missing[0].path};"
            f" {remedy}"
        )


def balanced(
    records: Sequence[Record], per_plane: int, seed: int, classes: Sequence[str] = PLANES
) -> list[Record]:
    """`per_plane` random records of each class, whatever their order; with the same seed, fewer are
    a part of more."""
    chosen = []
    for index, plane in enumerate(classes):
        pool = _sorted(record for record in records if record.plane == plane)
        if len(pool) < per_plane:
            raise DatasetError(f"images of {plane}: {len(pool)}, {per_plane} of each are asked for")
        chosen += [
            pool[n] for n in np.random.default_rng([seed, index]).permutation(len(pool))[:per_plane]
        ]
    return chosen


def validation_split(
    records: Iterable[Record], count: int = 200, *, seed: int
) -> tuple[list[Record], list[Record]]:
    """(train, validation): `count` images of random whole patients are set aside, or as many as
    these add up to below it; the others train."""
    records = _sorted(records)
    if not 0 < count < len(records):
        raise DatasetError(f"cannot set {count} of {len(records)} images aside for validation")
    images, held, left = Counter(record.patient for record in records), set(), count
    for patient in np.random.default_rng(seed).permutation(list(images)):
        if images[patient] <= left:  # a patient with more images than still fit trains
            held.add(patient)
            left -= images[patient]
    if not held:
        raise DatasetError(f"no patient has {count} images or fewer; set more aside for validation")
    return [r for r in records if r.patient not in held], [r for r in records if r.patient in held]


def count(records: list[Record], classes: Sequence[str] = PLANES) -> dict:
    """How many images, and of which source and class."""
    sources = Counter(record.source for record in records)
    of = Counter((record.source, record.plane) for record in records)
    return {
        "images": len(records),
        "patients": len({record.patient for record in records}),
        "sources": sources,
        "planes": {s: {str(name): of[s, name] for name in classes} for s in sources},
    }


def _sorted(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda record: (record.patient, record.name))


def _find(root: Path, top: str, table: str, source: str) -> Path:
    """The table in root, or in its subfolder `top`, which some unpackers make."""
    for path in (root / table, root / top / table):
        if path.is_file():
            return path
    raise DatasetError(f"{root}: neither {table} nor {top}/{table} is there; {ORIGINS[source]}")


def _rows(
    path: Path,
    *columns: str,
    key: int = 1,
    optional: tuple[str, ...] = (),
    labels: Mapping[str, str | None] = LABELS,
) -> list[tuple]:
    """(plane, the cells of the other `columns`, those of `optional`) for each row whose plane is
    not left out; of the column Train, whether it trains.

    columns: headers ("this|or that"), the plane's first; then `key` that name one image and no
        other

    Raises DatasetError, besides what `read_table` does, for an empty cell, a label that means
    nothing, and an image that is listed twice.
    """
    rows, seen = [], {}
    for where, label, *cells in read_table(path, *columns, optional=optional):
        if "" in cells[: len(columns) - 1]:
            raise DatasetError(f"{where}: {columns[1 + cells.index('')]} is empty")
        plane = _meaning(normalize("NFC", label.lower()), labels, f"{where}, Plane")
        if "Train" in columns:
            cells[-1] = _meaning(cells[-1], SPLIT, f"{where}, Train")
        name = "/".join(cells[:key])
        if name in seen:
            raise DatasetError(f"{where}: {name} is listed twice, before in {seen[name]}")
        seen[name] = where
        if plane:
            rows.append((plane, *cells))
    return rows


def _meaning(cell: str, meanings: Mapping, where: str):
    if cell not in meanings:
        raise DatasetError(f"{where}: {cell!r} is none of {', '.join(meanings)}")
    return meanings[cell]

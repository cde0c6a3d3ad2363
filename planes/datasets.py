"""The two datasets and the lists made from them, as records; selections by seed.

Readers know an image by its table alone, so they also work where only some of the files are;
`require_images` is the line that a caller gets before any work starts. Records of the maternal
cervix are left out, as in the paper.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planes import PLANES, Plane
from planes.tables import DatasetError, read_table

ORIGINS: dict[str, str] = {
    "spain": "download https://zenodo.org/records/3904280",
    "africa": "download https://zenodo.org/records/7540448",
    "synthetic": "make them with sample.py, or download https://zenodo.org/records/13228158",
}
"""Source of a record -> where its images come from."""

LABELS: dict[str, Plane | None] = {
    **{str(plane): plane for plane in PLANES},
    **{f"fetal {plane}": plane for plane in PLANES},
    **dict.fromkeys(("cervix", "maternal cervix")),
}
"""A plane's names in the tables, in lower case; None is left out."""

CODES: dict[str, Plane | None] = dict(
    zip("012345", (Plane.OTHER, Plane.ABDOMEN, Plane.BRAIN, None, Plane.FEMUR, Plane.THORAX))
)
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
    """

    path: Path
    plane: str
    patient: str
    train: bool
    source: str
    center: str

    @property
    def name(self) -> str:
        return self.path.stem


def read_spanish(root: str | Path, table: str = "FETAL_PLANES_DB_data.csv") -> list[Record]:
    """FETAL_PLANES_DB (Burgos-Artizzu et al. 2020, Zenodo 3904280), both splits, in the table's
    order.

    root: the unpacked archive, or the folder that holds it as FETAL_PLANES_ZENODO/
    table: the table's name in it
    """
    folder = _find(Path(root), "FETAL_PLANES_ZENODO", table, "spain")
    records = []
    for where, plane, name, patient, train in _rows(
        folder / table, "Plane", ("Image_name",), "Patient_num", "Train"
    ):
        path, split = folder / "Images" / f"{name}.png", _meaning(train, SPLIT, f"{where}, Train")
        records.append(Record(path, plane, f"spain/{patient}", split, "spain", "Spain"))
    return records


def read_african(root: str | Path) -> list[Record]:
    """The five-country African set (Sendra-Balcells et al. 2023, Zenodo 7540448), both splits, in
    the table's order.

    root: the unpacked archive, or the folder that holds it as Zenodo_dataset/
    A patient is (Center, Patient_num): the countries count from 1 each.
    """
    table = "African_planes_database.csv"
    folder = _find(Path(root), "Zenodo_dataset", table, "africa")
    records = []
    for where, plane, center, name, patient, train in _rows(
        folder / table, "Plane", ("Center", "Filename"), "Patient_num", "Train"
    ):
        path, split = folder / center / f"{name}.png", _meaning(train, SPLIT, f"{where}, Train")
        records.append(Record(path, plane, f"africa/{center}/{patient}", split, "africa", center))
    return records


def read_manifest(path: str | Path, records: Iterable[Record]) -> list[Record]:
    """The records that one of the authors' lists names, in the list's order.

    records: the whole dataset
    The list has columns Image_name (or Filename) and Plane (or category); it may write planes as
    CODES.
    """
    by_name = {record.name: record for record in records}
    chosen: dict[str, Record] = {}
    for where, plane, name in _rows(
        Path(path), "Plane|category", ("Image_name|Filename",), labels=LABELS | CODES
    ):
        if name not in by_name:
            raise DatasetError(
                f"{where}: {name} is not in the dataset; does the list belong to another one?"
            )
        if by_name[name].plane is not plane:
            raise DatasetError(
                f"{where}: {name} is listed as {plane}, but the dataset says {by_name[name].plane}"
            )
        chosen[name] = by_name[name]
    return list(chosen.values())


def read_synthetic(manifest: str | Path, classes: Sequence[str] = PLANES) -> list[Record]:
    """Synthetic images, all for training, each its own patient.

    classes: those that there may be
    manifest: the manifest.csv of sample.py beside its images, or the authors' list of those they
        published (Zenodo 13228158), put into the folder that holds them at any depth
    """
    path = Path(manifest)
    labels = LABELS if classes == PLANES else {name.lower(): name for name in classes}
    try:
        made = _rows(path, "plane", ("image",), "sampler", labels=labels)
        rows = [(plane, path.parent / image, sampler) for _, plane, image, sampler in made]
    except DatasetError:
        if not path.is_file() or "Image_name" not in path.read_text(
            encoding="utf-8-sig", errors="replace"
        ):
            raise
        files = {file.stem: file for file in path.parent.rglob("*.png")}
        names = _rows(path, "Plane", ("Image_name",))
        rows = [
            (plane, files.get(name, path.parent / f"{name}.png"), "published")
            for _, plane, name in names
        ]
    # each is a patient of its own: of one seed there may be an image of every plane and sampler
    of = [f"synthetic/{plane}/{sampler}/{file.stem}" for plane, file, sampler in rows]
    return [
        Record(f, plane, name, True, "synthetic", sampler)
        for name, (plane, f, sampler) in zip(of, rows)
    ]


def require_images(records: Iterable[Record]) -> None:
    """DatasetError unless the file of every record is there; it says how many are missing and where
    to get them."""
    records = list(records)
    missing = [record for record in records if not record.path.is_file()]
    if missing:
        names = ", ".join(record.name for record in missing[:5]) + (
            ", ..." if len(missing) > 5 else ""
        )
        sources = dict.fromkeys(record.source for record in missing)
        origins = "; ".join(
            ORIGINS.get(name, f"put them into the folder of the {name} site") for name in sources
        )
        raise DatasetError(
            f"{len(missing)} of {len(records)} images are missing ({names}); {origins}"
        )


def balanced(
    records: Iterable[Record], per_plane: int, seed: int, classes: Sequence[str] = PLANES
) -> list[Record]:
    """`per_plane` random records of each class, whatever their order; with the same seed, fewer are
    a part of more."""
    records, chosen = list(records), []
    for index, plane in enumerate(classes):
        pool = _sorted(record for record in records if record.plane == plane)
        if len(pool) < per_plane:
            raise DatasetError(
                f"only {len(pool)} images of {plane}, but {per_plane} of each were asked for"
            )
        chosen += [
            pool[n] for n in np.random.default_rng([seed, index]).permutation(len(pool))[:per_plane]
        ]
    return chosen


def validation_split(
    records: Iterable[Record], count: int = 200, *, seed: int
) -> tuple[list[Record], list[Record]]:
    """(train, validation): exactly `count` images of random whole patients are set aside, the
    others train."""
    records = _sorted(records)
    if not 0 < count < len(records):
        raise DatasetError(f"cannot set {count} of {len(records)} images aside for validation")
    images, held, total = Counter(record.patient for record in records), set(), 0
    for patient in np.random.default_rng(seed).permutation(list(images)):
        if total + images[patient] <= count:  # a patient with more images than still fit trains
            held.add(patient)
            total += images[patient]
    if total < count:
        raise DatasetError(
            f"whole patients add up to {total} validation images, not {count}; ask for another"
            " number"
        )
    return [r for r in records if r.patient not in held], [r for r in records if r.patient in held]


def count(records: list[Record], classes: Sequence[str] = PLANES) -> dict:
    """How many images, and of which source and class."""
    sources = Counter(record.source for record in records)
    planes = {
        s: {str(p): sum(r.source == s and r.plane == p for r in records) for p in classes}
        for s in sources
    }
    return {
        "images": len(records),
        "patients": len({r.patient for r in records}),
        "sources": sources,
        "planes": planes,
    }


def _sorted(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda record: (record.patient, record.name))


def _find(root: Path, top: str, table: str, source: str) -> Path:
    """The folder with the table in it: root, or its subfolder `top`, which some unpackers make."""
    for folder in (root, root / top):
        if (folder / table).is_file():
            return folder
    raise DatasetError(f"{root}: neither {table} nor {top}/{table} is there; {ORIGINS[source]}")


def _rows(
    path: Path,
    plane: str,
    image: tuple[str, ...],
    *columns: str,
    labels: dict[str, Plane | None] = LABELS,
) -> list[tuple]:
    """(where it stands, plane, a cell for each of `image` and `columns`) for each row whose plane
    is not left out.

    plane, image, columns: their headers ("this|or that"); those of `image` name one image and no
        other

    Raises DatasetError, besides what `read_table` does, for an empty cell, a label that means
    nothing, and an image that is listed twice.
    """
    rows, seen = [], {}
    for where, label, *cells in read_table(path, plane, *image, *columns):
        if "" in cells:
            raise DatasetError(
                f"{where}: {(image + columns)[cells.index('')].replace('|', ' or ')} is empty"
            )
        found = _meaning(label.lower(), labels, f"{where}, {plane.split('|')[0]}")
        name = "/".join(cells[: len(image)])
        before, other = seen.setdefault(name, (where, found))
        line = before.rpartition(", ")[2]
        if before != where and other is not found:
            raise DatasetError(
                f"{where}: {name} is listed as {label}, but as {other or 'cervix'} in {line}"
            )
        if before != where:
            raise DatasetError(f"{where}: {name} is listed twice, before in {line}; remove one")
        if found:
            rows.append((where, found, *cells))
    if not rows:
        raise DatasetError(f"{path}: no images listed in it")
    return rows


def _meaning(cell: str, meanings: dict, where: str):
    if cell not in meanings:
        raise DatasetError(f"{where}: {cell!r} is none of {', '.join(meanings)}")
    return meanings[cell]

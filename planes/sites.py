"""Any site: a folder for each class with its images in it, or a table, images.csv, that says which
image is what.

The two datasets of the paper have readers of their own (`datasets.py`); here is the one for
everybody else's.

    python -m planes.sites clinic_a clinic_b    # what is there, before hours of work

(`survey.py`)
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path, PureWindowsPath
from unicodedata import normalize

from harness.files import TYPES, file_below, walk
from planes.datasets import Record
from planes.pictures import dicom_patient, with_levels
from planes.tables import DatasetError, read_table

TABLE = "images.csv"
SPLITS = {"train": True, "test": False}
CLASS_NAME = re.compile(r"(?!\.)[^\\/:*?\"<>|\x00-\x1f\ud800-\udfff]+")
"""What a folder can be called everywhere; half characters, which no table holds, left out."""

TAKEN = ("image", "patient", "center", "target", "prediction", "copy", "confidence", "prompt")
"""Columns of predictions.csv, in which the classes are columns too."""


def read_site(root: str | Path, source: str, train: bool, held_out: float = 0.0) -> list[Record]:
    """The images of a site, whatever their classes are called, in the order of their names or of
    the table.

    root: SITE/<class>/<image> or SITE/<class>/<patient>/<image>; or a folder with images.csv, whose
        columns are image (a path below root), class and, where there are such, patient and split
        ("train" or "test")
    source: "source" or "target", which begins every patient's name
    train: what images without a split are for
    held_out: where no split is named, the share of the patients that are not trained on

    Names of classes and patients are trimmed, and in NFC. An image without a patient is of the one
    that its DICOM file names, else a patient of its own. Raises DatasetError where there are fewer
    than two classes, a class has no image, pictures lie beside the classes, or a row of the table
    means nothing.
    """
    root = Path(root)
    if not 0 <= held_out < 1:
        raise DatasetError(f"--held-out {held_out}: choose a number from 0 to less than 1")
    if not root.is_dir():
        raise DatasetError(
            f"{root}: no such folder; a site is a folder with one folder of images for each class"
        )
    if (table := root / TABLE).is_file():
        rows = read_table(table, "image", "class", optional=("patient", "split"))
    else:
        rows = _folders(root)
    records, spelled, center = {}, {}, root.resolve().name
    for where, image, name, patient, split in rows:
        name, patient = (normalize("NFC", text).strip() for text in (name, patient))
        split, place = split.lower(), PureWindowsPath(image)  # for which / and \ are one
        if not image or not name:
            raise DatasetError(f"{where}: image or class is empty")
        if place.root or ".." in place.parts:
            raise DatasetError(f"{where}: {image}: give the image's path below {root}")
        require_class_name(name, where)
        if (other := spelled.setdefault(name.casefold(), name)) != name:
            raise DatasetError(
                f"{where}: the classes {other} and {name} differ by capitals alone; call them alike"
            )
        if split not in ("", *SPLITS):
            raise DatasetError(f"{where}: split is {split!r}, neither {' nor '.join(SPLITS)}")
        path = file_below(root, image)
        if path in records:
            raise DatasetError(f"{where}: {image} is listed twice; remove one")
        patient = patient or dicom_patient(path) or path.relative_to(root).as_posix()
        owner, trains = f"{source}/{patient}", SPLITS.get(split, train)
        records[path] = Record(path, name, owner, trains, source, center)
    if len(spelled) < 2:
        raise DatasetError(
            f"{root}: has images of {', '.join(spelled.values())} alone; a classifier tells two"
            " apart"
        )
    held = set() if any(row[-1] for row in rows) else _held_out(records.values(), held_out)
    records = [replace(r, train=r.train and r.patient not in held) for r in records.values()]
    return with_levels(records, root)


def _held_out(records: Iterable[Record], share: float) -> set[str]:
    """Patients in the order of their names' hashes, until each class has given its share of images;
    none gives its last."""
    of, total = defaultdict(Counter), Counter(record.plane for record in records)
    for record in records:
        of[record.patient][record.plane] += 1
    taken, held = Counter(), set()
    for patient in sorted(of, key=lambda name: sha256(name.encode()).digest()):
        after = taken + of[patient]
        wanted = any(taken[name] < round(share * total[name]) for name in of[patient])
        if wanted and all(after[name] < total[name] for name in of[patient]):
            taken, held = after, {*held, patient}
    return held


def require_class_name(name: str, where: str | Path) -> None:
    """DatasetError unless a folder can be called so everywhere, and a column of predictions.csv
    too."""
    if not CLASS_NAME.fullmatch(name) or name in TAKEN:
        raise DatasetError(
            f"{where}: {name!r} is no name for a class, which names folders too; choose another"
        )


def classes_of(records: Iterable[Record]) -> tuple[str, ...]:
    """The names of the records' classes, from A to Z: class index = position."""
    return tuple(sorted({str(record.plane) for record in records}))


def has_patients(records: Iterable[Record]) -> bool:
    """Is any patient named, or is each image one of its own?"""
    return any(not record.patient.endswith(record.path.name) for record in records)


def prompts_of(classes: Iterable[str], template: str | None) -> dict[str, str]:
    """A prompt for each class, by a template such as "an ultrasound image of {class}".

    Raises DatasetError for a template that does not say where the class goes.
    """
    if not template or template.count("{class}") != 1:
        raise DatasetError(
            f"--prompt-template {template or ''!r}: give one that says once where the class goes,"
            " such as 'an X-ray of {class}'"
        )
    return {name: template.replace("{class}", name) for name in classes}


def _folders(root: Path) -> list[tuple[str, str, str, str, str]]:
    """The same rows as of a table, from folders of images."""
    if strays := walk(root, below=False).images:
        raise DatasetError(
            f"{strays[0]}: lies beside the folders of the classes; put it into one, or elsewhere"
        )
    rows = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        images = walk(folder).images
        if not images:
            raise DatasetError(
                f"{folder}: no images in it ({', '.join(TYPES)}); fill it, or remove it"
            )
        for image in images:
            patient, *inner = image.relative_to(folder).parts
            name = image.relative_to(root).as_posix()
            rows.append((str(folder), name, folder.name, patient if inner else "", ""))
    if not rows:
        raise DatasetError(
            f"{root}: neither {TABLE} nor folders of images, one for each class, are in it"
        )
    if {row[2].lower() for row in rows} <= {*SPLITS, "val", "valid", "validation"}:
        raise DatasetError(f"{root}: its folders are splits, not classes; give one, or {TABLE}")
    return rows


if __name__ == "__main__":
    from harness.script import run
    from planes.survey import main, parse_args

    run(parse_args, main, DatasetError)

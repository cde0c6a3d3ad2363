"""Any site: a folder for each class with its images in it, or a table, images.csv, that says which
image is what.

The two datasets of the paper have readers of their own (`datasets.py`); here is the one for
everybody else's.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from harness.files import TYPES, images_of
from planes.datasets import Record
from planes.tables import DatasetError, read_table

TABLE = "images.csv"
SPLITS = {"train": True, "test": False}


def read_site(root: str | Path, source: str, train: bool) -> list[Record]:
    """The images of a site, whatever their classes are called, in the order of their names or of
    the table.

    root: SITE/<class>/<image>; or a folder with images.csv, whose columns are image (a path below
        root), class and, where there are such, patient and split ("train" or "test")
    source: "source" or "target", which begins every patient's name
    train: what images without a split are for

    An image without a patient is a patient of its own. Raises DatasetError where there are fewer
    than two classes, a class has no image, pictures lie beside the classes, or a row of the table
    means nothing.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(
            f"{root}: no such folder; a site is a folder with one folder of images for each class"
        )
    rows = _from_table(root / TABLE) if (root / TABLE).is_file() else _from_folders(root)
    records, seen = [], {}
    for where, image, name, patient, split in rows:
        if not is_class_name(name):
            raise DatasetError(
                f"{where}: {name!r} is no name for a class, which names folders too; choose another"
            )
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise DatasetError(
                f"{where}: the classes {other} and {name} differ by capitals alone; call them alike"
            )
        path, owner = root / image, f"{source}/{patient or image}"
        if split not in ("", *SPLITS):
            raise DatasetError(f"{where}: split is {split!r}, neither {' nor '.join(SPLITS)}")
        records.append(
            Record(path, name, owner, SPLITS.get(split, train), source, root.resolve().name)
        )
    path, times = Counter(record.path for record in records).most_common(1)[0]
    if times > 1:
        raise DatasetError(f"{root / TABLE}: {path} is listed twice; remove one")
    if len(classes_of(records)) < 2:
        raise DatasetError(
            f"{root}: has images of {', '.join(classes_of(records))} alone; a classifier tells two"
            " apart"
        )
    return records


def is_text(text: str) -> bool:
    """Can it be written in UTF-8? A lone surrogate, half of a character, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_class_name(name: str) -> bool:
    """Can a folder be called so everywhere, and a column of predictions.csv too?"""
    taken = ("image", "patient", "center", "target", "prediction", "copy", "confidence", "prompt")
    return (
        bool(re.fullmatch(r"[^.\\/:*?\"<>|\x00-\x1f][^\\/:*?\"<>|\x00-\x1f]*", name))
        and is_text(name)
        and name not in taken
    )


def classes_of(records: Iterable[Record]) -> tuple[str, ...]:
    """The names of the records' classes, from A to Z: class index = position."""
    return tuple(sorted({str(record.plane) for record in records}))


def has_patients(records: Iterable[Record]) -> bool:
    """Is any patient named, or is each image one of its own?"""
    return any(not record.patient.endswith(record.path.name) for record in records)


def prompts_of(classes: Iterable[str], template: str) -> dict[str, str]:
    """A prompt for each class, by a template such as "an ultrasound image of {class}".

    Raises DatasetError for a template that does not say where the class goes.
    """
    if template.count("{class}") != 1:
        raise DatasetError(
            f"{template!r}: a template says once where the class goes, as in 'an X-ray of"
            " {class}'"
        )
    return {name: template.replace("{class}", name) for name in classes}


def _from_folders(root: Path) -> list[tuple[str, str, str, str, str]]:
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    if strays := [path for path in entries if path.is_file() and path.suffix.lower() in TYPES]:
        raise DatasetError(
            f"{strays[0]}: lies beside the folders of the classes; put it into one, or elsewhere"
        )
    rows = []
    for folder in (path for path in entries if path.is_dir()):
        images = images_of(folder)
        if not images:
            raise DatasetError(
                f"{folder}: no images in it ({', '.join(TYPES)}); fill it, or remove it"
            )
        rows += [
            (str(folder), f"{folder.name}/{path.name}", folder.name, "", "") for path in images
        ]
    if not rows:
        raise DatasetError(
            f"{root}: neither {TABLE} nor folders of images, one for each class, are in it"
        )
    return rows


def _from_table(path: Path) -> list[tuple[str, str, str, str, str]]:
    optional = [name for name in ("patient", "split") if name in _header(path)]
    rows = []
    for where, image, name, *more in read_table(path, "image", "class", *optional):
        if not image or not name:
            raise DatasetError(f"{where}: image or class is empty")
        if image.startswith("/") or ".." in Path(image).parts:
            raise DatasetError(f"{where}: {image}: give the image's path below {path.parent}")
        said = dict(zip(optional, more))
        rows.append((where, image, name, said.get("patient", ""), said.get("split", "").lower()))
    return rows


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return [cell.strip().strip('"') for cell in re.split("[,;]", file.readline())]
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from None

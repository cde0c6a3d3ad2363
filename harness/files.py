"""Files: written whole or not at all, hashed, found in folders. Once, for all rooms."""

import contextlib
import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

TYPES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".dcm", ".dicom")
"""The endings of image files, in lower case."""

OTHER_TYPES = """.gif .avif .heic .heif .jp2 .jxl .tga .pgm .ppm .psd .svg .nii .gz .mha .mhd .nrrd
.npy .svs .czi .avi .mp4"""
"""The endings of pictures that are not read, and therefore not left out in silence."""


class Found(NamedTuple):
    """What a folder holds, sorted: images, and pictures of OTHER_TYPES."""

    images: list[Path]
    others: list[Path]


def walk(folder: Path, below: bool = True) -> Found:
    """The pictures in a folder and, where `below` is True, in its subfolders and those it links to,
    each once.

    Hidden files and folders do not count, such as the "._a.png" that macOS leaves, nor do pictures
    beside an args.json, which are a run's own figures. Files without an ending, as DICOM's may be,
    are among the others. Raises OSError for a name that is not in UTF-8, which no table could hold.
    """
    files, todo, seen = [], [folder], set()
    for at in todo:
        if (real := at.resolve()) in seen:
            continue
        seen.add(real)
        shown = [path for path in sorted(at.iterdir()) if not path.name.startswith(".")]
        folders = [path for path in shown if path.is_dir()]
        todo += folders * below
        if at / "args.json" not in shown:
            files += {*shown} - {*folders}
    if odd := sorted(f for f in files if any("\ud800" <= letter <= "\udfff" for letter in str(f))):
        raise OSError(f"{odd[0]}: a name that is not in UTF-8; rename it ({len(odd)} such)")
    kinds = TYPES, ("", *OTHER_TYPES.split())
    return Found(*(sorted(f for f in files if f.suffix.lower() in kind) for kind in kinds))


def left_out(folder: Path, others: Sequence[Path]) -> str:
    """The line that says which pictures of a folder are not read; empty where there are none."""
    names = some(path.name for path in others)
    return names and f"{folder}: not read, by type: {names} ({len(others)})"


def some(names: Iterable[object]) -> str:
    """The first three in words."""
    names = [*map(str, names)]
    return ", ".join(names[:3]) + ", .." * (len(names) > 3)


def file_below(folder: Path, name: str) -> Path:
    """The file that a list calls so: with \\ as Windows writes, its accents as one character or
    two. Where there is none, the name as it stands."""
    other = name.replace("\\", "/")
    paths = [folder / text for text in (name, normalize("NFC", other), normalize("NFD", other))]
    return next(filter(Path.is_file, paths), paths[0])


def told_apart(*folders: Path) -> list[str]:
    """What folders are called: the ends of their paths, as much of them as tells them apart."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    depth = next(n for n in count(1) if len({path[-n:] for path in paths}) == len({*paths}))
    return ["/".join(path[-depth:]) for path in paths]


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> str:
    """One hash of many files, in order."""
    return hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()


def folder_hash(path: Path) -> str:
    """One hash of a file, or of all files in a folder and of their names. Hidden files, notes and
    code do not count: the embedded model's lie beside it."""
    if path.is_file():
        return sha256(path)
    other = ".md", ".py", ".pyc"
    files = sorted(f for f in path.rglob("[!.]*") if f.is_file() and f.suffix not in other)
    lines = (f"{file.relative_to(path)} {sha256(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextlib.contextmanager
def whole_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """Where to write a file that then appears at `path`, whole or not at all: whoever reads it
    meanwhile, and a run that is killed, finds the one before. Its folder is made.

    shared: several processes may write it at a time, each a part of its own
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}{f'.{os.getpid()}' * shared}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # of a disk that was full


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A folder to write files into, which move into `folder` when all of them are whole, or are
    gone."""
    part = folder / ".part"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    part.mkdir(parents=True)
    try:
        yield part
        for path in sorted(part.iterdir()):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows of the same columns as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def json_text(value: object) -> str:
    """A result as JSON, in which what is no number is null: NaN is none of JSON's words."""
    plain = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(plain, indent=2) + "\n"

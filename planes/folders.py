"""Captioned images as other trainers keep them: kohya's folders with repeats, one flat folder,
metadata.jsonl."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from harness.files import TYPES, images_of
from planes.datasets import DatasetError

OTHER_TYPES = (
    ".gif",
    ".apng",
    ".avif",
    ".heic",
    ".heif",
    ".jp2",
    ".jxl",
    ".tga",
    ".psd",
    ".dcm",
    ".nii",
    ".mha",
    ".nrrd",
)
"""The endings of pictures that are not read, and therefore not left out in silence."""

REPEATS = re.compile(r"(?!0+_)(\d{1,5})_(.+)")
"""A folder's name in kohya's layout, "20_fetal brain": repeats, not 0 and no date, then a
caption."""


@dataclass(frozen=True)
class Captioned:
    """An image, its caption, and how many times one epoch shows it."""

    path: Path
    caption: str
    repeats: int


def read_captioned_folder(folder: str | Path) -> list[Captioned]:
    """The captioned images of a folder, in the order of their names, in whichever of three layouts
    it has.

    kohya's: folders such as "20_fetal brain" in it; their images have 20 repeats and, where they
        have no caption of their own, the caption "fetal brain". Only these folders count, so images
        beside them are refused.
    flat: the images themselves, each with its own caption; repeats 1
    metadata.jsonl, of Hugging Face's imagefolder, in a flat folder or in one of kohya's: on each
        line an object with file_name and text (or caption). It alone says which images there are.
    An image's own caption is the first line of the .caption or .txt file of its name. Where both
    are there .caption counts, kohya's default: its taggers write .txt files, its captioner, whole
    sentences, .caption files. Raises DatasetError where there are no images, one has no caption, or
    there are pictures that would be left out.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [path for path in entries if path.is_dir()]
    repeated = [(path, found) for path in folders if (found := REPEATS.fullmatch(path.name))]
    if not repeated:
        return _read_flat(folder)
    others = [path for path in entries if path not in dict(repeated)]
    if strays := [
        path for path in others if (images_of(path) if path in folders else _is_data(path))
    ]:
        raise DatasetError(
            f"{folder}: {len(strays)} images or folders of images lie beside {repeated[0][0].name}"
            f" and would not be trained on, such as {strays[0].name}; put them into folders named"
            " repeats_caption, or elsewhere"
        )
    return [
        image
        for path, found in repeated
        for image in _read_flat(path, int(found[1]), found[2].strip())
    ]


def _read_flat(folder: Path, repeats: int = 1, class_tokens: str = "") -> list[Captioned]:
    """The images in one folder; class_tokens: the caption of those without their own, if not
    empty."""
    if (folder / "metadata.jsonl").is_file():
        return _read_metadata(folder / "metadata.jsonl", repeats)
    images = images_of(folder)
    strays = [p for p in sorted(folder.iterdir()) if _is_stray(p)] if images else []
    if strays:
        raise DatasetError(
            f"{folder}: {len(strays)} pictures or folders of pictures in it would not be trained"
            f" on, such as {strays[0].name}; convert pictures to PNG, put those of folders beside"
            " the others, or move them elsewhere"
        )
    if not images:
        inside = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())[:5])
        raise DatasetError(
            f"{folder}: no images in it ({', '.join(TYPES)}), no metadata.jsonl and no folders"
            " named repeats_caption, such as 20_fetal brain; "
            + (f"the folders there are: {inside}" if inside else "there are no folders")
        )
    captioned = [Captioned(image, _own_caption(image) or class_tokens, repeats) for image in images]
    if missing := next((image.path for image in captioned if not image.caption), None):
        remedy = f"write one into {missing.stem}.txt beside it, in UTF-8"
        if REPEATS.fullmatch(folder.resolve().name):
            remedy += (
                f", or give {folder.resolve().parent}, the folder above, so that"
                f" {folder.resolve().name} names it"
            )
        raise DatasetError(f"{missing}: has no caption; {remedy}")
    return captioned


def _is_stray(path: Path) -> bool:
    """Does a person take it for a part of the images around it, which it is not?"""
    if path.name.startswith("."):
        return False
    return bool(images_of(path)) if path.is_dir() else path.suffix.lower() in OTHER_TYPES


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in TYPES or path.name == "metadata.jsonl"


def _own_caption(image: Path) -> str | None:
    """The first line of the image's .caption or .txt file; None where it has neither."""
    for file in (image.with_suffix(".caption"), image.with_suffix(".txt")):
        if not file.is_file():
            continue
        try:
            caption = file.read_text(encoding="utf-8-sig").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{file}: cannot be read as a caption in UTF-8 ({error})") from None
        if not caption:
            raise DatasetError(
                f"{file}: its first line is empty; write the caption of {image.name} there, in"
                " UTF-8"
            )
        return caption
    return None


def _read_metadata(file: Path, repeats: int) -> list[Captioned]:
    """The images that a metadata.jsonl lists, in its order."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: cannot be read as text in UTF-8 ({error})") from None
    images = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, caption = row["file_name"], row["text"] if "text" in row else row["caption"]
            if not (name.strip() and caption.strip()):
                raise ValueError("empty")
            (name + caption).encode("utf-8")  # half a character, as "\\ud800", is a ValueError
        except (ValueError, LookupError, TypeError, AttributeError):
            needed = '{"file_name": "image.png", "text": "its caption"}'
            raise DatasetError(
                f"{file}, line {number}: must be like {needed}, neither of them empty"
            ) from None
        if not (file.parent / name).is_file():
            raise DatasetError(
                f"{file}, line {number}: {name} is not there; file_name is relative to"
                f" {file.parent}"
            )
        images.append(Captioned(file.parent / name, caption.strip(), repeats))
    if not images:
        raise DatasetError(f"{file}: no images listed in it")
    return images

"""Captioned images as other trainers keep them: kohya's folders with repeats, one flat folder,
metadata.jsonl."""

import re
from dataclasses import dataclass
from pathlib import Path

from harness.files import TYPES, file_below, some, walk
from planes.tables import DatasetError, from_json, read_text

REPEATS = re.compile(r"(?!0+_)(\d{1,5})_(.+)")
"""A folder's name in kohya's layout, "20_fetal brain": repeats, not 0 and no date, then a
caption."""

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Captioned:
    """An image, its caption, how many times one epoch shows it, and the levels of more than 8 bits
    (`planes.pictures.levels_of`)."""

    path: Path
    caption: str
    repeats: int = 1
    levels: tuple[float, ...] = ()


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
    named = {path: REPEATS.fullmatch(path.name) for path in sorted(folder.iterdir())}
    repeated = {path: found for path, found in named.items() if found and path.is_dir()}
    if not repeated:
        return _read_flat(folder)
    _refuse_others(folder, {*repeated})
    return [
        image
        for path, found in repeated.items()
        for image in _read_flat(path, int(found[1]), found[2].strip())
    ]


def _read_flat(folder: Path, repeats: int = 1, class_tokens: str = "") -> list[Captioned]:
    """The images in one folder; class_tokens: the caption of those without their own, if not
    empty."""
    if (folder / METADATA).is_file():
        return _read_metadata(folder / METADATA, repeats)
    images = walk(folder, below=False).images
    if not images:
        raise DatasetError(
            f"{folder}: no images in it ({', '.join(TYPES)}), no {METADATA} and no folders"
            " named repeats_caption, such as 20_fetal brain"
        )
    _refuse_others(folder, {*images})
    captioned = [Captioned(image, _own_caption(image) or class_tokens, repeats) for image in images]
    if missing := next((image.path for image in captioned if not image.caption), None):
        raise DatasetError(
            f"{missing}: has no caption; write one into {missing.stem}.txt beside it, in UTF-8, or"
            " give the folder above, if this one's name is the caption"
        )
    return captioned


def _refuse_others(folder: Path, read: set[Path]) -> None:
    """DatasetError where a folder has pictures, at any depth, beside those that are read: files, or
    folders of them."""
    images, others = walk(folder)
    beside = [*images, *others, *folder.glob(METADATA)]
    if strays := [p.relative_to(folder) for p in beside if read.isdisjoint([p, *p.parents])]:
        raise DatasetError(
            f"{folder}: would not be trained on: {some(strays)}; convert pictures to PNG, name"
            " folders repeats_caption, or move them elsewhere"
        )


def _own_caption(image: Path) -> str | None:
    """The first line of the image's .caption or .txt file; None where it has neither."""
    for file in (image.with_suffix(".caption"), image.with_suffix(".txt")):
        if file.is_file():
            if caption := read_text(file).partition("\n")[0].strip():
                return caption
            raise DatasetError(f"{file}: its first line is empty; write a caption there, in UTF-8")
    return None


def _read_metadata(file: Path, repeats: int) -> list[Captioned]:
    """The images that a metadata.jsonl lists, in its order."""
    images = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = from_json(line)
            name, caption = row["file_name"], row.get("text", row.get("caption")).strip()
            if not name.strip() or not caption:
                raise ValueError
        except Exception:  # a line may hold anything at all
            needed = '{"file_name": "image.png", "text": "its caption"}'
            line = f"{file}, line {number}: must be like {needed}, neither empty"
            raise DatasetError(line) from None
        if not (path := file_below(file.parent, name)).is_file():
            raise DatasetError(
                f"{file}, line {number}: {name} is not there; file_name is relative to"
                f" {file.parent}"
            )
        images.append(Captioned(path, caption, repeats))
    if not images:
        raise DatasetError(f"{file}: no images listed in it")
    return images

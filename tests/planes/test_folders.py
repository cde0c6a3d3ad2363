"""Folders of captioned images in kohya's layout, flat, and with Hugging Face's metadata.jsonl; what
they refuse."""

import json

import pytest
from shorthand import refused

from planes.datasets import DatasetError
from planes.folders import Captioned, read_captioned_folder


def fill(folder, **files):
    """A folder of empty images, and of captions: a="its caption" writes a.png and a.txt, b=None
    b.png alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, caption in files.items():
        (folder / f"{name}.png").touch()
        if caption is not None:
            (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


def metadata(folder, *rows):
    fill(folder, a=None, b=None)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def refusal(folder):
    with refused(DatasetError) as error:
        read_captioned_folder(folder)
    return str(error.value)


def test_a_folder_named_as_kohyas_gives_its_repeats_and_the_captions_of_images_without_their_own(
    tmp_path,
):
    brain = fill(tmp_path / "20_fetal brain", b="a photo of fetal brain", a=None, **{"._a": None})
    femur = fill(tmp_path / "3_fetal_femur", c=None)
    seven = metadata(tmp_path / "7_x", {"file_name": "a.png", "text": "one"})
    fill(tmp_path / ".thumbnails", a=None)
    (tmp_path / "log").mkdir()
    (tmp_path / "notes.md").touch()
    assert read_captioned_folder(str(tmp_path)) == [
        Captioned(brain / "a.png", "fetal brain", 20),
        Captioned(brain / "b.png", "a photo of fetal brain", 20),
        Captioned(femur / "c.png", "fetal_femur", 3),
        Captioned(seven / "a.png", "one", 7),
    ]


def test_a_flat_folder_has_one_repeat_and_a_caption_beside_each_image_in_the_order_of_names(
    tmp_path,
):
    (tmp_path / "notes.md").touch()
    endings = ["c.JPG", "a.b.webp", "b.TIFF", "d.jfif"]
    for name in endings:
        (tmp_path / name).touch()
        text = f"\ufeff the words of {name} \r\nand more"
        (tmp_path / name).with_suffix(".txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "c.caption").write_text("a sentence")  # goes before c.txt
    assert read_captioned_folder(tmp_path) == [
        Captioned(tmp_path / "a.b.webp", "the words of a.b.webp", 1),
        Captioned(tmp_path / "b.TIFF", "the words of b.TIFF", 1),
        Captioned(tmp_path / "c.JPG", "a sentence", 1),
        Captioned(tmp_path / "d.jfif", "the words of d.jfif", 1),
    ]


def test_metadata_lists_images_and_captions_in_its_own_order_and_alone_says_which(tmp_path):
    deep = fill(tmp_path / "train", c=None, d="not listed") / "c.png"
    first = {"file_name": "b.png", "text": " a photo of fetal brain ", "patient": 3}
    metadata(tmp_path, first, "", {"file_name": "train/c.png", "caption": "a photo of fetal femur"})
    (tmp_path / "e.gif").touch()
    assert read_captioned_folder(tmp_path) == [
        Captioned(tmp_path / "b.png", "a photo of fetal brain", 1),
        Captioned(deep, "a photo of fetal femur", 1),
    ]


BESIDE = ["loose.png", "femur", "0_femur", "metadata.jsonl", "e.gif"]  # kohya's folders
INSIDE = [f"{folder}/{stray}" for folder in (".", "20_brain") for stray in ("scan.GIF", "more")]


@pytest.mark.parametrize("stray", BESIDE + INSIDE)
def test_pictures_that_would_not_be_trained_on_are_named(tmp_path, stray):
    fill(tmp_path if stray in INSIDE[:2] else tmp_path / "20_brain", a="a photo")
    path = tmp_path / stray
    fill(path, b="a photo") if not path.suffix else path.touch()
    said = refusal(tmp_path)
    named = path.name + "/b.png" * path.is_dir()
    assert said.startswith(f"{path.parent}: would not be trained on: {named}; ")


def test_a_folder_without_images_is_named(tmp_path):
    assert refusal(tmp_path / "img") == f"{tmp_path / 'img'}: no such folder"
    fill(tmp_path / "20240131_clinic", a=None)  # a date is no number of repeats
    assert refusal(tmp_path).startswith(f"{tmp_path}: no images in it (.png, .jpg,")
    fill(tmp_path / "20_brain", a=None).joinpath("a.png").unlink()
    (tmp_path / "20240131_clinic" / "a.png").unlink()
    assert refusal(tmp_path).startswith(f"{tmp_path / '20_brain'}: no images in it")


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("a.caption", b"\nsecond line", "a.caption: its first line is empty"),
        ("a.txt", b"\xff\xfea\x00", "a.txt: cannot be read as text in UTF-8 ("),
        ("metadata.jsonl", b"\n", "metadata.jsonl: no images listed in it"),
        ("b.png", b"", "b.png: has no caption; write one into b.txt beside it, in UTF-8, or give"),
    ],
)
def test_an_image_without_a_caption_is_refused(tmp_path, file, content, words):
    fill(tmp_path, a="one" if file == "b.png" else None)
    (tmp_path / file).write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path}/{words}")


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"file_name": "a.png"', "must be like {"),
        ({"text": "no name"}, "must be like {"),
        *(({"file_name": "a.png", "text": x}, "must be like {") for x in (3, " ", "half \ud83d")),
        ({"file_name": "lost.png", "text": "one"}, "lost.png is not there; file_name is relative"),
    ],
)
def test_a_line_of_metadata_that_is_none_is_refused_with_its_number(tmp_path, row, words):
    said = refusal(metadata(tmp_path, {"file_name": "b.png", "text": "good"}, "", row))
    assert said.startswith(f"{tmp_path / 'metadata.jsonl'}, line 3: {words}")

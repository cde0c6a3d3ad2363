"""Folders of captioned images in kohya's layout, flat, and with Hugging Face's metadata.jsonl; what
they refuse."""

import json

import pytest

from planes import PROMPTS
from planes.captions import training_images
from planes.datasets import DatasetError, read_spanish
from planes.folders import Captioned, read_captioned_folder
from planes.phantoms.phantom import write_spanish_layout


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
    with pytest.raises(DatasetError) as error:
        read_captioned_folder(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- kohya's layout ---


def test_a_folder_named_as_kohyas_gives_its_repeats_and_the_captions_of_images_without_their_own(
    tmp_path,
):
    brain = fill(tmp_path / "20_fetal brain", b="a photo of fetal brain, transthalamic", a=None)
    femur = fill(tmp_path / "3_fetal_femur", c=None)
    assert read_captioned_folder(tmp_path) == [
        Captioned(brain / "a.png", "fetal brain", 20),
        Captioned(brain / "b.png", "a photo of fetal brain, transthalamic", 20),
        Captioned(femur / "c.png", "fetal_femur", 3),
    ]


def test_hidden_files_and_folders_without_images_are_no_part_of_kohyas_layout(tmp_path):
    fill(tmp_path / "2_brain", **{"a": None, "._a": None})
    fill(tmp_path / ".thumbnails", a=None)
    (tmp_path / "log").mkdir()
    (tmp_path / "notes.md").touch()
    assert [image.path.name for image in read_captioned_folder(str(tmp_path))] == ["a.png"]


@pytest.mark.parametrize("stray", ["loose.png", "femur", "0_femur", "metadata.jsonl"])
def test_images_beside_kohyas_folders_are_not_left_out_in_silence(tmp_path, stray):
    fill(tmp_path / "20_brain", a=None)
    if "." in stray:
        (tmp_path / stray).touch()
    else:
        fill(tmp_path / stray, a=None)
    message = refusal(tmp_path)
    assert message.startswith(
        f"{tmp_path}: 1 images or folders of images lie beside 20_brain and would not be trained"
    )
    assert f"such as {stray};" in message


def test_a_date_in_front_of_a_folders_name_is_no_number_of_repeats(tmp_path):
    fill(tmp_path / "20240131_clinic", a=None)
    assert refusal(tmp_path).endswith("the folders there are: 20240131_clinic")


def test_a_folder_of_kohyas_without_images_is_named(tmp_path):
    fill(tmp_path / "20_brain", a=None)
    (tmp_path / "5_femur").mkdir()
    assert refusal(tmp_path).startswith(f"{tmp_path / '5_femur'}: no images in it")


# --- captions in files ---


def test_a_flat_folder_has_one_repeat_and_a_caption_beside_each_image_in_the_order_of_names(
    tmp_path,
):
    (tmp_path / "notes.md").touch()
    for name, caption in {
        "b.JPG": "a photo of fetal brain\n",
        "a.b.webp": "\ufeffa photo of fetal abdomen",
    }.items():
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    assert read_captioned_folder(tmp_path) == [
        Captioned(tmp_path / "a.b.webp", "a photo of fetal abdomen", 1),
        Captioned(tmp_path / "b.JPG", "a photo of fetal brain", 1),
    ]


def test_images_are_read_in_the_order_of_their_names_however_the_disk_lists_them(tmp_path):
    fill(tmp_path, **dict.fromkeys("qwertyuiopasdfghjklzxcvbnm", "a photo"))
    assert (
        "".join(image.path.stem for image in read_captioned_folder(tmp_path))
        == "abcdefghijklmnopqrstuvwxyz"
    )


def test_a_caption_is_the_first_line_and_a_caption_file_goes_before_a_text_file(tmp_path):
    fill(tmp_path, a=" first \r\nsecond", b="tags, of, b")
    (tmp_path / "b.caption").write_text("a sentence on b")
    assert [image.caption for image in read_captioned_folder(tmp_path)] == [
        "first",
        "a sentence on b",
    ]


@pytest.mark.parametrize("content", [b"", b" \n", b"\nsecond line"])
@pytest.mark.parametrize("ending", ["txt", "caption"])
def test_an_empty_caption_is_refused_even_where_the_folder_has_one(tmp_path, content, ending):
    file = fill(tmp_path / "20_brain", a=None) / f"a.{ending}"
    file.write_bytes(content)
    assert (
        refusal(tmp_path)
        == f"{file}: its first line is empty; write the caption of a.png there, in UTF-8"
    )


def test_a_caption_in_another_encoding_is_refused(tmp_path):
    fill(tmp_path, a=None)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfea\x00")
    assert refusal(tmp_path).startswith(
        f"{tmp_path / 'a.txt'}: cannot be read as a caption in UTF-8 ("
    )


def test_an_image_without_a_caption_is_refused(tmp_path):
    fill(tmp_path, a="a photo", b=None)
    assert (
        refusal(tmp_path)
        == f"{tmp_path / 'b.png'}: has no caption; write one into b.txt beside it, in UTF-8"
    )


def test_one_of_kohyas_folders_given_in_place_of_the_folder_above_is_told_so(tmp_path):
    inner = fill(tmp_path / "20_fetal brain", a=None)
    assert refusal(inner).endswith(
        f"or give {tmp_path}, the folder above, so that 20_fetal brain names it"
    )


# --- nothing found ---


def test_a_folder_that_is_not_there_and_one_without_images_say_what_was_looked_for(tmp_path):
    assert refusal(tmp_path / "img") == f"{tmp_path / 'img'}: no such folder"
    types = ".png, .jpg, .jpeg, .jfif, .webp, .bmp, .tif, .tiff"
    looked = f"no images in it ({types}), no metadata.jsonl and no folders named repeats_caption"
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}: {looked}") and message.endswith("there are no folders")


def test_the_folder_above_the_right_one_names_the_folders_in_it(tmp_path):
    fill(tmp_path / "img" / "20_brain", a=None)
    (tmp_path / "log").mkdir()
    assert refusal(tmp_path).endswith("such as 20_fetal brain; the folders there are: img, log")


# --- metadata.jsonl ---


def test_metadata_lists_images_and_captions_in_its_own_order_and_alone_says_which(tmp_path):
    deep = fill(tmp_path / "train", c=None, d="not listed") / "c.png"
    first = {"file_name": "b.png", "text": " a photo of fetal brain ", "patient": 3}
    metadata(tmp_path, first, "", {"file_name": "train/c.png", "caption": "a photo of fetal femur"})
    assert read_captioned_folder(tmp_path) == [
        Captioned(tmp_path / "b.png", "a photo of fetal brain", 1),
        Captioned(deep, "a photo of fetal femur", 1),
    ]


def test_metadata_in_one_of_kohyas_folders_has_its_repeats(tmp_path):
    metadata(tmp_path / "7_brain", {"file_name": "a.png", "text": "one"})
    assert read_captioned_folder(tmp_path) == [Captioned(tmp_path / "7_brain" / "a.png", "one", 7)]


@pytest.mark.parametrize(
    "row",
    [
        '{"file_name": "a.png"',
        "[]",
        "3",
        {"text": "no name"},
        {"file_name": "a.png"},
        {"file_name": "a.png", "text": 3},
        {"file_name": "a.png", "text": " "},
        {"file_name": "", "text": "one"},
    ],
)
def test_a_line_of_metadata_that_is_none_is_refused_with_its_number(tmp_path, row):
    message = refusal(metadata(tmp_path, {"file_name": "b.png", "text": "good"}, "", row))
    assert message.startswith(f"{tmp_path / 'metadata.jsonl'}, line 3: must be like {{")


def test_metadata_of_an_image_that_is_not_there_and_metadata_of_none_are_refused(tmp_path):
    message = refusal(metadata(tmp_path, {"file_name": "lost.png", "text": "one"}))
    assert (
        message
        == f"{tmp_path / 'metadata.jsonl'}, line 1: lost.png is not there; file_name is relative to"
        f" {tmp_path}"
    )
    assert refusal(metadata(tmp_path)) == f"{tmp_path / 'metadata.jsonl'}: no images listed in it"
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe")
    assert "cannot be read as text in UTF-8" in refusal(tmp_path)


# --- what is trained on ---


def test_training_images_are_a_folders_with_its_repeats_or_the_datasets_with_one(
    tmp_path, monkeypatch
):
    fill(tmp_path / "own" / "20_fetal brain", a=None)
    (image,), _ = training_images(None, tmp_path / "own", None, 20, 0)
    assert (image.caption, image.repeats) == ("fetal brain", 20)

    monkeypatch.setattr(
        "planes.phantoms.phantom.phantom",
        lambda plane, site, patient, r: r.integers(0, 255, (2, 2), "uint8"),
    )
    write_spanish_layout(tmp_path / "spanish", train=2, test=0, seed=0)
    drawn, held_out = training_images(tmp_path / "spanish", None, None, 1, 0)
    assert held_out == []
    assert [(image.caption, image.repeats) for image in drawn] == [
        (prompt, 1) for prompt in PROMPTS.values()
    ]
    (tmp_path / "list.csv").write_text(f"Image_name,Plane\n{drawn[2].path.stem},Fetal femur\n")
    assert training_images(tmp_path / "spanish", None, tmp_path / "list.csv", 1, 0) == (
        [drawn[2]],
        [],
    )


def test_images_that_are_held_out_are_others_of_the_dataset_or_no_longer_trained_on_in_a_folder(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "planes.phantoms.phantom.phantom",
        lambda plane, site, patient, r: r.integers(0, 255, (2, 2), "uint8"),
    )
    write_spanish_layout(tmp_path / "spanish", train=3, test=1, seed=0)
    alone, _ = training_images(tmp_path / "spanish", None, None, 1, 0)
    drawn, held_out = training_images(tmp_path / "spanish", None, None, 1, 0, held_out=3)
    of = {record.path: record for record in read_spanish(tmp_path / "spanish")}
    assert drawn == alone and len(held_out) == 3
    assert all(of[image.path].train for image in held_out)
    assert not {of[i.path].patient for i in held_out} & {of[i.path].patient for i in drawn}
    with pytest.raises(DatasetError, match="of other patients are left, not 99 to hold out"):
        training_images(tmp_path / "spanish", None, None, 1, 0, held_out=99)

    fill(tmp_path / "own" / "20_fetal brain", a=None, b=None, c=None)
    every, _ = training_images(None, tmp_path / "own", None, 20, 0)
    rest, held_out = training_images(None, tmp_path / "own", None, 20, 0, held_out=1)
    assert len(held_out) == 1 and sorted([*rest, *held_out], key=lambda i: i.path) == every
    with pytest.raises(DatasetError, match="3 images, of which 3 cannot be held out"):
        training_images(None, tmp_path / "own", None, 20, 0, held_out=3)


# --- pictures that would be left out ---


@pytest.mark.parametrize("ending", ["tif", "TIFF", "jfif"])
def test_a_tif_and_a_jfif_are_images_too(tmp_path, ending):
    fill(tmp_path, a="a photo")
    (tmp_path / f"b.{ending}").touch()
    (tmp_path / "b.txt").write_text("another photo")
    assert [image.path.name for image in read_captioned_folder(tmp_path)] == [
        "a.png",
        f"b.{ending}",
    ]


@pytest.mark.parametrize("folder", [".", "20_fetal brain"])
@pytest.mark.parametrize("stray", ["e.gif", "scan.DCM", "more"])
def test_pictures_that_would_not_be_trained_on_are_named(tmp_path, folder, stray):
    fill(tmp_path / folder, a="a photo")
    if "." in stray:
        (tmp_path / folder / stray).touch()
    else:
        fill(tmp_path / folder / stray, b="a photo")
    words = (
        f"{tmp_path / folder}: 1 pictures or folders of pictures in it would not be trained on,"
        f" such as {stray};"
    )
    assert words in refusal(tmp_path)


def test_what_metadata_leaves_out_is_left_out_on_purpose(tmp_path):
    metadata(tmp_path, {"file_name": "a.png", "text": "a photo"})
    (tmp_path / "e.gif").touch()
    assert [image.path.name for image in read_captioned_folder(tmp_path)] == ["a.png"]

"""Images are opened as a person sees them: upright, opaque, eight bits deep, by every reader
alike."""

import logging
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from shorthand import refused

from classify.data import decode
from ldm.buckets import read_bucketed
from ldm.images import read_image
from planes import pictures
from planes.pictures import ImageError, open_image


@pytest.fixture(autouse=True)
def _nothing_told_yet(monkeypatch):
    monkeypatch.setattr(pictures, "_told", [])


def picture(width=64, height=48):
    """White on the left, black on the right, a grey band below."""
    levels = np.zeros((height, width, 3), np.uint8)
    levels[:, : width // 2] = 255
    levels[-height // 4 :] = 90
    return Image.fromarray(levels)


def read_by_all(path):
    """A 64 px square as LoRA and image-to-image, buckets and the classifiers get it: (3, 64, 64) in
    [0, 255]."""
    return [
        (read_image(path, 64) + 1) * 127.5,
        (read_bucketed(path, 64, 8) + 1) * 127.5,
        decode(path, 64).expand(3, -1, -1).float(),
    ]


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(tmp_path, orientation, ending):
    back = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270"
    turns = [Image.Transpose[name] for name in back.split()]
    stored = picture().transpose(turns[orientation - 2]) if orientation > 1 else picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{ending}", exif=exif, lossless=True)
    seen = open_image(tmp_path / f"a.{ending}")
    assert seen.size == (64, 48) and seen.tobytes() == picture().tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_is_black_whatever_colour_lies_under_it_and_that_is_said_once(
    tmp_path, mode, caplog
):
    hidden = np.full((64, 64, 4), 255, np.uint8)  # white under transparency, grey below
    hidden[:32, :, 3], hidden[32:, :, :3] = 0, 128
    image = Image.fromarray(hidden)
    if not mode.endswith("A"):
        image = image.convert("RGB")
    image = image.convert(mode)
    options = {} if mode.endswith("A") else {"transparency": image.getpixel((0, 0))}
    for name in "ab":
        image.save(tmp_path / f"{name}.png", **options)
    with caplog.at_level(logging.WARNING):
        read = [pixels for name in "ab" for pixels in read_by_all(tmp_path / f"{name}.png")]
    assert all(torch.equal(pixels[:, :28].round(), torch.zeros(3, 28, 64)) for pixels in read)
    assert all(pixels[:, 36:].mean() == pytest.approx(128, abs=1) for pixels in read)
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path / 'a.png'}: is transparent in parts")


def test_an_opaque_alpha_channel_changes_nothing_and_is_not_worth_a_word(tmp_path, caplog):
    picture(64, 64).save(tmp_path / "a.png")
    picture(64, 64).convert("RGBA").save(tmp_path / "b.png")
    for a, b in zip(read_by_all(tmp_path / "a.png"), read_by_all(tmp_path / "b.png"), strict=True):
        assert torch.equal(a, b)
    assert not caplog.messages


@pytest.mark.parametrize("levels", [np.uint16, ">u2", np.int32, np.float32])
def test_more_than_eight_bits_are_refused_by_name(tmp_path, levels):
    pixels = np.linspace(0, 4000, 64 * 64).reshape(64, 64).astype(levels)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    line = r"a\.tif: has more than 8 bits per channel \([IF].*\); convert it to 8 bits$"
    with refused(ImageError, line):
        open_image(tmp_path / "a.tif")


def test_megabytes_of_text_in_a_png_do_not_matter(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "node " * 1_000_000, zip=True)
    text.add_itxt("licence", "x" * 3_000_000)
    picture().save(tmp_path / "a.png", pnginfo=text)
    assert open_image(tmp_path / "a.png").tobytes() == picture().tobytes()


DAMAGED = {
    "cut": lambda whole: whole[: len(whole) // 2],
    "a wrong sum": lambda whole: whole[:-13] + bytes([whole[-13] ^ 1]) + whole[-12:],
    "a bomb": lambda whole: resized(whole, 1 << 20),
    "text": lambda whole: b"no image",
    "gif header": lambda whole: b"GIF89a" + b"\xff" * 40,
}


def resized(whole, side):
    """A PNG whose header says that it is a square of so many pixels."""
    header = b"IHDR" + struct.pack(">II", side, side) + whole[24:29]
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_one_line_whatever_its_decoder_raises(tmp_path, kind):
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(DAMAGED[kind]((tmp_path / "a.png").read_bytes()))
    line = r"a\.png: not a readable image \(.+\); replace or remove it$"
    with refused(ImageError, line):
        open_image(tmp_path / "a.png")

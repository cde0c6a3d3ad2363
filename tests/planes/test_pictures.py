"""Images are opened as a person sees them: upright, opaque, eight bits deep, by every reader
alike."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from classify.data import decode
from ldm.buckets import read_bucketed
from ldm.images import read_image
from planes import pictures
from planes.captions import say_style
from planes.folders import Captioned
from planes.pictures import ImageError, open_image


@pytest.fixture(autouse=True)
def _nothing_told_yet(monkeypatch):
    monkeypatch.setattr(pictures, "_told", set())


def picture(width=64, height=48):
    """White on the left, black on the right, a grey band below."""
    levels = np.zeros((height, width, 3), np.uint8)
    levels[:, : width // 2] = 255
    levels[-height // 4 :] = 90
    return Image.fromarray(levels)


def read_by_all(path):
    """A 64 px square as LoRA and image-to-image, buckets and the classifiers get it: (3, 64, 64) in
    [0, 255]."""
    bucketed = (read_bucketed(path, 64, 8) + 1) * 127.5
    return [
        (read_image(path, 64) + 1) * 127.5,
        bucketed,
        decode(path, 64).expand(3, -1, -1).float(),
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_an_image_is_turned_as_its_exif_says(tmp_path, orientation, ending):
    upright = picture()
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}
    stored.save(tmp_path / f"a.{ending}", exif=exif, **options.get(ending, {}))
    seen = open_image(tmp_path / f"a.{ending}")
    assert seen.size == (64, 48)
    np.testing.assert_allclose(
        np.asarray(seen, float), np.asarray(upright, float), atol=12 if ending == "jpg" else 0
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB", "1"])
def test_what_is_transparent_is_black_whatever_colour_lies_under_it_and_that_is_said_once(
    tmp_path, mode, caplog
):
    hidden = np.full((64, 64, 4), 255, np.uint8)  # white, or magenta, under transparency
    hidden[:32, :, :3] = (255, 0, 255) if mode in ("RGBA", "PA", "P", "RGB") else 255
    hidden[:32, :, 3], hidden[32:, :, :3] = 0, 128
    image, options = Image.fromarray(hidden), {}
    if mode in ("P", "L", "RGB", "1"):
        image = image.convert("RGB").convert("1" if mode == "1" else mode, dither=Image.Dither.NONE)
        colour = image.getpixel((0, 0))
        options = {"transparency": 1 if mode == "1" else colour}
    else:
        image = image.convert(mode) if mode != "PA" else image.convert("RGBA")
    for name in "ab":
        image.save(tmp_path / f"{name}.png", **options)
    with caplog.at_level(logging.WARNING):
        read = [pixels for name in "ab" for pixels in read_by_all(tmp_path / f"{name}.png")]
    assert all(torch.equal(pixels[:, :28].round(), torch.zeros(3, 28, 64)) for pixels in read)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(
        f"{tmp_path / 'a.png'}: is transparent in parts"
    )


def test_an_opaque_alpha_channel_changes_nothing_and_is_not_worth_a_word(tmp_path, caplog):
    picture(64, 64).save(tmp_path / "a.png")
    picture(64, 64).convert("RGBA").save(tmp_path / "b.png")
    for a, b in zip(read_by_all(tmp_path / "a.png"), read_by_all(tmp_path / "b.png"), strict=True):
        assert torch.equal(a, b)
    assert not caplog.messages


def deep(mode):
    """A picture of more than 8 bits per channel, as a file's bytes."""
    levels = {"I;16": np.uint16, "I;16B": np.dtype(">u2"), "I": np.int32, "F": np.float32}[mode]
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 4000, 64 * 64).reshape(64, 64).astype(levels)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_image(path, 64),
        lambda path: read_bucketed(path, 64, 8),
        lambda path: decode(path, 64),
        lambda path: say_style(Captioned(path, "a photo", 1)),
    ],
)
def test_more_than_eight_bits_are_refused_by_name_by_every_reader(tmp_path, mode, read):
    (tmp_path / "a.tif").write_bytes(deep(mode))
    with pytest.raises(
        ImageError,
        match=r"a\.tif: has more than 8 bits per channel \([IF].*\); convert it to 8 bits$",
    ):
        read(tmp_path / "a.tif")


def test_megabytes_of_text_in_a_png_do_not_matter(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "node " * 1_000_000, zip=True)
    text.add_itxt("licence", "x" * 3_000_000)
    picture().save(tmp_path / "a.png", pnginfo=text)
    assert open_image(tmp_path / "a.png").tobytes() == picture().tobytes()


def damaged():
    """Files that make decoders raise what is no OSError."""
    png = io.BytesIO()
    picture().save(png, "PNG")
    whole = png.getvalue()
    yield "cut", whole[: len(whole) // 2]
    header = struct.pack(">IIBBBBB", 64, 48, 8, 2, 0, 0, 0)
    yield "no pixels", whole[:8] + chunk(b"IHDR", header) + chunk(b"IEND", b"")
    yield (
        "bad depth",
        whole[:8]
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 48, 77, 9, 0, 0, 0))
        + chunk(b"IEND", b""),
    )
    yield "short header", whole[:8] + chunk(b"IHDR", b"\0\0")
    yield (
        "a bomb",
        whole[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 1 << 20, 1 << 20, 8, 2, 0, 0, 0)),
    )
    yield "text", b"no image"
    yield "empty", b""
    yield "gif header", b"GIF89a" + b"\xff" * 40
    yield "tiff header", b"II*\0" + b"\xff" * 40


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("content", [pytest.param(content, id=kind) for kind, content in damaged()])
def test_a_damaged_file_is_one_line_whatever_its_decoder_raises(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(
        ImageError, match=r"a\.png: not a readable image \(.+\); replace or remove it$"
    ) as error:
        open_image(tmp_path / "a.png")
    assert "\n" not in str(error.value)

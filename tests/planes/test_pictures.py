"""Images are opened as a person sees them: upright, opaque, eight bits deep, by every reader
alike."""

import logging
import struct
import warnings
import zlib
from argparse import Namespace

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image, PngImagePlugin
from shorthand import refused

from classify.data import decode
from eval.quality import Memorisation, closest_pairs_figure
from ldm.buckets import read_bucketed
from ldm.images import read_image
from paper.synthetic import figure_2
from planes import pictures
from planes.captions import training_images
from planes.datasets import Record
from planes.pictures import ImageError, open_image
from planes.sites import read_site


@pytest.fixture(autouse=True)
def _nothing_told_yet(monkeypatch):
    monkeypatch.setattr(pictures, "_told", [])


def picture(width=64, height=48):
    """White on the left, black on the right, a grey band below."""
    levels = np.zeros((height, width, 3), np.uint8)
    levels[:, : width // 2] = 255
    levels[-height // 4 :] = 90
    return Image.fromarray(levels)


def read_by_all(path, levels=()):
    """A 64 px square as LoRA and image-to-image, buckets and the classifiers get it: (3, 64, 64) in
    [0, 255]."""
    return [
        (read_image(path, 64, levels=levels) + 1) * 127.5,
        (read_bucketed(path, 64, 8, levels) + 1) * 127.5,
        decode(Record(path, "", "", True, "", "", levels), 64).expand(3, -1, -1).float(),
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


SHADES = np.linspace(0, 4000, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize("dtype", [np.uint16, ">u2", np.int32, np.float32])
def test_more_than_eight_bits_are_refused_by_name_or_scaled_as_their_site(tmp_path, dtype, caplog):
    for name, shift in zip("ab", (0, 1000)):
        Image.fromarray((SHADES + shift).astype(dtype)).save(tmp_path / f"{name}.tif")
        (tmp_path / f"{name}.txt").write_text("a picture")
    with refused(ImageError, r"a\.tif: has more than 8 bits per channel \([IF].*\); convert it"):
        open_image(tmp_path / "a.tif")
    (tmp_path / "images.csv").write_text("image,class\na.tif,x\nb.tif,y\n")
    site = read_site(tmp_path, "source", train=True)
    assert [record.levels for record in site] == [(0, 5000)] * 2
    assert caplog.messages == [
        f"{tmp_path}: more than 8 bits in 2 of 2 images; scaled from 0..5000 to 0..255"
    ]
    captioned, _ = training_images(Namespace(images=tmp_path, seed=0, validation=0))
    assert [image.levels for image in captioned] == [(0, 5000)] * 2
    for record, shift in zip(site, (0, 1000)):
        expected = (SHADES + shift) / 5000 * 255
        for pixels in read_by_all(record.path, record.levels):
            assert abs(pixels.numpy() - expected).max() <= 0.6


def write_dicom(path, pixels, syntax="1.2.840.10008.1.2.1", **header):
    file, (rows, columns) = pydicom.Dataset(), pixels.shape[-2:]
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = syntax
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = "1.2.3"
    bits, signed = 8 * pixels.itemsize, int(pixels.dtype.kind == "i")
    header = {
        "Rows": rows,
        "Columns": columns,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": signed,
        "PatientName": "Doe^Jane",
        "PatientID": "p7",
        "PixelData": pixels.tobytes(),
    } | header
    for key, value in header.items():
        setattr(file, key, value)
    file.save_as(path, enforce_file_format=True)


BYTES, WORDS = (SHADES // 16).astype(np.uint8), SHADES.astype(np.uint16)
WINDOW, SEEN = {"WindowCenter": [1000, 5], "WindowWidth": [501, 5]}, (SHADES - 750) / 500 * 255
INVERTED = {"PhotometricInterpretation": "MONOCHROME1"}
SCAN = {"RescaleSlope": 2, "RescaleIntercept": -1000}


@pytest.mark.parametrize(
    "pixels, header, expected",
    [
        (BYTES, {}, BYTES),
        (BYTES, INVERTED, 255 - BYTES),
        (WORDS, WINDOW, SEEN),
        (WORDS, WINDOW | INVERTED, 255 - SEEN),
        ((SHADES / 2).astype(np.int16), SCAN | WINDOW, (SHADES - 1750) / 500 * 255),
        (WORDS, {}, SHADES / 4095 * 255),
        (WORDS, INVERTED | {"BitsStored": 12, "HighBit": 11}, 255 - SHADES / 4095 * 255),
    ],
)
def test_a_dicom_file_is_shown_as_its_first_window_says(tmp_path, pixels, header, expected):
    write_dicom(tmp_path / "a.dcm", pixels, **header)
    shown = np.asarray(open_image(tmp_path / "a.dcm", (0, 4095)), float)
    assert abs(shown - expected.clip(0, 255)).max() <= 1.2


def test_colours_of_a_dicom_file_stay(tmp_path):
    colours = np.asarray(picture()) // 2
    header = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "Rows": 48, "Columns": 64}
    header["PhotometricInterpretation"] = "RGB"
    write_dicom(tmp_path / "a.dcm", colours, **header, **WINDOW)
    assert np.array_equal(open_image(tmp_path / "a.dcm"), colours)


def test_of_a_dicom_file_the_patients_number_is_taken_and_no_more_is_told(tmp_path, recwarn):
    write_dicom(tmp_path / "a.dcm", BYTES, SpecificCharacterSet="Doe^Jane")
    write_dicom(tmp_path / "b.dcm", np.stack([BYTES] * 2), NumberOfFrames=2, PatientID="")
    header = {"PixelData": pydicom.encaps.encapsulate([b"Doe^Jane"])}
    write_dicom(tmp_path / "c.dcm", BYTES, "1.2.840.10008.1.2.4.57", **header)
    write_dicom(tmp_path / "d.dcm", BYTES, PhotometricInterpretation="Doe^Jane", Rows=65)
    write_dicom(tmp_path / "f.dcm", BYTES, PhotometricInterpretation="PALETTE COLOR")
    (tmp_path / "e.dcm").write_bytes(b"Doe^Jane")
    recwarn.clear()
    warnings.simplefilter("always")
    rows = "a.dcm,x,\nb.dcm,y,\nc.dcm,y,other"
    (tmp_path / "images.csv").write_text(f"image,class,patient\n{rows}\n")
    site = read_site(tmp_path, "source", train=True)
    assert [record.patient[7:] for record in site] == ["p7", "b.dcm", "other"]
    ends = {"b": "2 frames, of which to save one", "c": "pip install pylibjpeg[all]"}
    ends["f"] = "colours by a palette, to be saved as RGB"
    for name in "bcdef":
        with pytest.raises(ImageError) as error:
            open_image(tmp_path / f"{name}.dcm")
        said = str(error.value)
        assert ends.get(name, "Error") in said and "Doe" not in said
    assert not recwarn.list


def test_figures_show_colours_and_deep_greys_as_they_are(tmp_path):
    picture().save(tmp_path / "a.png")
    Image.fromarray(WORDS).save(tmp_path / "b.png")
    records = [Record(tmp_path / f"{n}.png", n, n, True, "x", "x", (0, 4000)) for n in "ab"]
    found = Memorisation(np.arange(2), np.ones(2), np.zeros(2, bool))
    expected = np.asarray(picture()), (WORDS / 4000 * 255 + 0.5).astype(np.uint8)
    sheets = closest_pairs_figure(found, records, records), figure_2({}, records, "ab")
    shown = [axes.images[0].get_array() for figure in sheets for axes in figure.axes]
    assert len(shown) == 6 and all(map(np.array_equal, shown, expected * 3))


def test_16_bits_of_colour_and_stacks_of_pages_are_refused(tmp_path):
    deep = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(7))),
        (b"IEND", b""),
    ):
        deep += struct.pack(">I", len(data)) + kind + data
        deep += struct.pack(">I", zlib.crc32(kind + data))
    (tmp_path / "a.png").write_bytes(deep)
    picture().save(tmp_path / "b.tif", save_all=True, append_images=[picture()])
    for name, words in (("a.png", "16 bits per channel"), ("b.tif", "2 frames")):
        with refused(ImageError, words):
            open_image(tmp_path / name)


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

"""Image files as a person sees them: one way to open them for LoRA and the classifiers alike."""

import logging
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from planes.tables import DatasetError

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28
"""A workflow or a licence of megabytes in a PNG's text says nothing against its pixels (Pillow's
limit is 1 MB)."""

DICOM = (".dcm", ".dicom")
"""The endings of the files that pydicom reads."""

_told: list[Path] = []  # the first that is transparent: a run says it once


class ImageError(DatasetError):
    """A file that is no image, or one of a size or kind that cannot be used, told in one line."""


def open_image(path: Path, levels: Sequence[float] = ()) -> Image.Image:
    """An image file, upright by its EXIF orientation: in "L" if it is stored grey, else in "RGB".

    levels: the values that become black and white where grey has more than 8 bits (`levels_of`)

    What is transparent is composed on black, which is said once. Raises ImageError for a file that
    cannot be read or has several frames, and for more than 8 bits per channel without levels: which
    of the levels an eye should see is for its owner to say.
    """
    image = _stored(path)
    if image.mode[0] in "IF":
        if not levels:
            raise ImageError(
                f"{path}: has more than 8 bits per channel ({image.mode}); convert it to 8 bits, or"
                " give the folders of a site, which are scaled as one"
            )
        return _levelled(image, *levels)
    grey = image.mode in {"1", "L", "LA", "La"}
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            if not _told:
                _told.append(path)
                text = "%s: is transparent in parts, which become black, here and in others"
                logging.getLogger(__name__).warning(text, path)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("L" if grey else "RGB")


def with_levels(images: list, where: Path) -> list:
    """Records or captioned images of one site or folder with its `levels_of` in each."""
    levels = levels_of(tuple(image.path for image in images), where)
    return [replace(image, levels=levels) for image in images]


@cache
def levels_of(paths: tuple[Path, ...], where: Path) -> tuple[float, ...]:
    """The lowest and the highest value of all grey images of more than 8 bits, which is said once;
    () where there are none.

    where: the site or folder that they are of

    Files that cannot be read are left to whoever opens them.
    """
    with ThreadPoolExecutor() as pool:
        deep = [ends for ends in pool.map(_ends, paths) if ends]
    if not deep:
        return ()
    ends = min(deep)[0], max(high for _, high in deep)
    text = "%s: more than 8 bits in %d of %d images; scaled from %g..%g to 0..255"
    logging.getLogger(__name__).warning(text, where, len(deep), len(paths), *ends)
    return ends


def _ends(path: Path) -> tuple[float, float] | None:
    """The lowest and the highest value of a grey image of more than 8 bits."""
    with suppress(Exception):
        if bits_of(path) != 8:
            values = np.asarray(_stored(path), np.float64)
            values = values[np.isfinite(values)]
            return values.min(), values.max()


def bits_of(path: Path) -> int:
    """How many bits a value has, by the header alone: 8 too where a DICOM file has colours, or a
    window, which makes 8 of more. Raises anything for a damaged file."""
    if header := _header(path):
        shown = header.get("WindowWidth") or "MONO" not in header.PhotometricInterpretation
        return 8 if shown else header.BitsStored
    with Image.open(path) as file:
        deep = 32 if file.mode[0] in "IF" else 8
        return 16 if ";16" in f"{file.mode} {file.tile}" else deep


def dicom_patient(path: Path) -> str:
    """Who a DICOM file is of, its PatientID; "" where it names nobody, and of other files."""
    with suppress(Exception):
        return str(_header(path).get("PatientID") or "").strip()
    return ""


def require_sums(path: Path) -> None:
    """Raises whatever Pillow does for a PNG of which a part does not have its sum: its decoder
    would let that pass."""
    with Image.open(path) as file:
        file.verify()


def _stored(path: Path) -> Image.Image:
    """An image as it is stored, upright: grey of more than 8 bits in "I" or "F"."""
    try:
        if header := _header(path):
            return _read_dicom(path, header)
        require_sums(path)
        with Image.open(path) as file:
            if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":  # a photo's preview
                raise ValueError(f"{file.n_frames} frames, of which to save one")
            if file.mode[0] not in "IF" and ";16" in str(file.tile):  # Pillow would drop 8
                raise ValueError("16 bits per channel, of which to make 8")
            return ImageOps.exif_transpose(file)
    except Exception as error:  # the decoders of damaged files raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if path.suffix.lower() in DICOM and not isinstance(error, ImageError | ImportError):
            reason = type(error).__name__  # its words may quote the header
        raise ImageError(f"{path}: not a readable image ({reason}); replace or remove it") from None


def _levelled(values: object, low: float, high: float) -> Image.Image:
    """Values, (H, W) or (H, W, 3), as an image: black at `low`, white at `high`."""
    shares = ((np.asarray(values, float) - low) / (high - low or 1)).clip(0, 1)
    return Image.fromarray((np.nan_to_num(shares) * 255 + 0.5).astype(np.uint8))


def _header(path: Path):
    """A DICOM file without its pixels; of another file nothing."""
    if path.suffix.lower() not in DICOM:
        return {}
    import pydicom  # which nothing else needs

    warnings.filterwarnings("ignore", module="pydicom")  # which quote the header
    return pydicom.dcmread(path, stop_before_pixels=True)


def _read_dicom(path: Path, header) -> Image.Image:
    """The picture of a DICOM file: in "RGB", in "L" as its first window shows it, or in "F" where
    it has more than 8 bits and no window."""
    from pydicom import pixels

    if (header.get("NumberOfFrames") or 1) > 1:
        raise ImageError(f"{header.NumberOfFrames} frames, of which to save one")
    if header.PhotometricInterpretation == "PALETTE COLOR":
        raise ImageError("colours by a palette, to be saved as RGB")
    try:
        values = pixels.pixel_array(path)
    except (NotImplementedError, RuntimeError):
        syntax = header.file_meta.TransferSyntaxUID.name
        raise ImageError(f"{syntax}: pip install pylibjpeg[all], or convert it") from None
    inverted, ends = header.PhotometricInterpretation == "MONOCHROME1", (0, 255)  # low is white
    bits, signed = header.BitsStored, header.PixelRepresentation
    if values.ndim == 2 and header.get("WindowWidth"):
        values = pixels.apply_windowing(pixels.apply_modality_lut(values, header), header)
        ends = pixels.apply_windowing(np.array([-np.inf, np.inf]), header)
    elif bits != 8 or signed:
        if inverted:
            values = (-1 if signed else 2**bits - 1) - values
        return Image.fromarray(pixels.apply_modality_lut(values, header).astype(np.float32))
    return _levelled(values, *ends[:: -1 if inverted else 1])

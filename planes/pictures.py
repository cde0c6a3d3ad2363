"""Image files as a person sees them: one way to open them for LoRA and the
classifiers alike."""

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
            raise _too_deep(path, image)
        return _grey(np.asarray(image, np.float64), *levels)
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


@cache
def levels_of(paths: tuple[Path, ...], where: str) -> tuple[float, ...]:
    """The lowest and the highest value of all grey images of more than 8 bits, which is said once;
    () where there are none.

    where: whose images they are, in words

    Files that cannot be read are left to whoever opens them.
    """
    with ThreadPoolExecutor() as pool:
        lowest, highest = zip(*pool.map(_ends, paths))
    count, low, high = np.isfinite(lowest).sum(), min(lowest), max(highest)
    if not count:
        return ()
    text = "%s: %d of %d images have more than 8 bits; scaled from %g..%g to 0..255"
    logging.getLogger(__name__).warning(text, where, count, len(paths), low, high)
    return low, high


def with_levels(images: list, where: Path) -> list:
    """Records or captioned images of one site or folder with its `levels_of` in each."""
    levels = levels_of(tuple(image.path for image in images), str(where))
    return [replace(image, levels=levels) for image in images] if levels else images


def _ends(path: Path) -> tuple[float, float]:
    """The lowest and the highest value of a grey image of more than 8 bits; (inf, -inf) of any
    other."""
    values = np.empty(0)
    with suppress(Exception):
        if bits_of(path) != 8:
            values = np.asarray(_stored(path), np.float64)
    values = values[np.isfinite(values)]
    return float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))


def bits_of(path: Path) -> int:
    """How many bits a value has, by the header alone: 8 too where a DICOM file has a window, which
    makes 8 of more. Raises anything for a damaged file."""
    if _is_dicom(path):
        header = _header(path)
        return header.BitsStored if header.get("WindowWidth") is None else 8
    with Image.open(path) as file:
        deep = 32 if file.mode[0] in "IF" else 8
        return 16 if ";16" in f"{file.mode} {file.tile}" else deep


def dicom_patient(path: Path) -> str:
    """Who a DICOM file is of, its PatientID; "" where it names nobody, and of other files."""
    with suppress(Exception):
        return str(_header(path).get("PatientID") or "").strip() if _is_dicom(path) else ""
    return ""


def require_sums(path: Path) -> None:
    """Raises whatever Pillow does for a PNG of which a part does not have its sum: its decoder
    would let that pass."""
    with Image.open(path) as file:
        file.verify()


def _stored(path: Path) -> Image.Image:
    """An image as it is stored, upright: grey of more than 8 bits in "I" or "F"."""
    try:
        if _is_dicom(path):
            return _read_dicom(path)
        require_sums(path)
        with Image.open(path) as file:
            if file.format != "MPO":  # a photo with its preview
                _require_one(path, getattr(file, "n_frames", 1))
            if file.mode[0] not in "IF" and bits_of(path) > 8:  # Pillow would drop the lower 8
                raise _too_deep(path, file)
            return ImageOps.exif_transpose(file)
    except ImageError:
        raise
    except Exception as error:  # the decoders of damaged files raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if _is_dicom(path):  # whose header the words may quote
            reason = type(error).__name__
        raise ImageError(f"{path}: not a readable image ({reason}); replace or remove it") from None


def _grey(values: np.ndarray, low: float, high: float) -> Image.Image:
    """Values as grey levels, from black at `low` to white at `high`."""
    shares = ((values - low) / (high - low or 1)).clip(0, 1)
    return Image.fromarray((np.nan_to_num(shares) * 255 + 0.5).astype(np.uint8))


def _too_deep(path: Path, image: Image.Image) -> ImageError:
    return ImageError(
        f"{path}: has more than 8 bits per channel ({image.mode}); convert it to 8 bits (a site's"
        " grey images are scaled)"
    )


def _require_one(path: Path, frames: int) -> None:
    if frames > 1:
        raise ImageError(f"{path}: has {frames} frames; save one of them in its place")


def _is_dicom(path: Path) -> bool:
    return path.suffix.lower() in DICOM


def _header(path: Path):
    """A DICOM file without its pixels."""
    try:
        import pydicom  # which nothing else needs
    except ImportError:
        raise ImageError(f"{path}: is read by pydicom; pip install pydicom") from None
    # its warnings quote the header
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    warnings.filterwarnings("ignore", module="pydicom")
    return pydicom.dcmread(path, stop_before_pixels=True)


def _read_dicom(path: Path) -> Image.Image:
    """The picture of a DICOM file: in "RGB", in "L" as its first window shows it, or in "F" where
    it has more than 8 bits and no window."""
    header = _header(path)
    _require_one(path, int(header.get("NumberOfFrames") or 1))
    from pydicom import pixels

    try:
        values = pixels.pixel_array(path)
    except (NotImplementedError, RuntimeError):
        syntax = header.file_meta.TransferSyntaxUID.name
        advice = "pip install pylibjpeg[all], or convert it"
        raise ImageError(f"{path}: cannot be decoded ({syntax}); {advice}") from None
    kind, signed = header.PhotometricInterpretation, header.PixelRepresentation
    inverted = kind == "MONOCHROME1"  # its lowest value is white
    if kind == "PALETTE COLOR":
        values = pixels.apply_color_lut(values, header)
        values = (values >> header.RedPaletteColorLookupTableDescriptor[2] - 8).astype(np.uint8)
    if values.ndim == 3:
        return Image.fromarray(values)
    if header.get("WindowWidth") is not None:
        values = pixels.apply_windowing(pixels.apply_modality_lut(values, header), header)
        ends = pixels.apply_windowing(np.array([-np.inf, np.inf]), header)
        return _grey(values, *ends[:: -1 if inverted else 1])
    if inverted:
        values = (-1 if signed else 2**header.BitsStored - 1) - values.astype(np.int64)
    if header.BitsStored == 8 and not signed:
        return Image.fromarray(values.astype(np.uint8))
    return Image.fromarray(pixels.apply_modality_lut(values, header).astype(np.float32))

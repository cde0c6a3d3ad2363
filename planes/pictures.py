"""Image files as a person sees them: one way to open them for LoRA and the
classifiers alike."""

import logging
from pathlib import Path

from PIL import Image, ImageOps, PngImagePlugin

from planes.tables import DatasetError

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28
"""A workflow or a licence of megabytes in a PNG's text says nothing against its pixels (Pillow's
limit is 1 MB)."""

_told: list[Path] = []  # the first that is transparent: a run says it once


class ImageError(DatasetError):
    """A file that is no image, or one of a size or kind that cannot be used, told in one line."""


def open_image(path: Path) -> Image.Image:
    """An image file, upright by its EXIF orientation: in "L" if it is stored grey, else in "RGB".

    What is transparent is composed on black, which is said once. Raises ImageError for a file that
    cannot be read, and for more than 8 bits per channel: which of the levels an eye should see is
    for its owner to say.
    """
    try:
        require_sums(path)
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except Exception as error:  # the decoders of damaged files raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageError(f"{path}: not a readable image ({reason}); replace or remove it") from None
    if image.mode[0] in "IF":
        raise ImageError(
            f"{path}: has more than 8 bits per channel ({image.mode}); convert it to 8 bits"
        )
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


def require_sums(path: Path) -> None:
    """Raises whatever Pillow does for a PNG of which a part does not have its sum: its decoder
    would let that pass."""
    with Image.open(path) as file:
        file.verify()

"""Aspect-ratio buckets: images keep their shape and train at the size nearest to it in steps of 64
px, as in kohya."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.images import to_tensor
from planes.pictures import ImageError, open_image


def choose_bucket(
    width: int, height: int, size: int = 512, step: int = 64
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(w, h) that an image is resized to, and (w, h) of its middle that is kept, by kohya's
    bucket_no_upscale.

    An image of at most size * size pixels keeps its size. A larger one shrinks to about that area,
    so that one side is a multiple of `step`: of the two sides the one by which the bucket is closer
    to the image's aspect ratio. The bucket is what remains where both are cut to multiples of
    `step`. Sides are rounded to whole pixels before they are cut, so a bucket may exceed size *
    size by less than a pixel a side: 40x104 for size 64 in steps of 8. Raises ImageError where a
    side would be shorter than one step.
    """
    candidates = [(width, height)]
    if width * height > size * size:
        aspect = width / height
        wide, high = (
            _floor(math.sqrt(size * size * ratio), step) for ratio in (aspect, 1 / aspect)
        )
        candidates = [(int(high * aspect + 0.5), high), (wide, int(wide / aspect + 0.5))]
    pairs = [((w, h), (_floor(w, step), _floor(h, step))) for w, h in candidates]
    pairs = [pair for pair in pairs if min(pair[1]) > 0]
    if not pairs:
        raise ImageError(
            f"{width}x{height} px: too small or narrow for {size}x{size} px of area in steps of"
            f" {step}"
        )
    return min(pairs, key=lambda pair: abs(pair[1][0] / pair[1][1] - width / height))


def read_bucketed(path: Path, size: int, step: int = 64, levels: Sequence[float] = ()) -> Tensor:
    """An image file as (3, h, w) in [-1, 1]: resized, and its middle cut out, as choose_bucket
    says.

    levels: of `planes.pictures.open_image`

    Raises ImageError as `planes.pictures.open_image`, and for an image too narrow for a bucket.
    """
    image = open_image(path, levels).convert("RGB")
    try:
        (wide, high), (width, height) = choose_bucket(*image.size, size, step)
    except ImageError as error:
        raise ImageError(f"{path}: {error}; leave it out, or train without buckets") from None
    pixels = to_tensor(image)
    if (wide, high) != image.size:
        pixels = _area_weights(image.height, high) @ pixels @ _area_weights(image.width, wide).T
    left, top = (wide - width) // 2, (high - height) // 2
    return pixels[:, top : top + height, left : left + width].contiguous()


def _floor(length: float, step: int) -> int:
    """The length rounded to whole px, then cut to a multiple of the step."""
    return int(length + 0.5) // step * step


def _area_weights(source: int, target: int) -> Tensor:
    """(target, source) what each of `source` px in a row contributes to each of fewer: how much of
    it that one covers.

    Each new pixel is the mean of its area in the old image, as in OpenCV's INTER_AREA; PIL's BOX
    takes whole pixels.
    """
    scale = source / target
    start = torch.arange(target, dtype=torch.float64)[:, None] * scale
    pixel = torch.arange(source, dtype=torch.float64)
    covered = torch.minimum(start + scale, pixel + 1) - torch.maximum(start, pixel)
    return (covered.clamp(min=0) / scale).float()

"""Pixels in and out: image files as the VAE takes them, latents as images."""

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.generate import seeded_noise
from ldm.vae import AutoencoderKL


class ImageError(ValueError):
    """A file that is no image."""


def read_image(path: Path, size: int, resize: str = "squash") -> Tensor:
    """An image file as (3, size, size) in [-1, 1].

    resize: "squash" the whole frame into the square, as the classifiers do, or "crop" its middle square
    Raises ImageError for a file that cannot be read.
    """
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: not a readable image ({error}); replace or remove it") from None
    if resize == "crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode_images(vae: AutoencoderKL, paths: Iterable[Path], size: int, resize: str, seed: int) -> Tensor:
    """Scaled latents (N, 4, size/8, size/8) of image files, on the CPU; each is drawn once, with its own noise.

    size, resize: as for read_image; seed: of the noise
    """
    weight, side = vae.post_quant_conv.weight, size // vae.config.downsampling
    latents = []
    for n, path in enumerate(paths):
        noise = seeded_noise([seed * 1_000_003 + n], (vae.config.latent_channels, side, side))
        image = read_image(path, size, resize)[None]
        latents.append(vae.to_latents(image.to(weight.device), noise.to(weight.device)).cpu())
    return torch.cat(latents)


@torch.no_grad()
def decode_images(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (B, H, W, 3) uint8 on the CPU of scaled latents (B, 4, H/8, W/8).

    They are decoded one at a time: the decoder needs far more memory for an image than the U-Net.
    """
    dtype, device = vae.post_quant_conv.weight.dtype, vae.post_quant_conv.weight.device
    images = torch.cat([vae.decode(row[None].to(device, dtype)).float().cpu() for row in latents])
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)

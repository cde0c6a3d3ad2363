"""Pixels in and out: image files as the VAE takes them, latents as images."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.generate import seeded_noise
from ldm.vae import AutoencoderKL
from planes.pictures import ImageError, open_image

AT_ONCE = 4  # images that the decoder is given on a GPU


def read_image(path: Path, size: int, levels: Sequence[float] = ()) -> Tensor:
    """An image file as (3, size, size) in [-1, 1], its whole frame, as the classifiers see it.

    levels: of `planes.pictures.open_image`

    Raises ImageError as `planes.pictures.open_image`.
    """
    image = open_image(path, levels).convert("RGB")
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Iterable[Tensor], seed: int) -> list[Tensor]:
    """Scaled latents (4, h/8, w/8) on the CPU, one for each image, drawn once with noise of its
    own.

    images: (3, h, w) in [-1, 1], of any sizes; seed: of the noise
    """
    weight, latents = vae.post_quant_conv.weight, []
    for n, image in enumerate(images):
        height, width = (side // vae.config.downsampling for side in image.shape[1:])
        noise = seeded_noise([seed * 1_000_003 + n], (vae.config.latent_channels, height, width))
        scaled = vae.to_latents(image[None].to(weight.device), noise.to(weight.device))
        latents.append(scaled[0].cpu())
    return latents


@torch.no_grad()
def decode_images(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (B, H, W, 3) uint8 on the CPU of scaled latents (B, 4, H/8, W/8), a few at once on a
    GPU: the decoder needs far more memory for an image than the U-Net.

    What a decoder in half precision makes of them and is not finite, as SD's can be in float16, is
    decoded again in float32. Raises ImageError where that is not finite either.
    """
    weight, images = vae.post_quant_conv.weight, []
    dtype = weight.dtype
    for rows in latents.split(AT_ONCE if weight.is_cuda else 1):
        decoded = vae.decode(rows.to(weight)).float()
        if dtype != torch.float32 and not decoded.isfinite().all():
            decoded = vae.float().decode(rows.to(weight.device, torch.float32))
            vae.to(dtype)
        if not decoded.isfinite().all():
            raise ImageError("what the VAE makes of the latents is not finite; give another --vae")
        images.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(images)

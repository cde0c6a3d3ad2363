"""Text to latents: noise from a seed, a sampler over the denoiser."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.unet import UNet
from samplers.denoiser import Denoiser
from samplers.euler import sample_euler
from samplers.schedule import Nodes, NoiseSchedule, euler_nodes, unipc_nodes
from samplers.unipc import sample_unipc

SAMPLERS = {"euler": (euler_nodes, sample_euler), "unipc": (unipc_nodes, sample_unipc)}
"""Name -> (schedule of nodes, sampler), both with the settings of the authors' webui. Their number
and order decide which seeds sample.py gives to a plane: a third one would move them."""


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Unit normal float32 noise (B, *shape); row k is drawn from seeds[k] alone, on the CPU, on
    whatever device it is used: an image then depends on its seed and not on its batch."""
    return torch.stack(
        [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def make_nodes(sampler: str, steps: int, spacing: str | None = None) -> Nodes:
    """The noise levels that a sampler of SAMPLERS visits.

    Raises SamplerError for a spacing that the sampler does not have.
    """
    settings = {} if spacing is None else {"spacing": spacing}
    return SAMPLERS[sampler][0](NoiseSchedule(), steps, **settings)


@torch.no_grad()
def generate(
    unet: UNet,
    context: Tensor,
    negative_context: Tensor,
    seeds: Sequence[int],
    size: tuple[int, int],
    *,
    sampler: str = "euler",
    steps: int = 20,
    guidance_scale: float = 7.0,
    prediction_type: str = "epsilon",
    spacing: str | None = None,
    order: int | None = None,
) -> Tensor:
    """Scaled latents (B, 4, H, W) float32 for text embeddings, by classifier-free guidance (Ho &
    Salimans 2022).

    context: (B, S, D) one row per image; negative_context: (1 or B, S', D) of the empty or negative
        prompt
    seeds: B integers; size: (H, W) of the latents; sampler: a key of SAMPLERS
    spacing, order: the sampler's own where None; order is UniPC's alone

    Raises SamplerError for a spacing that the sampler does not have, or where the network's
    prediction is not finite.
    """
    nodes = make_nodes(sampler, steps, spacing)
    negative_context = negative_context.expand(len(context), -1, -1)
    denoise = Denoiser(unet, nodes, context, negative_context, guidance_scale, prediction_type)
    noise = seeded_noise(seeds, (unet.config.in_channels, *size)).to(context.device)
    settings = {} if order is None else {"order": order}
    latents = SAMPLERS[sampler][1](denoise, nodes.init_scale * noise, nodes.sigmas, **settings)
    denoise.require_finite()
    return latents

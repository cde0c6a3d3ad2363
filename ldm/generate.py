"""Text to latents: noise from a seed, a sampler over the denoiser; and variations of an image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.unet import UNet
from samplers.denoiser import Denoiser
from samplers.euler import sample_euler
from samplers.schedule import Nodes, NoiseSchedule, SamplerError, euler_nodes, unipc_nodes
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


def make_nodes(
    sampler: str,
    steps: int,
    spacing: str | None = None,
    order: int | None = None,
    strength: float = 1.0,
) -> Nodes:
    """The noise levels that a sampler of SAMPLERS visits: all, or for image-to-image the last
    int(steps * strength).

    Raises SamplerError for a setting that the sampler does not have, or where no step is left.
    """
    if order is not None and sampler != "unipc":
        raise SamplerError(f"order {order}: UniPC has one, {sampler} does not")
    if order not in (None, 1, 2, 3):
        raise SamplerError(f"UniPC of order {order}: choose 1, 2 or 3")
    if not 0 < strength <= 1:
        raise SamplerError(f"strength {strength:g}: choose more than 0 and at most 1")
    settings = {} if spacing is None else {"spacing": spacing}
    nodes = SAMPLERS[sampler][0](NoiseSchedule(), steps, **settings)
    first = steps - int(steps * strength)
    if first == steps:
        raise SamplerError(f"strength {strength:g} of {steps} steps: no step is left; raise either")
    return Nodes(nodes.timesteps[first:], nodes.sigmas[first:], nodes.init_scale)


@torch.no_grad()
def generate(
    unet: UNet,
    context: Tensor,
    negative_context: Tensor | None,
    seeds: Sequence[int],
    size: tuple[int, int],
    *,
    sampler: str = "euler",
    steps: int = 20,
    guidance_scale: float = 7.0,
    prediction_type: str = "epsilon",
    spacing: str | None = None,
    order: int | None = None,
    init_latents: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Scaled latents (B, 4, H, W) float32 for text embeddings, by classifier-free guidance (Ho &
    Salimans 2022).

    context: (B, S, D) one row per image; negative_context: (1 or B, S', D) of the empty or negative
        prompt
    seeds: B integers; size: (H, W) of the latents; sampler: a key of SAMPLERS
    spacing, order: the sampler's own where None; order is UniPC's alone
    init_latents: (1 or B, 4, H, W) scaled latents of an image to vary (SDEdit, Meng et al. 2022,
        arXiv 2108.01073): noise is added to them as it stands int(steps * strength) nodes before
        the end, where sampling begins; diffusers counts like that too
    strength: in (0, 1], of the variation

    Raises SamplerError for a setting that the sampler does not have, where no step is left, or
    where the network's prediction is not finite.
    """
    strength = 1.0 if init_latents is None else strength
    nodes = make_nodes(sampler, steps, spacing, order, strength)
    if negative_context is not None:
        negative_context = negative_context.expand(len(context), -1, -1)
    denoise = Denoiser(unet, nodes, context, negative_context, guidance_scale, prediction_type)
    noise = seeded_noise(seeds, (unet.config.in_channels, *size)).to(context.device)
    if init_latents is None:
        x = nodes.init_scale * noise
    else:
        x = init_latents.to(noise) + nodes.sigmas[0] * noise
    settings = {} if order is None else {"order": order}
    latents = SAMPLERS[sampler][1](denoise, x, nodes.sigmas, **settings)
    denoise.require_finite()
    return latents

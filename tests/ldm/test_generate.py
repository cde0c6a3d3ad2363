"""generate: noise by seed, settings of the samplers, and what is refused."""

import math

import pytest
import torch
from shorthand import agree, refused

from ldm.generate import generate
from ldm.unet import UNet, UNetConfig
from samplers import (
    Denoiser,
    NoiseSchedule,
    SamplerError,
    euler_nodes,
    sample_euler,
    sample_unipc,
    unipc_nodes,
)

SAMPLERS = {"euler": (euler_nodes, sample_euler), "unipc": (unipc_nodes, sample_unipc)}
SEEDS = [3, 8]


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    config = UNetConfig(4, 4, (8, 16), (True, False), 1, (2, 2), 12, norm_num_groups=4)
    return UNet(config).requires_grad_(False)


@pytest.fixture(scope="module")
def texts():
    return torch.randn(2, 10, 12), torch.randn(1, 5, 12)  # the negative one is shorter


@pytest.mark.parametrize(
    "sampler, spacing, order",
    [
        ("euler", (), {}),
        ("euler", ("karras",), {}),
        ("unipc", (), {}),
        ("unipc", ("leading",), {"order": 2}),
    ],
)
def test_generate_is_the_sampler_to_the_bit_and_an_image_is_its_seeds_alone(
    unet, texts, sampler, spacing, order
):
    (make, sample), (context, negative) = SAMPLERS[sampler], texts
    nodes = make(NoiseSchedule(), 5, *spacing)
    x = [torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    denoise = Denoiser(unet, nodes, context, negative.expand(2, -1, -1), 7.0)
    expected = sample(denoise, nodes.init_scale * torch.stack(x), nodes.sigmas, **order)

    def generated(context, seeds):
        settings = order | dict(zip(["spacing"], spacing)) | {"sampler": sampler, "steps": 5}
        return generate(unet, context, negative, seeds, (8, 6), **settings)

    assert torch.equal(generated(context, SEEDS), expected)
    alone = generated(context[1:], SEEDS[1:])
    agree(alone, expected[1:], 1e-4)  # of values of 10


def test_what_is_not_finite_is_told(unet, texts):
    with refused(SamplerError, r"at t = 999 is not finite in float32: take a wider"):
        generate(unet, texts[0] * math.nan, texts[1], SEEDS, (8, 6), steps=1)


@pytest.mark.slow
def test_the_compiled_unet_is_the_plain_one(unet, texts):
    inputs = torch.randn(2, 4, 8, 6), torch.tensor([3.0, 800.5]), texts[0]
    expected = unet(*inputs)
    unet.compile(dynamic=False, backend="aot_eager")
    agree(unet(*inputs), expected, 1e-5)

"""generate: its defaults, spacings and orders, and image-to-image against known answers and
diffusers' pipeline."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from ldm import MINI
from ldm.checkpoints import load
from ldm.generate import generate, make_nodes, seeded_noise
from samplers import (
    Denoiser,
    NoiseSchedule,
    SamplerError,
    euler_nodes,
    sample_euler,
    sample_unipc,
    unipc_nodes,
)

SCHEDULE = NoiseSchedule()
CONTEXT = torch.zeros(2, 1, 1)
SEEDS, SIZE = [3, 8], (4, 6)
SPREAD = 0.8  # of the data in the linear denoiser


class Network:
    """In the place of a U-Net: eps(x, sigma) of noisy latents x = x0 + sigma eps; keeps the times
    that it was told."""

    config = SimpleNamespace(in_channels=4)

    def __init__(self, eps):
        self.eps, self.times = eps, []

    def read(self, context):
        return context

    def __call__(self, x_vp, t, context):
        self.times.append(float(t[0]))
        sigma = float(SCHEDULE.sigma(float(t[0])))
        return self.eps(x_vp * math.hypot(1, sigma), sigma)


def linear(x, sigma):
    """The ideal denoiser of data N(0, SPREAD^2)."""
    return x * sigma / (SPREAD**2 + sigma**2)


@pytest.fixture
def image():
    return torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mini():
    return load(MINI)


@pytest.fixture(scope="module")
def texts(mini):
    draw, width = torch.Generator().manual_seed(2), mini.unet.config.cross_attention_dim
    return torch.randn(2, 77, width, generator=draw), torch.randn(1, 77, width, generator=draw)


def run(network, **settings):
    return generate(network, CONTEXT, None, SEEDS, SIZE, guidance_scale=1.0, **settings)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
# of the prompt; where the negative one has fewer, each is a call
@pytest.mark.parametrize("tokens", [77, 154])
def test_a_text_is_read_once_for_all_steps_and_the_bits_are_those_of_reading_it_at_each(
    mini, guidance, tokens
):
    draw, width = torch.Generator().manual_seed(2), mini.unet.config.cross_attention_dim
    context, negative = (
        torch.randn(2, tokens, width, generator=draw),
        torch.randn(2, 77, width, generator=draw),
    )
    asked, to_k = [], mini.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    hook = to_k.register_forward_hook(lambda *_: asked.append(1))
    once = generate(mini.unet, context, negative, SEEDS, (4, 8), steps=3, guidance_scale=guidance)
    assert len(asked) == (2 if guidance > 1 and tokens > 77 else 1)
    denoise = Denoiser(mini.unet, euler_nodes(SCHEDULE, 3), context, negative, guidance)
    nodes = denoise.nodes
    with torch.no_grad():
        each = sample_euler(
            denoise, nodes.init_scale * seeded_noise(SEEDS, (4, 4, 8)), nodes.sigmas
        )
    hook.remove()
    assert torch.equal(once, each) and len(asked) > 3


@pytest.mark.parametrize(
    ("sampler", "nodes", "sample"),
    [("euler", euler_nodes, sample_euler), ("unipc", unipc_nodes, sample_unipc)],
)
def test_defaults_are_the_sampler_from_pure_noise_to_the_bit(mini, texts, sampler, nodes, sample):
    context, negative = texts
    nodes = nodes(SCHEDULE, 2)
    denoise = Denoiser(mini.unet, nodes, context, negative.expand(2, -1, -1), 7.0)
    with torch.no_grad():
        expected = sample(denoise, nodes.init_scale * seeded_noise(SEEDS, (4, 8, 8)), nodes.sigmas)
    assert torch.equal(
        generate(mini.unet, context, negative, SEEDS, (8, 8), sampler=sampler, steps=2), expected
    )


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "karras"])
def test_the_network_is_told_the_times_of_the_spacing(sampler, spacing):
    network = Network(linear)
    run(network, sampler=sampler, steps=6, spacing=spacing)
    nodes = {"euler": euler_nodes, "unipc": unipc_nodes}[sampler](SCHEDULE, 6, spacing)
    assert network.times == pytest.approx(nodes.timesteps, abs=1e-3)  # float32 holds 999 to 6e-5


def test_every_order_of_unipc_is_another_result_and_three_is_the_default():
    results = [run(Network(linear), sampler="unipc", steps=6, order=order) for order in (1, 2, 3)]
    assert torch.equal(run(Network(linear), sampler="unipc", steps=6), results[2])
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert (results[one] - results[other]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("steps", "strength", "first"), [(10, 0.6, 4), (10, 0.69, 4), (10, 1.0, 0), (5, 0.2, 4)]
)
def test_euler_varies_an_image_as_the_linear_denoiser_says(image, steps, strength, first):
    network = Network(linear)
    sigmas = euler_nodes(SCHEDULE, steps).sigmas
    factor = math.prod(1 + (b - a) * a / (SPREAD**2 + a**2) for a, b in pairwise(sigmas[first:]))
    expected = factor * (image + sigmas[first] * seeded_noise(SEEDS, (4, *SIZE)))
    x = run(network, steps=steps, strength=strength, init_latents=image)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)  # float32
    assert len(network.times) == steps - first


@pytest.mark.parametrize("spacing", [None, "leading", "karras"])
@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_image_to_image_starts_from_the_image_plus_sigma_times_noise(image, sampler, spacing):
    """Where every x0 is c, each sampler ends exactly at c + sigma_N / sigma_k (x_k - c)."""
    c = 0.5
    nodes = {"euler": euler_nodes, "unipc": unipc_nodes}[sampler](
        SCHEDULE, 8, *([spacing] if spacing else [])
    )
    network = Network(lambda x, sigma: (x - c) / sigma)
    x = run(network, sampler=sampler, steps=8, spacing=spacing, strength=0.5, init_latents=image)
    sigma, last = nodes.sigmas[4], nodes.sigmas[-1]
    start = image + sigma * seeded_noise(SEEDS, (4, *SIZE))
    # UniPC's first sigmas and times agree to 1e-3 only, since its log alpha is interpolated and
    # karras' times rounded
    torch.testing.assert_close(
        x, c + last / sigma * (start - c), rtol=0, atol=1e-5 if sampler == "euler" else 5e-3
    )


def test_a_weak_variation_is_the_image_and_a_strong_one_is_not(image):
    weak, strong = (
        run(Network(linear), steps=50, strength=s, init_latents=image * SPREAD) for s in (0.02, 0.9)
    )
    away = [(x - image * SPREAD).square().mean().sqrt() for x in (weak, strong)]
    assert away[0] < 0.05 and away[1] > 0.5


def test_strength_matters_to_image_to_image_alone(image):
    assert torch.equal(run(Network(linear), steps=4, strength=0.3), run(Network(linear), steps=4))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spacing": "time_uniform"}, "unknown spacing 'time_uniform'"),
        ({"sampler": "unipc", "spacing": "even"}, "unknown spacing 'even'"),
        ({"order": 2}, "order 2"),
        ({"sampler": "unipc", "order": 4}, "order 4"),
        ({"strength": 0.0}, "strength 0"),
        ({"strength": 1.1}, "strength 1.1"),
        ({"strength": math.nan}, "strength nan"),
        ({"strength": 0.04}, "no step is left"),
        ({"steps": 1000}, "1000 steps"),
    ],
)
def test_a_setting_that_the_sampler_does_not_have_is_one_line(settings, words):
    settings = {"sampler": "euler", "steps": 20} | settings
    with pytest.raises(SamplerError, match=words) as error:
        make_nodes(**settings)
    assert "\n" not in str(error.value)


def scheduler_like(sampler, diffusers):
    betas = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    if sampler == "euler":
        return diffusers.EulerDiscreteScheduler(**betas, timestep_spacing="linspace")
    unipc = {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}
    return diffusers.UniPCMultistepScheduler(**betas, **unipc, timestep_spacing="linspace")


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.35, 0.6, 1.0])
@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_image_to_image_is_diffusers_pipeline(mini, texts, sampler, strength):
    """To 1e-3 of the largest value: ours is float64 in its coefficients, theirs float32, and
    guidance is 7."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(
        MINI, scheduler=scheduler_like(sampler, diffusers), safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    context, negative = (text[:1] for text in texts)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    theirs = pipeline(
        image=latents,
        prompt_embeds=context,
        negative_prompt_embeds=negative,
        strength=strength,
        num_inference_steps=10,
        guidance_scale=7.0,
        generator=torch.Generator().manual_seed(9),
        output_type="latent",
    ).images
    settings = {"sampler": sampler, "steps": 10, "spacing": "linspace", "strength": strength}
    ours = generate(mini.unet, context, negative, [9], (8, 8), init_latents=latents, **settings)
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()

"""Samplers live against diffusers' schedulers, which are float32 inside: 1e-4 of the largest
value."""

import math

import numpy as np
import pytest
import torch

from samplers import Denoiser, NoiseSchedule, euler_nodes, sample_euler, sample_unipc, unipc_nodes

pytestmark = pytest.mark.slow

SCHEDULE = NoiseSchedule()
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONTEXT = torch.zeros(2, 1, 1)


def network(x_vp, t, context=None):
    """Smooth in t, so that a wrong time shows."""
    u = torch.as_tensor(t, dtype=x_vp.dtype).view(-1, 1, 1, 1) / 1000
    return u * x_vp + 0.3 * torch.tanh(2 * x_vp.roll(1, -1) + torch.cos(6 * u))


def by_diffusers(scheduler, steps, start):
    """The result of the scheduler's own loop, from unit noise."""
    scheduler.set_timesteps(steps)
    x = start * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        prediction = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(prediction, t, x).prev_sample
    return x


def assert_near(x, reference):
    assert (x - reference).abs().max() < 1e-4 * reference.abs().max()


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture
def unit():
    return torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "karras"])
@pytest.mark.parametrize("steps", [5, 20])
def test_euler_is_diffusers_euler_discrete_scheduler(
    diffusers, unit, spacing, prediction_type, steps
):
    karras = spacing == "karras"
    theirs = diffusers.EulerDiscreteScheduler(
        **BETAS,
        timestep_spacing="linspace" if karras else spacing,
        use_karras_sigmas=karras,
        prediction_type=prediction_type,
    )
    nodes = euler_nodes(SCHEDULE, steps, spacing)
    denoise = Denoiser(network, nodes, CONTEXT, prediction_type=prediction_type)
    assert_near(
        sample_euler(denoise, nodes.init_scale * unit, nodes.sigmas),
        by_diffusers(theirs, steps, unit),
    )


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    ("spacing", "final", "variant"),
    [
        ("linspace", "sigma_min", "bh1"),  # diffusers' bh1 is NaN at a final sigma of zero
        ("linspace", "sigma_min", "bh2"),
        ("linspace", "zero", "bh2"),
        ("leading", "zero", "bh2"),
        ("trailing", "zero", "bh2"),
        ("karras", "zero", "bh2"),
    ],
)
@pytest.mark.parametrize("steps", [5, 20])
def test_unipc_is_diffusers_unipc_multistep_scheduler(
    diffusers, unit, spacing, final, order, variant, steps
):
    karras = spacing == "karras"
    theirs = diffusers.UniPCMultistepScheduler(
        **BETAS,
        solver_order=order,
        solver_type=variant,
        timestep_spacing="linspace" if karras else spacing,
        use_karras_sigmas=karras,
        final_sigmas_type=final,
    )
    nodes = unipc_nodes(SCHEDULE, steps, spacing, final=final)
    x = sample_unipc(
        Denoiser(network, nodes, CONTEXT), nodes.init_scale * unit, nodes.sigmas, order, variant
    )
    assert_near(x / math.hypot(1, nodes.sigmas[-1]), by_diffusers(theirs, steps, unit))


def test_the_web_uis_unipc_is_diffusers_of_order_3_bh1_and_final_sigma_min_but_for_its_fractional_times(
    diffusers, unit
):
    theirs = diffusers.UniPCMultistepScheduler(
        **BETAS,
        solver_order=3,
        solver_type="bh1",
        timestep_spacing="linspace",
        final_sigmas_type="sigma_min",
    )
    nodes = unipc_nodes(SCHEDULE)
    x = sample_unipc(Denoiser(network, nodes, CONTEXT), nodes.init_scale * unit, nodes.sigmas)
    assert_near(x / math.hypot(1, nodes.sigmas[-1]), by_diffusers(theirs, 20, unit))


def test_add_noise_is_diffusers_ddpm_scheduler_s(diffusers):
    t = torch.arange(0, 1000, 7)
    latents, noise = (
        torch.randn(len(t), 2, 3, 3, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 2)
    )
    theirs = diffusers.DDPMScheduler(**BETAS)
    tolerance = {"rtol": 0, "atol": 2e-6}
    torch.testing.assert_close(
        SCHEDULE.add_noise(latents, noise, t), theirs.add_noise(latents, noise, t), **tolerance
    )
    torch.testing.assert_close(
        SCHEDULE.velocity(latents, noise, t), theirs.get_velocity(latents, noise, t), **tolerance
    )
    np.testing.assert_allclose(SCHEDULE.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-6)


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_times_are_those_of_diffusers_at_every_number_of_steps(diffusers, sampler, spacing):
    """What is rounded hangs on its last bit, and so on the way of counting.

    Euler's only step of linspace is diffusers' t = 0, from which no image can come, and
    k-diffusion's 999.
    """
    scheduler = {
        "euler": diffusers.EulerDiscreteScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
    }[sampler]
    nodes = {"euler": euler_nodes, "unipc": unipc_nodes}[sampler]
    theirs = scheduler(**BETAS, timestep_spacing=spacing)
    off = []
    for steps in range(2 if (sampler, spacing) == ("euler", "linspace") else 1, 1000):
        theirs.set_timesteps(steps)
        own = np.float32(nodes(SCHEDULE, steps, spacing).timesteps)
        if not np.allclose(own, theirs.timesteps.numpy()[:steps], rtol=0, atol=1e-3):
            off.append(steps)
    assert off == []

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


def network(x_vp, t, context=None):
    """Smooth in t, so that a wrong time shows."""
    u = torch.as_tensor(t, dtype=x_vp.dtype).view(-1, 1, 1, 1) / 1000
    return u * x_vp + 0.3 * torch.tanh(2 * x_vp.roll(1, -1) + torch.cos(6 * u))


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        ("Euler", {"timestep_spacing": "linspace"}),
        # the web UI's, but for its fractional times
        ("UniPC", {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    ],
)
def test_the_samplers_are_diffusers_schedulers(diffusers, sampler, settings, prediction_type):
    name = {"Euler": "EulerDiscreteScheduler", "UniPC": "UniPCMultistepScheduler"}[sampler]
    theirs = getattr(diffusers, name)(**BETAS, prediction_type=prediction_type, **settings)
    theirs.set_timesteps(20)
    unit = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    expected = unit * theirs.init_noise_sigma
    for t in theirs.timesteps:
        prediction = network(theirs.scale_model_input(expected, t), t)
        expected = theirs.step(prediction, t, expected).prev_sample
    nodes, sample = {
        "Euler": (euler_nodes(SCHEDULE), sample_euler),
        "UniPC": (unipc_nodes(SCHEDULE, spacing="linspace"), sample_unipc),
    }[sampler]
    denoise = Denoiser(network, nodes, torch.zeros(2, 1, 1), prediction_type=prediction_type)
    x = sample(denoise, nodes.init_scale * unit, nodes.sigmas)
    x = x / math.hypot(1, nodes.sigmas[-1])  # 1 where the last is 0
    assert (x - expected).abs().max() < 1e-4 * expected.abs().max()


def test_add_noise_is_diffusers_ddpm_scheduler_s(diffusers):
    t, theirs = torch.arange(0, 1000, 7), diffusers.DDPMScheduler(**BETAS)
    x, eps = torch.randn(2, len(t), 2, 3, 3, generator=torch.Generator().manual_seed(1))
    near = {"rtol": 0, "atol": 2e-6}
    torch.testing.assert_close(SCHEDULE.add_noise(x, eps, t), theirs.add_noise(x, eps, t), **near)
    torch.testing.assert_close(
        SCHEDULE.target(x, eps, t, "v_prediction"), theirs.get_velocity(x, eps, t), **near
    )
    np.testing.assert_allclose(SCHEDULE.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-6)


@pytest.mark.parametrize("sampler", ["Euler", "UniPC"])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_times_are_those_of_diffusers_at_every_number_of_steps(diffusers, sampler, spacing):
    """What is rounded hangs on its last bit, and so on the way of counting.

    Euler's only step of linspace is diffusers' t = 0, from which no image can come, and
    k-diffusion's 999.
    """
    scheduler, nodes = {
        "Euler": (diffusers.EulerDiscreteScheduler, euler_nodes),
        "UniPC": (diffusers.UniPCMultistepScheduler, unipc_nodes),
    }[sampler]
    theirs, off = scheduler(**BETAS, timestep_spacing=spacing), []
    for steps in range(2 if (sampler, spacing) == ("Euler", "linspace") else 1, 1000, 3):
        theirs.set_timesteps(steps)
        own = np.float32(nodes(SCHEDULE, steps, spacing).timesteps)
        if not np.allclose(own, theirs.timesteps.numpy()[:steps], rtol=0, atol=1e-3):
            off.append(steps)
    assert off == []

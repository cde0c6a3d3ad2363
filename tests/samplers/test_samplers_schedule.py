"""The noise schedule, the nodes, and the one line that a mistake gets."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from shorthand import agree, noise, refused

from samplers import (
    Denoiser,
    Nodes,
    NoiseSchedule,
    SamplerError,
    euler_nodes,
    karras_sigmas,
    sample_euler,
    sample_unipc,
    unipc_nodes,
)

SCHEDULE = NoiseSchedule()


def test_the_noise_schedule_is_stable_diffusions():
    alphas_cumprod = SCHEDULE.alphas_cumprod
    beta = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    assert len(SCHEDULE) == len(alphas_cumprod) == 1000 and alphas_cumprod.dtype == torch.float64
    assert 1 - alphas_cumprod[0].item() == pytest.approx(0.00085, rel=1e-12)
    assert beta[-1].item() == pytest.approx(0.012, rel=1e-10)
    even = beta.sqrt().diff().mean().expand(998)
    agree(beta.sqrt().diff(), even, 0, 1e-8)
    assert SCHEDULE.sigma_min == pytest.approx(0.029167158, rel=1e-8)
    assert SCHEDULE.sigma_max == pytest.approx(14.614641229, rel=1e-9)


def test_sigma_and_t_are_inverse_and_between_whole_times_linear_in_log_sigma():
    t = np.linspace(0, 999, 777)
    np.testing.assert_allclose(SCHEDULE.t(SCHEDULE.sigma(t)), t, atol=1e-9)
    assert SCHEDULE.sigma(500.5) == pytest.approx(
        math.sqrt(SCHEDULE.sigma(500) * SCHEDULE.sigma(501)), rel=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_add_noise_and_velocity_are_the_forward_process_at_every_time(dtype):
    """DDPM's formula; in float32 its own tables are off by up to 7e-7, so 2e-6 for noise of up to 4
    sigma."""
    x, eps = (noise(1000, 1, 2, 2, seed=n, dtype=dtype) for n in (1, 2))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=dtype) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0).view(-1, 1, 1, 1)
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    tolerance = {"rtol": 0, "atol": 3e-6 if dtype == torch.float32 else 1e-13}
    t = torch.arange(1000)
    noisy, v = SCHEDULE.add_noise(x, eps, t), SCHEDULE.target(x, eps, t, "v_prediction")
    assert noisy.dtype == v.dtype == dtype
    torch.testing.assert_close(noisy, alpha * x + sigma * eps, **tolerance)
    torch.testing.assert_close(v, alpha * eps - sigma * x, **tolerance)


def test_the_web_uis_nodes_are_the_default():
    euler, unipc = euler_nodes(SCHEDULE), unipc_nodes(SCHEDULE)
    assert euler.timesteps == pytest.approx([999 - 999 * i / 19 for i in range(20)])
    assert unipc.timesteps == pytest.approx([999 - 999 * i / 20 for i in range(20)])
    assert euler.sigmas[-2:] == pytest.approx((SCHEDULE.sigma_min, 0))
    assert len(unipc.sigmas) == 21 and unipc.sigmas[-1] == SCHEDULE.sigma_min
    assert euler.init_scale == pytest.approx(SCHEDULE.sigma_max)
    assert unipc.init_scale == pytest.approx(math.hypot(1, SCHEDULE.sigma_max))


@pytest.mark.parametrize("make_nodes", [euler_nodes, unipc_nodes])
@pytest.mark.parametrize("steps", [1, 2, 17, 61, 103, 500, 999])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "karras"])
def test_every_spacing_has_falling_sigmas_and_as_many_calls_as_asked(make_nodes, steps, spacing):
    nodes = make_nodes(SCHEDULE, steps, spacing, final="zero")
    assert len(nodes.timesteps) == steps and len(nodes.sigmas) == steps + 1
    assert all(a > b for a, b in pairwise(nodes.sigmas))
    assert all(0 <= t <= 999 for t in nodes.timesteps)


def test_the_nodes_know_the_time_of_each_sigma():
    """Karras nodes of UniPC have rounded, even repeated times: the schedule's own t(sigma) would be
    off by up to .5."""
    nodes = unipc_nodes(SCHEDULE, 60, "karras", final="zero")
    assert len(set(nodes.timesteps)) < 60
    assert [nodes.t(sigma) for sigma in nodes.sigmas[:-1]] == list(nodes.timesteps)
    assert [nodes.t(float(np.float32(s))) for s in nodes.sigmas[:-1]] == pytest.approx(
        nodes.timesteps, abs=1e-4
    )
    grid = Nodes((900.0, 100.0), (4.0, 1.0, 0.0), 4.0)
    assert grid.t(2.0) == pytest.approx(500)


def test_karras_sigmas_are_even_in_their_seventh_root():
    sigmas = karras_sigmas(9, 14.6, 0.03)
    assert (sigmas[0], sigmas[-1]) == (14.6, 0.03)
    even = np.linspace(14.6 ** (1 / 7), 0.03 ** (1 / 7), 9)
    np.testing.assert_allclose(sigmas ** (1 / 7), even, rtol=1e-12)


X = torch.zeros(1, 1, 2, 2)
CONTEXT = torch.zeros(1, 2, 4)
EULER = euler_nodes(SCHEDULE)


@pytest.mark.parametrize(
    "line, mistake",
    {
        "unknown spacing 'time_uniform': choose one of linspace": lambda: euler_nodes(
            SCHEDULE, 20, "time_uniform"
        ),
        "0 steps: choose from 1 to 999": lambda: euler_nodes(SCHEDULE, 0),
        "1000 steps: choose from 1 to 999": lambda: unipc_nodes(SCHEDULE, 1000),
        "unknown final 'one': choose zero or sigma_min": lambda: unipc_nodes(SCHEDULE, final="one"),
        "beyond": lambda: euler_nodes(SCHEDULE, 20, "leading", steps_offset=50),
        "UniPC of order 4: choose 1, 2 or 3": lambda: sample_unipc(None, X, [2, 1], order=4),
        "unknown UniPC variant 'bh3': choose bh1 or bh2": lambda: sample_unipc(
            None, X, [2, 1], variant="bh3"
        ),
        "1 sigmas: a sampler needs at least a first and a last one": lambda: sample_euler(
            None, X, [2]
        ),
        "they must be finite and fall": lambda: sample_euler(None, X, [0.1, 2]),
        r"sigmas 0, 0: .* only the last may be 0": lambda: sample_unipc(None, X, [2, 0, 0]),
        "they must be finite": lambda: sample_unipc(None, X, [math.nan, 1]),
        "7 needs a negative context": lambda: Denoiser(None, EULER, CONTEXT, None, 7.0),
        r"\(1, 2, 1\) and \(1, 2, 4\): only their number of tokens may differ": lambda: Denoiser(
            None, EULER, CONTEXT, CONTEXT[..., :1], 7.0
        ),
        "unknown prediction type 'sample': choose epsilon or v_prediction": lambda: Denoiser(
            None, EULER, CONTEXT, prediction_type="sample"
        ),
        "t is torch.float32 of shape": lambda: SCHEDULE.add_noise(X, X, torch.tensor([3.0])),
        "must be one integer for each of 1 rows": lambda: SCHEDULE.target(
            X, X, torch.tensor([3, 4]), "v_prediction"
        ),
    }.items(),
)
def test_a_mistake_is_one_clear_line(mistake, line):
    with refused(SamplerError, line):
        mistake()

"""Samplers against a flow that is known exactly: orders of convergence, and the errors of twenty
steps."""

import math

import numpy as np
import pytest
import torch

from samplers import NoiseSchedule, euler_nodes, sample_euler, sample_unipc, unipc_nodes

SCHEDULE = NoiseSchedule()
LEVELS = (torch.arange(25, dtype=torch.float64) + 0.5) / 25
# data sum_i w_i N(mu_i, s^2)
W, MU = torch.tensor([0.3, 0.45, 0.25]).double(), torch.tensor([-1.2, 0.4, 1.6]).double()
S = 0.35


def denoise(x, sigma):
    variance = S**2 + sigma**2
    r = torch.softmax(W.log() - (x[:, None] - MU) ** 2 / (2 * variance), 1)
    return (r * (S**2 * x[:, None] + sigma**2 * MU)).sum(1) / variance


def cdf(x, sigma):
    return (W * torch.special.ndtr((x[:, None] - MU) / math.hypot(S, sigma))).sum(1)


def quantiles(levels, sigma):
    """The flow keeps the value of the cumulative distribution, which bisection inverts."""
    low, high = torch.full_like(levels, -100), torch.full_like(levels, 100)
    for _ in range(80):
        middle = (low + high) / 2
        below = cdf(middle, sigma) < levels
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def flow_error(sample, sigmas, **options):
    """The largest distance from the exact flow, over 25 quantiles."""
    x = sample(denoise, quantiles(LEVELS, sigmas[0]), sigmas, **options)
    return (x - quantiles(LEVELS, sigmas[-1])).abs().max().item()


FULL = {"lower_order_final": False}
ALONE = FULL | {"corrector": False}


@pytest.mark.parametrize(
    "sample, options, order, window",
    [
        (sample_euler, {}, 1, 0.1),
        (sample_unipc, {"order": 1, **ALONE}, 1, 0.1),
        (sample_unipc, {"order": 2, **ALONE}, 2, 0.1),
        (sample_unipc, {"order": 1, **FULL}, 2, 0.1),
        (sample_unipc, {"order": 2, **FULL}, 3, 0.15),
        (sample_unipc, {"order": 3, **FULL}, 3.8, 0.5),
    ],
    ids=["Euler", "UniP-1", "UniP-2", "UniPC-1", "UniPC-2", "UniPC-3"],
)
def test_each_sampler_has_its_order_and_the_corrector_gains_one(sample, options, order, window):
    """On 80 and 160 steps even in ln sigma, where the last step is as short as the others."""
    options = options | ({"variant": "bh2"} if options.get("order", 3) < 3 else {})
    few, many = (
        flow_error(
            sample,
            np.geomspace(SCHEDULE.sigma_max, SCHEDULE.sigma_min, n + 1).tolist(),
            **options,
        )
        for n in (80, 160)
    )
    assert math.log2(few / many) == pytest.approx(order, abs=window)


def test_twenty_steps_stay_within_the_known_distance_of_the_flow():
    """Mean |x0 - flow| over 4001 quantiles of unit noise with the web UI's settings: .052 Euler,
    .0225 UniPC."""
    unit = torch.special.ndtri((torch.arange(4001, dtype=torch.float64) + 0.5) / 4001)
    for sample, nodes, distance in (
        (sample_euler, euler_nodes(SCHEDULE), 0.052),
        (sample_unipc, unipc_nodes(SCHEDULE), 0.0225),
    ):
        x = nodes.init_scale * unit
        exact = quantiles(cdf(x, nodes.sigmas[0]), 0)
        mean = (sample(denoise, x, nodes.sigmas) - exact).abs().mean().item()
        assert mean == pytest.approx(distance, rel=0.05)


def test_the_lower_order_of_the_last_steps_is_what_uniform_times_need():
    """The last step of the web UI's grid spans h = 2; the full order there is an order of magnitude
    worse."""
    sigmas = unipc_nodes(SCHEDULE).sigmas
    with_it, without = flow_error(sample_unipc, sigmas), flow_error(sample_unipc, sigmas, **FULL)
    assert with_it < 0.065 and without > 7 * with_it

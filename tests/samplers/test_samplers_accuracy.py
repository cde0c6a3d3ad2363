"""Samplers against two flows that are known exactly: orders of convergence, and the errors of
twenty steps."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from samplers import NoiseSchedule, euler_nodes, sample_euler, sample_unipc, unipc_nodes

SCHEDULE = NoiseSchedule()


class Gaussian:
    """Data N(mu, s^2): the flow is linear."""

    mu, s = 0.5, 0.8

    def denoise(self, x, sigma):
        return x - sigma**2 * (x - self.mu) / (self.s**2 + sigma**2)

    def start(self, sigma, count=25):
        return self.mu + math.hypot(self.s, sigma) * torch.special.ndtri(quantile_levels(count))

    def flow(self, x, sigma, target):
        return self.mu + (x - self.mu) * math.hypot(self.s, target) / math.hypot(self.s, sigma)


class Mixture:
    """Data sum_i w_i N(mu_i, s^2): the flow keeps the value of the cumulative distribution, which
    bisection inverts."""

    w, mu, s = (
        torch.tensor([0.3, 0.45, 0.25]).double(),
        torch.tensor([-1.2, 0.4, 1.6]).double(),
        0.35,
    )

    def denoise(self, x, sigma):
        variance = self.s**2 + sigma**2
        r = torch.softmax(self.w.log() - (x[:, None] - self.mu) ** 2 / (2 * variance), 1)
        return (r * (self.s**2 * x[:, None] + sigma**2 * self.mu)).sum(1) / variance

    def start(self, sigma, count=25):
        return self.inverse(quantile_levels(count), sigma)

    def flow(self, x, sigma, target):
        return self.inverse(self.cdf(x, sigma), target)

    def cdf(self, x, sigma):
        return (
            self.w * torch.special.ndtr((x[:, None] - self.mu) / math.hypot(self.s, sigma))
        ).sum(1)

    def inverse(self, levels, sigma):
        low, high = torch.full_like(levels, -100), torch.full_like(levels, 100)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, sigma) < levels
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def quantile_levels(count):
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def log_snr_sigmas(steps):
    return np.geomspace(SCHEDULE.sigma_max, SCHEDULE.sigma_min, steps + 1).tolist()


def flow_error(sample, data, sigmas, **options):
    """The largest distance from the exact flow, over 25 quantiles."""
    x = data.start(sigmas[0])
    return (
        (sample(data.denoise, x, sigmas, **options) - data.flow(x, sigmas[0], sigmas[-1]))
        .abs()
        .max()
        .item()
    )


def slope(errors):
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize("data", [Gaussian(), Mixture()], ids=["gaussian", "mixture"])
def test_euler_is_of_first_order(data):
    errors = [
        flow_error(sample_euler, data, euler_nodes(SCHEDULE, n).sigmas[:-1]) for n in (160, 320)
    ]  # down to sigma_min
    assert slope(errors) == pytest.approx([1.0], abs=0.1)


@pytest.mark.parametrize("data", [Gaussian(), Mixture()], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("order", [1, 2])
def test_the_predictor_alone_has_its_order(order, data):
    """On 80, 160 and 320 steps even in ln sigma, where the last step is as short as the others."""
    errors = [
        flow_error(
            sample_unipc,
            data,
            log_snr_sigmas(n),
            order=order,
            corrector=False,
            lower_order_final=False,
            variant="bh2",
        )
        for n in (80, 160, 320)
    ]
    assert slope(errors)[1:] == pytest.approx([order], abs=0.1)


@pytest.mark.parametrize("data", [Gaussian(), Mixture()], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(("order", "window"), [(1, 0.1), (2, 0.15)])
def test_the_corrector_gains_an_order(order, window, data):
    errors = [
        flow_error(
            sample_unipc,
            data,
            log_snr_sigmas(n),
            order=order,
            variant="bh2",
            lower_order_final=False,
        )
        for n in (80, 160)
    ]
    assert slope(errors) == pytest.approx([order + 1], abs=window)


def test_unipc_of_order_3_converges_faster_than_third_order():
    errors = [
        flow_error(sample_unipc, Mixture(), log_snr_sigmas(n), order=3, lower_order_final=False)
        for n in (80, 160)
    ]
    assert slope(errors)[0] >= 3.3


def test_twenty_steps_stay_within_the_known_distance_of_the_mixtures_flow():
    """Mean |x0 - flow| over 4001 quantiles of unit noise with the web UI's settings: .052 Euler,
    .0225 UniPC."""
    data, unit = Mixture(), torch.special.ndtri(quantile_levels(4001))
    distance = {}
    for name, nodes, sample in [
        ("euler", euler_nodes(SCHEDULE), sample_euler),
        ("unipc", unipc_nodes(SCHEDULE), sample_unipc),
    ]:
        x = nodes.init_scale * unit
        distance[name] = (
            (sample(data.denoise, x, nodes.sigmas) - data.flow(x, nodes.sigmas[0], 0))
            .abs()
            .mean()
            .item()
        )
    assert 0.04 < distance["euler"] < 0.06
    assert 0.015 < distance["unipc"] < 0.026


def test_the_lower_order_of_the_last_steps_is_what_uniform_times_need():
    """The last step of the web UI's grid spans h = 2; the full order there is an order of magnitude
    worse."""
    sigmas = unipc_nodes(SCHEDULE).sigmas
    with_it, without = (
        flow_error(sample_unipc, Mixture(), sigmas, lower_order_final=lof) for lof in (True, False)
    )
    assert with_it < 0.065 and without > 7 * with_it

"""Samplers against exact mathematics: what a step must do, and the ends of the grid. Nothing stored
is read here."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from shorthand import agree, noise

from samplers import NoiseSchedule, euler_nodes, sample_euler, sample_unipc, unipc_nodes
from samplers.unipc import coefficients

SCHEDULE = NoiseSchedule()
UNIPC = {
    f"unipc{order}-{variant}": partial(sample_unipc, order=order, variant=variant)
    for order in (1, 2, 3)
    for variant in ("bh1", "bh2")
}
SAMPLERS = {"euler": sample_euler, **UNIPC}
FULL_ORDER = {
    f"{name}-full-order-last": partial(sample, lower_order_final=False)
    for name, sample in UNIPC.items()
}
UNCORRECTED = {
    f"{name}-uncorrected": partial(sample, corrector=False) for name, sample in UNIPC.items()
}


def each(samplers):
    return pytest.mark.parametrize("sample", samplers.values(), ids=samplers)


EXACT = {"rtol": 1e-12, "atol": 1e-12}


def nonlinear(x, sigma):
    """A denoiser that couples nothing but is far from linear in x and in ln sigma."""
    return torch.tanh(x / math.hypot(1, sigma)) + 0.3 * math.sin(2 * math.log(sigma)) * torch.cos(x)


# --- identities of single steps


@each(SAMPLERS | UNCORRECTED)
def test_a_constant_denoiser_is_followed_exactly_at_every_node(sample):
    nodes, c, states = unipc_nodes(SCHEDULE, 20), 0.7, []
    x = nodes.init_scale * noise(3, 2)
    last = sample(
        lambda x, sigma: torch.full_like(x, c),
        x,
        nodes.sigmas,
        callback=lambda i, x, x0: states.append(x),
    )
    for sigma, state in zip(nodes.sigmas, [*states, last], strict=True):
        agree(state, c + sigma / nodes.sigmas[0] * (x - c), **EXACT)


def integral(h, k):
    """integral_0^h e^(u-h) u^k du by Gauss-Legendre, which shares nothing with the library's
    recursion."""
    u, weights = np.polynomial.legendre.leggauss(30)
    u = (u + 1) * h / 2
    return float((weights * np.exp(u - h) * u**k).sum() * h / 2)


def quadrature(h, positions, k, variant):
    """What a step adds for D = (lambda - lambda_0)^k, starting from x = 0."""
    d = [(u * h) ** k - 0**k for u in positions]
    return -math.expm1(-h) * 0**k + sum(
        c * d_j for c, d_j in zip(coefficients(h, positions, variant), d)
    )


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize(
    "positions, exact_to",
    [([], 0), ([-1.3], 0), ([1.0], 0), ([-2.9, -1.3], 2), ([-1.3, 1.0], 2), ([-2.9, -1.3, 1.0], 3)],
    ids=["UniP-1", "UniP-2", "UniC-1", "UniP-3", "UniC-2", "UniC-3"],
)
def test_a_step_integrates_polynomials_up_to_its_degree_and_no_further(
    variant, positions, exact_to
):
    h = 0.6
    for k in range(exact_to + 1):
        assert quadrature(h, positions, k, variant) == pytest.approx(integral(h, k), abs=1e-13)
    assert abs(quadrature(h, positions, exact_to + 1, variant) - integral(h, exact_to + 1)) > 1e-3


def test_a_single_neighbour_takes_the_papers_b_of_h_and_more_make_the_variants_equal():
    h = 0.6
    for u in (-1.3, 1.0):
        assert coefficients(h, [u], "bh1") == pytest.approx([h / (2 * u)], abs=1e-15)
        assert coefficients(h, [u], "bh2") == pytest.approx([-math.expm1(-h) / (2 * u)], abs=1e-15)
    assert coefficients(h, [-1.3, 1.0], "bh1") == coefficients(h, [-1.3, 1.0], "bh2")


@pytest.mark.parametrize("order, degree", [(2, 2), (3, 3)])
def test_the_corrector_looks_at_the_model_where_the_step_ends(order, degree):
    """D = (lambda - lambda_0)^k depends on sigma alone; an order-p corrected state is then exact
    for k <= p."""
    sigmas, states = [8.0, 5.0, 3.5, 2.0, 1.1, 0.5], []
    sample_unipc(
        lambda x, sigma: torch.full_like(x, math.log(sigmas[order - 1] / sigma) ** degree),
        torch.zeros(1, dtype=torch.float64),
        sigmas,
        order,
        lower_order_final=False,
        callback=lambda i, x, x0: states.append(x.item()),
    )
    h = math.log(sigmas[order - 1] / sigmas[order])
    expected = math.exp(-h) * states[order - 1] + integral(h, degree)
    assert states[order] == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_unipc_of_order_1_without_its_corrector_is_euler(final):
    nodes = unipc_nodes(SCHEDULE, 20, "linspace", final=final)
    x = nodes.init_scale * noise(4, 3)
    euler = sample_euler(nonlinear, x, nodes.sigmas)
    agree(sample_unipc(nonlinear, x, nodes.sigmas, 1, corrector=False), euler, **EXACT)
    assert (sample_unipc(nonlinear, x, nodes.sigmas, 1) - euler).abs().max() > 1e-3


@pytest.mark.parametrize(
    "corrector, expected", [(True, [1, 2, 3, 4, 5]), (range(3, 6), [3, 4, 5]), (False, [])]
)
def test_the_corrector_is_applied_at_the_named_nodes_only(corrector, expected):
    nodes, predicted, corrected = unipc_nodes(SCHEDULE, 6), [], []
    sample_unipc(
        lambda x, sigma: predicted.append(x) or nonlinear(x, sigma),
        nodes.init_scale * noise(4, 3),
        nodes.sigmas,
        corrector=corrector,
        callback=lambda i, x, x0: corrected.append(x),
    )
    pairs = enumerate(zip(predicted, corrected, strict=True))
    assert [i for i, (a, b) in pairs if not torch.equal(a, b)] == expected


# --- the ends of the grid


@each(SAMPLERS | FULL_ORDER)
def test_a_final_sigma_of_zero_ends_at_the_last_x0(sample):
    for steps in range(1, 6):
        nodes, seen = euler_nodes(SCHEDULE, steps), []
        x = nodes.init_scale * noise(4, 3)
        last = sample(
            nonlinear, x, nodes.sigmas, callback=lambda i, x, x0, seen=seen: seen.append(x0)
        )
        assert len(seen) == steps and last.isfinite().all()
        agree(last, seen[-1], 0)


@each(SAMPLERS | FULL_ORDER)
def test_a_repeated_sigma_changes_nothing_but_the_cost(sample):
    """Of a denoiser that does not depend on x, the second look is the same as the first."""
    sigmas = [9.0, 5.0, 3.0, 2.0, 1.0, 0.6, 0.4, 0.3]
    repeated = [9.0, 5.0, 3.0, 3.0, 2.0, 1.0, 0.6, 0.4, 0.3]
    x = 9 * noise(4, 3)

    def denoise(x, sigma):
        return torch.full_like(x, math.sin(3 * math.log(sigma)))

    agree(sample(denoise, x, repeated), sample(denoise, x, sigmas), 1e-12, 1e-12)
    nodes = unipc_nodes(SCHEDULE, 10, "karras")  # its last step is of length zero
    assert nodes.sigmas[-2] == SCHEDULE.sigma_min == nodes.sigmas[-1]
    assert sample(nonlinear, nodes.init_scale * x, nodes.sigmas).isfinite().all()

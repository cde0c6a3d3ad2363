"""Euler's method on the probability-flow ODE."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from samplers.schedule import checked_sigmas


def sample_euler(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    sigmas: Sequence[float],
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Samples with Euler steps (Karras et al. 2022, algorithm 2 without its correction and its
    added noise).

    denoise: (x, sigma) -> x0, called once for each sigma but the last
    x: (B, ...) noise at sigmas[0] (Nodes.init_scale times unit noise)
    sigmas: N + 1 falling noise levels; a last one of 0 ends at the last x0 itself
    callback: called as callback(i, x, x0) after the model at node i

    Returns x at the last sigma. This is DDIM with eta = 0 (Song et al. 2020, arXiv 2010.02502) in
    other variables. Raises SamplerError where the sigmas rise or one before the last is 0.
    """
    for i, (sigma, target) in enumerate(pairwise(checked_sigmas(sigmas))):
        x0 = denoise(x, sigma)
        if callback is not None:
            callback(i, x, x0)
        r = target / sigma
        x = r * x + (1 - r) * x0
    return x

"""UniPC, a multistep predictor-corrector for the probability-flow ODE."""

import math
from collections import deque
from collections.abc import Callable, Container, Sequence

import numpy as np
from torch import Tensor

from samplers.schedule import SamplerError, checked_sigmas


def sample_unipc(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    sigmas: Sequence[float],
    order: int = 3,
    variant: str = "bh1",
    lower_order_final: bool = True,
    corrector: bool | Container[int] = True,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Samples with UniPC (Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2), data prediction,
    multistep.

    denoise: (x, sigma) -> x0, called once for each sigma but the last, always at the predicted x
    x: (B, ...) noise at sigmas[0] (Nodes.init_scale times unit noise)
    sigmas: N + 1 falling noise levels; a last one of 0 ends at the last x0 itself
    order: 1 to 3, of the predictor; the corrector, which costs no call of the model, gains one more
    variant: "bh1" or "bh2", the paper's B(h); it matters only where a step has a single neighbour
    lower_order_final: the last steps fall to order 2 and 1, needed where the last one is long, as
        with even times
    corrector: True or False, or the nodes to correct: range(4, N) spares the first ones under
        strong guidance
    callback: called as callback(i, x, x0) after the model at node i; x is corrected

    Returns x at the last sigma, which no corrector sees. Raises SamplerError for an unknown order
    or variant, or where the sigmas rise or one before the last is 0.
    """
    sigmas = checked_sigmas(sigmas)
    if order not in (1, 2, 3):
        raise SamplerError(f"UniPC of order {order}: choose 1, 2 or 3")
    if variant not in ("bh1", "bh2"):
        raise SamplerError(f"unknown UniPC variant {variant!r}: choose bh1 or bh2")
    steps = len(sigmas) - 1
    to_correct = range(steps) if corrector is True else corrector or ()
    history = deque(maxlen=order)  # (sigma, x0) of the latest nodes
    start, node, older = x, None, []  # what the step to the current node set out from

    for i, sigma in enumerate(sigmas[:-1]):
        x0 = denoise(x, sigma)

        # correct: take the step that led here again, now that x0 is known at its end
        if i > 0 and i in to_correct:
            x = _step(start, node, [*older, (sigma, x0)], sigma, variant)
        if callback is not None:
            callback(i, x, x0)

        # predict: extrapolate from the nodes behind
        if history and history[-1][0] == sigma:
            history.pop()  # a repeated sigma is one node, not two
        history.append((sigma, x0))
        p = min(len(history), steps - i) if lower_order_final else len(history)
        *older, node = list(history)[-p:]
        start = x
        x = _step(start, node, older, sigmas[i + 1], variant)
    return x


def _step(
    x: Tensor,
    node: tuple[float, Tensor],
    others: list[tuple[float, Tensor]],
    target: float,
    variant: str,
) -> Tensor:
    """x at the sigma of node, carried to target through the x0 of node and of the others, which
    are pairs (sigma, x0) all."""
    sigma, x0 = node
    if target == sigma:
        return x
    if target == 0:
        return x0  # h is infinite and every order has this limit
    h = math.log(sigma / target)
    positions = [math.log(sigma / other) / h for other, _ in others]
    x = math.exp(-h) * x - math.expm1(-h) * x0
    for c, (_, other_x0) in zip(coefficients(h, positions, variant), others):
        x = x + c * (other_x0 - x0)
    return x


def coefficients(h: float, positions: Sequence[float], variant: str) -> list[float]:
    """Weights c_j in x' = r x + (1 - r) D_0 + sum_j c_j (D_j - D_0), r = e^-h, of a step of length
    h.

    positions: u_j = (lambda_j - lambda_0) / h of the other nodes, lambda = -log sigma, where the
        guess of x_0 is D_j: below 0 behind the step, 1 at its end

    The polynomial through D_0 and the D_j is integrated exactly, so sum_j c_j u_j^k = J_k for k = 1
    .. len(positions), J_k = integral_0^h e^(s-h) (s/h)^k ds. A single node takes the paper's B(h)
    instead: c = B(h) / (2 u).
    """
    if not positions:
        return []
    if len(positions) == 1:
        B = h if variant == "bh1" else -math.expm1(-h)
        return [B / (2 * positions[0])]
    powers = range(1, len(positions) + 1)
    integral, moments = -math.expm1(-h), []
    for k in powers:
        integral = h**k - k * integral  # by parts
        moments.append(integral / h**k)
    return np.linalg.solve([[u**k for u in positions] for k in powers], moments).tolist()

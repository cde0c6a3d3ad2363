"""Samplers for diffusion models: any callable in, nothing of Stable Diffusion known.

Everything runs in the variance-exploding space of Karras et al. 2022 (arXiv 2206.00364), where a
noisy latent is x = x0 + sigma * eps and the probability-flow ODE, with lambda = -ln sigma, is

    d(x / sigma) / d lambda = e^lambda D(x; sigma)

where D is the denoiser, the model's estimate of x0. So a step from sigma to sigma' is exactly, with
r = sigma' / sigma and h = -ln r,

    x' = r x + integral_0^h e^(u-h) D(lambda + u) du

Euler holds D constant; UniPC fits a polynomial to it.

| concept | where |
|---|---|
| the forward process x0 -> x_t, sigma(t) and t(sigma) | `schedule.py` NoiseSchedule |
| the nodes sigma_0 > ... > sigma_N and their times | `schedule.py` euler_nodes, unipc_nodes |
| eps- or v-network + text context + guidance -> D(x; sigma) | `denoiser.py` Denoiser |
| first order (Euler, the same as DDIM) | `euler.py` sample_euler |
| order 1 to 3 with a corrector (UniPC) | `unipc.py` sample_unipc |

The coefficients are Python floats in double precision; the state keeps the dtype of the noise it
started from (float32 in use, also where the network runs in half precision).
"""

from samplers.denoiser import Denoiser
from samplers.euler import sample_euler
from samplers.schedule import (
    Nodes,
    NoiseSchedule,
    SamplerError,
    euler_nodes,
    karras_sigmas,
    unipc_nodes,
)
from samplers.unipc import sample_unipc

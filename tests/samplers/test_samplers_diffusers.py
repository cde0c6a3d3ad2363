"""The times of samplers live against those of diffusers' schedulers."""

import numpy as np
import pytest

from samplers import NoiseSchedule, euler_nodes, unipc_nodes

pytestmark = pytest.mark.slow

SCHEDULE = NoiseSchedule()
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("sampler", ["Euler", "UniPC"])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_times_are_those_of_diffusers_at_every_number_of_steps(sampler, spacing):
    """What is rounded hangs on its last bit, and so on the way of counting.

    Euler's only step of linspace is diffusers' t = 0, from which no image can come, and
    k-diffusion's 999.
    """
    diffusers = pytest.importorskip("diffusers")
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

"""Trajectories of diffusers, k-diffusion and the UniPC authors' code replayed, node by node.

They are kept in references/samplers.safetensors, made by references/make_samplers.py.
"""

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from safetensors import safe_open
from shorthand import REFERENCES, agree
from torch.nn.functional import conv2d

from samplers import (
    Denoiser,
    Nodes,
    NoiseSchedule,
    euler_nodes,
    sample_euler,
    sample_unipc,
    unipc_nodes,
)

SCHEDULE = NoiseSchedule()
# max |x - reference| / max |reference|, the worst node
STATE_TOLERANCE = {"f64": 1e-12, "f32": 1e-4}
# relative; the references' float32 tables lose five digits
SIGMA_TOLERANCE = {"f64": 1e-11, "f32": 1e-4}
TIME_TOLERANCE = {"f64": 1e-9, "f32": 1e-2}

with safe_open(REFERENCES / "samplers.safetensors", "pt") as file:
    RECORDS = json.loads(file.metadata()["records"])
    TENSORS = {key: file.get_tensor(key) for key in file.offset_keys()}


@cache
def toy_kernel(channels, dtype):
    c, taps = torch.arange(channels, dtype=torch.float64), torch.arange(3, dtype=torch.float64)
    inputs = 1.7 * c[:, None, None, None] + 2.3 * c[:, None, None]
    return (0.35 * torch.sin(1 + inputs + 0.9 * taps[:, None] + 1.3 * taps)).to(dtype)


def toy_model(x, t, context):
    """The small nonlinear network of the references: (B, C, H, W), (B,), (B, 1, 1) the condition y
    -> (B, C, H, W)."""
    u, c = t.view(-1, 1, 1, 1) / 1000, torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)
    bias = 0.5 * torch.cos(6 * u + c) + context.view(-1, 1, 1, 1)
    return u * x + 0.25 * torch.tanh(conv2d(x, toy_kernel(x.shape[1], x.dtype), padding=1) + bias)


def nodes_of(reference, steps, s):
    """The library's nodes for a reference's settings, or None for those that it does not have."""
    if reference == "kdiffusion_euler" and not s["quantize"]:
        spacing = {"uniform": "linspace", "karras": "karras"}[s["schedule"]]
        return euler_nodes(SCHEDULE, steps, spacing)
    if reference == "wlzhao_unipc" and s["skip"] == "time_uniform":
        return unipc_nodes(SCHEDULE, steps)
    options = {"final": s.get("final"), "steps_offset": s.get("steps_offset")}
    if reference == "diffusers_unipc":
        return unipc_nodes(SCHEDULE, steps, "karras" if s["karras"] else s["spacing"], **options)
    if reference == "diffusers_euler":
        if s["karras"] and s["spacing"] == "linspace" and steps > 1:
            return euler_nodes(SCHEDULE, steps, "karras", **options)
        # its own linspace interpolates sigma itself, and its Karras follows the other spacings
        if not s["karras"] and s["spacing"] != "linspace":
            return euler_nodes(SCHEDULE, steps, s["spacing"], **options)
    return None


def replay(record):
    """(predicted states (N + 1, ...), corrected states (N, ...)) of the library at the record's
    nodes, in the record's own space."""
    sigmas, s = TENSORS[record["sigmas"]], record["settings"]
    nodes = Nodes((*TENSORS[record["timesteps"]].tolist(),), (*sigmas.tolist(),), 1.0)
    start = TENSORS[f"{record['id']}.x"][0]
    to_vp = sigmas.square().add(1).rsqrt() if record["space"] == "VP" else torch.ones_like(sigmas)
    to_vp = to_vp.to(start.dtype).view(-1, 1, 1, 1, 1)
    zeros = torch.zeros(len(start), 1, 1, dtype=start.dtype)
    guided = (zeros, 1.0) if record["cfg"] is None else (zeros + 0.7, record["cfg"])
    denoise = Denoiser(toy_model, nodes, guided[0], zeros, guided[1], s["prediction"])
    predicted, corrected = [], []

    def recorded(x, sigma):
        predicted.append(x)
        return denoise(x, sigma)

    def callback(i, x, x0):
        corrected.append(x)

    x = start / to_vp[0]
    if "order" in s:
        off = s.get("disable_corrector", [])  # i stands for the corrector of node i + 1
        on = [node for node in range(1, record["steps"]) if node - 1 not in off]
        how = (s["order"], s["variant"], s["lower_order_final"], on if off else True, callback)
        x = sample_unipc(recorded, x, nodes.sigmas, *how)
    else:
        x = sample_euler(recorded, x, nodes.sigmas, callback)
    if s.get("denoise_to_zero"):  # one more call of the model at sigma_min
        end = Denoiser(toy_model, Nodes((0.0,), (*nodes.sigmas[-1:], 0.0), 1.0), zeros)
        x0 = sample_euler(end, x, (nodes.sigmas[-1], 0.0))
        agree(x0, TENSORS[f"{record['id']}.x0_denoised"], 1e-12, 1e-12)
    return torch.stack([*predicted, x]) * to_vp, torch.stack(corrected) * to_vp[:-1]


def worst_node(states, reference):
    distance = (states - reference).abs().flatten(1).amax(1) / reference.abs().flatten(1).amax(1)
    return distance.nan_to_num(math.inf).max().item()


# how many, and how many of them at nodes that the library has too
GROUPS = {
    ("diffusers_euler", "f64"): (52, 24),
    ("diffusers_euler", "f32"): (25, 10),
    ("diffusers_unipc", "f64"): (218, 218),
    ("diffusers_unipc", "f32"): (26, 26),
    ("kdiffusion_euler", "f64"): (18, 17),
    ("kdiffusion_euler", "f32"): (5, 5),
    ("wlzhao_unipc", "f64"): (48, 42),
    ("wlzhao_unipc", "f32"): (7, 7),
}


@pytest.mark.parametrize("group", GROUPS, ids="-".join)
def test_every_state_time_and_sigma_of_the_reference_trajectories_is_reproduced(group):
    failures, precision, compared = [], group[1], 0
    records = [r for r in RECORDS if (r["reference"], r["precision"]) == group]
    for record in records:
        predicted, corrected = replay(record)
        found = {"x": (worst_node(predicted, TENSORS[f"{record['id']}.x"]), STATE_TOLERANCE)}
        if "order" in record["settings"]:
            distance = worst_node(corrected, TENSORS[f"{record['id']}.xc"])
            found["xc"] = (distance, STATE_TOLERANCE)
        nodes = nodes_of(record["reference"], record["steps"], record["settings"])
        if nodes is not None:
            compared += 1
            sigmas, times = (TENSORS[record[name]].numpy() for name in ("sigmas", "timesteps"))
            assert (len(nodes.sigmas), len(nodes.timesteps)) == (len(sigmas), len(times))
            to_ve = math.hypot(1, nodes.sigmas[0]) if record["space"] == "VP" else 1
            off = np.abs((nodes.sigmas - sigmas) / np.where(sigmas > 0, sigmas, 1)).max()
            found["sigmas"] = (off, SIGMA_TOLERANCE)
            found["times"] = (np.abs(nodes.timesteps - times).max(), TIME_TOLERANCE)
            scale = nodes.init_scale / (record["init_scale"] * to_ve)
            found["init_scale"] = (abs(scale - 1), SIGMA_TOLERANCE)
        failures += [
            f"{record['id']} {name}: {distance:.2e}, {record['steps']} steps, {record['settings']}"
            for name, (distance, tolerance) in found.items()
            if not distance <= tolerance[precision]
        ]
    assert not failures, "\n".join(failures)
    assert (len(records), compared) == GROUPS[group]

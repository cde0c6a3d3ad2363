"""Every reference trajectory replayed: diffusers, k-diffusion and the UniPC authors' code, node by
node.

The trajectories lie beside the checkout in ../shared/reference/golden; the ten of them at the
paper's setting are kept under references/ (made by make_samplers_golden_small.py), so that
something is compared everywhere.
"""

import json
import math
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import conv2d

from samplers import (
    Denoiser,
    Nodes,
    NoiseSchedule,
    euler_nodes,
    karras_sigmas,
    sample_euler,
    sample_unipc,
    unipc_nodes,
)

SMALL = Path(__file__).parents[1] / "references"
GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "reference" / "golden"
# max |x - reference| / max |reference|, the worst node
STATE_TOLERANCE = {"f64": 1e-12, "f32": 1e-4}
# relative; the references' float32 tables lose five digits
SIGMA_TOLERANCE = {"f64": 1e-11, "f32": 1e-4}
TIME_TOLERANCE = {"f64": 1e-9, "f32": 1e-2}
SCHEDULE = NoiseSchedule()


def records_by_group(index):
    """{(reference, precision): [record, ...]}"""
    groups = defaultdict(list)
    for record in json.loads(index.read_text())["records"]:
        groups[record["reference"], record["precision"]].append(record)
    return groups


FULL_GROUPS = [
    pytest.param(reference, precision, count, id=f"{reference}-{precision}")
    for reference, precision, count in [
        ("diffusers_euler", "f64", 91),
        ("diffusers_euler", "f32", 37),
        ("diffusers_unipc", "f64", 354),
        ("diffusers_unipc", "f32", 38),
        ("kdiffusion_euler", "f64", 31),
        ("kdiffusion_euler", "f32", 7),
        ("wlzhao_unipc", "f64", 85),
        ("wlzhao_unipc", "f32", 10),
    ]
]


@pytest.fixture(scope="module")
def full():
    if not GOLDEN.is_dir():
        pytest.skip(
            "the reference trajectories, ../shared/reference/golden, are not beside this checkout"
        )
    return records_by_group(GOLDEN / "index.json"), load_file(GOLDEN / "samplers.safetensors")


@pytest.fixture(scope="module")
def small():
    records = json.loads((SMALL / "samplers_golden_small.json").read_text())["records"]
    return records, load_file(SMALL / "samplers_golden_small.safetensors")


@cache
def toy_kernel(channels, dtype):
    c, taps = torch.arange(channels, dtype=torch.float64), torch.arange(3, dtype=torch.float64)
    phase = (
        1 + 1.7 * c[:, None, None, None] + 2.3 * c[:, None, None] + 0.9 * taps[:, None] + 1.3 * taps
    )
    return (0.35 * torch.sin(phase)).to(dtype)


def toy_model(x, t, context):
    """The small nonlinear network of the references: (B, C, H, W), (B,), (B, 1, 1) the condition y
    -> (B, C, H, W)."""
    u, c = t.view(-1, 1, 1, 1) / 1000, torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)
    bias = 0.5 * torch.cos(6 * u + c) + context.view(-1, 1, 1, 1)
    return u * x + 0.25 * torch.tanh(conv2d(x, toy_kernel(x.shape[1], x.dtype), padding=1) + bias)


def nodes_of(record):
    """The library's nodes for a record, or nodes made here for the settings that only a reference
    has."""
    steps, options = record["steps"], record["settings"]
    if record["reference"] == "kdiffusion_euler":
        nodes = euler_nodes(
            SCHEDULE, steps, {"uniform": "linspace", "karras": "karras"}[options["schedule"]]
        )
        if options["quantize"]:
            # the nearest whole time in log sigma, the lower one of two
            times = tuple(np.ceil(np.subtract(nodes.timesteps, 0.5)).tolist())
            nodes = Nodes(times, nodes.sigmas, nodes.init_scale)
        return nodes
    if record["reference"] == "diffusers_euler":
        return diffusers_euler_nodes(steps, options)
    if record["reference"] == "diffusers_unipc":
        spacing = "karras" if options["karras"] else options["spacing"]
        return unipc_nodes(
            SCHEDULE, steps, spacing, final=options["final"], steps_offset=options["steps_offset"]
        )
    if options["skip"] == "time_uniform":
        return unipc_nodes(SCHEDULE, steps)
    return log_alpha_nodes(steps, options["skip"])


def diffusers_euler_nodes(steps, options):
    """Its fractional times interpolate sigma itself, a single step starts at t = 0, and its Karras
    sigmas lie between the first and the last of the spacing."""
    spacing, final = options["spacing"], options["final"]
    if options["karras"] and spacing == "linspace" and steps > 1:
        return euler_nodes(SCHEDULE, steps, "karras", final=final)
    nodes = euler_nodes(SCHEDULE, steps, spacing, final=final, steps_offset=options["steps_offset"])
    if not options["karras"] and spacing != "linspace":
        return nodes
    times, sigmas, last = nodes.timesteps, nodes.sigmas[:-1], nodes.sigmas[-1]
    if spacing == "linspace":
        times = times if steps > 1 else (0.0,)
        sigmas = np.interp(times, np.arange(1000), SCHEDULE.sigma(np.arange(1000))).tolist()
    if options["karras"]:
        sigmas = karras_sigmas(steps, sigmas[0], sigmas[-1]).tolist()
        times = tuple(SCHEDULE.t(np.array(sigmas)).tolist())
    return Nodes(
        times, (*sigmas, last), math.hypot(1, sigmas[0]) if spacing == "leading" else sigmas[0]
    )


def log_alpha_nodes(steps, skip):
    """Even in lambda, or even in sqrt(t), with log alpha interpolated."""
    log_alphas = np.log(SCHEDULE.alphas_cumprod.numpy()) / 2
    if skip == "logSNR":
        lambdas = np.linspace(
            -math.log(SCHEDULE.sigma_max), -math.log(SCHEDULE.sigma_min), steps + 1
        )
        times = np.interp(np.logaddexp(0, -2 * lambdas) / 2, -log_alphas, np.arange(1000))
    else:
        times = 1000 * np.linspace(1, math.sqrt(1e-3), steps + 1) ** 2 - 1
    sigmas = np.sqrt(np.expm1(-2 * np.interp(times, np.arange(1000), log_alphas)))
    return Nodes(tuple(times[:-1].tolist()), tuple(sigmas.tolist()), math.hypot(1, sigmas[0]))


def replay(record, tensors):
    """(predicted states (N + 1, ...), corrected states (N, ...)) of the library, in the record's
    own space."""
    nodes = nodes_of(record)
    if record.get("t_tie"):  # a rounded time that the last bit decides: the reference's own
        nodes = Nodes(tuple(tensors[record["timesteps"]].tolist()), nodes.sigmas, nodes.init_scale)
    options, start = record["settings"], tensors[f"{record['id']}.x"][0]
    to_vp = torch.ones(len(nodes.sigmas), dtype=torch.float64)
    if record["space"] == "VP":
        to_vp = 1 / torch.tensor(nodes.sigmas, dtype=torch.float64).square().add(1).sqrt()
    to_vp = to_vp.to(start.dtype).view(-1, 1, 1, 1, 1)

    context, negative, scale = torch.zeros(len(start), 1, 1, dtype=start.dtype), None, 1.0
    if record["cfg"] is not None:
        context, negative, scale = context + 0.7, context, record["cfg"]
    denoise = Denoiser(toy_model, nodes, context, negative, scale, options["prediction"])
    predicted, corrected = [], []

    def recorded(x, sigma):
        predicted.append(x)
        return denoise(x, sigma)

    def callback(i, x, x0):
        corrected.append(x)

    x = start / to_vp[0]
    if "order" in options:
        off = options.get("disable_corrector", [])  # i stands for the corrector of node i + 1
        to_correct = [node for node in range(1, record["steps"]) if node - 1 not in off]
        x = sample_unipc(
            recorded,
            x,
            nodes.sigmas,
            options["order"],
            options["variant"],
            options["lower_order_final"],
            to_correct if off else True,
            callback,
        )
    else:
        x = sample_euler(recorded, x, nodes.sigmas, callback)
    return torch.stack([*predicted, x]) * to_vp, torch.stack(corrected) * to_vp[:-1]


def worst_node(states, reference):
    distance = (states - reference).abs().flatten(1).amax(1) / reference.abs().flatten(1).amax(1)
    return distance.nan_to_num(math.inf).max().item()


def state_failures(records, tensors):
    """One line for each record whose states leave the tolerance of its precision."""
    failures = []
    for record in records:
        predicted, corrected = replay(record, tensors)
        found = {".x": worst_node(predicted, tensors[f"{record['id']}.x"])}
        if "order" in record["settings"]:
            found[".xc"] = worst_node(corrected, tensors[f"{record['id']}.xc"])
        for name, distance in found.items():
            if distance > STATE_TOLERANCE[record["precision"]]:
                failures.append(
                    f"{record['id']}{name}: {distance:.2e}, {record['steps']} steps,"
                    f" {record['settings']}"
                )
    return failures


def node_failures(records, tensors):
    """One line for each record whose sigmas, times or scale of the first noise leave their
    tolerances."""
    failures = []
    for record in records:
        nodes, precision = nodes_of(record), record["precision"]
        sigmas, times = tensors[record["sigmas"]].numpy(), tensors[record["timesteps"]].numpy()
        if len(nodes.sigmas) != len(sigmas) or len(nodes.timesteps) != len(times):
            failures.append(
                f"{record['id']}: {len(nodes.timesteps)} nodes, {len(times)} in the reference"
            )
            continue
        to_ve = math.hypot(1, nodes.sigmas[0]) if record["space"] == "VP" else 1
        found = {  # name -> (distance, tolerance)
            "sigmas": (
                np.abs((nodes.sigmas - sigmas) / np.where(sigmas > 0, sigmas, 1)).max(),
                SIGMA_TOLERANCE,
            ),
            "timesteps": (
                0 if record.get("t_tie") else np.abs(nodes.timesteps - times).max(),
                TIME_TOLERANCE,
            ),
            "init_scale": (
                abs(nodes.init_scale / (record["init_scale"] * to_ve) - 1),
                SIGMA_TOLERANCE,
            ),
        }
        for name, (distance, tolerance) in found.items():
            if not distance <= tolerance[precision]:
                failures.append(
                    f"{record['id']} {name}: {distance:.2e}, {record['steps']} steps,"
                    f" {record['settings']}"
                )
    return failures


@pytest.mark.parametrize(("reference", "precision", "count"), FULL_GROUPS)
def test_every_state_of_every_reference_trajectory_is_reproduced(full, reference, precision, count):
    groups, tensors = full
    assert len(groups[reference, precision]) == count
    failures = state_failures(groups[reference, precision], tensors)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(("reference", "precision", "count"), FULL_GROUPS)
def test_every_time_and_sigma_of_the_references_is_reproduced(full, reference, precision, count):
    groups, tensors = full
    assert len(groups[reference, precision]) == count
    failures = node_failures(groups[reference, precision], tensors)
    assert not failures, "\n".join(failures)


def test_one_more_model_call_at_sigma_min_is_the_denoised_result_of_the_authors_unipc(full):
    groups, tensors = full
    records = [r for r in groups["wlzhao_unipc", "f64"] if r["settings"]["denoise_to_zero"]]
    assert [r["id"] for r in records] == ["r0632", "r0633"]
    for record in records:
        x_vp = tensors[f"{record['id']}.x"][-1]
        nodes = Nodes((0.0,), (SCHEDULE.sigma_min, 0.0), 1.0)
        denoise = Denoiser(toy_model, nodes, torch.zeros(len(x_vp), 1, 1, dtype=x_vp.dtype))
        x0 = sample_euler(denoise, x_vp * math.hypot(1, SCHEDULE.sigma_min), nodes.sigmas)
        torch.testing.assert_close(
            x0, tensors[f"{record['id']}.x0_denoised"], rtol=1e-12, atol=1e-12, msg=record["id"]
        )


def test_the_trajectories_at_the_papers_setting_are_reproduced(small):
    records, tensors = small
    assert (
        len(records) == 10
        and {r["steps"] for r in records} == {20}
        and {r["cfg"] for r in records} == {7.0}
    )
    failures = state_failures(records, tensors) + node_failures(records, tensors)
    assert not failures, "\n".join(failures)

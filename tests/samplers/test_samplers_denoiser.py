"""The denoiser: prediction types, guidance in one call or two, batches, half precision."""

import math

import pytest
import torch
from shorthand import agree, noise, refused

from samplers import (
    Denoiser,
    Nodes,
    NoiseSchedule,
    SamplerError,
    euler_nodes,
    sample_euler,
    sample_unipc,
    unipc_nodes,
)

SCHEDULE = NoiseSchedule()
every_sampler = pytest.mark.parametrize(
    "sample", [sample_euler, sample_unipc], ids=["euler", "unipc"]
)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def network(x_vp, t, context):
    """A stand-in for a U-Net: depends on each of its arguments, row by row."""
    rows = (-1, 1, 1, 1)
    return torch.tanh(x_vp * (1 + t.view(rows) / 1000)) + context.mean((1, 2)).view(
        rows
    ) * torch.cos(x_vp)


def test_v_prediction_of_a_known_image_and_noise_gives_the_image_back():
    t, x0, eps = torch.tensor([300]), noise(1, 1, 3, 3, seed=1), noise(1, 1, 3, 3, seed=2)
    sigma = float(SCHEDULE.sigma(300))
    nodes = Nodes((300.0,), (sigma, 0.0), sigma)
    for kind in ("epsilon", "v_prediction"):
        seen, target = [], SCHEDULE.target(x0, eps, t, kind)
        denoise = Denoiser(
            lambda x_vp, t, context, target=target, seen=seen: seen.append(x_vp) or target,
            nodes,
            torch.zeros(1, 1, 1, dtype=torch.float64),
            prediction_type=kind,
        )
        agree(denoise(x0 + sigma * eps, sigma), x0, **EXACT)
        agree(seen[0], SCHEDULE.add_noise(x0, eps, t), **EXACT)


@every_sampler
def test_a_batch_equals_its_rows_alone(sample):
    nodes = unipc_nodes(SCHEDULE, 6)
    x, context = nodes.init_scale * noise(3, 1, 2, 2), noise(3, 2, 4, seed=1)
    negative = noise(3, 2, 4, seed=2)
    whole = sample(Denoiser(network, nodes, context, negative, 4.0), x, nodes.sigmas)
    rows = [
        sample(
            Denoiser(network, nodes, context[i : i + 1], negative[i : i + 1], 4.0),
            x[i : i + 1],
            nodes.sigmas,
        )
        for i in range(3)
    ]
    agree(whole, torch.cat(rows), **EXACT)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_guidance_is_one_call_of_twice_the_batch_or_two_where_the_prompts_differ_in_length(
    tokens, prediction_type
):
    nodes, calls = euler_nodes(SCHEDULE, 3), []
    x, context = nodes.init_scale * noise(2, 1, 2, 2), noise(2, 2, 4, seed=1)
    negative, sigma = noise(2, tokens, 4, seed=2), nodes.sigmas[1]

    def counted(x_vp, t, context):
        calls.append((t.tolist(), t.dtype))
        return network(x_vp, t, context)

    def denoised(*settings):
        return Denoiser(counted, nodes, *settings, prediction_type=prediction_type)(x, sigma)

    guided = denoised(context, negative, 7.0)
    joint = [([499.5] * 4, torch.float64)]
    assert calls == (joint if tokens == 2 else [([499.5] * 2, torch.float64)] * 2)
    with_, without = denoised(context), denoised(negative)
    agree(guided, without + 7 * (with_ - without), **EXACT)
    calls.clear()
    agree(denoised(context, negative, 1.0), with_, **EXACT)
    assert len(calls) == 1  # at scale 1 the condition alone


@every_sampler
def test_the_state_stays_in_float32_around_a_network_in_half_precision(sample):
    nodes, seen = unipc_nodes(SCHEDULE), set()
    x, context = nodes.init_scale * noise(2, 1, 3, 3, dtype=torch.float32), torch.zeros(2, 1, 1)

    def half(x_vp, t, context):
        seen.add((x_vp.dtype, t.dtype, context.dtype))
        return network(x_vp.float(), t, context.float()).half()

    full = sample(Denoiser(network, nodes, context), x, nodes.sigmas)
    mixed = sample(Denoiser(half, nodes, context.half()), x, nodes.sigmas)
    assert mixed.dtype == full.dtype == torch.float32
    assert seen == {(torch.float16, torch.float32, torch.float16)}
    assert (mixed - full).norm() / full.norm() < 1e-2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_guidance_combines_the_predictions_of_a_half_precision_network_in_float32(prediction_type):
    """Not in half precision, where 7 times a difference would be rounded again: exactly the widened
    numbers."""
    nodes = euler_nodes(SCHEDULE, 3)
    x, context, negative = (
        noise(2, *shape, dtype=torch.float32) for shape in ((1, 2, 2), (2, 4), (2, 4))
    )
    negative = negative + 1

    def denoise(widen):
        def model(x_vp, t, context):
            prediction = network(x_vp, t, context).half()
            return prediction.float() if widen else prediction

        return Denoiser(model, nodes, context, negative, 7.0, prediction_type)(x, nodes.sigmas[0])

    agree(denoise(widen=False), denoise(widen=True), 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("guidance_scale", [1, 3])
def test_a_prediction_that_is_not_finite_is_told_with_its_step(value, guidance_scale):
    nodes = euler_nodes(SCHEDULE, 4)

    def broken(x_vp, t, context):
        prediction = network(x_vp, t, context)
        if t[0] < 500:
            prediction[-1, -1, -1, -1] = value
        return prediction

    zeros = torch.zeros(1, 1, 1, dtype=torch.float64)
    denoise = Denoiser(broken, nodes, zeros, zeros, guidance_scale)
    with refused(SamplerError, "predicts at t = 333 is not finite in float64: take a wider"):
        sample_euler(denoise, nodes.init_scale * noise(1, 1, 3, 3), nodes.sigmas)
        denoise.require_finite()
    with refused(SamplerError, "must be a finite number"):
        Denoiser(network, nodes, zeros, zeros, value)

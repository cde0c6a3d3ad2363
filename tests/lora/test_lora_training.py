"""LoRA against sd-scripts: the outputs of three of its files, and three of its training steps, on a
small SD 1.5.

The references were computed by sd-scripts' own modules in float32 on the CPU; eps has a standard
deviation of 0.5 and a LoRA changes it by 0.8 to 1.5.
"""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.checkpoints.keys import SINGLE_FILE, rename
from ldm.text import TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from lora import (
    inject,
    load_lora,
    lora_layers,
    lora_parameters,
    merge,
    remove,
    save_lora,
    set_strength,
)

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "lora"
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no reference files in {REFERENCE}")

FILES = {
    "kohya_default_r4a2_fp32": ({"lora_unet": 192, "lora_te": 24}, {(4, 2.0): 216}, torch.float32),
    "kohya_noalpha_r8_fp16": ({"lora_unet": 192, "lora_te": 24}, {(8, 8.0): 216}, torch.float16),
    "kohya_unetonly_r4a1_bf16": ({"lora_unet": 192, "lora_te": 0}, {(4, 1.0): 192}, torch.bfloat16),
}


@pytest.fixture(scope="module")
def base():
    """The small base in float32: a U-Net and a text encoder of four layers."""
    networks = {
        "unet": UNet(UNetConfig(block_out_channels=(32, 64, 128, 128), cross_attention_dim=64)),
        "text_encoder": TextEncoder(
            TextConfig(
                vocab_size=1000,
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=4,
                num_attention_heads=4,
            )
        ),
    }
    weights = {"unet": {}, "vae": {}, "text_encoder": {}}
    for key, tensor in load_file(REFERENCE / "base_small.safetensors").items():
        if name := rename(key, SINGLE_FILE):
            network, _, parameter = name.partition(".")
            weights[network][parameter] = tensor.float()
    for network, module in networks.items():
        module.load_state_dict(weights[network])
    return networks["unet"].eval(), networks["text_encoder"].eval()


@pytest.fixture
def networks(base):
    return copy.deepcopy(base)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_a_kohya_file_gives_sd_scripts_outputs(networks, name):
    unet, text_encoder = networks
    reference, inputs = (
        load_file(REFERENCE / f"ref_{name}.safetensors"),
        load_file(REFERENCE / "inputs.safetensors"),
    )
    x, t, ids = inputs["x"], inputs["t"], inputs["input_ids"]

    def check(output, key, atol=5e-5):
        torch.testing.assert_close(output, reference[key], atol=atol, rtol=0)

    base_outputs = text_encoder(ids), unet(x, t, reference["ctx_base_cs1"])
    check(base_outputs[0], "ctx_base_cs1")
    check(base_outputs[1], "eps_base")

    summary = load_lora(
        REFERENCE / f"{name}.safetensors", {"lora_unet": unet, "lora_te": text_encoder}
    )
    assert (summary.layers, summary.ranks, summary.dtype) == FILES[name]
    for suffix, strength in {"m1": 1, "m05": 0.5, "mneg1": -1}.items():
        set_strength(unet, strength)
        set_strength(text_encoder, strength)
        check(unet(x, t, reference["ctx_base_cs1"]), f"eps_unetonly_{suffix}")
        check(text_encoder(ids), f"ctx_lora_cs1_{suffix}")
        check(text_encoder(ids, clip_skip=2), f"ctx_lora_cs2_{suffix}")
        check(unet(x, t, text_encoder(ids)), f"eps_full_{suffix}")

    merge(unet, 1)
    merge(text_encoder, 1)
    check(unet(x, t, text_encoder(ids)), "eps_merged_m1", atol=1e-5)
    check(unet(x, t, text_encoder(ids)), "eps_full_m1", atol=1e-5)
    merged = [key for key in reference if key.startswith("merged/")]
    assert len(merged) == 3
    for key in merged:
        path = rename(f"model.diffusion_model.{key.removeprefix('merged/')}", SINGLE_FILE)
        layer = lora_layers(unet)[path.removeprefix("unet.").removesuffix(".weight")]
        check(layer.base.weight, key, atol=1e-6)

    remove(unet)
    remove(text_encoder)
    assert torch.equal(text_encoder(ids), base_outputs[0])
    assert torch.equal(unet(x, t, reference["ctx_base_cs1"]), base_outputs[1])


def train_three_steps(unet, text_encoder, weight_decay=0.01):
    """Eq. 2's A and B by AdamW on the noise prediction error, as sd-scripts does it; losses, norms,
    first gradients."""
    batches = load_file(REFERENCE / "train_batches.safetensors")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = (1 - betas).cumprod(0)
    groups = [
        {"params": lora_parameters(text_encoder), "lr": 5e-5},
        {"params": lora_parameters(unet), "lr": 1e-4},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
    losses, norms, gradients = [], [], {}
    for i in range(3):
        latents, noise, t, ids = (
            batches[f"{part}_{i}"] for part in ("latents", "noise", "t", "ids")
        )
        abar = alphas_cumprod[t]
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        loss = (unet(noisy, t, text_encoder(ids)) - noise).square().mean()
        loss.backward()
        norms.append(
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        )
        losses.append(loss.detach())
        if i == 0:
            for prefix, model in (("lora_unet", unet), ("lora_te", text_encoder)):
                for path, layer in lora_layers(model).items():
                    name = f"{prefix}_{path}".replace(".", "_")
                    gradients[f"grad0/{name}.lora_up.weight"] = layer.B.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, gradients


def distance_from_reference(path):
    """norm(final - reference) / norm(reference - start), per network and matrix, of the file at
    `path`."""
    final, reference, start = (
        load_file(file)
        for file in (
            path,
            REFERENCE / "train_final_cs1.safetensors",
            REFERENCE / "train_init_r4a2.safetensors",
        )
    )
    assert final.keys() == reference.keys()

    def difference(a, b, *marks):
        return torch.cat(
            [(a[key] - b[key]).flatten() for key in a if all(mark in key for mark in marks)]
        ).norm()

    return {
        marks: (difference(final, reference, *marks) / difference(reference, start, *marks)).item()
        for marks in (
            (network, matrix)
            for network in ("lora_unet", "lora_te")
            for matrix in ("lora_down", "lora_up")
        )
    }


def test_three_training_steps_are_sd_scripts_steps(networks, tmp_path):
    unet, text_encoder = networks
    models = {"lora_unet": unet, "lora_te": text_encoder}
    load_lora(REFERENCE / "train_init_r4a2.safetensors", models)
    losses, norms, gradients = train_three_steps(unet, text_encoder)

    reference = load_file(REFERENCE / "ref_train_cs1.safetensors")
    for i in range(3):
        torch.testing.assert_close(losses[i], reference[f"loss_{i}"].squeeze(), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            norms[i], reference[f"gradnorm_{i}"].squeeze(), rtol=1e-5, atol=0
        )
    stored = {key for key in reference if key.startswith("grad0/")}
    assert len(stored) == 17
    for key in stored:
        torch.testing.assert_close(
            gradients[key], reference[key].view_as(gradients[key]), rtol=1e-3, atol=1e-7
        )

    # Adam amplifies rounding in gradients near zero; measured 3e-5, and a forgotten weight decay is
    # 1.7e-3
    save_lora(tmp_path / "final.safetensors", models, dtype=torch.float32)
    for marks, distance in distance_from_reference(tmp_path / "final.safetensors").items():
        assert distance < 5e-4, marks


def test_the_reference_steps_have_weight_decay(networks, tmp_path):
    models = dict(zip(("lora_unet", "lora_te"), networks))
    load_lora(REFERENCE / "train_init_r4a2.safetensors", models)
    train_three_steps(*networks, weight_decay=0.0)
    save_lora(tmp_path / "final.safetensors", models, dtype=torch.float32)
    assert distance_from_reference(tmp_path / "final.safetensors")["lora_unet", "lora_down"] > 1e-3


def test_injected_layers_are_the_ones_that_sd_scripts_trains(networks, tmp_path):
    unet, text_encoder = networks
    inject(unet, 4, 2, "transformer", init="kaiming")
    inject(text_encoder, 4, 2, "text-encoder", init="kaiming")
    save_lora(
        tmp_path / "ours.safetensors",
        {"lora_unet": unet, "lora_te": text_encoder},
        dtype=torch.float32,
    )
    ours, theirs = (
        load_file(tmp_path / "ours.safetensors"),
        load_file(REFERENCE / "train_init_r4a2.safetensors"),
    )
    assert {key: tensor.shape for key, tensor in ours.items()} == {
        key: tensor.shape for key, tensor in theirs.items()
    }
    # the same law of A: uniform within 1 / sqrt(in), B = 0
    for key, tensor in ours.items():
        if key.endswith("lora_up.weight"):
            assert not tensor.any() and not theirs[key].any()
        if key.endswith("lora_down.weight"):
            bound = tensor.shape[1] ** -0.5
            assert tensor.abs().max() <= bound and theirs[key].abs().max() <= bound

"""LoRA as other tools compute it: their files, their merges, their training; made and described by
tests/references/make_lora.py."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm.text import TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from lora import inject, load_loras, lora_layers, lora_parameters, save_lora
from lora.training import make_optimizer
from samplers import NoiseSchedule

HERE = Path(__file__).parents[1] / "references" / "lora"
SIZES = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "cross_attention_dim": 8}
TEXT = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 12}


def stored(name):
    return load_file(HERE / f"{name}.safetensors")


@pytest.fixture(scope="module")
def base():
    unet = UNet(UNetConfig(**SIZES, num_heads=(2, 2, 2, 2))).eval()
    text_encoder, weights = TextEncoder(TextConfig(**TEXT)).eval(), stored("base")
    for name, network in {"unet.": unet, "text_encoder.": text_encoder}.items():
        own = [key for key in weights if key.startswith(name)]
        network.load_state_dict({key.removeprefix(name): weights[key].float() for key in own})
    return {"lora_unet": unet, "lora_te": text_encoder}


@pytest.fixture
def models(base):
    return copy.deepcopy(base)


@pytest.mark.parametrize("strength", [-0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("kohya", {(4, 2): 204}),
        ("lora_down", {(4, 4): 140}),
        ("lora_AB", {(4, 8): 112, (2, 6 * 2**0.5): 16, (4, 2): 12}),  # rslora: alpha sqrt(r)
        ("peft_folder", {(4, 4): 112, (2, 6): 16}),
        ("attn_procs", {(4, 4): 128}),
    ],
)
def test_a_file_of_another_tool_gives_that_tools_outputs(models, name, ranks, strength):
    path = HERE / name if name == "peft_folder" else HERE / f"{name}.safetensors"
    (file,) = load_loras([(path, strength)], models)
    found = [(len(pair.down), pytest.approx(pair.alpha)) for pair in file.pairs.values()]
    assert {pair: found.count(pair) for pair in ranks} == ranks
    inputs, expected = stored("inputs"), stored("outputs")
    with torch.no_grad():
        context = models["lora_te"](inputs["ids"])
        eps = models["lora_unet"](inputs["x"], inputs["t"], context.expand(2, -1, -1))
    for what, output in {"context": context, "eps": eps}.items():  # a LoRA changes eps by 0.3
        assert torch.allclose(output, expected[f"{name}.{strength}.{what}"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["default_r4a2_fp32", "noalpha_r8_fp16", "unetonly_r4a1_bf16"])
def test_weights_are_merged_as_sd_scripts_merges_them(name):
    with torch.device("meta"):
        unet = UNet(UNetConfig(block_out_channels=(32, 64, 128, 128), cross_attention_dim=64))
    weights = stored("sd_scripts_merged")
    paths = [key.removeprefix("base.") for key in weights if key.startswith("base.")]
    for path in paths:
        unet.get_submodule(path).weight = nn.Parameter(weights[f"base.{path}"].float())
    load_loras([(HERE / f"sd_scripts_{name}.safetensors", 1.0)], {"lora_unet": unet})
    for path in paths:
        merged = unet.get_submodule(path).weight
        torch.testing.assert_close(merged, weights[f"{name}.{path}"], atol=1e-6, rtol=0)


def test_three_training_steps_are_peers_steps(models, tmp_path):
    """The same layers, losses, norms of the gradient and, by AdamW, the same A and B."""
    start, end, reference = map(stored, ("train_start", "train_end", "train"))
    for (prefix, model), target in zip(models.items(), ("transformer", "text-encoder")):
        inject(model, 4, 2, target)
        for path, layer in lora_layers(model).items():
            name = f"{prefix}_{path}".replace(".", "_")
            layer.A.weight.data.copy_(start[f"{name}.lora_down.weight"])
    groups = [
        {"params": lora_parameters(model), "lr": lr}
        for model, lr in zip(models.values(), (1e-4, 5e-5))
    ]
    optimizer, ids = make_optimizer(groups, 0.01, eight_bit=False), stored("inputs")["ids"]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for step in range(3):
        x, noise, t = (reference[f"{part}_{step}"] for part in ("x", "noise", "t"))
        x_t = NoiseSchedule().add_noise(x, noise, t)
        prediction = models["lora_unet"](x_t, t, models["lora_te"](ids))
        loss = (prediction - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
        for what, value in {"loss": loss.detach(), "norm": norm}.items():
            torch.testing.assert_close(value, reference[f"{what}_{step}"], rtol=1e-5, atol=0)

    save_lora(tmp_path / "ours", models, dtype=torch.float32)
    ours = load_file(tmp_path / "ours")
    assert {k: w.shape for k, w in ours.items()} == {k: w.shape for k, w in end.items()}
    away, way = (
        torch.cat([(a[key] - b[key]).flatten() for key in end]).norm()
        for a, b in ((ours, end), (start, end))
    )
    assert away < 2e-4 * way  # without weight decay it is 2e-3

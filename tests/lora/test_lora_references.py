"""LoRA as other tools compute it: their files, their merges, their training; made and described by
tests/references/make_lora.py."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from shorthand import REFERENCES, ROOT, agree
from torch import nn

from ldm.checkpoints.keys import SINGLE_FILE, rename
from ldm.text import TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from lora import inject, load_loras, lora_layers, lora_parameters, save_lora
from lora.files.formats import kohya_name
from lora.training import make_optimizer
from samplers import NoiseSchedule

HERE = REFERENCES / "lora"
LARGE = ROOT.parent / "shared" / "reference" / "lora"
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
    "name, ranks",
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
        agree(merged, weights[f"{name}.{path}"], 1e-6)


def three_steps(models, start, batches, clip):
    """Loss and norm of the gradient of each step, from A as `start` has it; lr as kohya's."""
    for (prefix, model), target in zip(models.items(), ("transformer", "text-encoder")):
        inject(model, 4, 2, target)
        for path, layer in lora_layers(model).items():
            A = start[f"{kohya_name(prefix, path)}.lora_down.weight"]
            layer.A.weight.data.copy_(A.view_as(layer.A.weight))
    groups = [
        {"params": lora_parameters(model), "lr": lr}
        for model, lr in zip(models.values(), (1e-4, 5e-5))
    ]
    optimizer, schedule = make_optimizer(groups, 0.01, False), NoiseSchedule()
    parameters = [parameter for group in groups for parameter in group["params"]]
    for x, noise, t, ids in batches:
        x_t = schedule.add_noise(x, noise, t)
        prediction = models["lora_unet"](x_t, t, models["lora_te"](ids))
        loss = (prediction - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        yield loss.detach(), norm


def share_of_the_way(models, start, end, path):
    """How far the LoRA is from where the peer's ended, as a share of the way it went."""
    save_lora(path, models, dtype=torch.float32)
    ours = load_file(path)
    assert {k: w.shape for k, w in ours.items()} == {k: w.shape for k, w in end.items()}
    away, way = (
        torch.cat([(a[key] - b[key]).flatten() for key in end]).norm()
        for a, b in ((ours, end), (start, end))
    )
    return away / way


def test_three_training_steps_are_peers_steps(models, tmp_path):
    """The same layers, losses, norms of the gradient and, by AdamW, the same A and B."""
    start, end, reference = map(stored, ("train_start", "train_end", "train"))
    ids = stored("inputs")["ids"]
    batches = [[*(reference[f"{part}_{n}"] for part in ("x", "noise", "t")), ids] for n in range(3)]
    for step, found in enumerate(three_steps(models, start, batches, clip=0.05)):
        for what, value in zip(("loss", "norm"), found):
            agree(value, reference[f"{what}_{step}"], 0, 1e-5)
    # without weight decay it is 1e-3
    assert share_of_the_way(models, start, end, tmp_path / "ours") < 2e-4


@pytest.mark.slow
@pytest.mark.skipif(not LARGE.is_dir(), reason=f"no {LARGE}: 22 MB, too much for the repository")
def test_three_training_steps_are_those_of_sd_scripts_own_code(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    sizes |= {"vocab_size": 1000, "num_attention_heads": 4}
    unet = UNet(UNetConfig(block_out_channels=(32, 64, 128, 128), cross_attention_dim=64))
    models = {"lora_unet": unet, "lora_te": TextEncoder(TextConfig(**sizes))}
    names, weights = {"unet": unet, "text_encoder": models["lora_te"]}, {}
    for key, tensor in load_file(LARGE / "base_small.safetensors").items():
        network, _, parameter = (rename(key, SINGLE_FILE) or "").partition(".")
        weights.setdefault(network, {})[parameter] = tensor.float()
    for name, network in names.items():
        network.load_state_dict(weights[name])
    files = ("train_init_r4a2", "train_final_cs1", "ref_train_cs1", "train_batches")
    start, end, reference, batches = (load_file(LARGE / f"{name}.safetensors") for name in files)
    parts = ("latents", "noise", "t", "ids")
    steps = [[batches[f"{part}_{n}"] for part in parts] for n in range(3)]
    for step, (loss, norm) in enumerate(three_steps(models, start, steps, clip=1.0)):
        agree(loss, reference[f"loss_{step}"], 0, 1e-6)
        agree(norm, reference[f"gradnorm_{step}"], 0, 1e-5)
    assert share_of_the_way(models, start, end, tmp_path / "ours") < 5e-4

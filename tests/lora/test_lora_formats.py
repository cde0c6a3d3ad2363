"""Layouts of LoRA files: the peers' files give their stored outputs, several at once, conversion,
live diffusers."""

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.checkpoints.keys import SINGLE_FILE, rename
from ldm.text import TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from lora import (
    LoRAError,
    convert,
    inject,
    load_lora,
    lora_layers,
    merge,
    remove,
    save_lora,
    set_strength,
)
from lora.files.__main__ import main
from lora.files.formats import dotted, kohya_name, read

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "lora"
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason=f"no reference files at {REFERENCE}"
)

FILES = {
    "kohya_default_r4a2_fp32": (192, 24, {(4, 2.0): 216}),
    "kohya_noalpha_r8_fp16": (192, 24, {(8, 8.0): 216}),
    "kohya_unetonly_r4a1_bf16": (192, 0, {(4, 1.0): 192}),
    "diffusers_loradown_r4": (128, 0, {(4, 4.0): 128}),
    "diffusers_loraAB_meta_r4a8": (128, 16, {(4, 8.0): 128, (4, 2.0): 16}),
    "attnprocs17_noprefix_r4": (128, 0, {(4, 4.0): 128}),
    "peft_adapter_dir": (64, 0, {(4, 4.0): 48, (8, 2.0): 16}),
}
"""File -> layers of the U-Net and of the text encoder, and (rank, alpha) with its number of
layers."""


def path_of(name):
    folder = REFERENCE / name
    return folder if folder.is_dir() else REFERENCE / f"{name}.safetensors"


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


@pytest.fixture(scope="module")
def base():
    """The small base in float32, without a LoRA."""
    sizes = dict(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    unet = UNet(UNetConfig(block_out_channels=(32, 64, 128, 128), cross_attention_dim=64))
    networks = {"unet": unet, "vae": None, "text_encoder": TextEncoder(TextConfig(**sizes))}
    weights = {name: {} for name in networks}
    for key, tensor in load_file(REFERENCE / "base_small.safetensors").items():
        if name := rename(key, SINGLE_FILE):
            network, _, parameter = name.partition(".")
            weights[network][parameter] = tensor.float()
    for name in ("unet", "text_encoder"):
        networks[name].load_state_dict(weights[name])
    return {"lora_unet": unet.eval(), "lora_te": networks["text_encoder"].eval()}


@pytest.fixture
def small(base):
    yield base
    for model in base.values():
        remove(model)


def close(output, expected):
    torch.testing.assert_close(output, expected, atol=5e-5, rtol=0)


@needs_reference
# see test_lora_training.py
@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("kohya")])
def test_a_peers_file_gives_its_stored_outputs_within_5e5(small, name):
    inputs, expected = (
        load_file(REFERENCE / "inputs.safetensors"),
        load_file(REFERENCE / f"ref_{name}.safetensors"),
    )
    unet, text_encoder = small.values()
    summary = load_lora(path_of(name), small)
    assert (*summary.layers.values(), summary.ranks) == FILES[name]
    compared = 0
    with torch.no_grad():
        for suffix, strength in {"m1": 1.0, "m05": 0.5, "mneg1": -1.0}.items():
            if f"eps_unetonly_{suffix}" not in expected:
                continue
            for model in small.values():
                set_strength(model, strength)
            close(
                unet(inputs["x"], inputs["t"], expected["ctx_base_cs1"]),
                expected[f"eps_unetonly_{suffix}"],
            )
            compared += 1
            if f"ctx_lora_cs1_{suffix}" in expected:
                context = text_encoder(inputs["input_ids"])
                close(context, expected[f"ctx_lora_cs1_{suffix}"])
                close(unet(inputs["x"], inputs["t"], context), expected[f"eps_full_{suffix}"])
        set_strength(unet, 0)
        eps = unet(inputs["x"], inputs["t"], expected["ctx_base_cs1"])
        remove(unet)
        assert torch.equal(unet(inputs["x"], inputs["t"], expected["ctx_base_cs1"]), eps)
    assert compared >= 2


@needs_reference
def test_files_of_several_layouts_add_up_in_any_order_and_one_can_be_removed(small):
    inputs = load_file(REFERENCE / "inputs.safetensors")
    names = ["kohya_default_r4a2_fp32", "diffusers_loraAB_meta_r4a8", "peft_adapter_dir"]

    def output():
        with torch.no_grad():
            return small["lora_unet"](
                inputs["x"], inputs["t"], small["lora_te"](inputs["input_ids"])
            )

    def load_all(*names):
        for model in small.values():
            remove(model)
        for name in names:
            load_lora(path_of(name), small, name)
        set_strength(small["lora_unet"], -0.5, names[0])

    load_all(*names)
    together = output()
    for model in small.values():
        merge(model)
    torch.testing.assert_close(output(), together, atol=2e-5, rtol=0)
    load_all(names[0], names[2], names[1])
    assert torch.equal(output(), together)
    remove(small["lora_unet"], names[1])
    remove(small["lora_te"], names[1])
    without = output()
    load_all(names[0], names[2])
    assert torch.equal(output(), without) and (without - together).abs().max() > 0.1


# ours and diffusers' alike
LEVEL = dict(block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=12)
TEXT = dict(
    vocab_size=20, hidden_size=12, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
)


@pytest.fixture
def models():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**LEVEL, attention=(True, False), num_heads=(4, 4)))
    return {"lora_unet": unet, "lora_te": TextEncoder(TextConfig(**TEXT))}


def train(models, *targets):
    """LoRAs with B as if trained. targets: (prefix, rank, alpha, target)"""
    for prefix, rank, alpha, target in targets:
        inject(models[prefix], rank, alpha, target)
    for model in models.values():
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.B, std=0.3)
    return models


@pytest.fixture
def trained(models):
    return train(
        copy.deepcopy(models), ("lora_unet", 4, 2, "transformer"), ("lora_te", 2, 2, "text-encoder")
    )


def outputs(models):
    latents, context = (
        torch.linspace(-1, 1, 64).view(1, 4, 4, 4),
        torch.linspace(-2, 2, 36).view(1, 3, 12),
    )
    with torch.no_grad():
        return models["lora_unet"](latents, torch.tensor([10]), context), models["lora_te"](
            torch.tensor([[1, 5, 9]])
        )


def test_a_file_in_pefts_layout_has_diffusers_keys_and_configuration(models, tmp_path):
    attn2 = r".*mid_block.*attn2\.to_[qk]"
    targets = [
        ("lora_unet", 4, 4, attn2),
        ("lora_unet", 2, 4, r".*mid_block.*proj_in"),
        ("lora_te", 2, 2, r".*fc1"),
    ]
    train(models, *targets)
    save_lora(tmp_path / "a.safetensors", models, {"ss_v2": False}, torch.float32, layout="peft")
    tensors = load_file(tmp_path / "a.safetensors")
    block = "mid_block.attentions.0"
    to_q, to_k = (f"{block}.transformer_blocks.0.attn2.to_{x}" for x in "qk")
    shapes = {
        f"unet.{block}.proj_in": ((2, 64, 1, 1), (64, 2, 1, 1)),
        f"unet.{to_q}": ((4, 64), (64, 4)),
        f"unet.{to_k}": ((4, 12), (64, 4)),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": ((2, 12), (24, 2)),
    }
    assert len(tensors) == 8
    for name, (A, B) in shapes.items():
        assert (
            tensors[f"{name}.lora_A.weight"].shape == A
            and tensors[f"{name}.lora_B.weight"].shape == B
        )
    layer = lora_layers(models["lora_unet"])[f"{block}.proj_in"]
    assert torch.equal(tensors[f"unet.{block}.proj_in.lora_B.weight"].flatten(1), 2 * layer.B)
    with safe_open(tmp_path / "a.safetensors", "pt") as stored:
        metadata = stored.metadata()
    assert metadata["format"] == "pt" and metadata["ss_v2"] == "False"
    assert json.loads(metadata["lora_adapter_metadata"]) == {
        "unet.r": 4,
        "unet.lora_alpha": 4,
        "unet.rank_pattern": {f"{block}.proj_in": 2},
        "unet.alpha_pattern": {f"{block}.proj_in": 2},
        "unet.target_modules": [f"{block}.proj_in", to_k, to_q],
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 2,
        "text_encoder.rank_pattern": {},
        "text_encoder.alpha_pattern": {},
        "text_encoder.target_modules": ["encoder.layers.0.mlp.fc1"],
    }


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_a_saved_file_is_the_same_bytes_and_loads_to_the_same_output(models, tmp_path, layout):
    trained = train(
        copy.deepcopy(models), ("lora_unet", 4, 2, "locon"), ("lora_te", 2, 2, "text-encoder")
    )
    for name in ("a", "b"):
        save_lora(tmp_path / name, trained, {"z": 1, "a": 2}, torch.float32, layout)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    load_lora(tmp_path / "a", models)
    for ours, expected in zip(outputs(models), outputs(trained)):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def laid_out(tensors, layout):
    """A kohya file's tensors as other writers lay them out, alpha left out."""
    renamed = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        prefix, _, path = dotted(name).partition(".")
        if part != "alpha":
            renamed[
                layout(
                    "unet" if prefix == "lora_unet" else "text_encoder",
                    path,
                    part.split(".")[0][5:],
                )
            ] = tensor
    return renamed


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.float64]
)
def test_an_alpha_of_any_type_is_a_number(tmp_path, dtype):
    tensors = {
        "lora_unet_x.lora_down.weight": torch.ones(4, 8),
        "lora_unet_x.lora_up.weight": torch.ones(8, 4),
    }
    save_file(tensors | {"lora_unet_x.alpha": torch.tensor(2.0).to(dtype)}, tmp_path / "a")
    assert read(tmp_path / "a").pairs["lora_unet_x"].alpha == 2.0
    tensors["lora_unet_x.lora_up.weight"] = tensors["lora_unet_x.lora_up.weight"].to(dtype)
    save_file(tensors, tmp_path / "a")
    with pytest.raises(
        LoRAError, match=r"weights of torch\..*: convert the file to float16, bfloat16 or float32"
    ):
        read(tmp_path / "a")


def test_an_alpha_beside_pefts_matrices_counts(tmp_path):
    key = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{key}.lora_A.weight": torch.ones(4, 8), f"{key}.lora_B.weight": torch.ones(8, 4)}
    save_file(tensors | {f"{key}.alpha": torch.tensor(2.0)}, tmp_path / "a")
    assert read(tmp_path / "a").pairs["lora_unet_mid_block_attentions_0_proj_in"].alpha == 2.0


def attention_processors(network, path, part):
    if network == "unet":
        head, _, layer = path.replace(".to_out.0", ".to_out").rpartition(".")
        return f"unet.{head}.processor.{layer}_lora.{part}.weight"
    head, _, layer = path.rpartition(".")
    return f"text_encoder.{head}.to_{layer.removesuffix('_proj')}_lora.{part}.weight"


LAYOUTS = {
    "lora.down and lora_linear_layer": lambda network, path, part: (
        f"{network}.{path}.{'lora' if network == 'unet' else 'lora_linear_layer'}.{part}.weight"
    ),
    "lora_A without text_model": lambda network, path, part: (
        f"{network}.{path.removeprefix('text_model.')}.lora_{'A' if part == 'down' else 'B'}.weight"
    ),
    "attention processors": attention_processors,
    "kohya's with dots": lambda network, path, part: (
        f"lora_{'unet' if network == 'unet' else 'te'}.{path}.lora_{part}.weight"
    ),
    "kohya's parts on diffusers' paths": lambda network, path, part: (
        f"{network}.{path}.lora_{part}.weight"
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_layouts_are_read_in_both_networks(models, tmp_path, layout):
    trained = train(
        copy.deepcopy(models),
        ("lora_unet", 4, 4, "attention"),
        ("lora_te", 2, 2, r".*self_attn\.(.|out)_proj"),
    )
    save_lora(tmp_path / "kohya", trained, dtype=torch.float32)
    save_file(laid_out(load_file(tmp_path / "kohya"), LAYOUTS[layout]), tmp_path / "other")
    assert load_lora(tmp_path / "other", models).layers == {"lora_unet": 32, "lora_te": 4}
    assert all(torch.equal(a, b) for a, b in zip(outputs(models), outputs(trained)))


def test_compvis_names_of_blocks_are_sd_15s(tmp_path):
    with torch.device("meta"):
        unet = UNet()
    blocks = [f"input_blocks_{i}_1" for i in (1, 2, 4, 5, 7, 8)] + ["middle_block_1"]
    blocks += [f"output_blocks_{i}_1" for i in range(3, 12)]
    expected = [
        kohya_name("lora_unet", path) for path in inject(unet, 1, 1, r".*attentions\.\d\.proj_in")
    ]
    for block, name in zip(blocks, expected, strict=True):
        tensors = {
            f"lora_unet_{block}_proj_in.lora_{part}.weight": torch.ones(1, 1)
            for part in ("down", "up")
        }
        save_file(tensors, tmp_path / "a")
        assert list(read(tmp_path / "a").pairs) == [name]


def test_a_name_without_dots_gets_sd_15s_dots_back():
    with torch.device("meta"):
        unet, text_encoder = (
            UNet(),
            TextEncoder(TextConfig(vocab_size=10, hidden_size=24, intermediate_size=96)),
        )
    paths = [
        f"lora_unet.{path}"
        for path in inject(unet, 1, 1, r".*(attentions.*|time_emb_proj|linear_\d)")
    ]
    paths += [f"lora_te.{path}" for path in inject(text_encoder, 1, 1, "text-encoder")]
    assert len(paths) > 264 and [dotted(path.replace(".", "_")) for path in paths] == paths
    assert dotted("lora_unet_mid_block_x") is None and dotted("lora_other_ff") is None


@needs_reference
@pytest.mark.parametrize("name", FILES)
def test_conversion_needs_no_model_and_comes_back_equal(tmp_path, name):
    for layout in ("kohya", "peft", "back"):
        source = {"kohya": path_of(name), "peft": tmp_path / "kohya", "back": tmp_path / "peft"}[
            layout
        ]
        convert(source, tmp_path / layout, "peft" if layout == "peft" else "kohya")
    original, kohya, back = (
        read(path) for path in (path_of(name), tmp_path / "kohya", tmp_path / "back")
    )
    assert original.pairs.keys() == kohya.pairs.keys() == back.pairs.keys() and len(back.pairs) > 60
    for layer, (down, up, alpha) in original.pairs.items():
        assert kohya.pairs[layer].alpha == alpha and torch.equal(kohya.pairs[layer].down, down)
        there = alpha / len(down) * (up.flatten(1).double() @ down.flatten(1).double())
        pair = back.pairs[layer]
        assert pair.alpha == len(down)
        torch.testing.assert_close(
            pair.up.flatten(1).double() @ pair.down.flatten(1).double(), there, atol=1e-6, rtol=0
        )
    if all(pair.alpha == len(pair.down) for pair in original.pairs.values()):
        assert (tmp_path / "back").read_bytes() == (tmp_path / "kohya").read_bytes()
        for layer, (down, up, _) in original.pairs.items():
            assert torch.equal(back.pairs[layer].down, down) and torch.equal(
                back.pairs[layer].up, up
            )


def test_half_precision_files_are_converted_without_rounding_where_alpha_is_not_the_rank(
    models, tmp_path
):
    save_lora(
        tmp_path / "in", train(models, ("lora_unet", 4, 3, "cross-attention")), dtype=torch.float16
    )
    convert(tmp_path / "in", tmp_path / "peft", "peft")
    convert(tmp_path / "peft", tmp_path / "out", "kohya")
    before, after = read(tmp_path / "in").pairs, read(tmp_path / "out").pairs
    for name, (down, up, alpha) in before.items():
        expected = alpha / 4 * (up.double() @ down.double())
        torch.testing.assert_close(
            after[name].up.double() @ after[name].down.double(), expected, atol=1e-6, rtol=0
        )


def test_kohyas_metadata_go_along_and_name_the_base_where_they_lack_it(tmp_path):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 1024),
        f"{name}.lora_up.weight": torch.ones(3, 2),
    }
    save_file(tensors, tmp_path / "in", {"ss_output_name": "fetal", "sshs_model_hash": "stale"})
    convert(tmp_path / "in", tmp_path / "peft", "peft")
    convert(tmp_path / "peft", tmp_path / "out", "kohya")
    metadata = read(tmp_path / "out").metadata
    assert metadata["ss_output_name"] == "fetal" and metadata["sshs_model_hash"] != "stale"
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == ("sd_v2", "True")
    assert "lora_adapter_metadata" not in metadata  # diffusers refuses it beside alphas


@pytest.mark.parametrize(
    ("rslora", "expected"), [(False, [3.0, 8.0]), (True, [3 * 2**0.5, 8 * 2**0.5])]
)
def test_alpha_is_read_from_pefts_patterns_and_scaled_by_rslora(tmp_path, rslora, expected):
    paths = [f"unet.mid_block.attentions.0.transformer_blocks.0.attn{i}.to_k" for i in (1, 2)]
    config = {
        "unet.r": 2,
        "unet.lora_alpha": 8,
        "unet.alpha_pattern": {"attn1.to_k": 3},
        "unet.use_rslora": rslora,
    }
    tensors = {f"{path}.lora_{x}.weight": torch.ones(2, 2) for path in paths for x in "AB"}
    save_file(tensors, tmp_path / "a", {"lora_adapter_metadata": json.dumps(config)})
    assert [pair.alpha for pair in read(tmp_path / "a").pairs.values()] == pytest.approx(expected)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_whose_initialisation_left_the_base_as_it_was_is_read(tmp_path, init):
    tensors = {
        f"unet.mid_block.attentions.0.proj_in.lora_{part}.weight": torch.ones(2, 2) for part in "AB"
    }
    save_file(
        tensors,
        tmp_path / "a",
        {"lora_adapter_metadata": json.dumps({"unet.init_lora_weights": init})},
    )
    assert len(read(tmp_path / "a").pairs) == 1


PATH = "unet.mid_block.attentions.0.proj_in"


@pytest.mark.parametrize(
    ("key", "metadata", "message"),
    [
        (PATH, '{"unet.use_dora": true}', r"a DoRA \(use_dora\)"),
        (
            PATH,
            '{"unet.init_lora_weights": "pissa"}',
            "weights that init_lora_weights 'pissa' changed",
        ),
        (
            PATH,
            '{"unet.init_lora_weights": "pissa_niter_16"}',
            "init_lora_weights 'pissa_niter_16' changed",
        ),
        (
            PATH,
            '{"unet.init_lora_weights": "corda"}',
            "weights that init_lora_weights 'corda' changed",
        ),
        (PATH, '{"init_lora_weights": "olora"}', "weights that init_lora_weights 'olora' changed"),
        (
            PATH,
            '{"unet.init_lora_weights": "loftq"}',
            "weights that init_lora_weights 'loftq' changed",
        ),
        (
            PATH,
            '{"unet.init_lora_weights": "lora_ga"}',
            "weights that init_lora_weights 'lora_ga' changed",
        ),
        (
            PATH,
            '{"unet.init_lora_weights": "next_year"}',
            "weights that init_lora_weights 'next_year' changed",
        ),
        (PATH, "[1, 2]", "not a JSON object"),
        (PATH, "{", "not a JSON object"),
        (PATH, '{"unet.lora_alpha": "x"}', "no readable alpha"),
        (PATH, '{"unet.lora_alpha": -1}', "alpha -1.0: it must be a positive number"),
        (PATH, '{"unet.alpha_pattern": {"(": 1}}', "no readable alpha"),
        (
            "base_model.model.mid_block.attentions.0.proj_in",
            "{}",
            "adapter_config.json: missing, it holds alpha",
        ),
        ("text_encoder_2.text_model.x", "{}", "SDXL"),
        (
            "diffusion_model.input_blocks.1.1.proj_in",
            "{}",
            r"in ComfyUI's names, .*use one for SD 1 or SD 2 in kohya's",
        ),
        ("transformer.single_transformer_blocks.0.attn.to_q", "{}", "for a diffusion transformer"),
        (
            "unet.nowhere",
            "{}",
            "2 of 2 keys have no place in lora_unet, lora_te, such as unet.nowhere.lora_A.weight",
        ),
    ],
)
def test_what_pefts_layout_cannot_say_is_refused_and_changes_nothing(
    models, tmp_path, key, metadata, message
):
    weights = copy.deepcopy([model.state_dict() for model in models.values()])
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 64), f"{key}.lora_B.weight": torch.ones(64, 2)}
    save_file(tensors, tmp_path / "a", {"lora_adapter_metadata": metadata})
    with pytest.raises(LoRAError, match=message) as error:
        load_lora(tmp_path / "a", models)
    assert "\n" not in str(error.value)
    for model, before in zip(models.values(), weights):
        assert same_bits(model.state_dict(), before)


def test_a_second_lora_needs_a_name_and_is_refused_beside_a_merged_one_or_in_a_file(
    models, trained, tmp_path
):
    save_lora(tmp_path / "a", trained, dtype=torch.float32)
    with pytest.raises(LoRAError, match="named 'lora' already"):
        load_lora(tmp_path / "a", trained)
    load_lora(tmp_path / "a", trained, "second")
    with pytest.raises(LoRAError, match=r"several LoRAs \(lora, second\): remove all but one"):
        save_lora(tmp_path / "b", trained)
    assert not (tmp_path / "b").exists()
    load_lora(tmp_path / "a", models)
    merge(models["lora_te"])
    with pytest.raises(LoRAError, match="the lora_te model's LoRA is merged: unmerge first"):
        load_lora(tmp_path / "a", models, "second")
    assert all(len(layer.loras) == 1 for layer in lora_layers(models["lora_unet"]).values())


def test_the_command_converts_and_says_nothing(trained, tmp_path, monkeypatch, capsys):
    save_lora(tmp_path / "a.safetensors", trained)
    command = [
        "lora.files",
        str(tmp_path / "a.safetensors"),
        str(tmp_path / "b.safetensors"),
        "--to",
        "peft",
    ]
    monkeypatch.setattr(sys, "argv", command)
    # as in a process of its own, which has not imported it
    monkeypatch.delitem(sys.modules, "lora.files.__main__")
    runpy.run_module("lora.files", run_name="__main__")
    assert capsys.readouterr() == ("", "")
    assert len(load_file(tmp_path / "b.safetensors")) == 2 * 54


@pytest.mark.parametrize(
    ("name", "out", "message"),
    [
        ("lora_unet_mid_block_x", "out", "lora_unet_mid_block_x is no layer of Stable Diffusion"),
        ("lora_other_mid_block", "out", "lora_other_mid_block is no layer"),
        ("lora_unet_mid_block_attentions_0_proj_in", "no/out", "its folder does not exist"),
        (None, "out", "no such file"),
    ],
)
def test_a_failed_conversion_is_one_line_exit_code_2_and_nothing_written(
    tmp_path, capsys, name, out, message
):
    if name:
        save_file(
            {f"{name}.lora_{part}.weight": torch.ones(2, 2) for part in ("down", "up")},
            tmp_path / "in",
        )
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "in"), str(tmp_path / out), "--to", "peft"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "target"), [("kohya", "transformer"), ("kohya", "locon"), ("peft", "locon")]
)
def test_live_diffusers_places_every_layer_and_gives_our_output(models, tmp_path, layout, target):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from transformers import CLIPTextConfig, CLIPTextModel

    # a rank for each network, and in PEFT's layout a second one, whose alpha diffusers misreads in
    # kohya's
    targets = [("lora_unet", 4, 2, target), ("lora_te", 2, 3, "text-encoder")]
    if layout == "peft":
        targets.append(("lora_unet", 3, 1, "conv_in|conv_out|time_embedding.*"))
    trained = train(copy.deepcopy(models), *targets)
    save_lora(tmp_path / "ours.safetensors", trained, dtype=torch.float32, layout=layout)

    unet = diffusers.UNet2DConditionModel(
        **LEVEL,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    unet.load_state_dict(models["lora_unet"].state_dict())
    text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT)).eval()
    level = "text_model." if hasattr(text_encoder, "text_model") else ""
    ours = {
        key.removeprefix("text_model."): tensor
        for key, tensor in models["lora_te"].state_dict().items()
    }
    text_encoder.load_state_dict({f"{level}{key}": tensor for key, tensor in ours.items()})
    pipe = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=text_encoder, tokenizer=None, unet=unet, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None,
    )  # fmt: skip
    pipe.load_lora_weights(tmp_path, weight_name="ours.safetensors", local_files_only=True)

    for model, prefix in ((unet, "lora_unet"), (text_encoder, "lora_te")):
        placed = {
            kohya_name(prefix, path)
            for path, module in model.named_modules()
            if hasattr(module, "lora_A")
        }
        assert placed == {kohya_name(prefix, path) for path in lora_layers(trained[prefix])}
    ids = torch.tensor([[1, 5, 9, 2]])
    latents, t = torch.randn(2, 4, 8, 8), torch.tensor([17, 801])
    with torch.no_grad():
        context = trained["lora_te"](ids)
        torch.testing.assert_close(context, text_encoder(ids).last_hidden_state, atol=1e-5, rtol=0)
        context = context.expand(2, -1, -1)
        eps = trained["lora_unet"](latents, t, context)
        torch.testing.assert_close(eps, unet(latents, t, context).sample, atol=1e-5, rtol=0)
        assert (eps - models["lora_unet"](latents, t, context)).abs().max() > 0.05

"""LoRA files: the layouts read to the same numbers, put into weights, written, converted; all that
is refused; diffusers as a second reader."""

import copy
import json
import pickle
import runpy
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from shorthand import agree, exits, refused

from ldm.text import TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from lora import LoRAError, convert, inject, load_loras, lora_layers, save_lora
from lora.files.__main__ import main, parse_args
from lora.files.formats import dotted, kohya_name, read
from lora.files.metadata import metadata, trained_otherwise

# ours and diffusers' alike
SIZES = {"block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 12}
SIZES |= {"norm_num_groups": 4}
TEXT = {"vocab_size": 20, "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2}
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
TO_K, FLAT = f"{BLOCK}.attn2.to_k", "encoder.layers.0.self_attn.q_proj"
Q_PROJ = f"text_model.{FLAT}"
K, Q = (kohya_name(f"lora_{x}", path) for x, path in (("unet", TO_K), ("te", Q_PROJ)))
IN = "lora_unet_mid_block_attentions_0_proj_in"
DOWN, UP, ALPHA = f"{K}.lora_down.weight", f"{K}.lora_up.weight", f"{K}.alpha"
IN_DOWN, IN_UP = f"{IN}.lora_down.weight", f"{IN}.lora_up.weight"


@pytest.fixture
def models():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**SIZES, attention=(True, False), num_heads=(2, 2)))
    return {"lora_unet": unet, "lora_te": TextEncoder(TextConfig(**TEXT))}


def train(models, *targets):
    """Copies with LoRAs of (prefix, rank, alpha, target), and B as if trained."""
    models = copy.deepcopy(models)
    for prefix, rank, alpha, target in targets:
        inject(models[prefix], rank, alpha, target)
    for model in models.values():
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.B.weight, std=0.3)
    return models


@pytest.fixture
def trained(models):
    return train(models, ("lora_unet", 4, 2, "locon"), ("lora_te", 2, 3, "text-encoder"))


def weights_of(models):
    return [tensor.clone() for model in models.values() for tensor in model.state_dict().values()]


ones = torch.ones
GOOD = {DOWN: ones(4, 12), UP: ones(16, 4), ALPHA: torch.tensor(2.0)}
GOOD |= {IN_DOWN: ones(4, 16, 1, 1), IN_UP: ones(16, 4, 1, 1)}

# into weights


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_what_is_saved_and_loaded_is_w0_plus_alpha_by_r_b_a(models, trained, tmp_path, layout):
    save_lora(tmp_path / "a", trained, dtype=torch.float32, layout=layout)
    (file,) = load_loras([(tmp_path / "a", -0.7)], models)
    assert len(file.pairs) == 85 and file.dtype == torch.float32
    for prefix, model in trained.items():
        for path, layer in lora_layers(model).items():
            BA = layer.B.weight.flatten(1) @ layer.A.weight.flatten(1)
            W = layer.base.weight + -0.7 * layer.alpha / layer.rank * BA.view_as(layer.base.weight)
            loaded = models[prefix].get_submodule(path).weight
            agree(loaded, W, 1e-6)


def test_several_files_are_summed_in_float32_whatever_their_order(models, trained, tmp_path):
    models = {prefix: model.half() for prefix, model in models.items()}
    before, results = weights_of(models), []
    for name in "abc":
        save_lora(tmp_path / name, trained)
        torch.nn.init.normal_(next(iter(lora_layers(trained["lora_unet"]).values())).B.weight)
    strengths = {"a": 0.1, "b": 1.0, "c": -3.0}
    for order in ("abc", "cab", "bca"):
        loaded = copy.deepcopy(models)
        load_loras([(tmp_path / name, strengths[name]) for name in order], loaded)
        results.append(weights_of(loaded))
        assert all(map(torch.equal, results[0], results[-1]))
    assert not all(map(torch.equal, results[0], before))
    load_loras([(tmp_path / "a", 0), (tmp_path / "b", 0.0)], models)
    assert all(map(torch.equal, weights_of(models), before))


# layouts

LAYOUTS = {
    "kohya": (DOWN, f"{Q}.lora_down.weight"),
    "kohya, one of several encoders": (DOWN, f"{Q.replace('te', 'te1', 1)}.lora_down.weight"),
    "kohya, flat CLIP": (DOWN, f"{Q.replace('text_model_', '')}.lora_down.weight"),
    "with dots": (f"lora_unet.{TO_K}.lora_down.weight", f"lora_te.{Q_PROJ}.lora_down.weight"),
    "kohya's parts": (f"unet.{TO_K}.lora_down.weight", f"text_encoder.{Q_PROJ}.lora_down.weight"),
    "PEFT": (f"unet.{TO_K}.lora_A.weight", f"text_encoder.{FLAT}.lora_A.weight"),
    "one network's": (f"{TO_K}.lora_A.default.weight", f"{FLAT}.lora_A.default.weight"),
    "PEFT's folder": tuple(f"base_model.model.{path}.lora_A.weight" for path in (TO_K, Q_PROJ)),
    "diffusers": (
        f"unet.{TO_K}.lora.down.weight",
        f"text_encoder.{Q_PROJ}.lora_linear_layer.down.weight",
    ),
    "diffusers to 0.17": (
        f"{BLOCK}.attn2.processor.to_k_lora.down.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight",
    ),
}
"""Layout -> the keys of A of two layers."""


def write(path, layout, config):
    """A file or, if it is PEFT's, a folder."""
    path.mkdir()
    tensors = {}
    for n, key in enumerate(LAYOUTS[layout]):
        tensors[key] = n + ones(4, 12)
        tensors[key.replace("down", "up").replace("lora_A", "lora_B")] = n + ones(16, 4)
    said = {"lora_adapter_metadata": json.dumps(config)}
    save_file(tensors, path / "adapter_model.safetensors", said)
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_to_the_same_pairs(tmp_path, layout):
    pairs = read(write(tmp_path / "lora", layout, {})).pairs
    assert pairs.keys() == {K, Q}
    for n, name in enumerate((K, Q)):
        down, up, alpha = pairs[name]
        assert torch.equal(down, n + ones(4, 12)) and torch.equal(up, n + ones(16, 4))
        assert alpha == 4


@pytest.mark.parametrize(
    "config, alphas",
    [
        ({"unet.lora_alpha": 8, "text_encoder.lora_alpha": 2}, [8, 2]),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, [16, 4]),
        ({"lora_alpha": 8, "alpha_pattern": {"attn2.to_k": 3, "q_pro.": 1}}, [3, 1]),
        ({"lora_alpha": 8, "alpha_pattern": {"to_": 3}}, [8, 8]),
        ({"unet.init_lora_weights": "gaussian", "unet.lora_alpha": 1.5}, [1.5, 4]),
    ],
)
def test_alpha_is_read_from_pefts_configuration(tmp_path, config, alphas):
    pairs = read(write(tmp_path / "lora", "PEFT", config)).pairs
    assert [pairs[name].alpha for name in (K, Q)] == alphas


@pytest.mark.parametrize(
    "alpha, expected",
    [
        (None, 4),
        (torch.tensor(8), 8),
        (torch.tensor([1.5]), 1.5),
        (torch.tensor(2.0).to(torch.float8_e4m3fn), 2),
        (torch.tensor(0.0), 4),
    ],
    ids=str,
)
def test_alpha_may_be_of_any_type_and_where_it_is_absent_or_zero_is_the_rank(
    tmp_path, recwarn, alpha, expected
):
    tensors = {DOWN: ones(4, 12), UP: ones(16, 4)} | ({} if alpha is None else {ALPHA: alpha})
    save_file(tensors, tmp_path / "a")
    assert read(tmp_path / "a").pairs[K].alpha == expected
    told = [str(warning.message).partition(": ")[2] for warning in recwarn]
    zero = alpha is not None and expected == 4
    assert told == ["alpha 0 of 1 layers is read as their rank, as kohya does"] * zero


def test_matrices_without_a_convolutions_ones_are_read_alike(models, tmp_path):
    before = weights_of(models)
    save_file(GOOD, tmp_path / "a")
    flat = {key: tensor.flatten(1) if tensor.ndim else tensor for key, tensor in GOOD.items()}
    save_file(flat, tmp_path / "b")
    load_loras([(tmp_path / "a", 1.0), (tmp_path / "b", -1.0)], models)
    agree(weights_of(models), before, 1e-6)


def test_sd_15s_names_are_known_with_underscores_and_in_compvis_numbers(tmp_path):
    with torch.device("meta"):
        unet, text = UNet(), TextEncoder(TextConfig())
    paths = [f"lora_unet.{path}" for path in inject(unet, 1, 1, r".*(attentions|resnets).*|time.*")]
    paths += [f"lora_te.{path}" for path in inject(text, 1, 1, "text-encoder")]
    assert len(paths) == 346 and [dotted(path.replace(".", "_")) for path in paths] == paths
    assert dotted("lora_unet_mid_block_x") is None and dotted("lora_other_ff") is None

    blocks = [f"input_blocks_{n}_1" for n in (1, 2, 4, 5, 7, 8)] + ["middle_block_1"]
    blocks += [f"output_blocks_{n}_1" for n in range(3, 12)]
    names = [path.replace(".", "_") for path in paths if path.endswith("proj_in")]
    for block, name in zip(blocks, names, strict=True):
        key = f"lora_unet_{block}_proj_in.lora"
        save_file({f"{key}_{x}.weight": torch.ones(1, 1) for x in ("down", "up")}, tmp_path / "a")
        assert list(read(tmp_path / "a").pairs) == [name]


# what is refused


def peft(key):
    return {f"{key}.lora_A.weight": ones(2, 64), f"{key}.lora_B.weight": ones(64, 2)}


BAD = {
    "no up": ({UP: None}, rf"{K}: lora_up is missing"),
    "no down": ({DOWN: None}, rf"{K}: lora_down is missing"),
    "unknown layers": (
        {f"lora_unet_x{n}.lora_{x}.weight": ones(2, 2) for n in range(3) for x in ("down", "up")},
        r"6 of 11 keys have no place in lora_unet, lora_te, such as lora_unet_x0\.lora_down\.w"
        r"eight, .*, lora_unet_x2\.lora_down\.weight: pass the models",
    ),
    "unknown part": ({f"{K}.bias": ones(3)}, "1 of 6 keys have no place in a LoRA's layers.*bias"),
    "one layer twice": (
        {f"unet.{TO_K}.lora_A.weight": ones(4, 12)},
        "1 of 6 keys have no place in a LoRA's layers",
    ),
    "other width": (
        {DOWN: ones(4, 16)},
        r"lora_down \[4, 16\] and lora_up \[16, 4\] for a weight \[16, 12\]: made for another base "
        r"model \(its metadata says sd_v2\): load it into that one",
    ),
    "other rank": ({UP: ones(16, 3)}, r"lora_up \[16, 3\].*ranks differ"),
    "rank 0": (
        {UP: ones(16, 0), DOWN: ones(0, 12)},
        "ranks differ or are 0",
    ),
    "3x3 for 1x1": (
        {IN_DOWN: ones(4, 16, 3, 3)},
        r"\[4, 16, 3, 3\].*for a weight \[16, 16, 1, 1\]: made for another base model",
    ),
    "other outputs": ({UP: ones(8, 4)}, r"lora_up \[8, 4\] for a weight"),
    "3x3 up": ({IN_UP: ones(16, 4, 3, 3)}, "lora_up must be 1x1"),
    "vector": ({IN_UP: ones(16)}, r"\[16\]: neither matrices nor convolutions"),
    "nan": ({UP: torch.nan * ones(16, 4)}, "to_k: a value is not finite"),
    "infinite alpha": ({ALPHA: torch.inf * ones(())}, "not finite"),
    "negative alpha": ({ALPHA: -ones(())}, "alpha of shape.*not negative"),
    "two alphas": ({ALPHA: ones(2)}, r"alpha of shape \[2\] must be one number"),
    "integers": ({UP: ones(16, 4).char()}, "and torch.int8: convert the file"),
    "LoHa": ({f"{K}.hada_w1_a": ones(3)}, "a LoHa"),
    "LoKr": ({f"{K}.lokr_w1": ones(3)}, "a LoKr"),
    "DoRA": ({f"{K}.dora_scale": ones(3)}, "a DoRA"),
    "PEFT's DoRA": ({"unet.conv_in.lora_magnitude_vector": ones(3)}, "a DoRA"),
    "core tensor": ({f"{K}.lora_mid.weight": ones(3)}, "a LoCon with a core tensor"),
    "SDXL": ({"lora_te2_x.alpha": ones(())}, "for SDXL, with two text encoders"),
    "diffusers' SDXL": (peft("text_encoder_2.x"), "for SDXL"),
    "cloneofsimo": ({"unet:0:up": ones(2)}, "in the format of cloneofsimo's lora"),
    "embedding": ({"emb_params": ones(2)}, "a textual inversion, no LoRA"),
    "ComfyUI": (peft("diffusion_model.input_blocks.1.1.proj_in"), "in ComfyUI's names"),
    "Flux": (peft("transformer.single_transformer_blocks.0.attn.to_q"), "a diffusion transformer"),
    "no config": (peft("base_model.model.conv_in"), "adapter_config.json: missing, it holds alpha"),
}
CONFIGS = {
    '{"unet.use_dora": true}': r"a DoRA \(use_dora\)",
    "[1, 2]": "not a JSON object",
    "{": "not a JSON object",
    '{"unet.lora_alpha": "x"}': "no readable alpha",
    '{"unet.lora_alpha": 0}': "alpha 0.0: it must be a positive number",
    '{"unet.alpha_pattern": {"(": 1}}': "no readable alpha",
    '{"unet.init_lora_weights": "olora"}': "init_lora_weights 'olora' changed",
}
for config, message in CONFIGS.items():
    BAD[config] = (peft("unet.conv_out"), message)


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_file_is_refused_in_one_line_and_no_file_changes_anything(models, tmp_path, problem):
    changes, message = BAD[problem]
    tensors = {key: tensor for key, tensor in (GOOD | changes).items() if tensor is not None}
    said = {"ss_base_model_version": "sd_v2"}
    said["lora_adapter_metadata"] = problem if problem in CONFIGS else "{}"
    save_file(GOOD, tmp_path / "a")
    save_file(tensors, tmp_path / "b", said)
    before = weights_of(models)
    with refused(LoRAError, message, tmp_path):
        load_loras([(tmp_path / "a", 1.0), (tmp_path / "b", 1.0)], models)
    assert all(map(torch.equal, weights_of(models), before))


@pytest.mark.parametrize("width, family", [(768, "SD 1"), (1024, "SD 2"), (2048, "SDXL")])
def test_a_file_without_metadata_tells_its_base_by_the_width_of_its_text(
    models, tmp_path, width, family
):
    save_file(GOOD | {DOWN: ones(4, width)}, tmp_path / "a")
    with refused(LoRAError, rf"another base model \(by its shapes {family}\): load"):
        load_loras([(tmp_path / "a", 1.0)], models)
    with refused(LoRAError, rf"5 of 5 .* lora_te.*made for \(by its shapes {family}\)"):
        load_loras([(tmp_path / "a", 1.0)], {"lora_te": models["lora_te"]})


class _Payload:
    def __reduce__(self):
        return pytest.fail, ("the pickle was executed",)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<!DOCTYPE html><html></html>", "begins with b'<!DOCTYPE html"),
        (pickle.dumps(_Payload()), "no whole safetensors file"),
        (save(GOOD)[:-7], "no whole safetensors file"),
        (save({}), "no LoRA among its 0 keys"),
        (save({"model.out": ones(2)}), r"no LoRA among its 1 keys, such as model\.out: give"),
        (None, "a: no such file"),
    ],
)
def test_what_is_no_lora_file_is_told_in_one_line(models, tmp_path, content, message):
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    with refused(LoRAError, message):
        load_loras([(tmp_path / "a", 1.0)], models)


def test_a_strength_that_is_not_finite_and_a_layer_that_has_a_lora_are_refused(
    models, trained, tmp_path
):
    save_file(GOOD, tmp_path / "a")
    for strength in (float("nan"), float("-inf")):
        with refused(LoRAError, f"strength {strength}: must be a finite number"):
            load_loras([(tmp_path / "a", strength)], models)
    with refused(LoRAError, "has a LoRA already"):
        load_loras([(tmp_path / "a", 1.0)], trained)


# written


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_keys_shapes_metadata_and_bytes_of_both_layouts(models, tmp_path):
    unet, path, proj_in = models["lora_unet"], tmp_path / "a", "mid_block.attentions.0.proj_in"
    inject(unet, 4, 2, r"mid_block\.(resnets\.1\.conv2|.*attn2\.to_k)")
    inject(unet, 2, 4, proj_in)
    inject(models["lora_te"].text_model, 2, 3, r".*fc1")
    for model in models.values():
        for layer in lora_layers(model).values():
            for matrix in (layer.A.weight, layer.B.weight):
                matrix.data = torch.arange(matrix.numel()).view_as(matrix) / 64
    models["lora_te"] = models["lora_te"].text_model  # as transformers 5.6 has it
    save_lora(path, models, {"note": "x", "ss_network_dim": "wrong", "sshs_model_hash": "stale"})
    conv, fc1 = "lora_unet_mid_block_resnets_1_conv2", "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors, data = load_file(path), path.read_bytes()
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert tensors.keys() == {f"{name}.{part}" for name in (K, IN, conv, fc1) for part in parts}
    assert tensors[f"{conv}.lora_down.weight"].shape == (4, 16, 3, 3)
    assert tensors[f"{conv}.lora_up.weight"].shape == (16, 4, 1, 1)
    assert tensors[ALPHA] == 2 and tensors[ALPHA].dtype == torch.float16
    assert header(path) == {
        "note": "x",
        "ss_network_args": '{"conv_dim": "4", "conv_alpha": "2.0"}',
        "ss_network_alpha": "Dynamic",
        "ss_network_dim": "Dynamic",
        "ss_network_module": "networks.lora",
        "sshs_model_hash": sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest(),
    }

    save_lora(path, models, {"z": 1, "a": None}, torch.float32, "peft")
    layers = [f"unet.{layer}" for layer in (proj_in, TO_K, "mid_block.resnets.1.conv2")]
    layers.append("text_encoder.text_model.encoder.layers.0.mlp.fc1")
    tensors = load_file(path)
    assert tensors.keys() == {f"{layer}.lora_{x}.weight" for layer in layers for x in "AB"}
    B = unet.get_submodule(proj_in).B.weight
    assert torch.equal(tensors[f"unet.{proj_in}.lora_B.weight"], 2 * B)
    assert json.loads(header(path)["lora_adapter_metadata"]) == {
        "unet.r": 4,
        "unet.lora_alpha": 4,
        "unet.rank_pattern": {proj_in: 2},
        "unet.alpha_pattern": {proj_in: 2},
        "unet.target_modules": [layer.removeprefix("unet.") for layer in layers[:3]],
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 2,
        "text_encoder.rank_pattern": {},
        "text_encoder.alpha_pattern": {},
        "text_encoder.target_modules": ["encoder.layers.0.mlp.fc1"],
    }
    # the same bytes for the same arguments, today and later
    hashes = [sha256(content).hexdigest()[:16] for content in (data, path.read_bytes())]
    assert hashes == ["aa7805773b4682ce", "f120cd156ae8d321"]
    save_lora(path, {"lora_te": models["lora_te"]})
    assert (header(path)["ss_network_dim"], header(path)["ss_network_alpha"]) == ("2", "3.0")


def test_a_failed_save_leaves_the_older_file_and_nothing_else(
    models, trained, tmp_path, monkeypatch
):
    path = tmp_path / "a"
    save_lora(path, trained)
    older = path.read_bytes()

    def fails(message, path=path, models=trained, dtype=torch.float32, layout="kohya"):
        with refused(LoRAError, message):
            save_lora(path, models, {}, dtype, layout)

    fails("nothing to save", models=models)
    fails("cannot be written", path=tmp_path / "no" / "a")
    fails("layout 'old': must be 'kohya' or 'peft'", layout="old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    fails(r"cannot be written.*no space left")
    next(iter(lora_layers(trained["lora_unet"]).values())).B.weight.data[0, 0] = 1e5
    fails(r"lora_up.weight is not finite in torch.float16: .* as float32", dtype=torch.float16)
    assert path.read_bytes() == older and list(tmp_path.iterdir()) == [path]


# converted


@pytest.mark.parametrize(
    "alpha, layout, dtype",
    [
        (4, "peft", torch.float16),
        (3, "peft", torch.float32),  # 3 / 4 goes into B
        (3, "kohya", torch.float16),
        (0.1, "kohya", torch.float32),  # which float16 would round
    ],
)
def test_conversion_keeps_bits_or_is_in_float32(tmp_path, alpha, layout, dtype):
    down, up = torch.randn(4, 12).half(), torch.randn(16, 4).half()
    tensors = {DOWN: down, UP: up, ALPHA: torch.tensor(alpha)}
    save_file(tensors, tmp_path / "in", {"ss_output_name": "fetal"})
    convert(tmp_path / "in", tmp_path / "out", layout)
    (pair,) = read(tmp_path / "out").pairs.values()
    factor = alpha / 4 if layout == "peft" else 1
    assert torch.equal(pair.down, down.to(dtype)) and pair.down.dtype == dtype
    assert torch.equal(pair.up, (up.float() * factor).to(dtype))
    assert pair.alpha == (4 if layout == "peft" else pytest.approx(alpha))
    convert(tmp_path / "out", tmp_path / "back", "kohya")
    assert header(tmp_path / "back")["ss_output_name"] == "fetal"
    assert "lora_adapter_metadata" not in header(tmp_path / "back")  # refused beside alphas


@pytest.mark.parametrize(
    "width, base", [(768, ["sd_v1", "False"]), (1024, ["sd_v2", "True"]), (12, [None, None])]
)
def test_the_command_converts_says_nothing_and_names_the_base(
    tmp_path, monkeypatch, capsys, width, base
):
    save_file(GOOD | {DOWN: ones(4, width)}, tmp_path / "in")
    command = ["lora.files", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "kohya"]
    monkeypatch.setattr(sys, "argv", command)
    # as in a process of its own, which has not imported it
    monkeypatch.delitem(sys.modules, "lora.files.__main__")
    runpy.run_module("lora.files", run_name="__main__")
    said = header(tmp_path / "out")
    assert [said.get(key) for key in ("ss_base_model_version", "ss_v2")] == base
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name, out, message",
    [
        ("lora_unet_mid_block_x", "out", "lora_unet_mid_block_x is no layer of Stable Diffusion"),
        (IN, "no/out", "cannot be written"),
    ],
)
def test_a_failed_conversion_is_one_line_exit_code_2_and_nothing_written(
    tmp_path, capsys, name, out, message
):
    source = tmp_path / "in"
    save_file({f"{name}.lora_{x}.weight": ones(2, 2) for x in ("down", "up")}, source)
    with exits(capsys, message):
        main(parse_args([str(source), str(tmp_path / out), "--to", "peft"]))
    assert list(tmp_path.iterdir()) == [source]


# what a file says of its training


METADATA = """\
modelspec.architecture = stable-diffusion-v1/lora
modelspec.encoder_layer = 2
modelspec.implementation = diffusers
modelspec.prediction_type = epsilon
modelspec.resolution = 512x512
modelspec.sai_model_spec = 1.0.0
modelspec.title = lora
ss_bucket_no_upscale = True
ss_cache_latents = True
ss_clip_skip = 2
ss_dataset_dirs = {"3_brain": {"n_repeats": 3, "img_count": 2}}
ss_debiased_estimation = False
ss_enable_bucket = True
ss_epoch = 2
ss_gradient_accumulation_steps = 1
ss_gradient_checkpointing = False
ss_learning_rate = 0.0001
ss_lr_scheduler = cosine
ss_max_grad_norm = 1.0
ss_max_train_steps = 60
ss_mixed_precision = fp16
ss_num_batches_per_epoch = 30
ss_num_epochs = 2
ss_num_train_images = 6
ss_optimizer = torch.optim.adamw.AdamW
ss_output_name = lora
ss_resolution = (512, 512)
ss_sd_model_name = v1-5.safetensors
ss_seed = 3
ss_steps = 60
ss_tag_frequency = {"3_brain": {"fetal brain": 2}}
ss_text_encoder_lr = 5e-05
ss_unet_lr = 0.0001"""


def test_the_metadata_of_a_training_are_kohyas(tmp_path):
    settings = {"model": "models/v1-5.safetensors", "size": 512, "prediction": "epsilon"}
    settings |= {"bucket": True, "clip_skip": 2, "batches": 30, "lr": 1e-4, "seed": 3}
    settings |= {"text_encoder_lr": 5e-5, "train_text_encoder": True, "schedule": "cosine"}
    settings |= {"debiased_estimation_loss": False, "epochs": 2, "steps": 60, "accumulate": 1}
    settings |= {"gradient_checkpointing": False, "dtype": "fp16"}
    images = [
        SimpleNamespace(path=Path(f"data/3_brain/{n}.png"), caption="fetal brain, ", repeats=3)
        for n in range(2)
    ]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(ones(1))])
    keys = metadata(settings, images, optimizer, 768)
    assert "\n".join(f"{key} = {keys[key]}" for key in sorted(keys)) == METADATA
    settings |= {"prediction": "v_prediction", "train_text_encoder": False, "dtype": "fp32"}
    other = metadata(settings, images, optimizer, 1024)
    assert {key: value for key, value in other.items() if value != keys[key]} == {
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        "modelspec.prediction_type": "v",
        "ss_text_encoder_lr": None,
        "ss_mixed_precision": "no",
    }
    assert "modelspec.architecture" not in metadata(settings, images, optimizer, 12)


@pytest.mark.parametrize(
    "said, prediction, told",
    [
        (
            {"ss_clip_skip": "2"},
            "epsilon",
            "was trained with clip skip 2: sample.py --clip-skip 2 does so",
        ),
        ({"ss_clip_skip": "None", "ss_v_parameterization": "False"}, "epsilon", None),
        ({"ss_clip_skip": "1", "modelspec.prediction_type": "v"}, "v_prediction", None),
        (
            {"ss_v_parameterization": "True"},
            "epsilon",
            "was trained on a model that predicts v, this one predicts epsilon",
        ),
        (
            {"modelspec.prediction_type": "epsilon"},
            "v_prediction",
            "was trained on a model that predicts epsilon, this one predicts v",
        ),
    ],
)
def test_what_a_file_was_trained_for_otherwise_is_told(said, prediction, told):
    assert trained_otherwise(said, 1, prediction) == [told] * bool(told)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_live_diffusers_gives_our_output_with_our_file(models, tmp_path, layout):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from transformers import CLIPTextConfig, CLIPTextModel

    # a rank for each network, and in PEFT's layout a second one, whose alpha diffusers misreads in
    # kohya's
    targets = [("lora_unet", 4, 2, "locon"), ("lora_te", 2, 3, "text-encoder")]
    if layout == "peft":
        targets.append(("lora_unet", 3, 1, "conv_in|conv_out|time_embedding.*"))
    trained = train(models, *targets)
    save_lora(tmp_path / "ours.safetensors", trained, dtype=torch.float32, layout=layout)

    unet = diffusers.UNet2DConditionModel(
        **SIZES,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    unet.load_state_dict(models["lora_unet"].state_dict())
    text = CLIPTextModel(CLIPTextConfig(**TEXT)).eval()
    getattr(text, "text_model", text).load_state_dict(models["lora_te"].text_model.state_dict())
    parts = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = diffusers.DDIMScheduler()
    pipe = diffusers.StableDiffusionPipeline(
        text_encoder=text, unet=unet, scheduler=scheduler, **parts
    )
    pipe.load_lora_weights(tmp_path, weight_name="ours.safetensors", local_files_only=True)

    ids, latents, t = torch.tensor([[1, 5, 9, 2]]), torch.randn(2, 4, 8, 8), torch.tensor([17, 801])
    with torch.no_grad():
        context = trained["lora_te"](ids)
        agree(context, text(ids).last_hidden_state, 1e-5)
        context = context.expand(2, -1, -1)
        eps = trained["lora_unet"](latents, t, context)
        agree(eps, unet(latents, t, context).sample, 1e-5)
        assert (eps - models["lora_unet"](latents, t, context)).abs().max() > 0.05

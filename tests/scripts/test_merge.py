"""merge_lora.py: what it writes is the model with its LoRAs, in both layouts, or nothing."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from shorthand import refused

import merge_lora
import sample
from harness.files import sha256
from ldm import MINI, CheckpointError
from ldm.checkpoints import Model, load, save_folder, save_single
from ldm.checkpoints.tokenizer import load_tokenizer
from ldm.text import TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from ldm.vae import AutoencoderKL, VAEConfig
from ldm.webui.shots import lora_hash
from lora.files import load_loras
from lora.layer import LoRAError

UNET = "unet/diffusion_pytorch_model.safetensors"


def merge(*words):
    merge_lora.main(merge_lora.parse_args([str(word) for word in words]))


def drawn(out, *words):
    line = f"--device cpu --out {out} --prompt femur --samplers euler --seeds 1 --steps 2"
    sample.main(sample.parse_args([*line.split(), *map(str, words)]))
    return np.asarray(Image.open(out / "prompt" / "euler_1.png"), int)


def apart(pixels, others) -> int:
    """The largest difference in grey levels. Equal weights may round otherwise where they lie at
    other addresses, as in a mapped file: a CPU's kernels depend on alignment."""
    return abs(pixels - others).max()


@pytest.mark.slow
def test_a_merged_folder_draws_what_the_model_draws_with_its_loras(
    tiny_model, loras, tmp_path, capsys
):
    out, weights = tmp_path / "merged", (0.8, -0.5)
    merge(tiny_model, *loras, "--strength", *weights, "--out", out)
    flags = ["--model", tiny_model, "--lora", *loras, "--lora-weight", *weights]
    assert apart(drawn(tmp_path / "a", "--model", out), drawn(tmp_path / "b", *flags)) == 0
    assert "was trained with clip skip 2" in capsys.readouterr().out  # as sampling says
    (tmp_path / "prompts.json").write_text("{}")
    merge(tiny_model, shutil.copy(loras[1], tmp_path), "--out", tmp_path / "again")
    assert (tmp_path / "again" / "prompts.json").exists() and not (out / "prompts.json").exists()
    base, merged = load(tiny_model), load(out)
    for name, weight in base.vae.state_dict().items():
        assert torch.equal(merged.vae.state_dict()[name], weight)


@pytest.fixture(scope="module")
def single(make_lora, tmp_path_factory):
    """A model of SD 1's structure, which a single file tells whole, and a LoRA for it."""
    place = tmp_path_factory.mktemp("single")
    tokenizer = load_tokenizer(MINI / "tokenizer", TextConfig())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(UNetConfig(block_out_channels=(32,) * 4, cross_attention_dim=12))
        vae = AutoencoderKL(VAEConfig(block_out_channels=(32,) * 4))
        model = Model(unet, vae, TextEncoder(TextConfig(len(tokenizer), 12, 4, 2)), tokenizer)
    save_single(place / "base.safetensors", model)
    save_folder(model, place / "folder")
    make_lora(place / "fetal.safetensors", place / "folder", 0)
    return place


@pytest.mark.slow
def test_a_merged_file_draws_what_the_model_draws_and_says_what_it_is(single, tmp_path, capsys):
    base, lora = single / "base.safetensors", single / "fetal.safetensors"
    out = tmp_path / "merged.safetensors"
    words = ["--tokenizer", MINI / "tokenizer"]
    merge(base, lora, "--strength", 0.5, "--out", out, *words)
    merged, model = (load(path, tokenizer=str(words[1])) for path in (out, base))
    load_loras([(lora, 0.5)], {"lora_unet": model.unet, "lora_te": model.text_encoder})
    weights = merged.networks.state_dict()
    for name, weight in model.networks.state_dict().items():
        assert torch.equal(weights[name], weight)
    words += ["--size", 64, "--model"]
    pixels = drawn(tmp_path / "a", *words, out)
    assert "sample.py --prompts" not in capsys.readouterr().out
    (tmp_path / "prompts.json").write_text("{}")
    merge(base, shutil.copy(lora, tmp_path), "--out", tmp_path / "own.safetensors", *words[:2])
    assert f"sample.py --prompts {tmp_path / 'prompts.json'}" in capsys.readouterr().out
    applied = drawn(tmp_path / "b", *words, base, "--lora", lora, "--lora-weight", 0.5)
    assert apart(pixels, applied) <= 1 < apart(pixels, drawn(tmp_path / "c", *words, base))
    with safe_open(out, "pt") as file:
        said = file.metadata()
    assert json.loads(said.pop("sd_merge_recipe")) == {
        "type": "fu-lora",
        "base": {"name": "base", "hash": sha256(base)[:10]},
        "loras": [{"name": "fetal", "strength": 0.5, "hash": lora_hash(lora)}],
    }
    assert said == {  # its text width, 12, is no published model's: no architecture is claimed
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "merged",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
        "modelspec.merged_from": "base, fetal",
    }


@pytest.mark.parametrize(
    "stored, flags, expected",
    [
        (torch.float16, [], torch.float16),
        pytest.param(torch.bfloat16, [], torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(torch.float32, ["--dtype", "fp16"], torch.float16, marks=pytest.mark.slow),
    ],
)
def test_the_bases_own_precision_or_the_one_asked_for_is_rounded_to_once(
    tiny_model, loras, tmp_path, stored, flags, expected
):
    save_folder(load(tiny_model), tmp_path / "base", stored)
    merge(tmp_path / "base", loras[0], "--out", tmp_path / "merged", *flags)
    model = load(tmp_path / "base")
    load_loras([(loras[0], 1.0)], {"lora_unet": model.unet, "lora_te": model.text_encoder})
    actual = load_file(tmp_path / "merged" / UNET)
    for name, weight in model.unet.state_dict().items():
        assert actual[name].dtype == expected and torch.equal(actual[name], weight.to(expected))


@pytest.mark.parametrize(
    "flags, error, words",
    [
        ("{tiny} {lora} --out {tiny}", CheckpointError, "exists already; remove it first"),
        ("{tiny} {lora} --out {out}.safetensors", CheckpointError, "save it as a folder"),
        ("{tiny} {tiny} --out {out}", LoRAError, "tiny_model"),
        ("{tiny} {lora} --out {out} --strength nan", LoRAError, "strength nan: must be a finite"),
        (
            "{tiny} {lora} --out {out} --strength 1e9 --dtype fp16",
            LoRAError,
            "is not finite in fp16: give a lower --strength, or --dtype fp32",
        ),
    ],
)
def test_what_cannot_be_merged_is_told_and_writes_nothing(
    tiny_model, loras, tmp_path, flags, error, words
):
    places = {"tiny": tiny_model, "lora": loras[0], "out": tmp_path / "new" / "out"}
    with refused(error, words):
        merge(*flags.format(**places).split())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

"""python merge_lora.py: what it writes is the model with its LoRAs at run time, for us and for
diffusers."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import random_model
from test_checkpoint import tokenizer_folder as tokenizer_folder
from test_checkpoint_families import SD_1

from harness.files import sha256
from ldm.checkpoints import load, save_folder, save_single
from ldm.webui.shots import lora_hash
from lora.files import load_lora, save_lora
from lora.model import inject, lora_layers, lora_names, set_strength

pytestmark = pytest.mark.slow

SCRIPT = str(Path(__file__).resolve().parents[2] / "merge_lora.py")

IDS = torch.arange(77)[None] + 90
LATENTS = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def files(tokenizer_folder, tmp_path_factory):
    """A tiny SD 1 as file and folder, and two LoRAs: `both` of both networks, `unet` of the U-Net
    alone, PEFT's."""
    place = tmp_path_factory.mktemp("files")
    model = random_model(SD_1, tokenizer_folder)
    save_single(place / "base.safetensors", model)
    save_folder(model, place / "base")
    wanted = {
        "both": ("kohya", 4, 2, {"lora_unet": "transformer", "lora_te": "text-encoder"}),
        "unet": ("peft", 2, 2, {"lora_unet": "attention"}),
    }
    for name, (layout, rank, alpha, targets) in wanted.items():
        own = load(place / "base")
        networks = {"lora_unet": own.unet, "lora_te": own.text_encoder}
        generator = torch.Generator().manual_seed(rank)
        for prefix, target in targets.items():
            inject(networks[prefix], rank, alpha, target, generator=generator)
            for layer in lora_layers(networks[prefix]).values():
                layer.B.data.normal_(0, 0.3, generator=generator)
        save_lora(place / f"{name}.safetensors", networks, dtype=torch.float32, layout=layout)
    return place


def merge(monkeypatch, *flags):
    """The command, in this process."""
    monkeypatch.setattr(sys, "argv", ["merge_lora.py", *map(str, flags)])
    runpy.run_path(SCRIPT, run_name="__main__")


def refused(monkeypatch, capsys, *flags):
    """The last line of what it says."""
    with pytest.raises(SystemExit) as stop:
        merge(monkeypatch, *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    return error.splitlines()[-1]


@torch.no_grad()
def output(model):
    context = model.text_encoder(IDS)
    return context, model.unet(LATENTS, 500, context)


def at_run_time(files, **strengths):
    """The base with its LoRAs beside the weights."""
    model = load(files / "base")
    networks = {"lora_unet": model.unet, "lora_te": model.text_encoder}
    for name, strength in strengths.items():
        load_lora(files / f"{name}.safetensors", networks, name)
        for network in networks.values():
            if name in lora_names(network):
                set_strength(network, strength, name)
    return model


def assert_near(actual, expected, tolerance):
    """Within `tolerance` of the largest expected value."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(scope="module")
def expected(files):
    """Outputs of the base, and with both LoRAs at run time."""
    return output(load(files / "base")), output(at_run_time(files, both=0.8, unet=-0.5))


@pytest.mark.parametrize(
    ("base", "out"),
    [
        ("base", "merged"),
        ("base.safetensors", "merged.safetensors"),
        pytest.param("base", "merged.safetensors", marks=pytest.mark.slow),
        pytest.param("base.safetensors", "merged", marks=pytest.mark.slow),
    ],
)
def test_a_merged_model_gives_the_run_time_loras_output_within_1e5(
    files, expected, tokenizer_folder, tmp_path, monkeypatch, base, out
):
    flags = ["--tokenizer", tokenizer_folder] * (base != "base")
    loras = [files / "both.safetensors", files / "unet.safetensors"]
    merge(
        monkeypatch, files / base, *loras, "--strength", 0.8, -0.5, "--out", tmp_path / out, *flags
    )
    assert (tmp_path / out).is_dir() == (out == "merged")
    merged = load(tmp_path / out, tokenizer=tokenizer_folder)
    for actual, plain, with_loras in zip(output(merged), *expected):
        assert_near(actual, with_loras, 1e-5)
        assert (actual - plain).abs().max() > 0.05 * plain.abs().max()


@pytest.mark.slow
def test_without_a_strength_a_lora_is_merged_as_trained_and_the_vae_keeps_its_bits(
    files, tmp_path, monkeypatch
):
    merge(monkeypatch, files / "base", files / "both.safetensors", "--out", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    for actual, expected in zip(output(merged), output(at_run_time(files, both=1.0))):
        assert_near(actual, expected, 1e-5)
    before, after = (
        load_file(f / "vae/diffusion_pytorch_model.safetensors")
        for f in (files / "base", tmp_path / "merged")
    )
    assert before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )


@pytest.mark.parametrize(
    ("stored", "flags", "expected"),
    [
        (torch.float16, [], torch.float16),
        pytest.param(torch.bfloat16, [], torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(torch.float16, ["--dtype", "fp32"], torch.float32, marks=pytest.mark.slow),
        pytest.param(torch.float32, ["--dtype", "fp16"], torch.float16, marks=pytest.mark.slow),
    ],
)
def test_the_bases_own_precision_or_the_one_asked_for_is_rounded_to_once(
    files, tmp_path, monkeypatch, stored, flags, expected
):
    save_folder(load(files / "base"), tmp_path / "base", stored)
    merge(
        monkeypatch,
        tmp_path / "base",
        files / "both.safetensors",
        "--out",
        tmp_path / "merged",
        *flags,
    )
    actual = load_file(tmp_path / "merged/unet/diffusion_pytorch_model.safetensors")
    model = load(tmp_path / "base")
    load_lora(files / "both.safetensors", {"lora_unet": model.unet, "lora_te": model.text_encoder})
    layers = lora_layers(model.unet)
    for where, layer in layers.items():
        layer.merge()
        assert torch.equal(actual[f"{where}.weight"], layer.root.weight.to(expected)), where
    assert {tensor.dtype for tensor in actual.values()} == {expected} and layers


def test_the_files_metadata_say_what_was_merged(files, tokenizer_folder, tmp_path, monkeypatch):
    loras = [files / "both.safetensors", files / "unet.safetensors"]
    out = tmp_path / "merged.safetensors"
    merge(
        monkeypatch,
        files / "base.safetensors",
        *loras,
        "--strength",
        0.5,
        2,
        "--out",
        out,
        "--tokenizer",
        tokenizer_folder,
    )
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata.pop("sd_merge_recipe")) == {
        "type": "fu-lora",
        "base": {
            "name": "base",
            "hash": sha256(files / "base.safetensors")[:10],
        },
        "loras": [
            {"name": "both", "strength": 0.5, "hash": lora_hash(loras[0])},
            {"name": "unet", "strength": 2.0, "hash": lora_hash(loras[1])},
        ],
    }
    assert metadata == {  # its text width, 12, is no published model's: no architecture is claimed
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "merged",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
        "modelspec.merged_from": "base, both, unet",
    }


@pytest.mark.slow
def test_the_order_of_the_loras_changes_no_bit(files, tmp_path, monkeypatch):
    loras = [files / "both.safetensors", files / "unet.safetensors"]
    merge(monkeypatch, files / "base", *loras, "--out", tmp_path / "a")
    merge(monkeypatch, files / "base", *reversed(loras), "--out", tmp_path / "b")
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        a, b = (load_file(tmp_path / out / f"{name}.safetensors") for out in "ab")
        assert all(torch.equal(a[key], b[key]) for key in a)


# --- refusals: one line, exit code 2, nothing written


@pytest.mark.parametrize("out", ["out", pytest.param("out.safetensors", marks=pytest.mark.slow)])
def test_a_lora_that_does_not_fit_writes_nothing(files, tmp_path, monkeypatch, capsys, out):
    """The second of two, when the first is in the model already."""
    tensors = load_file(files / "both.safetensors")
    key = next(key for key in tensors if key.endswith("attn2_to_k.lora_down.weight"))
    save_file(tensors | {key: torch.zeros(4, 1024)}, tmp_path / "other.safetensors")
    flags = [
        files / "base",
        files / "unet.safetensors",
        tmp_path / "other.safetensors",
        "--out",
        tmp_path / "new" / out,
    ]
    line = refused(monkeypatch, capsys, *flags)
    assert (
        line.startswith(f"merge_lora.py: {tmp_path / 'other.safetensors'}: lora_unet ")
        and "another base model" in line
    )
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


@pytest.mark.parametrize("out", ["there", "there.safetensors"])
def test_an_existing_file_or_folder_is_left_alone(files, tmp_path, monkeypatch, capsys, out):
    if out == "there":
        (tmp_path / out).mkdir()
    else:
        (tmp_path / out).write_bytes(b"mine")
    # said before loading
    line = refused(monkeypatch, capsys, files / "none", files / "none", "--out", tmp_path / out)
    assert (
        line
        == f"merge_lora.py: {tmp_path / out}: exists already; remove it first or choose another"
        " name"
    )
    assert list(tmp_path.iterdir()) == [tmp_path / out]
    assert out == "there" or (tmp_path / out).read_bytes() == b"mine"


@pytest.mark.slow
def test_a_weight_beyond_half_precision_writes_nothing(files, tmp_path, monkeypatch, capsys):
    flags = ["--strength", 1e9, "--dtype", "fp16", "--out", tmp_path / "out"]
    line = refused(monkeypatch, capsys, files / "base", files / "unet.safetensors", *flags)
    assert line.endswith("is not finite in fp16: give a lower --strength, or --dtype fp32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_model_that_no_single_file_tells_writes_nothing(files, tmp_path, monkeypatch, capsys):
    config = tmp_path / "base/unet/config.json"
    save_folder(load(files / "base"), tmp_path / "base")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_head_dim": [4] * 4}))
    flags = [tmp_path / "base", files / "unet.safetensors", "--out", tmp_path / "out.safetensors"]
    assert refused(monkeypatch, capsys, *flags).endswith(
        "the model has (4, 4, 4, 4); save it as a folder"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["no.safetensors", "a", "--out", "out"],
            "merge_lora.py: no.safetensors: no such file or folder",
        ),
        (
            ["base", "no.safetensors", "--out", "out"],
            "merge_lora.py: no.safetensors: no such file: give the path of a",
        ),
        (
            ["base", "both.safetensors", "--strength", "nan", "--out", "out"],
            "strength nan: must be a finite number",
        ),
        (
            ["base", "both.safetensors", "--strength", "1", "2", "--out", "out"],
            "2 numbers for 1 LoRAs; give one, or",
        ),
        (
            ["base", "both.safetensors", "base/../both.safetensors", "--out", "out"],
            "one file twice; give it once",
        ),
        (
            ["base", "both.safetensors", "--out", "out.ckpt"],
            "--out out.ckpt: give a single file a name in .safetensors",
        ),
        (
            ["base", "both.safetensors", "--to", "single", "--out", "out"],
            "--out out: give a single file a name in",
        ),
        (
            ["base", "both.safetensors", "--to", "folder", "--out", "out.safetensors"],
            "a folder one without such an end",
        ),
        (
            ["base", "both.safetensors", "--model", "base", "--out", "out"],
            "unrecognized arguments: --model",
        ),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(files, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    assert message in refused(monkeypatch, capsys, *flags)
    assert sorted(files.rglob("*")) == before


# --- live diffusers


@pytest.mark.slow
@pytest.mark.parametrize("out", ["merged", "merged.safetensors"])
def test_diffusers_loads_a_merged_model_to_the_run_time_loras_output(
    files, tokenizer_folder, tmp_path, monkeypatch, out
):
    """Both layouts, within 1e-5 of the outputs' maximum."""
    diffusers = pytest.importorskip("diffusers")
    merge(monkeypatch, files / "base", files / "both.safetensors", "--out", tmp_path / out)
    pipeline = diffusers.StableDiffusionPipeline
    if out == "merged":
        theirs = pipeline.from_pretrained(tmp_path / out, local_files_only=True)
    else:
        theirs = pipeline.from_single_file(
            tmp_path / out, config=str(files / "base"), local_files_only=True
        )
    with torch.no_grad():
        context, eps = output(at_run_time(files, both=1.0))
        assert_near(theirs.text_encoder(IDS)[0], context, 1e-5)
        assert_near(theirs.unet(LATENTS, 500, encoder_hidden_states=context).sample, eps, 1e-5)

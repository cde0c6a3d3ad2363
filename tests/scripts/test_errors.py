"""Files that cannot be used, as a user meets them: one line of the script, exit code 2, and nothing
written."""

import json
import pickle
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

from ldm import MINI
from ldm.checkpoints import load
from lora.files import save_lora
from lora.model import inject, lora_layers

ROOT = Path(__file__).resolve().parents[2]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:6ce0161689\nsize 4265146304\n"
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
UNET = "model.diffusion_model."
ONE = save({"x": torch.zeros(4)})


class Payload:
    """What a pickle would run where it is loaded without care."""

    def __reduce__(self):
        return (print, ("the payload ran",))


def refused(script, flags, out, monkeypatch, capsys):
    """The script's one line."""
    monkeypatch.setattr(
        sys, "argv", [f"{script}.py", *map(str, flags), "--device", "cpu", "--out", str(out)]
    )
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith(f"{script}.py: ")]
    assert stop.value.code == 2 and len(lines) == 1 and printed.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in printed.err and "the payload ran" not in printed.out
    assert not out.exists()
    return lines[0].removeprefix(f"{script}.py: ")


def single(**shapes):
    """A file with nothing but these tensors."""
    return save({name: torch.zeros(shape) for name, shape in shapes.items()})


BASES = {
    "git-LFS pointer": (
        LFS,
        "a git-LFS pointer, not the weights; run `git lfs pull`",
    ),
    "web page": (PAGE, "a web page, not the weights ("),
    "empty": (b"", "empty, 0 bytes; fetch it again"),
    "truncated": (
        ONE[:-6],
        f"{len(ONE) - 6} bytes, cut short or damaged",
    ),
    "truncated header": (ONE[:20], "20 bytes, cut short or damaged"),
    "trailing bytes": (
        ONE + b"more",
        f"{len(ONE) + 4} bytes, cut short or damaged",
    ),
    "unsafe pickle": (
        pickle.dumps(Payload()),
        "able to run code; convert it to safetensors in a sandbox",
    ),
    "SDXL": (
        single(**{"conditioner.embedders.0.weight": 2}),
        "an SDXL checkpoint; give one of SD 1 or SD 2",
    ),
    "SD 3": (
        single(**{f"{UNET}joint_blocks.0.weight": 2}),
        "an SD 3 checkpoint; give one of SD 1 or SD 2",
    ),
    "Flux": (
        single(**{"double_blocks.0.weight": 2}),
        "a Flux checkpoint; give one of SD 1 or SD 2",
    ),
    "ControlNet": (
        single(**{"control_model.out.0.weight": 2}),
        "a ControlNet, not a base model; give the model",
    ),
    "LoRA": (
        single(**{"lora_unet_mid.lora_down.weight": 2}),
        "a LoRA, not a base model; give the model it was",
    ),
    "U-Net": (
        single(**{"down_blocks.0.resnets.0.norm1.weight": 2}),
        "a U-Net alone; give the diffusers folder",
    ),
    "VAE": (
        single(**{"encoder.conv_in.weight": 2}),
        "a VAE alone; give a whole model, and this by --vae",
    ),
    "embedding": (
        single(emb_params=(1, 768)),
        "an embedding, not a base model; give the model that it was made for",
    ),
    "embedding of ours": (
        single(**{"<fetal-us>": (1, 768)}),
        "an embedding, not a base model; give the model",
    ),
    "something else": (
        single(x=2),
        "no tensor model.diffusion_model.* but 1 other tensor: x; give one of SD 1 or SD 2",
    ),
    "leftover keys": (
        single(**{f"{UNET}mine.{n}": 2 for n in range(7)}),
        "7 unknown tensors: "
        + ", ".join(f"{UNET}mine.{n}" for n in range(5))
        + ", ..; a model of another kind",
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_a_file_that_is_no_base_model_is_named_with_what_to_do(name, tmp_path, monkeypatch, capsys):
    content, message = BASES[name]
    path = tmp_path / ("model.ckpt" if "pickle" in name else "model.safetensors")
    path.write_bytes(content)
    line = refused("sample", ["--model", path], tmp_path / "out", monkeypatch, capsys)
    assert line.startswith(f"{path}: ") and message in line and ";" in line


def changed_mini(root, change):
    """The embedded model with other tensors in its U-Net; its other files are links."""
    shutil.copytree(MINI, root, copy_function=lambda source, place: Path(place).symlink_to(source))
    path = root / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)
    return path


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


STEM = [
    f"{layer}.{part}"
    for layer in ("conv_in", "time_embedding.linear_1", "time_embedding.linear_2")
    for part in ("weight", "bias")
]
CHANGES = {
    "missing keys": (
        drop("conv_in.bias", "conv_out.bias"),
        "2 missing tensors: unet.conv_in.bias, unet.co",
    ),
    "many missing keys": (
        drop(*STEM),
        (
            f"6 missing tensors: {', '.join(f'unet.{name}' for name in STEM[:5])}, ..;"
            " fetch it again"
        ),
    ),
    "leftover key": (
        lambda t: t.update(mine=torch.zeros(2)),
        "1 unknown tensor: mine; a model of another kind",
    ),
    "wrong shape": (
        lambda t: t.update({"conv_in.bias": torch.zeros(3)}),
        "conv_in.bias has shape [3], the network",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_with_other_tensors_than_it_needs_is_told_which(
    name, tmp_path, monkeypatch, capsys
):
    change, message = CHANGES[name]
    changed_mini(tmp_path / "model", change)
    line = refused("sample", ["--model", tmp_path / "model"], tmp_path / "out", monkeypatch, capsys)
    assert line.startswith(f"{tmp_path / 'model'}") and message in line
    assert "fetch it again" in line or "give a checkpoint of SD 1 or SD 2" in line


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("script", ["sample", "train_lora"])
def test_a_weight_that_is_not_finite_is_named_when_the_model_is_loaded(
    value, script, tmp_path, monkeypatch, capsys
):
    changed_mini(
        tmp_path / "model", lambda tensors: tensors["conv_in.weight"].view(-1)[3].fill_(value)
    )
    (tmp_path / "images").mkdir()
    Image.new("L", (64, 64)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a photo")
    flags = {"sample": [], "train_lora": ["--images", tmp_path / "images"]}[script]
    line = refused(
        script, ["--model", tmp_path / "model", *flags], tmp_path / "out", monkeypatch, capsys
    )
    assert (
        line
        == f"{tmp_path / 'model'}: unet.conv_in.weight is not finite in float32; fetch or train it"
        " again"
    )


def test_activations_that_leave_half_precision_are_told_with_the_step_and_the_remedy(
    tmp_path, monkeypatch, capsys
):
    def swell(tensors):  # the same function, but for what its middle reaches
        for name, weight in list(tensors.items()):
            if ".ff.net.0.proj." in name:
                value, gate = weight.float().chunk(2)
                tensors[name] = torch.cat([value * 1e5, gate])
            elif name.endswith(".ff.net.2.weight"):
                tensors[name] = weight.float() / 1e5

    changed_mini(tmp_path / "model", swell)
    flags = [
        "--model",
        tmp_path / "model",
        "--planes",
        "brain",
        "--samplers",
        "euler",
        "--count",
        1,
        "--steps",
        2,
    ]
    half = refused("sample", [*flags, "--dtype", "fp16"], tmp_path / "out", monkeypatch, capsys)
    assert half.startswith(
        "what the model predicts at t = 999 is not finite in float16: take a wider"
        " --dtype, another model"
    )
    sample = runpy.run_path(str(ROOT / "sample.py"), run_name="sample")
    flags += ["--dtype", "bf16", "--device", "cpu", "--out", tmp_path / "bf16"]
    sample["main"](sample["parse_args"](list(map(str, flags))))
    assert len(list((tmp_path / "bf16" / "brain").glob("*.png"))) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_embedding_that_is_not_finite_is_refused(value, tmp_path, monkeypatch, capsys):
    save_file({"<us>": torch.full((1, 128), value)}, tmp_path / "us.safetensors")
    line = refused(
        "sample",
        ["--embedding", tmp_path / "us.safetensors"],
        tmp_path / "out",
        monkeypatch,
        capsys,
    )
    assert line.startswith(
        f"{tmp_path / 'us.safetensors'}: <us> is not finite; train the token again"
    )


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_a_guidance_scale_that_is_no_number_is_refused(scale, tmp_path, monkeypatch, capsys):
    line = refused(
        "sample", [f"--guidance-scale={scale}", "--count", 1], tmp_path / "out", monkeypatch, capsys
    )
    assert line == f"guidance scale {scale}: must be a finite number"


@pytest.mark.parametrize("channels", [9, 8, 7])
def test_a_unet_that_takes_more_than_latents_is_named(channels, tmp_path, monkeypatch, capsys):
    def widen(tensors):
        weight = tensors["conv_in.weight"]
        tensors["conv_in.weight"] = torch.zeros(weight.shape[0], channels, 3, 3)

    config = changed_mini(tmp_path / "model", widen).with_name("config.json")
    settings = json.loads(config.read_text()) | {"in_channels": channels}
    config.unlink()
    config.write_text(json.dumps(settings))
    line = refused("sample", ["--model", tmp_path / "model"], tmp_path / "out", monkeypatch, capsys)
    assert f"a U-Net with {channels} input channels (inpainting has 9, instruct-pix2pix 8," in line


def test_the_training_script_says_the_same(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    shutil.copy(ROOT / "docs" / "mini_after_lora.png", tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a photo")
    (tmp_path / "model.safetensors").write_bytes(LFS)
    flags = ["--images", tmp_path / "images", "--model", tmp_path / "model.safetensors"]
    assert "run `git lfs pull`" in refused(
        "train_lora", flags, tmp_path / "out", monkeypatch, capsys
    )


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", LFS, PAGE, pickle.dumps(Payload()), ONE[:20]])
def test_a_checkpoint_that_training_cannot_go_on_from_is_left_and_named(
    content, tmp_path, monkeypatch, capsys
):
    shutil.copy(ROOT / "docs" / "mini_after_lora.png", tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a photo")
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(content)
    flags = [
        "--images",
        tmp_path,
        "--out",
        tmp_path / "out",
        "--resume",
        "--rank",
        2,
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", ["train_lora.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train_lora.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert (
        stop.value.code == 2
        and "Traceback" not in printed.err
        and "the payload ran" not in printed.out
    )
    line = (
        f"train_lora.py: {checkpoint}: no checkpoint of train_lora.py, or a damaged one: remove it"
        " to begin anew"
    )
    assert printed.err.splitlines()[-1] == line
    assert (
        checkpoint.read_bytes() == content and not (tmp_path / "out" / "lora.safetensors").exists()
    )


def test_a_vae_and_an_average_that_are_not_there_are_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "vae.safetensors").write_bytes(single(**{"lora_unet_mid.lora_down.weight": 2}))
    flags = ["--vae", tmp_path / "vae.safetensors"]
    assert "give a VAE's own file or folder" in refused(
        "sample", flags, tmp_path / "out", monkeypatch, capsys
    )
    assert "load it without --ema" in refused(
        "sample", ["--ema"], tmp_path / "out", monkeypatch, capsys
    )


def test_a_tokenizer_that_is_not_the_models_is_named(tmp_path, monkeypatch, capsys):
    flags = ["--tokenizer", tmp_path / "words", "--count", 1, "--steps", 1]
    shutil.copytree(MINI / "tokenizer", tmp_path / "words")
    vocabulary = json.loads((tmp_path / "words" / "vocab.json").read_text())
    size = json.loads((MINI / "text_encoder" / "config.json").read_text())["vocab_size"]
    more = {f"word{n}": n for n in range(len(vocabulary), size + 1)}
    (tmp_path / "words" / "vocab.json").write_text(json.dumps(vocabulary | more))
    line = refused("sample", flags, tmp_path / "out", monkeypatch, capsys)
    assert line.endswith(
        f"{size + 1} tokens, the text encoder knows {size}; give the right --tokenizer"
    )
    (tmp_path / "words" / "merges.txt").unlink()
    line = refused("sample", flags, tmp_path / "out", monkeypatch, capsys)
    assert line.startswith(
        f"{tmp_path / 'words'}: no vocab.json and merges.txt; put those of openai/clip-vit-large-"
    )


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of the embedded model: its tensors and a key's beginning."""
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    unet = load(MINI).unet
    inject(unet, 2, 2, "cross-attention")
    save_lora(path, {"lora_unet": unet})
    return load_file(path), "lora_unet_" + next(iter(lora_layers(unet))).replace(".", "_")


def put(part, tensor):
    return lambda tensors, key: tensors.update({f"{key}.{part}": tensor})


LORAS = {
    "git-LFS pointer": (LFS, "a git-LFS pointer, not the weights: run `git lfs pull`"),
    "web page": (PAGE, "a web page, not the weights: download it again"),
    "empty": (b"", "empty, 0 bytes: download it again"),
    "truncated": (ONE[:-6], "not a whole safetensors file: download or convert it again"),
    "pickle": (
        pickle.dumps(Payload()),
        "a pickle, which may run code: convert it to safetensors in a sandbox",
    ),
    "checkpoint": (
        single(**{f"{UNET}out": 4}),
        f"no LoRA among its 1 keys, such as {UNET}out: give a LoRA file",
    ),
    "embedding": (
        single(emb_params=(1, 96)),
        "a textual inversion, no LoRA: load it as an embedding",
    ),
    "no down": (
        lambda t, key: t.pop(f"{key}.lora_down.weight"),
        "lora_down is missing: the file is damaged",
    ),
    "no up": (
        lambda t, key: t.pop(f"{key}.lora_up.weight"),
        "lora_up is missing: the file is damaged",
    ),
    "wrong rank": (
        lambda t, key: t.update(
            {f"{key}.lora_up.weight": t[f"{key}.lora_up.weight"].repeat(1, 2)[:, :3].contiguous()}
        ),
        "the ranks differ or are 0: the file is damaged",
    ),
    "not finite": (
        lambda t, key: t[f"{key}.lora_up.weight"].fill_(torch.nan),
        "a value is not finite",
    ),
    "LoHa": (put("hada_w1_a", torch.zeros(2)), "a LoHa (LyCORIS): use a plain LoRA"),
    "LoKr": (put("lokr_w1", torch.zeros(2)), "a LoKr (LyCORIS): use a plain LoRA"),
    "DoRA": (put("dora_scale", torch.zeros(2)), "a DoRA: use a plain LoRA"),
    "LoCon": (
        put("lora_mid.weight", torch.zeros(2)),
        "a LoCon with a core tensor (LyCORIS): use a plain LoRA",
    ),
    "SDXL": (
        lambda t, key: t.update({"lora_te2_x.alpha": torch.ones(())}),
        "for SDXL, with two text encoders: use one for SD 1 or SD 2",
    ),
    "leftover keys": (
        lambda t, key: t.update(
            {
                f"lora_unet_x{n}.lora_{p}.weight": torch.ones(2, 2)
                for n in range(3)
                for p in ("down", "up")
            }
        ),
        (
            "6 of {count} keys have no place in lora_unet, lora_te, such as"
            " lora_unet_x0.lora_down.weight"
        ),
    ),
    "for another base": (
        lambda t, key: t.update({key + ".lora_down.weight": torch.zeros(2, 1024)}),
        "made for another base model: load it into that one",
    ),
    "for SD 2": (
        lambda t, key: t.update(
            {key.replace("to_q", "to_k") + ".lora_down.weight": torch.zeros(2, 1024)}
        ),
        "made for another base model (by its shapes SD 2): load it into that one",
    ),
}


@pytest.mark.parametrize("name", LORAS)
def test_a_file_that_is_no_lora_of_the_model_is_named_with_what_to_do(
    name, lora, tmp_path, monkeypatch, capsys
):
    content, message = LORAS[name]
    path = tmp_path / "lora.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        tensors, key = {name: tensor.clone() for name, tensor in lora[0].items()}, lora[1]
        content(tensors, key)
        save_file(tensors, path)
        message = message.format(count=len(tensors))
    line = refused("sample", ["--lora", path], tmp_path / "out", monkeypatch, capsys)
    assert line.startswith(f"{path}: ") and message in line and line.count(": ") >= 2

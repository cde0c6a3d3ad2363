"""The flags of the base model: what they load, how another script gets them, and what a plan says
of them."""

from argparse import ArgumentParser

import pytest
import torch

import ldm.cli
from ldm import MINI, CheckpointError
from ldm.cli import DTYPES, SD_1_5, add_model_arguments, describe_models, load_model, model_flags

ALL = (
    "--model",
    "a/b@c",
    "--tokenizer",
    "d/e",
    "--vae",
    "f.pt",
    "--prediction-type",
    "v_prediction",
    "--ema",
)


def parse(*flags):
    parser = ArgumentParser()
    add_model_arguments(parser)
    return parser.parse_args([str(flag) for flag in flags])


def test_without_a_flag_the_embedded_model_is_loaded():
    model = load_model(parse())
    assert model.files.keys() == {
        f"{name}.safetensors"
        for name in (
            "unet/diffusion_pytorch_model",
            "vae/diffusion_pytorch_model",
            "text_encoder/model",
        )
    }
    assert all(path.is_relative_to(MINI) for path in model.files.values())
    assert model.prediction_type == "epsilon" and model.unet.conv_in.weight.dtype == torch.float32


def test_every_flag_reaches_the_model(tmp_path):
    vae = tmp_path / "vae"
    vae.mkdir()
    for path in (MINI / "vae").iterdir():
        (vae / path.name).write_bytes(path.read_bytes())
    flags = ("--vae", vae, "--prediction-type", "v_prediction", "--tokenizer", MINI)
    model = load_model(parse(*flags), dtype=DTYPES["bf16"], device="cpu")
    assert model.files["vae/diffusion_pytorch_model.safetensors"].parent == vae
    assert (
        model.prediction_type == "v_prediction"
        and model.unet.conv_in.weight.dtype == torch.bfloat16
    )
    with pytest.raises(CheckpointError, match="load it without --ema"):
        load_model(parse("--ema"))
    with pytest.raises(CheckpointError, match=r"no vocab\.json and no merges\.txt"):
        load_model(parse("--tokenizer", vae))


def test_model_vae_and_tokenizer_may_be_hub_ids(monkeypatch):
    asked = []
    monkeypatch.setattr(
        ldm.cli, "resolve_model", lambda source, part="model": asked.append((source, part)) or MINI
    )
    load_model(parse("--model", "a/b", "--vae", "c/d", "--tokenizer", "e/f"))
    assert sorted(asked) == [("a/b", "model"), ("c/d", "vae"), ("e/f", "tokenizer")]


def test_another_script_gets_the_same_model():
    for flags in ((), ALL):
        assert parse(*model_flags(parse(*flags))) == parse(*flags)
    args = parse()
    args.model = None
    assert model_flags(args) == []


def test_a_plan_tells_what_is_here_what_will_be_downloaded_and_what_is_missing(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    # where nobody answers
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert describe_models(parse("--vae", "owner/vae", "--tokenizer", tmp_path / "words")) == [
        f"{MINI}: there",
        "owner/vae: downloaded from the hub when needed",
        f"{tmp_path}/words: missing",
    ]
    assert describe_models(parse("--model", "sd.safetensors")) == [
        f"sd.safetensors: missing; SD 1.5 is {SD_1_5} on the hub"
    ]
    assert list(tmp_path.iterdir()) == []

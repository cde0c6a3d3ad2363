"""Checkpoints beyond a plain SD 1: SD 2, v-prediction, averages, pickles, foreign VAEs, single
files written."""

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import (
    CONFIG,
    UNTOLD,
    assert_near,
    assert_same,
    compvis,
    parameters,
    random_model,
    rewrite,
    save_single_file,
)
from test_checkpoint import built as built
from test_checkpoint import tokenizer_folder as tokenizer_folder

from ldm import CheckpointError
from ldm.checkpoints import Config, load, save_folder, save_single
from ldm.text import TextConfig
from ldm.unet import UNetConfig
from ldm.vae import VAEConfig

# models whose heads and norm groups are their family's, so that a single file tells them whole
SD_1 = Config(
    unet=UNetConfig(block_out_channels=(32,) * 4, cross_attention_dim=12),
    vae=VAEConfig(block_out_channels=(32,) * 4),
    text_encoder=TextConfig(
        vocab_size=200, hidden_size=12, intermediate_size=4, num_hidden_layers=2
    ),
)
SD_2 = Config(
    unet=UNetConfig(
        block_out_channels=(64,) * 4,
        num_heads=(1,) * 4,
        cross_attention_dim=64,
        use_linear_projection=True,
    ),
    vae=VAEConfig(block_out_channels=(32,) * 4),
    text_encoder=TextConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=23,
        num_attention_heads=1,
        hidden_act="gelu",
    ),
    prediction_type="v_prediction",
    sample_size=96,
)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tokenizer_folder):
    models = {
        "SD 1": random_model(SD_1, tokenizer_folder),
        "SD 2": random_model(SD_2, tokenizer_folder),
    }
    models["SD 2"].prediction_type = "v_prediction"
    return models


@pytest.fixture(scope="module")
def kept(models, tmp_path_factory):
    place = tmp_path_factory.mktemp("kept")
    save_single(place / "sd1.safetensors", models["SD 1"])
    save_single(place / "sd2.safetensors", models["SD 2"])
    save_folder(models["SD 1"], place / "sd1")
    return place


@pytest.fixture
def sd_1(kept, tmp_path):
    return Path(shutil.copy(kept / "sd1.safetensors", tmp_path))


@pytest.fixture
def sd_2(kept, tmp_path):
    """Without a word about what it predicts."""
    path = Path(shutil.copy(kept / "sd2.safetensors", tmp_path))
    rewrite(path, lambda tensors: tensors)
    return path


@pytest.fixture
def folder(kept, tmp_path):
    return Path(shutil.copytree(kept / "sd1", tmp_path / "sd1"))


# --- single files, written


@pytest.mark.parametrize("family", ["SD 1", "SD 2"])
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_a_saved_model_comes_back_bit_for_bit(models, tokenizer_folder, tmp_path, family, layout):
    model = models[family]
    if layout == "file":
        save_single(tmp_path / "model", model)
    else:
        save_folder(model, tmp_path / "model")
    again = load(tmp_path / "model", tokenizer=tokenizer_folder)
    assert again.config == (SD_1 if family == "SD 1" else SD_2)
    assert_same(again, parameters(model))


def test_a_single_file_of_sd_1_has_compviss_names_and_shapes(models, kept):
    expected = {compvis(name): value for name, value in parameters(models["SD 1"]).items()}
    actual = load_file(kept / "sd1.safetensors")
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        assert value.shape == (*expected[key].shape, 1, 1)[: value.ndim], key
        assert value.ndim == 4 or ".attn_1." not in key or value.ndim == 1, key
        assert torch.equal(value.flatten(), expected[key].flatten()), key


def test_a_reference_file_written_again_has_every_tensor_it_was_read_from(
    built, tokenizer_folder, tmp_path
):
    """The file's own but for the averages' counters, the schedule and OpenCLIP's last layer, which
    no model holds."""
    config = Config(
        unet=UNetConfig(num_heads=(8,) * 4),
        text_encoder=TextConfig(num_attention_heads=4, hidden_act="gelu"),
    )
    path = built("tiny_sd2") / "single_file.safetensors"
    model = load(path, tokenizer=tokenizer_folder, config=config)
    # 64 channels each, as a reader takes them
    model.unet.config = replace(model.unet.config, num_heads=(1, 1, 2, 2))
    model.text_encoder.config = replace(model.text_encoder.config, num_attention_heads=1)
    save_single(tmp_path / "again.safetensors", model, dtype=torch.float16)
    original, again = load_file(path), load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(original[key], value) for key, value in again.items())
    lost = {key for key in original if key not in again and "." in key}
    assert {re.sub(r"resblocks\.23\..*", "resblocks.23", key) for key in lost} == {
        "cond_stage_model.model.transformer.resblocks.23",
        "cond_stage_model.model.text_projection",
        "cond_stage_model.model.logit_scale",
        "model_ema.decay",
        "model_ema.num_updates",
    }


def test_a_model_that_a_single_file_does_not_tell_is_refused(tokenizer_folder, tmp_path):
    model = random_model(CONFIG, tokenizer_folder)
    message = (
        r"would be read with unet num_heads \(8, 8, 8, 8\), the model has \(2, 2, 2, 2\); save it"
        r" as a folder"
    )
    with pytest.raises(CheckpointError, match=message):
        save_single(tmp_path / "model.safetensors", model)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_single_file_is_not_overwritten(models, sd_1):
    before = sd_1.read_bytes()
    with pytest.raises(CheckpointError, match="exists already; remove it first"):
        save_single(sd_1, models["SD 1"])
    assert sd_1.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("family", ["SD 1", "SD 2"])
def test_diffusers_reads_a_saved_file_and_folder_alike(models, kept, tmp_path, family):
    """from_single_file with our folder as its config, and from_pretrained; 1e-5 of the outputs'
    maximum."""
    diffusers = pytest.importorskip("diffusers")
    model = models[family]
    save_folder(model, tmp_path / "folder")
    file = kept / ("sd1.safetensors" if family == "SD 1" else "sd2.safetensors")
    generator = torch.Generator().manual_seed(0)
    latents, image = (
        torch.randn(1, 4, 16, 16, generator=generator),
        torch.randn(1, 3, 32, 32, generator=generator),
    )
    ids = torch.randint(0, 190, (1, 77), generator=generator)
    with torch.no_grad():
        context, posterior = model.text_encoder(ids), model.vae.encode(image)
        output, decoded = model.unet(latents, 500, context), model.vae.decode(latents)
    pipeline = diffusers.StableDiffusionPipeline
    for theirs in (
        pipeline.from_pretrained(tmp_path / "folder", local_files_only=True),
        pipeline.from_single_file(file, config=str(tmp_path / "folder"), local_files_only=True),
    ):
        with torch.no_grad():
            assert_near(context, theirs.text_encoder(ids)[0], 1e-5)
            assert_near(
                output, theirs.unet(latents, 500, encoder_hidden_states=context).sample, 1e-5
            )
            assert_near(posterior.mean, theirs.vae.encode(image).latent_dist.mean, 1e-5)
            assert_near(decoded, theirs.vae.decode(latents / 0.18215).sample, 1e-5)
        assert theirs.scheduler.config.prediction_type == model.prediction_type


# --- what the U-Net predicts


def test_what_an_sd_2_file_predicts_is_probed_where_nothing_says_it(sd_2, tokenizer_folder):
    bias = "model.diffusion_model.out.2.bias"
    for shift, expected in ((-4.0, "v_prediction"), (4.0, "epsilon")):
        rewrite(sd_2, lambda tensors, shift=shift: tensors | {bias: torch.full((4,), shift)})
        model = load(sd_2, tokenizer=tokenizer_folder)
        assert (model.prediction_type, model.sample_size) == (expected, 96 if shift < 0 else 64)
    rewrite(sd_2, lambda tensors: tensors | {bias: torch.full((4,), torch.nan)})
    with pytest.raises(
        CheckpointError, match=r"the U-Net overflows in float32; give its --prediction-type"
    ):
        load(sd_2, tokenizer=tokenizer_folder)
    assert (
        load(sd_2, tokenizer=tokenizer_folder, prediction_type="epsilon").prediction_type
        == "epsilon"
    )


@pytest.mark.parametrize(
    ("text", "expected"), [('  parameterization: "v"\n', "v_prediction"), ("model:\n", "epsilon")]
)
def test_webuis_yaml_beside_the_file_says_what_it_predicts(
    kept, tmp_path, tokenizer_folder, text, expected
):
    """It outranks the file's own words: whoever puts it there has the last one."""
    for name in ("sd1.safetensors", "sd2.safetensors"):
        path = Path(shutil.copy(kept / name, tmp_path))
        path.with_suffix(".yaml").write_text(text)
        assert load(path, tokenizer=tokenizer_folder).prediction_type == expected


def test_a_v_pred_mark_and_an_argument_say_what_it_predicts(sd_1, folder, tokenizer_folder):
    rewrite(sd_1, lambda tensors: tensors)
    assert load(sd_1, tokenizer=tokenizer_folder).prediction_type == "epsilon"
    rewrite(sd_1, lambda tensors: tensors | {"v_pred": torch.zeros(0)})
    assert load(sd_1, tokenizer=tokenizer_folder).prediction_type == "v_prediction"
    assert (
        load(sd_1, tokenizer=tokenizer_folder, prediction_type="epsilon").prediction_type
        == "epsilon"
    )
    assert load(folder, prediction_type="v_prediction").prediction_type == "v_prediction"
    with pytest.raises(
        CheckpointError, match="prediction_type 'x0' is not one of epsilon, v_prediction"
    ):
        load(folder, prediction_type="x0")


# --- the average


def test_the_average_is_taken_only_where_it_is_asked_for(tokenizer_folder, tmp_path):
    model = random_model(CONFIG, tokenizer_folder)
    # the average is the trained U-Net plus one
    save_single_file(model, tmp_path / "both.safetensors")
    trained = load(tmp_path / "both.safetensors", tokenizer=tokenizer_folder, config=UNTOLD)
    averaged = load(
        tmp_path / "both.safetensors", tokenizer=tokenizer_folder, config=UNTOLD, ema=True
    )
    assert_same(trained, parameters(model))
    assert_same(averaged, {k: v + k.startswith("unet.") for k, v in parameters(model).items()})
    rewrite(
        tmp_path / "both.safetensors",
        lambda t: {k: v for k, v in t.items() if "diffusion_modelout2" not in k},
    )
    message = (
        r"2 missing tensors: model_ema\.diffusion_modelout2(bias|weight), model_ema\.\w+; load it"
        r" without --ema$"
    )
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "both.safetensors", config=UNTOLD, ema=True)


def test_no_average_to_take_is_an_error(sd_1, folder):
    rewrite(sd_1, lambda tensors: tensors | {"model_ema.decay": torch.ones(())})
    with pytest.raises(
        CheckpointError, match=r"no averaged U-Net \(model_ema\.\*\) inside; load it without --ema"
    ):
        load(sd_1, ema=True)
    with pytest.raises(CheckpointError, match="a folder holds one U-Net"):
        load(folder, ema=True)


# --- folders


def test_bf16_names_load_from_a_folder(models, folder):
    for path in folder.glob("*/*.safetensors"):
        rewrite(path, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
        path.rename(path.with_suffix(".bf16.safetensors"))
    assert_same(
        load(folder), {k: v.bfloat16().float() for k, v in parameters(models["SD 1"]).items()}
    )


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": 3},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "../vae/x.safetensors"}},
        [],
    ],
)
def test_an_index_without_a_map_of_shards_is_an_error(folder, index):
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    path = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=re.escape(str(path)) + ": no (weight_map|JSON object)"
    ) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_an_absent_shard_is_named(folder):
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    path = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"conv_in.bias": "second.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"unet/second\.safetensors: no such file"):
        load(folder)


@pytest.mark.parametrize(
    ("pipeline", "family"),
    [
        ("StableDiffusionXLPipeline", "an SDXL"),
        ("StableDiffusion3Pipeline", "an SD 3"),
        ("FluxPipeline", "a Flux"),
    ],
)
def test_a_folder_of_another_family_is_named(folder, pipeline, family):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(
        CheckpointError, match=rf"{family} model \({pipeline}\); give one of SD 1 or SD 2"
    ):
        load(folder)


def test_unknown_tensors_are_counted_and_the_first_five_named(sd_1, folder):
    for path, where, inside in (
        (sd_1, sd_1, "model.diffusion_model."),
        (folder / "unet/diffusion_pytorch_model.safetensors", folder, ""),
    ):
        extra = {f"{inside}extra.{n}": torch.zeros(1) for n in range(7)}
        rewrite(path, lambda tensors, extra=extra: tensors | extra)
        with pytest.raises(
            CheckpointError, match=rf"7 unknown tensors: {', '.join([*extra][:5])}, \.\.; a model"
        ):
            load(where)


# --- pickles


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("end", [".ckpt", ".safetensors"])
def test_a_pickle_of_plain_tensors_loads_whatever_its_name(
    models, sd_1, tokenizer_folder, zipped, wrapped, end
):
    path = sd_1.with_name(f"pickle{end}")
    state = load_file(sd_1)
    content = {"state_dict": state, "global_step": 840000} if wrapped else state
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_same(load(path, tokenizer=tokenizer_folder), parameters(models["SD 1"]))


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, zipped):
    path, proof = tmp_path / "model.ckpt", tmp_path / "ran"
    torch.save(
        {"state_dict": {}, "callbacks": _Payload(proof)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(
        CheckpointError, match="refuses, broken or able to run code; convert it to safetensors"
    ):
        load(path)
    assert not proof.exists()


def test_a_pickle_of_something_else_is_named(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(CheckpointError, match=r"model\.ckpt: a pickle"):
        load(tmp_path / "model.ckpt")
    torch.save([torch.zeros(1)], tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="a pickle of a list, no dict of tensors"):
        load(tmp_path / "model.ckpt")


# --- another VAE


@pytest.fixture(scope="module")
def foreign(tokenizer_folder, tmp_path_factory):
    """A model whose VAE differs in its weights and widths, as a folder."""
    config = replace(SD_1, vae=VAEConfig(block_out_channels=(32, 64, 64, 64)))
    model = random_model(config, tokenizer_folder)
    save_folder(model, tmp_path_factory.mktemp("foreign") / "model")
    save_single(tmp_path_factory.getbasetemp() / "foreign.safetensors", model)
    return model, tmp_path_factory.getbasetemp()


def _vae_files(place, model, form):
    """The VAE alone, in one of the forms that people have."""
    state = {k: v.clone() for k, v in model.vae.state_dict().items()}
    named = {compvis(f"vae.{k}"): v for k, v in state.items()}
    named = {
        k: v[:, :, None, None] if "attn_1" in k and v.ndim == 2 else v for k, v in named.items()
    }
    bare = {k.removeprefix("first_stage_model."): v for k, v in named.items()}
    extra = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    path = place / "vae.safetensors"
    match form:
        case "CompVis":
            save_file(bare | extra, path)
        case "first_stage_model":
            save_file(named, path)
        case "diffusers":
            save_file(state, path)
        case "pickle":
            path = place / "vae.pt"
            torch.save({"state_dict": bare | extra}, path)
        case "vae folder" | "model folder":
            save_folder(model, place / "other")
            path = place / "other" / ("vae" if form == "vae folder" else "")
    return path


@pytest.mark.parametrize(
    "form", ["CompVis", "first_stage_model", "diffusers", "pickle", "vae folder", "model folder"]
)
@pytest.mark.parametrize("base", ["sd1", "sd1.safetensors"])
def test_another_vae_takes_the_place_of_the_models_own(
    models, kept, foreign, tokenizer_folder, tmp_path, form, base
):
    other = foreign[0]
    path = _vae_files(tmp_path, other, form)
    model = load(kept / base, tokenizer=tokenizer_folder, vae=path)
    own = {k: v for k, v in parameters(models["SD 1"]).items() if not k.startswith("vae.")}
    assert_same(model, own | {k: v for k, v in parameters(other).items() if k.startswith("vae.")})
    assert model.config.vae == other.config.vae
    assert len(model.sha256()) == (3 if base == "sd1" else 2)
    assert (
        f"vae/{path.name if path.is_file() else 'diffusion_pytorch_model.safetensors'}"
        in model.files
    )


def test_a_file_that_is_no_vae_is_refused_as_one(sd_1, tmp_path, folder):
    save_file({"lora_unet_conv_in.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    for path in (sd_1, tmp_path / "lora.safetensors"):
        with pytest.raises(CheckpointError, match=re.escape(str(path)) + r": not a VAE"):
            load(folder, vae=path)
    scaled = Path(shutil.copytree(folder / "vae", tmp_path / "scaled"))
    config = json.loads((scaled / "config.json").read_text())
    (scaled / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.13025}))
    with pytest.raises(
        CheckpointError, match=r"latents scaled by 0\.13025, the model's by 0\.18215"
    ):
        load(folder, vae=scaled)


def test_a_vae_with_missing_or_unknown_tensors_is_named(folder, tmp_path):
    path = Path(
        shutil.copy(
            folder / "vae/diffusion_pytorch_model.safetensors", tmp_path / "vae.safetensors"
        )
    )
    rewrite(path, lambda tensors: {k: v for k, v in tensors.items() if k != "decoder.conv_in.bias"})
    message = re.escape(str(path)) + r": 1 of 240 vae tensors missing: vae\.decoder\.conv_in\.bias"
    with pytest.raises(CheckpointError, match=message):
        load(folder, vae=path)
    rewrite(
        path,
        lambda tensors: (
            tensors | {"decoder.conv_in.bias": torch.zeros(32), "encoder.more": torch.zeros(1)}
        ),
    )
    with pytest.raises(
        CheckpointError, match=r"vae\.safetensors: 1 unknown tensor: encoder\.more; a model"
    ):
        load(folder, vae=path)

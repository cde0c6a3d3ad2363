"""Checkpoints beyond a plain SD 1: SD 2, v-prediction, averages, pickles, foreign VAEs, single
files written."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shorthand import refused
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
from ldm.checkpoints.single_file import config_of
from ldm.text import TextConfig
from ldm.unet import UNetConfig
from ldm.vae import VAEConfig

# models whose heads and norm groups are their family's, so that a single file tells them whole
SD_1 = Config(
    unet=UNetConfig(block_out_channels=(32,) * 4, cross_attention_dim=12),
    vae=VAEConfig(block_out_channels=(32,) * 4),
    text_encoder=TextConfig(200, 12, 4, 2),
)
SD_2 = Config(
    unet=UNetConfig(
        block_out_channels=(64,) * 4,
        num_heads=(1,) * 4,
        cross_attention_dim=64,
        use_linear_projection=True,
    ),
    vae=VAEConfig(block_out_channels=(32,) * 4),
    text_encoder=TextConfig(200, 64, 8, 23, 1, hidden_act="gelu"),
    prediction_type="v_prediction",
    sample_size=96,
)

slow = pytest.mark.slow


def test_sd_2_has_heads_of_64_channels_at_its_published_widths():
    published = config_of(True, {})
    assert published.unet.num_heads == (5, 10, 20, 20)
    assert published.text_encoder.num_attention_heads == 16


@pytest.fixture(scope="module")
def models(tokenizer_folder):
    models = {name: random_model(c, tokenizer_folder) for name, c in (("1", SD_1), ("2", SD_2))}
    models["2"].prediction_type = "v_prediction"
    return models


@pytest.fixture(scope="module")
def kept(models, tmp_path_factory):
    place = tmp_path_factory.mktemp("kept")
    for family, model in models.items():
        save_single(place / f"sd{family}.safetensors", model)
        save_folder(model, place / f"sd{family}")
    return place


@pytest.fixture
def read(tokenizer_folder):
    return lambda path, **options: load(path, tokenizer=tokenizer_folder, **options)


@pytest.fixture
def sd_1(kept, tmp_path):
    return Path(shutil.copy(kept / "sd1.safetensors", tmp_path))


# --- written and read again


@slow
@pytest.mark.parametrize("family", ["1", "2"])
def test_a_saved_model_comes_back_bit_for_bit_and_diffusers_reads_it_too(
    models, kept, read, family
):
    """from_single_file with our folder as its config, and from_pretrained; 1e-5 of the outputs'
    maximum."""
    diffusers = pytest.importorskip("diffusers")
    model, file, folder = models[family], kept / f"sd{family}.safetensors", kept / f"sd{family}"
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    image = torch.randn(1, 3, 32, 32, generator=generator)
    ids = torch.randint(0, 190, (1, 77), generator=generator)
    context, posterior = model.text_encoder(ids), model.vae.encode(image)
    output, decoded = model.unet(latents, 500, context), model.vae.decode(latents)
    pipeline, local = diffusers.StableDiffusionPipeline, {"local_files_only": True}
    for path, theirs in (
        (file, pipeline.from_single_file(file, config=str(folder), **local)),
        (folder, pipeline.from_pretrained(folder, **local)),
    ):
        again = read(path)
        assert again.config == (SD_1 if family == "1" else SD_2)
        assert_same(again, parameters(model))
        with torch.no_grad():
            assert_near(context, theirs.text_encoder(ids)[0], 1e-5)
            eps = theirs.unet(latents, 500, encoder_hidden_states=context).sample
            assert_near(output, eps, 1e-5)
            assert_near(posterior.mean, theirs.vae.encode(image).latent_dist.mean, 1e-5)
            assert_near(decoded, theirs.vae.decode(latents / 0.18215).sample, 1e-5)
        assert theirs.scheduler.config.prediction_type == model.prediction_type
        assert theirs.scheduler.alphas_cumprod[-1].item() == pytest.approx(0.0046604, rel=1e-4)
        side = again.sample_size * again.vae.config.downsampling
        assert theirs.unet.config.sample_size * theirs.vae_scale_factor == side


@slow
@pytest.mark.parametrize("case", ["sd1", "sd2"])
def test_a_reference_file_written_again_has_every_tensor_it_was_read_from(
    built, read, tmp_path, case
):
    """The file's own but for the averages' counters, the schedule, positions, and OpenCLIP's last
    layer, which no model holds."""
    heads = 12 if case == "sd1" else 1  # as a reader takes them
    text = TextConfig(num_attention_heads=4, hidden_act="quick_gelu" if case == "sd1" else "gelu")
    path = built(case) / "single_file.safetensors"
    model = read(path, config=Config(text_encoder=text))
    unet = {"num_heads": (1, 1, 2, 2)} if case == "sd2" else {}
    model.unet.config = replace(model.unet.config, **unet)
    model.text_encoder.config = replace(model.text_encoder.config, num_attention_heads=heads)
    save_single(tmp_path / "again.safetensors", model, dtype=torch.float16)
    original, again = load_file(path), load_file(tmp_path / "again.safetensors")
    for key, value in again.items():
        assert original[key].shape == value.shape and torch.equal(original[key], value), key
    lost = {key for key in original if key not in again and "." in key}
    beside = {"model_ema.decay", "model_ema.num_updates"}
    assert {re.sub(r"resblocks\.23\..*", "resblocks.23", key) for key in lost} - beside == (
        {"cond_stage_model.transformer.text_model.embeddings.position_ids"}
        if case == "sd1"
        else {
            f"cond_stage_model.model.{name}"
            for name in ("transformer.resblocks.23", "text_projection", "logit_scale")
        }
    )


@pytest.mark.slow
def test_a_single_file_is_not_overwritten_and_none_of_a_model_that_it_does_not_tell(
    models, sd_1, tokenizer_folder, tmp_path
):
    before = sd_1.read_bytes()
    with refused(CheckpointError, "exists already; remove it first"):
        save_single(sd_1, models["1"])
    assert sd_1.read_bytes() == before
    with refused(CheckpointError, r"new: cannot be written: .*save it as a folder$"):
        save_single(tmp_path / "new", random_model(CONFIG, tokenizer_folder))
    assert list(tmp_path.iterdir()) == [sd_1]


# --- what the U-Net predicts


@slow
@pytest.mark.parametrize("shift, expected", [(-4, "v_prediction"), (4, "epsilon")])
def test_what_an_sd_2_file_predicts_is_probed_where_nothing_says_it(
    kept, tmp_path, read, shift, expected
):
    path, bias = tmp_path / "a.safetensors", "model.diffusion_model.out.2.bias"
    tensors = load_file(kept / "sd2.safetensors")
    save_file(tensors | {bias: torch.full((4,), float(shift))}, path)
    model = read(path)
    assert (model.prediction_type, model.sample_size) == (expected, 96 if shift < 0 else 64)
    save_file(tensors | {bias: torch.full((4,), torch.nan)}, path)
    with refused(CheckpointError, r"overflows in torch.float32; give its --pred"):
        read(path)
    assert read(path, prediction_type="epsilon").prediction_type == "epsilon"


@slow
@pytest.mark.parametrize("family", ["1", "2"])
@pytest.mark.parametrize(
    "text, expected", [('  parameterization: "v"\n', "v_prediction"), ("model:\n", "epsilon")]
)
def test_webuis_yaml_beside_the_file_says_what_it_predicts(
    kept, tmp_path, read, family, text, expected
):
    """It outranks the file's own words: whoever puts it there has the last one."""
    path = Path(shutil.copy(kept / f"sd{family}.safetensors", tmp_path))
    path.with_suffix(".yaml").write_text(text)
    assert read(path).prediction_type == expected


@slow
@pytest.mark.parametrize(
    "mark, header, option, expected",
    [
        ({}, None, None, "epsilon"),
        ({"v_pred": torch.zeros(0)}, None, None, "v_prediction"),
        ({}, "v", None, "v_prediction"),
        ({"v_pred": torch.zeros(0)}, "epsilon", None, "epsilon"),
        ({}, "v", "epsilon", "epsilon"),
    ],
)
def test_an_argument_or_the_header_or_a_v_pred_mark_says_what_it_predicts(
    sd_1, read, mark, header, option, expected
):
    stated = {"modelspec.prediction_type": header} if header else None
    save_file(load_file(sd_1) | mark, sd_1, stated)
    model = read(sd_1, prediction_type=option)
    assert model.config == replace(SD_1, prediction_type=expected)


def test_an_argument_says_what_a_folder_predicts(kept, read):
    assert read(kept / "sd1", prediction_type="v_prediction").prediction_type == "v_prediction"


# --- the average


@slow
def test_the_average_is_taken_only_where_it_is_asked_for(tokenizer_folder, kept, read, tmp_path):
    model, path = random_model(CONFIG, tokenizer_folder), tmp_path / "both.safetensors"
    save_single_file(model, path)  # the average is the trained U-Net plus one
    assert_same(read(path, config=UNTOLD), parameters(model))
    expected = {k: v + k.startswith("unet.") for k, v in parameters(model).items()}
    assert_same(read(path, config=UNTOLD, ema=True), expected)
    rewrite(path, lambda t: {k: v for k, v in t.items() if "diffusion_modelout2" not in k})
    message = r"no averaged U-Net inside, or not whole \(model_ema\.diffusion_modelout2\w+\); load"
    with refused(CheckpointError, message):
        read(path, config=UNTOLD, ema=True)
    with refused(CheckpointError, "a folder holds one U-Net"):
        read(kept / "sd1", ema=True)


# --- pickles


@slow
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("end", [".ckpt", ".safetensors"])
def test_a_pickle_of_plain_tensors_loads_whatever_its_name(models, sd_1, read, zipped, end):
    path, state = sd_1.with_name(f"pickle{end}"), load_file(sd_1)
    for content in (state, {"state_dict": state, "global_step": 840000}):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert_same(read(path), parameters(models["1"]))


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, zipped):
    path, proof = tmp_path / "model.ckpt", tmp_path / "ran"
    content = {"state_dict": {}, "callbacks": _Payload(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with refused(CheckpointError, "refuses, broken or able to run code; convert it"):
        load(path)
    assert not proof.exists()


def test_a_pickle_of_something_else_is_named(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "model.ckpt")
    with refused(CheckpointError, "a pickle of a list, no dict of tensors"):
        load(tmp_path / "model.ckpt")


# --- another VAE


@pytest.fixture(scope="module")
def foreign(tokenizer_folder):
    """A model whose VAE differs in its weights and widths."""
    config = replace(SD_1, vae=VAEConfig(block_out_channels=(32, 64, 64, 64)))
    return random_model(config, tokenizer_folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, base",
    [
        ("CompVis", "sd1"),
        ("first_stage_model", "sd1.safetensors"),
        ("diffusers", "sd1"),
        ("pickle", "sd1.safetensors"),
        ("vae folder", "sd1.safetensors"),
        ("model folder", "sd1"),
    ],
)
def test_another_vae_takes_the_place_of_the_models_own(
    models, kept, foreign, read, tmp_path, form, base
):
    state = {k: v for k, v in parameters(foreign).items() if k.startswith("vae.")}
    named, path = compvis(state), tmp_path / "vae.safetensors"
    bare = {k.removeprefix("first_stage_model."): v for k, v in named.items()}
    bare |= {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    if form == "pickle":
        path = tmp_path / "vae.pt"
        torch.save({"state_dict": bare}, path)
    elif "folder" in form:
        save_folder(foreign, tmp_path / "other")
        path = tmp_path / "other" / ("vae" if form == "vae folder" else "")
    else:
        forms = {"CompVis": bare, "first_stage_model": named, "diffusers": foreign.vae.state_dict()}
        save_file({k: v.clone() for k, v in forms[form].items()}, path)
    model = read(kept / base, vae=path)
    own = {k: v for k, v in parameters(models["1"]).items() if not k.startswith("vae.")}
    assert_same(model, own | state)
    assert model.config.vae == foreign.config.vae
    assert len(model.sha256()) == (3 if base == "sd1" else 2)
    file = path.name if path.is_file() else "diffusion_pytorch_model.safetensors"
    assert f"vae/{file}" in model.files


@pytest.mark.slow
def test_a_model_without_a_vae_takes_anothers(models, kept, sd_1, read):
    rewrite(sd_1, lambda t: {k: v for k, v in t.items() if not k.startswith("first_stage")})
    assert_same(read(sd_1, vae=kept / "sd1"), parameters(models["1"]))


@slow
def test_what_is_no_vae_or_none_of_this_family_or_not_whole_is_named(sd_1, kept, tmp_path):
    save_file({"lora_unet_conv_in.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    scaled = Path(shutil.copytree(kept / "sd1" / "vae", tmp_path / "scaled"))
    config = json.loads((scaled / "config.json").read_text())
    (scaled / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.13025}))
    state = load_file(scaled / "diffusion_pytorch_model.safetensors")
    save_file(state | {"encoder.more": torch.zeros(1)}, tmp_path / "more.safetensors")
    state.pop("decoder.conv_in.bias")
    save_file(state, tmp_path / "less.safetensors")
    for path, message in {
        sd_1: "not a VAE alone",
        tmp_path / "lora.safetensors": "not a VAE alone",
        scaled: "latents scaled by 0.13025, the model's by 0.18215; this VAE is of another family",
        tmp_path / "more.safetensors": "1 unknown tensor: encoder.more; a model",
        tmp_path / "less.safetensors": "1 missing tensor: vae.decoder.conv_in.bias; fetch it again",
    }.items():
        with refused(CheckpointError, f"^{re.escape(f'{path}: {message}')}"):
            load(kept / "sd1", vae=path)

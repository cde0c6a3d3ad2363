"""Checkpoints: both layouts against stored outputs, what is dropped or renamed, every error line,
and writing."""

import hashlib
import json
import math
import re
import runpy
import shutil
import socket
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm.checkpoints.checkpoint
import ldm.checkpoints.weights
from ldm import CheckpointError
from ldm.checkpoints import NETWORKS, Config, Model, load, save_folder
from ldm.checkpoints.tokenizer import load_tokenizer, save_tokenizer, tokenizer_hash
from ldm.text import TextConfig, encode_prompts, tokenize
from ldm.unet import UNetConfig
from ldm.vae import VAEConfig

REFERENCE = Path(__file__).resolve().parents[4] / "shared" / "reference" / "checkpoints"
WEIGHT_FILES = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")

# SD 1's structure, 1130 tensors, at a few channels
CONFIG = Config(
    unet=UNetConfig(
        block_out_channels=(8, 16, 24, 24),
        num_heads=(2, 2, 2, 2),
        cross_attention_dim=12,
        norm_num_groups=4,
    ),
    vae=VAEConfig(block_out_channels=(8, 12, 16, 16), norm_num_groups=4),
    text_encoder=TextConfig(
        vocab_size=600,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=16,
    ),
    sample_size=32,
)
# what a single file of that model does not tell
UNTOLD = Config(
    unet=UNetConfig(num_heads=(2, 2, 2, 2), norm_num_groups=4),
    vae=VAEConfig(norm_num_groups=4),
    text_encoder=TextConfig(num_attention_heads=3),
    sample_size=32,
)


def compvis(name):
    """The single file's name of our parameter, by arithmetic rather than by table."""
    network, _, key = name.partition(".")
    if network == "text_encoder":
        return f"cond_stage_model.transformer.{key}"
    if network == "vae":
        for ours, theirs in (
            (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
            (r"mid_block\.attentions\.0\.(to_)?", "mid.attn_1."),
            (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
            (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
            (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
            (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
            (r"attn_1\.group_norm", "attn_1.norm"),
            (r"attn_1\.out\.0", "attn_1.proj_out"),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
        ):
            key = re.sub(ours, theirs, key)
        return f"first_stage_model.{key}"
    kind = {"resnets": 0, "attentions": 1}
    for ours, theirs in (
        (r"time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
        (r"conv_in\.", "input_blocks.0.0."),
        (r"conv_norm_out\.", "out.0."),
        (r"conv_out\.", "out.2."),
        (r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
        (r"mid_block\.attentions\.0", "middle_block.1"),
        (
            r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)",
            lambda m: f"input_blocks.{1 + 3 * int(m[1]) + int(m[3])}.{kind[m[2]]}",
        ),
        (
            r"down_blocks\.(\d)\.downsamplers\.0\.conv",
            lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op",
        ),
        (
            r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)",
            lambda m: f"output_blocks.{3 * int(m[1]) + int(m[3])}.{kind[m[2]]}",
        ),
        (
            r"up_blocks\.(\d)\.upsamplers\.0",
            lambda m: f"output_blocks.{3 * int(m[1]) + 2}.{1 if m[1] == '0' else 2}",
        ),
    ):
        key = re.sub(ours, theirs, key)
    if re.match(r"(in|out)put_blocks\.\d+\.0|middle_block\.[02]", key):
        for ours, theirs in (
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
            ("conv_shortcut", "skip_connection"),
        ):
            key = key.replace(ours, theirs)
    return f"model.diffusion_model.{key}"


def parameters(model):
    """Name, behind its network's -> tensor."""
    return {
        f"{name}.{key}": v
        for name in NETWORKS
        for key, v in getattr(model, name).state_dict().items()
    }


def assert_same(model, expected):
    actual = parameters(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def rewrite(path, change, metadata=None):
    """Apply `change` to the file's dict of tensors."""
    tensors = load_file(path)
    save_file(change(tensors), path, metadata)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """CLIP's format with letters for tokens and a few merges."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(c) for c in range(33, 127)]
    merges = ["f e", "t a", "ta l</w>", "fe tal</w>"]
    vocabulary = [*letters, *(c + "</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


def random_model(config, tokenizer_folder):
    """A model of random float16 numbers in float32 tensors."""
    generator = torch.Generator().manual_seed(0)
    networks = {name: build(getattr(config, name)).eval() for name, build in NETWORKS.items()}
    for network in networks.values():
        for p in network.requires_grad_(False).parameters():
            p.copy_(torch.randn(p.shape, generator=generator).half() / 8)
    tokenizer = load_tokenizer(tokenizer_folder, config.text_encoder)
    return Model(**networks, tokenizer=tokenizer, sample_size=config.sample_size)


def save_single_file(model, path, metadata=None):
    """CompVis names, float32, with everything a training run leaves beside the networks."""
    tensors = {compvis(name): value.clone() for name, value in parameters(model).items()}
    for key, value in tensors.items():
        if "mid.attn_1" in key and value.ndim == 2:
            tensors[key] = value[:, :, None, None]
    extra = {
        f"model_ema.{k[6:].replace('.', '')}": v + 1
        for k, v in tensors.items()
        if k.startswith("model.")
    }
    extra |= {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    }
    extra |= {"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000)}
    extra |= {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.full((1, 16), 3.5)
    }
    save_file(tensors | extra, path, metadata)


@pytest.fixture(scope="module")
def tiny(tokenizer_folder):
    return random_model(CONFIG, tokenizer_folder)


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    place = tmp_path_factory.mktemp("saved")
    save_folder(tiny, place / "tiny")
    save_single_file(tiny, place / "tiny.safetensors")
    return place


@pytest.fixture
def folder(saved, tmp_path):
    """The tiny model as a diffusers folder, to be damaged."""
    return Path(shutil.copytree(saved / "tiny", tmp_path / "tiny"))


@pytest.fixture
def single_file(saved, tmp_path):
    """The tiny model as a CompVis file, to be damaged."""
    return Path(shutil.copy(saved / "tiny.safetensors", tmp_path))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """case -> the reference model's directory, both layouts inside."""
    if not REFERENCE.is_dir():
        pytest.skip("the shared reference checkpoints are not beside this checkout")
    build = runpy.run_path(str(REFERENCE / "make.py"))["build"]
    out, made = tmp_path_factory.mktemp("reference"), {}
    return lambda case: made.get(case) or made.setdefault(case, build(case, out))


# --- against stored outputs

# the reference models' heads are narrower than the published ones'
REFERENCE_UNTOLD = {
    "tiny_sd1": Config(text_encoder=TextConfig(num_attention_heads=4)),
    "tiny_sd2": Config(
        unet=UNetConfig(num_heads=(2, 4, 8, 8)),
        text_encoder=TextConfig(num_attention_heads=4, hidden_act="gelu"),
        prediction_type="v_prediction",
        sample_size=96,
    ),
}


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("tiny_sd1", "single_file.safetensors"),
        ("tiny_sd1", "diffusers"),
        ("tiny_sd2", "single_file.safetensors"),
        ("tiny_sd2", "diffusers"),
    ],
)
def test_a_loaded_model_gives_the_reference_outputs(built, tokenizer_folder, case, layout):
    """float64 outputs of the original modules; relative to the maximum 5e-6, for the VAE 1e-5."""
    config = REFERENCE_UNTOLD[case] if layout.startswith("single") else None
    model = load(built(case) / layout, tokenizer=tokenizer_folder, config=config)
    assert model.prediction_type == ("epsilon" if case == "tiny_sd1" else "v_prediction")
    assert model.sample_size == (64 if case == "tiny_sd1" else 96)
    gold = load_file(REFERENCE / case / "refs.safetensors")
    for run in "abc":  # c at a fractional time, b with 154 tokens
        eps = model.unet(*(gold[f"in.unet.{run}.{name}"] for name in ("x", "t", "ctx")))
        assert_near(eps, gold[f"gold.unet.{run}.out"], 5e-6)
    for run in "ab":
        image, noise, z = (gold[f"in.vae.{run}.{name}"] for name in ("image", "noise", "z"))
        posterior = model.vae.encode(image)
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
        # logvar lies inside the clamp here
        assert_near(moments, gold[f"gold.vae.{run}.moments"], 1e-5)
        assert_near(posterior.mean, gold[f"gold.vae.{run}.mean"], 1e-5)
        assert_near(posterior.logvar, gold[f"gold.vae.{run}.logvar"], 1e-5)
        assert_near(posterior.std, gold[f"gold.vae.{run}.std"], 1e-5)
        assert_near(model.vae.to_latents(image, noise), gold[f"gold.vae.{run}.latent"], 1e-5)
        assert_near(model.vae.decode(z), gold[f"gold.vae.{run}.decoded"], 1e-5)
    for clip_skip in (1, 2, 3):
        context = model.text_encoder(gold["in.text.ids"], clip_skip)
        assert_near(context, gold[f"gold.text.clip_skip{clip_skip}"], 5e-6)


def assert_near(actual, expected, rel):
    torch.testing.assert_close(actual, expected, rtol=0, atol=rel * expected.abs().max().item())


def test_the_table_covers_the_published_names(built, tokenizer_folder):
    model = load(built("tiny_sd1") / "diffusers", tokenizer=tokenizer_folder)
    published = load_file(built("tiny_sd1") / "single_file.safetensors")
    ours = {compvis(name) for name in parameters(model)}
    assert len(ours) == 686 + 248 + 196
    assert {k for k in published if k.startswith(("model.", "first_", "cond_"))} - ours == {
        "cond_stage_model.transformer.text_model.embeddings.position_ids"
    }


# --- the same weights, however they are stored


def test_a_single_file_gives_every_weight_and_its_sizes(tiny, single_file, tokenizer_folder):
    model = load(single_file, tokenizer=tokenizer_folder, config=UNTOLD)
    assert model.config == CONFIG
    assert_same(model, parameters(tiny))


def test_a_folder_comes_back_as_it_was_saved(tiny, folder):
    model = load(folder)
    assert model.config == CONFIG
    assert_same(model, parameters(tiny))
    prompts = ["Fetal Abdomen!", ""]
    assert torch.equal(tokenize(model.tokenizer, prompts), tokenize(tiny.tokenizer, prompts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_type_of_the_file_and_the_type_asked_for_are_independent(tiny, folder, dtype):
    for name in WEIGHT_FILES:
        rewrite(
            folder / f"{name}.safetensors",
            lambda tensors: {k: v.to(dtype) for k, v in tensors.items()},
        )
    assert_same(load(folder), {k: v.to(dtype).float() for k, v in parameters(tiny).items()})
    assert_same(load(folder, dtype=dtype), {k: v.to(dtype) for k, v in parameters(tiny).items()})


def test_a_loaded_model_is_real_frozen_and_in_eval_mode(folder, single_file, tokenizer_folder):
    for model in (load(folder), load(single_file, tokenizer=tokenizer_folder, config=UNTOLD)):
        for name in NETWORKS:
            network = getattr(model, name)
            assert not network.training
            assert not any(p.requires_grad for p in network.parameters())
            assert {v.device.type for v in (*network.parameters(), *network.buffers())} == {"cpu"}
        assert model.text_encoder.text_model.embeddings.position_ids.tolist() == [list(range(16))]


def mapped_weights(model, path):
    """How many of the model's parameters are in memory that is mapped from the file, and of how
    many."""
    mappings = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [[int(end, 16) for end in m[0].split("-")] for m in mappings if m[5:] == [str(path)]]
    pointers = [value.data_ptr() for value in parameters(model).values()]
    return sum(any(start <= p < end for start, end in spans) for p in pointers), len(pointers)


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="what is mapped is seen on Linux alone"
)
def test_weights_that_keep_their_type_take_no_memory_but_the_files(single_file, tokenizer_folder):
    rewrite(
        single_file,
        lambda tensors: {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()},
    )
    options = {"config": UNTOLD, "tokenizer": tokenizer_folder}
    assert mapped_weights(load(single_file, dtype=torch.float16, **options), single_file) == (
        986,
        986,
    )
    assert mapped_weights(load(single_file, dtype=torch.float32, **options), single_file) == (
        0,
        986,
    )


def test_weights_outlive_a_file_that_is_removed_or_replaced_by_a_rename(tiny, folder):
    model = load(folder)
    for name in WEIGHT_FILES:
        path = folder / f"{name}.safetensors"
        zeros = path.with_suffix(".part")
        zeros.write_bytes(bytes(path.stat().st_size))
        zeros.replace(path)
    assert_same(model, parameters(tiny))
    shutil.rmtree(folder)
    assert_same(model, parameters(tiny))


def test_a_write_to_a_weight_does_not_reach_the_file(folder):
    files = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    model = load(folder)
    for network in NETWORKS:
        for parameter in getattr(model, network).parameters():
            parameter.add_(1)
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.slow
def test_weights_behind_a_header_of_odd_length_are_moved_to_whole_addresses(tiny, folder):
    for name in WEIGHT_FILES:
        path = folder / f"{name}.safetensors"
        whole = path.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        spaces = b" " * (1 + end % 2)
        path.write_bytes(
            struct.pack("<Q", end - 8 + len(spaces)) + whole[8:end] + spaces + whole[end:]
        )
    model = load(folder)
    assert_same(model, parameters(tiny))
    assert all(value.data_ptr() % value.element_size() == 0 for value in parameters(model).values())


def test_of_a_single_file_only_the_wanted_tensors_are_read(
    single_file, tokenizer_folder, monkeypatch
):
    read = []

    class Recorder:
        def __init__(self, *args):
            self.file = safe_open(*args)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def get_tensor(self, key):
            read.append(key)
            return self.file.get_tensor(key)

    safe_open = ldm.checkpoints.weights.safe_open
    monkeypatch.setattr(ldm.checkpoints.weights, "safe_open", Recorder)
    load(single_file, tokenizer=tokenizer_folder, config=UNTOLD)
    assert len(read) == len(set(read)) == 686 + 248 + 52  # 52: a text tower of three layers
    assert not any(key.startswith("model_ema") or key.endswith("position_ids") for key in read)


@pytest.mark.slow
def test_text_keys_may_lack_text_model(tiny, folder, single_file, tokenizer_folder):
    rewrite(
        single_file, lambda tensors: {k.replace("text_model.", ""): v for k, v in tensors.items()}
    )
    assert_same(load(single_file, tokenizer=tokenizer_folder, config=UNTOLD), parameters(tiny))
    positions = {"embeddings.position_ids": torch.zeros(1, 16)}
    rewrite(
        folder / "text_encoder/model.safetensors",
        lambda tensors: {k.replace("text_model.", ""): v for k, v in tensors.items()} | positions,
    )
    assert_same(load(folder), parameters(tiny))


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def renamed(tensors, names):
    """The VAE attention's tensors under other names, the others as they are."""
    result = {}
    for key, value in tensors.items():
        for old, new in names.items():
            if re.search(r"attn_1|mid_block\.attentions", key):
                key = key.replace(f".{old}.", f".{new}.")
        result[key] = value
    return result


@pytest.mark.slow
def test_a_vae_with_the_old_attention_names_loads_from_a_folder(tiny, folder):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    rewrite(path, lambda tensors: renamed(tensors, OLD_NAMES))
    assert any("query" in key for key in load_file(path))
    assert_same(load(folder), parameters(tiny))


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"},
        {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"},
    ],
)
def test_broken_converters_vae_names_and_flat_weights_load_from_a_single_file(
    tiny, single_file, tokenizer_folder, names
):
    rewrite(
        single_file,
        lambda tensors: {
            k: v[..., 0, 0] if "attn_1" in k and v.ndim == 4 else v for k, v in tensors.items()
        },
    )
    rewrite(single_file, lambda tensors: renamed(tensors, names))
    assert any("attn_1." + names["q"] in key for key in load_file(single_file))
    assert_same(load(single_file, tokenizer=tokenizer_folder, config=UNTOLD), parameters(tiny))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_and_fp16_names_load_from_a_folder(tiny, folder, variant):
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors, shards = load_file(whole), {}
    for n, key in enumerate(sorted(tensors)):
        name = f"diffusion_pytorch_model{variant}-0000{n % 3 + 1}-of-00003.safetensors"
        shards.setdefault(name, {})[key] = tensors[key]
    for name, part in shards.items():
        save_file(part, whole.with_name(name))
    index = f"diffusion_pytorch_model.safetensors.index{variant}.json"
    where = {key: name for name, part in shards.items() for key in part}
    whole.with_name(index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    whole.unlink()
    for name in WEIGHT_FILES[1:]:
        (folder / f"{name}.safetensors").rename(folder / f"{name}{variant}.safetensors")
    assert_same(load(folder), parameters(tiny))


@pytest.mark.slow
def test_the_digests_are_those_of_the_files(folder, single_file, tokenizer_folder):
    digests = load(folder).sha256()
    assert list(digests) == [f"{name}.safetensors" for name in WEIGHT_FILES]
    for name, digest in digests.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    digests = load(single_file, tokenizer=tokenizer_folder, config=UNTOLD).sha256()
    assert digests == {"tiny.safetensors": hashlib.sha256(single_file.read_bytes()).hexdigest()}


@pytest.mark.slow
def test_a_single_files_header_can_state_v_prediction(tmp_path, tokenizer_folder):
    config = Config(
        unet=UNetConfig(block_out_channels=(32,) * 4, cross_attention_dim=4),
        vae=VAEConfig(block_out_channels=(32,) * 4),
        text_encoder=TextConfig(
            vocab_size=200, hidden_size=12, intermediate_size=4, num_hidden_layers=1
        ),
    )
    model = random_model(config, tokenizer_folder)
    path = tmp_path / "v.safetensors"
    for stated, expected in (("v", "v_prediction"), ("epsilon", "epsilon")):
        save_single_file(model, path, {"modelspec.prediction_type": stated})
        assert load(path, tokenizer=tokenizer_folder).prediction_type == expected
    told = load(path, tokenizer=tokenizer_folder, config=Config(prediction_type="v_prediction"))
    assert told.prediction_type == "v_prediction"
    assert told.config == replace(config, prediction_type="v_prediction")


# --- errors


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file or folder"):
        load(tmp_path / "none.safetensors")


PICKLE = b"\x80\x02}q\x00X\x05\x00\x00\x00stateq\x01."
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:6ce0161689\nsize 4265146304\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in\n - Hub</title></head></html>"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, 0 bytes"),
        (POINTER, "a git-LFS pointer, not the weights (4265146304 bytes); run `git lfs pull`"),
        (PAGE, "a web page titled 'Sign in - Hub', not the weights"),
        (
            b'{"error": "Repository not found"}',
            'a JSON text, not the weights: {"error": "Repository not found"}',
        ),
        (
            PICKLE,
            (
                "a pickle that torch.load(weights_only=True) refuses, broken or able to run code;"
                " convert it"
            ),
        ),
        (b"PK\x03\x04" + bytes(40), "a pickle that torch.load(weights_only=True) refuses"),
        (b"\xff" * 100, "not a safetensors file"),
        (b"\xff" * 8 + b"{}", "not a safetensors file"),
        (b"abc", "not a safetensors file"),
        (struct.pack("<Q", 4) + b"{]]}", "a damaged safetensors header"),
        (struct.pack("<Q", 9) + b'{"a": 1 }', "a damaged safetensors header"),
    ],
    ids=[
        "empty",
        "LFS",
        "page",
        "JSON",
        "pickle",
        "zip",
        "noise",
        "endless header",
        "short",
        "no JSON",
        "no table",
    ],
)
@pytest.mark.parametrize("layout", ["single", "folder"])
def test_a_file_that_is_no_weights_is_named(folder, tmp_path, content, message, layout):
    path = (
        tmp_path / "model.ckpt"
        if layout == "single"
        else folder / "vae/diffusion_pytorch_model.safetensors"
    )
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: {message}")) as error:
        load(path if layout == "single" else folder)
    assert "\n" not in str(error.value)


def test_a_cut_or_overlong_file_is_told_with_both_sizes(single_file):
    whole = single_file.read_bytes()
    single_file.write_bytes(whole[:-5])
    with pytest.raises(
        CheckpointError,
        match=f"cut short, {len(whole) - 5} bytes where its header says {len(whole)}",
    ):
        load(single_file)
    single_file.write_bytes(whole + b"more")
    with pytest.raises(
        CheckpointError,
        match=f"too long, {len(whole) + 4} bytes where its header says {len(whole)}",
    ):
        load(single_file)
    single_file.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="cut short, 100 bytes where its header ends at"):
        load(single_file)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
            "an SDXL checkpoint; give one of SD 1 or SD 2",
        ),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "a Flux checkpoint"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "an SD 3 checkpoint"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "a LoRA, not a base model"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "a LoRA, not a base model"),
        ("control_model.time_embed.0.weight", "a ControlNet"),
        (
            "down_blocks.0.resnets.0.norm1.weight",
            "a U-Net alone; give the diffusers folder around it",
        ),
        ("encoder.conv_in.weight", "a VAE alone"),
        ("text_model.final_layer_norm.weight", "a text encoder alone"),
        (
            "something.else",
            r"not a Stable Diffusion checkpoint: no tensor model\.diffusion_model\.\*",
        ),
    ],
)
def test_a_single_file_of_another_family_is_named(tmp_path, key, message):
    save_file({key: torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "other.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "kind"), [(9, "an inpainting"), (8, "an instruct-pix2pix"), (6, "another kind")]
)
def test_a_unet_with_other_inputs_is_named(single_file, channels, kind):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    rewrite(single_file, lambda tensors: tensors | {key: torch.zeros(8, channels, 3, 3)})
    with pytest.raises(CheckpointError, match=rf"{kind}.* U-Net \({channels} input channels\)"):
        load(single_file, config=UNTOLD)


@pytest.mark.slow
def test_missing_tensors_are_counted_and_the_first_five_named(folder, single_file):
    rewrite(
        single_file,
        lambda tensors: {k: v for k, v in tensors.items() if "first_stage_model.decoder" not in k},
    )
    with pytest.raises(
        CheckpointError, match=r"138 of 248 vae tensors missing: (vae\.[\w.]+, ){5}\.\.; fetch it"
    ):
        load(single_file, config=UNTOLD)
    rewrite(
        folder / "unet/diffusion_pytorch_model.safetensors",
        lambda t: t.pop("conv_in.bias") is None or t,
    )
    with pytest.raises(
        CheckpointError, match=r"1 of 686 unet tensors missing: unet\.conv_in\.bias; fetch it"
    ):
        load(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.12.0.in_layers.0.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.9.weight",
        "first_stage_model.loss.logvar",
        "cond_stage_model.transformer.text_model.encoder.layers.0.adapter",
    ],
)
def test_an_unknown_tensor_is_an_error(single_file, key):
    rewrite(single_file, lambda tensors: tensors | {key: torch.zeros(3)})
    with pytest.raises(CheckpointError, match=f"1 unknown tensor: {re.escape(key)}; a model"):
        load(single_file, config=UNTOLD)


@pytest.mark.slow
def test_what_lies_beside_the_networks_in_a_single_file_is_said_once_and_let_be(
    tiny, single_file, tokenizer_folder
):
    more = {
        f"{key}": torch.zeros(3)
        for key in ("global_step_of_mine", "control.0.weight", "safety.concepts")
    }
    rewrite(single_file, lambda tensors: tensors | more)
    with pytest.warns(
        UserWarning, match=r"3 more tensors: .*control\.0\.weight.* beside the model, not read$"
    ) as said:
        model = load(single_file, config=UNTOLD, tokenizer=tokenizer_folder)
    assert len(said) == 1
    assert_same(model, parameters(tiny))


@pytest.mark.slow
def test_a_model_without_a_vae_takes_anothers_and_else_asks_for_one(
    tiny, folder, single_file, tokenizer_folder
):
    whole = shutil.copytree(folder / "vae", folder.parent / "vae")
    rewrite(
        single_file,
        lambda t: {k: v for k, v in t.items() if not k.startswith("first_stage_model.")},
    )
    with pytest.raises(
        CheckpointError, match=r"tiny\.safetensors: no VAE inside; give one by --vae$"
    ):
        load(single_file, config=UNTOLD, tokenizer=tokenizer_folder)
    assert_same(
        load(single_file, config=UNTOLD, tokenizer=tokenizer_folder, vae=whole), parameters(tiny)
    )
    for file in (folder / "vae").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(
        CheckpointError, match=r"vae: no diffusion_pytorch_model.*; give another by --vae$"
    ):
        load(folder)
    assert_same(load(folder, vae=whole), parameters(tiny))


@pytest.mark.slow
def test_an_unknown_tensor_in_a_folder_is_an_error(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    rewrite(path, lambda tensors: tensors | {"add_embedding.linear_1.weight": torch.zeros(3)})
    with pytest.raises(
        CheckpointError, match=re.escape(f"{path}: 1 unknown tensor: add_embedding.linear_1.weight")
    ):
        load(folder)


@pytest.mark.slow
def test_two_tensors_for_one_parameter_are_an_error(folder):
    path = folder / "text_encoder/model.safetensors"
    rewrite(path, lambda tensors: tensors | {"final_layer_norm.weight": torch.zeros(12)})
    with pytest.raises(
        CheckpointError, match=r"are both text_encoder\.text_model\.final_layer_norm\.weight"
    ):
        load(folder)


@pytest.mark.slow
def test_a_wrong_shape_is_told_with_the_files_own_key(single_file):
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    rewrite(single_file, lambda tensors: tensors | {key: torch.zeros(24, 23, 1, 1)})
    message = f"{key} has shape [24, 23, 1, 1], the network wants [24, 24, 1, 1]"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(single_file, config=UNTOLD)


@pytest.mark.slow
def test_heads_and_groups_that_do_not_divide_the_widths_are_an_error(single_file):
    with pytest.raises(
        CheckpointError,
        match="8 channels do not divide into 32 U-Net norm groups; a model of anoth",
    ):
        load(single_file)
    for config, message in (
        (replace(UNTOLD, unet=replace(UNTOLD.unet, num_heads=(8, 8, 8, 5))), "24 .* 5 U-Net heads"),
        (replace(UNTOLD, vae=VAEConfig(norm_num_groups=8)), "12 .* 8 VAE norm groups"),
        (
            replace(UNTOLD, text_encoder=TextConfig(num_attention_heads=8)),
            "12 .* 8 text encoder heads",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(single_file, config=config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn is 'gelu'; only 'silu' is implemented"),
        ("unet/config.json", {"freq_shift": 1}, "freq_shift is 1; only 0 is implemented"),
        (
            "unet/config.json",
            {"up_block_types": ["UpBlock2D"] * 4},
            "only SD's, mirrored, are implemented",
        ),
        ("unet/config.json", {"in_channels": 9}, "an inpainting U-Net"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor is 0.1; only None is implemented"),
        ("text_encoder/config.json", {"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
        (
            "scheduler/scheduler_config.json",
            {"beta_schedule": "linear"},
            "beta_schedule is 'linear'",
        ),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "sample"},
            "prediction_type 'sample' is not one of",
        ),
    ],
)
def test_a_folder_beyond_these_networks_is_an_error(folder, file, change, message):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.slow
def test_an_incomplete_folder_is_an_error(folder):
    (folder / "scheduler/scheduler_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: not JSON"):
        load(folder)
    (folder / "vae/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"vae/config\.json: no such file"):
        load(folder)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(
        CheckpointError,
        match=r"no diffusion_pytorch_model\.safetensors .* only a pickle; convert it",
    ):
        load(folder)


# --- the tokenizer


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache, and a network that fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(
        "huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub")
    )
    return tmp_path / "hub"


def test_without_a_tokenizer_the_files_to_fetch_are_named(single_file, hub_cache):
    message = (
        "no tokenizer: --tokenizer openai/clip-vit-large-patch14 fetches it from the hub; without a"
        " network put its "
    )
    with pytest.raises(CheckpointError, match=message):
        load(single_file, config=UNTOLD)


def test_a_tokenizer_in_the_hub_cache_is_found(single_file, hub_cache, tokenizer_folder):
    repository = hub_cache / "models--openai--clip-vit-large-patch14"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(tokenizer_folder)
    assert tokenize(load(single_file, config=UNTOLD).tokenizer, ["fetal"]).shape == (1, 77)


def test_a_folder_without_its_tokenizer_is_an_error(folder, tokenizer_folder):
    (folder / "tokenizer/merges.txt").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"tokenizer: no merges\.txt; put those of openai/clip-vit-large-patch14",
    ):
        load(folder)
    assert load(folder, tokenizer=tokenizer_folder).tokenizer


def test_a_tokenizer_with_more_tokens_than_embeddings_is_an_error(tokenizer_folder):
    with pytest.raises(CheckpointError, match="194 tokens, the text encoder knows 100"):
        load_tokenizer(tokenizer_folder, TextConfig(vocab_size=100))


def test_prompts_are_marked_cut_and_padded_to_the_length(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder, CONFIG.text_encoder)
    ids = tokenize(tokenizer, ["fetal", "a " * 100, ""])
    begin, end = 192, 193
    assert ids.shape == (3, 77)
    assert ids[0].tolist() == [begin, 191] + [end] * 75
    assert ids[1, [0, 75, 76]].tolist() == [begin, ids[1, 1], end]
    assert ids[2].tolist() == [begin] + [end] * 76


SD_2 = {
    "special_tokens_map.json": {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "!",
    },
    "tokenizer_config.json": {
        "pad_token": "!",
        "added_tokens_decoder": {"0": {"content": "!", "special": True}},
    },
}


@pytest.mark.parametrize(
    "json_files", [{}, SD_2, {"special_tokens_map.json": SD_2["special_tokens_map.json"]}]
)
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_the_text_encoder_and_no_json_says_what_pads_and_a_typed_exclamation_mark_is_a_word(
    tokenizer_folder, act, json_files
):
    for name, content in json_files.items():
        (tokenizer_folder / name).write_text(json.dumps(content))
    config = TextConfig(vocab_size=194, hidden_act=act)
    ids = tokenize(load_tokenizer(tokenizer_folder, config), ["fetal !"], config)[0].tolist()
    exclamation = 94  # "!</w>"; "!" within a word is 0, which pads SD 2's prompts
    assert ids == [192, 191, exclamation, 193] + [0 if act == "gelu" else 193] * 73


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<probe>": 195, "<us>": 194, "<|endoftext|>": 193}),
        (
            "tokenizer_config.json",
            {
                "added_tokens_decoder": {
                    str(n): {"content": t} for n, t in enumerate(["<us>", "<probe>"], 194)
                }
            },
        ),
    ],
)
def test_tokens_that_were_added_keep_their_numbers(tokenizer_folder, tmp_path, name, content):
    config = TextConfig(vocab_size=196)
    (tokenizer_folder / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tokenizer_folder, config)
    save_tokenizer(tokenizer, tmp_path / "again", config)
    for known in (tokenizer, load_tokenizer(tmp_path / "again", config)):
        assert tokenize(known, ["fetal <probe> <us>"], config)[0, :5].tolist() == [
            192,
            191,
            195,
            194,
            193,
        ]


@pytest.mark.parametrize("pairs", [str, list])  # as written before transformers 4.45, and since
def test_a_tokenizer_in_one_file_as_transformers_5_saves_it_is_the_same(
    tokenizer_folder, tmp_path, pairs
):
    config = TextConfig(vocab_size=196)
    known = load_tokenizer(tokenizer_folder, config)
    known.add_tokens(["<probe>"])
    known.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = [
        pair.split(" ") if isinstance(pair, str) else pair for pair in whole["model"]["merges"]
    ]
    whole["model"]["merges"] = [" ".join(pair) if pairs is str else pair for pair in merges]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    again, texts = load_tokenizer(tmp_path, config), ["a fetal <probe>!", "", "total"]
    assert tokenizer_hash(again) == tokenizer_hash(known) and len(again) == len(known)
    assert torch.equal(tokenize(again, texts, config), tokenize(known, texts, config))
    whole["model"].pop("merges")
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not as transformers writes it"):
        load_tokenizer(tmp_path, config)


@pytest.mark.parametrize(
    "name, content",
    [
        ("vocab.json", "[1"),
        ("vocab.json", '{"a": "b"}'),
        ("merges.txt", "a\n"),
        ("merges.txt", "#version\n" + "q z\n"),
    ],
)
def test_a_damaged_vocabulary_is_named(tokenizer_folder, tmp_path, name, content):
    tokenizer_folder = shutil.copytree(tokenizer_folder, tmp_path / "damaged")
    (tokenizer_folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=r"no tokenizer of CLIP's kind .*; fetch it again$"):
        load_tokenizer(tokenizer_folder, TextConfig())


@pytest.mark.parametrize("content", ["[]", "{", '{"added_tokens_decoder": {"a": 1}}'])
def test_a_broken_list_of_added_tokens_is_named(tokenizer_folder, content):
    (tokenizer_folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(
        CheckpointError,
        match=r"tokenizer_config\.json: not as transformers writes it .*; fetch it again$",
    ):
        load_tokenizer(tokenizer_folder, TextConfig())


def test_prompts_are_encoded_at_the_towers_own_length(tiny):
    prompts = ["fetal brain", "fetal femur"]
    with torch.no_grad():
        context = encode_prompts(tiny.tokenizer, tiny.text_encoder, prompts, clip_skip=2)
        expected = tiny.text_encoder(
            tokenize(tiny.tokenizer, prompts, tiny.text_encoder.config), clip_skip=2
        )
    assert context.shape == (2, 16, 12)
    assert torch.equal(context, expected)


# --- writing


@pytest.mark.slow
def test_a_folder_saved_in_float16_halves_and_loads_alike(tiny, folder, tmp_path):
    save_folder(tiny, tmp_path / "half", dtype=torch.float16)
    for name in WEIGHT_FILES:
        whole, half = (
            load_file(folder / f"{name}.safetensors"),
            load_file(tmp_path / "half" / f"{name}.safetensors"),
        )
        assert {v.dtype for v in half.values()} == {torch.float16}
        assert whole.keys() == half.keys()
    assert_same(load(tmp_path / "half"), parameters(tiny))  # the model's numbers are float16's


def test_an_existing_path_is_not_overwritten(tiny, folder):
    before = (folder / "model_index.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        save_folder(tiny, folder)
    assert (folder / "model_index.json").read_bytes() == before


def test_a_save_that_fails_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(ldm.checkpoints.checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_folder(tiny, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".new.part").mkdir()
    (tmp_path / ".new.part" / "of a killed save").touch()
    monkeypatch.undo()
    save_folder(tiny, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.slow
def test_diffusers_loads_what_was_saved(tiny, folder):
    """StableDiffusionPipeline.from_pretrained: the same noise from the same prompt within 1e-5 of
    its maximum."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["fetal brain"]
    generator = torch.Generator().manual_seed(0)
    latents, image = (
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.randn(1, 3, 16, 16, generator=generator),
    )
    with torch.no_grad():
        context = encode_prompts(tiny.tokenizer, tiny.text_encoder, prompts)
        expected = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)[0]
        assert_near(context, expected, 1e-5)
        eps = pipeline.unet(latents, 500, encoder_hidden_states=expected).sample
        assert_near(tiny.unet(latents, 500, context), eps, 1e-5)
        assert_near(tiny.vae.encode(image).mean, pipeline.vae.encode(image).latent_dist.mean, 1e-5)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert math.isclose(pipeline.scheduler.alphas_cumprod[-1].item(), 0.0046604, rel_tol=1e-4)
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 256

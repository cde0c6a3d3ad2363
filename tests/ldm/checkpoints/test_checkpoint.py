"""Checkpoints: both layouts against stored outputs, what is dropped or renamed, every error line,
the tokenizer, and writing."""

import hashlib
import json
import runpy
import shutil
import socket
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shorthand import REFERENCES, agree, read_json, refused

import ldm.checkpoints.checkpoint
from ldm import CheckpointError
from ldm.checkpoints import NETWORKS, Config, Model, load, save_folder
from ldm.checkpoints.keys import SINGLE_FILE, inverse, rename
from ldm.checkpoints.tokenizer import load_tokenizer, save_tokenizer, tokenizer_hash
from ldm.text import TextConfig, encode_prompts, tokenize
from ldm.unet import UNetConfig
from ldm.vae import VAEConfig

UNET, VAE = (f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "vae"))
TEXT = "text_encoder/model.safetensors"

# SD 1's structure, 1130 tensors, at a few channels
CONFIG = Config(
    unet=UNetConfig(
        block_out_channels=(8, 16, 24, 24),
        num_heads=(2, 2, 2, 2),
        cross_attention_dim=12,
        norm_num_groups=4,
    ),
    vae=VAEConfig(block_out_channels=(8, 12, 16, 16), norm_num_groups=4),
    text_encoder=TextConfig(600, 12, 20, 3, 3, 16),
    sample_size=32,
)
# what a single file of that model does not tell
UNTOLD = Config(
    unet=UNetConfig(num_heads=(2, 2, 2, 2), norm_num_groups=4),
    vae=VAEConfig(norm_num_groups=4),
    text_encoder=TextConfig(num_attention_heads=3),
    sample_size=32,
)


def parameters(model):
    """Name, behind its network's -> tensor."""
    return model.networks.state_dict()


def assert_same(model, expected):
    actual = parameters(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def assert_near(actual, expected, rel):
    agree(actual, expected, rel * expected.abs().max().item())


def rewrite(path, change):
    """Apply `change` to the file's dict of tensors."""
    save_file(change(load_file(path)), path)


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


def compvis(state):
    """A state of SD 1 under a single file's names and in its shapes."""
    names = inverse(SINGLE_FILE)
    tensors = {rename(name, names): value.clone() for name, value in state.items()}
    return {
        key: value[:, :, None, None] if "mid.attn_1" in key and value.ndim == 2 else value
        for key, value in tensors.items()
    }


def save_single_file(model, path, metadata=None):
    """CompVis names, float32, with everything a training run leaves beside the networks."""
    tensors = compvis(parameters(model))
    tensors |= {
        f"model_ema.{k[6:].replace('.', '')}": v + 1
        for k, v in tensors.items()
        if k.startswith("model.")
    }
    tensors |= {name: torch.zeros(9) for name in ("betas", "alphas_cumprod", "model_ema.decay")}
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    save_file(tensors | {positions: torch.full((1, 16), 3.5)}, path, metadata)


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
def places(saved, tmp_path):
    """The tiny model as a "file" and as a "folder", to be damaged."""
    return {
        "file": Path(shutil.copy(saved / "tiny.safetensors", tmp_path)),
        "folder": Path(shutil.copytree(saved / "tiny", tmp_path / "tiny")),
    }


@pytest.fixture
def read(places, tokenizer_folder):
    """Loads either."""
    options = {"file": {"config": UNTOLD, "tokenizer": tokenizer_folder}, "folder": {}}
    return lambda layout, **more: load(places[layout], **options[layout], **more)


# --- against stored outputs

# the reference models' heads are narrower than the published ones'
REFERENCE_UNTOLD = {
    "sd1": Config(text_encoder=TextConfig(num_attention_heads=4)),
    "sd2": Config(
        unet=UNetConfig(num_heads=(2, 4, 8, 8)),
        text_encoder=TextConfig(num_attention_heads=4, hidden_act="gelu"),
        prediction_type="v_prediction",
        sample_size=96,
    ),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """case -> the reference model's directory, both layouts inside."""
    build = runpy.run_path(str(REFERENCES / "make_checkpoints.py"))["build"]
    out, made = tmp_path_factory.mktemp("reference"), {}
    return lambda case: made.get(case) or made.setdefault(case, build(case, out))


@pytest.mark.parametrize("case", ["sd1", pytest.param("sd2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["single_file.safetensors", "diffusers"])
def test_a_loaded_model_gives_the_reference_outputs(built, tokenizer_folder, case, layout):
    """float64 outputs of the original modules; relative to the maximum 5e-6, for the VAE 1e-5."""
    config = REFERENCE_UNTOLD[case] if layout.startswith("single") else None
    model = load(built(case) / layout, tokenizer=tokenizer_folder, config=config)
    expected = ("epsilon", 64) if case == "sd1" else ("v_prediction", 96)
    assert (model.prediction_type, model.sample_size) == expected
    gold = load_file(REFERENCES / f"checkpoint_{case}.safetensors")
    for run in "abc":  # c at a fractional time, b with 154 tokens
        eps = model.unet(*(gold[f"in.unet.{run}.{name}"] for name in ("x", "t", "ctx")))
        assert_near(eps, gold[f"gold.unet.{run}.out"], 5e-6)
    image, noise, z = (gold[f"in.vae.b.{name}"] for name in ("image", "noise", "z"))
    posterior = model.vae.encode(image)
    for name, value in {  # logvar lies inside the clamp here
        "moments": torch.cat([posterior.mean, posterior.logvar], dim=1),
        "std": posterior.std,
        "latent": model.vae.to_latents(image, noise),
        "decoded": model.vae.decode(z),
    }.items():
        assert_near(value, gold[f"gold.vae.b.{name}"], 1e-5)
    for clip_skip in (1, 2, 3):
        context = model.text_encoder(gold["in.text.ids"], clip_skip)
        assert_near(context, gold[f"gold.text.clip_skip{clip_skip}"], 5e-6)


# --- the same weights, however they are stored


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_a_model_comes_with_every_weight_its_sizes_and_digests_frozen_in_eval_mode(
    tiny, places, read, layout
):
    model = read(layout)
    assert model.config == CONFIG
    assert_same(model, parameters(tiny))
    for name in NETWORKS:
        network = getattr(model, name)
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        assert {v.device.type for v in (*network.parameters(), *network.buffers())} == {"cpu"}
    assert model.text_encoder.text_model.embeddings.position_ids.tolist() == [list(range(16))]
    path = places[layout]
    files = {path.name: path} if layout == "file" else {n: path / n for n in (UNET, VAE, TEXT)}
    digests = {n: hashlib.sha256(file.read_bytes()).hexdigest() for n, file in files.items()}
    assert model.sha256() == digests
    prompts = ["Fetal Abdomen!", ""]
    assert torch.equal(tokenize(model.tokenizer, prompts), tokenize(tiny.tokenizer, prompts))


def without_text_model(path):
    file = path / TEXT if path.is_dir() else path
    rewrite(file, lambda t: {key.replace("text_model.", ""): v for key, v in t.items()})


def vae_names(**names):
    """The VAE attention's tensors under other names and, in a single file, without the 1x1."""
    names = {old.replace("to_out_0", "to_out.0"): new for old, new in names.items()}

    def change(path):
        result, file = {}, path / VAE if path.is_dir() else path
        for key, value in load_file(file).items():
            if "attn_1." in key or ("mid_block.attentions." in key and file.name in VAE):
                for old, new in names.items():
                    key = key.replace(f".{old}.", f".{new}.")
                value = value[..., 0, 0] if value.ndim == 4 else value
            result[key] = value
        assert sum("query" in key or "to_q" in key for key in result) > 3
        save_file(result, file)

    return change


def in_shards(variant):
    def change(folder):
        tensors, shards, stem = load_file(folder / UNET), {}, "diffusion_pytorch_model"
        for n, key in enumerate(sorted(tensors)):
            name = f"{stem}{variant}-0000{n % 3 + 1}-of-00003.safetensors"
            shards.setdefault(name, {})[key] = tensors[key]
        for name, part in shards.items():
            save_file(part, folder / "unet" / name)
        where = {key: name for name, part in shards.items() for key in part}
        index = folder / "unet" / f"{stem}.safetensors.index{variant}.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (folder / UNET).unlink()
        for name in (VAE, TEXT):
            (folder / name).rename((folder / name).with_suffix(f"{variant}.safetensors"))

    return change


def odd_header(folder):
    for name in (UNET, VAE, TEXT):
        whole = (folder / name).read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        spaces = b" " * (1 + end % 2)
        header = struct.pack("<Q", end - 8 + len(spaces)) + whole[8:end] + spaces
        (folder / name).write_bytes(header + whole[end:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, change",
    [
        ("file", without_text_model),
        ("folder", without_text_model),
        ("folder", vae_names(to_q="query", to_k="key", to_v="value", to_out_0="proj_attn")),
        ("file", vae_names(q="query", k="key", v="value", proj_out="proj_attn")),
        ("file", vae_names(q="to_q", k="to_k", v="to_v", proj_out="to_out.0", norm="group_norm")),
        ("folder", in_shards("")),
        ("folder", in_shards(".fp16")),
        ("folder", odd_header),
    ],
)
def test_the_weights_are_the_same_however_they_are_named_and_cut(
    tiny, places, read, layout, change
):
    change(places[layout])
    model = read(layout)
    assert_same(model, parameters(tiny))
    assert all(value.data_ptr() % value.element_size() == 0 for value in parameters(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype, variant", [(torch.float16, ""), (torch.bfloat16, ".bf16")])
def test_the_type_of_the_file_and_the_type_asked_for_are_independent(
    tiny, places, read, dtype, variant
):
    for name in (UNET, VAE, TEXT):
        file = places["folder"] / name
        rewrite(file, lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
        file.rename(file.with_suffix(f"{variant}.safetensors"))
    expected = {k: v.to(dtype) for k, v in parameters(tiny).items()}
    assert_same(read("folder", dtype=dtype), expected)
    assert_same(read("folder"), {k: v.float() for k, v in expected.items()})


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="what is mapped is seen on Linux alone"
)
def test_weights_that_keep_their_type_take_no_memory_but_the_files(places, read):
    def mapped(model):
        """How many of the model's parameters are in memory that is mapped from the file."""
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        ends = [line[0].split("-") for line in lines if line[5:] == [str(places["file"])]]
        pointers = [value.data_ptr() for value in parameters(model).values()]
        return sum(any(int(a, 16) <= p < int(b, 16) for a, b in ends) for p in pointers)

    rewrite(places["file"], lambda t: {k: v.half() for k, v in t.items()})
    assert mapped(read("file", dtype=torch.float16)) == 986
    assert mapped(read("file", dtype=torch.float32)) == 0


def test_a_write_to_a_weight_and_a_new_file_of_its_name_do_not_reach_each_other(tiny, places, read):
    files = {path: path.read_bytes() for path in places["folder"].rglob("*.safetensors")}
    written, model = read("folder"), read("folder")
    for value in parameters(written).values():
        value.add_(1)
    assert {path: path.read_bytes() for path in files} == files
    for path, whole in files.items():
        path.with_suffix(".part").write_bytes(bytes(len(whole)))
        path.with_suffix(".part").replace(path)
    assert_same(model, parameters(tiny))


@pytest.mark.slow
def test_what_lies_beside_the_networks_in_a_single_file_is_said_once_and_let_be(tiny, places, read):
    more = {key: torch.zeros(3) for key in ("step_of_mine", "control.0.weight", "safety.concepts")}
    rewrite(places["file"], lambda tensors: tensors | more)
    message = r"3 more tensors: .*control\.0\.weight.* beside the model, not read$"
    with pytest.warns(UserWarning, match=message) as said:
        assert_same(read("file"), parameters(tiny))
    assert len(said) == 1


# --- errors


def holds(content, name=""):
    """Makes a file of these bytes."""
    return lambda path: (path / name if name else path).write_bytes(content)


def tensors(change, name=""):
    return lambda path: rewrite(path / name if name else path, change)


def more(key, *shape, name=""):
    return tensors(lambda t: t | {key: torch.zeros(*shape)}, name)


def only(key):
    return tensors(lambda t: {key: torch.zeros(2)})


def says(name, **values):
    """Changes a json file of the folder."""

    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def cut(count):
    return lambda path: path.write_bytes(path.read_bytes()[:count])


def gone(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in\n - Hub</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:6ce0161689\nsize 4265146304\n"
STEM = "model.diffusion_model"
SCHEDULER = "scheduler/scheduler_config.json"


def shard_gone(folder):
    in_shards("")(folder)
    next((folder / "unet").glob("*-00002-of-*")).unlink()


FILE_ERRORS = [
    (holds(b""), "empty, 0 bytes"),
    (holds(POINTER), "a git-LFS pointer, not the weights; run `git lfs pull`"),
    (holds(PAGE), r"a web page, not the weights \(<!DOCTYPE .*Sign in - Hub"),
    (holds(b'{"error": "not found"}'), r'a web page, not the weights \({"error": "not found"}\)'),
    (holds(b"\x80\x02}q\x00X\x05\x00\x00\x00stateq\x01."), "a pickle that .* refuses, broken or"),
    (holds(b"PK\x03\x04" + bytes(40)), r"torch.load\(weights_only=True\) refuses"),
    (holds(b"\xff" * 100), "not a safetensors file"),
    (holds(b"\xff" * 8 + b"{}"), "10 bytes, cut short or damaged"),
    (cut(-5), "bytes, cut short or damaged"),
    (only("conditioner.embedders.0.transformer.weight"), "an SDXL checkpoint; give one of SD 1"),
    (only(f"{STEM}.double_blocks.0.img_attn.qkv.weight"), "a Flux checkpoint"),
    (only(f"{STEM}.joint_blocks.0.x_block.attn.qkv.weight"), "an SD 3 checkpoint"),
    (only("lora_unet_mid_block_attentions_0.lora_down.weight"), "a LoRA, not a base model"),
    (only("unet.mid_block.attentions.0.proj_in.lora_A.weight"), "a LoRA, not a base model"),
    (only("emb_params"), "an embedding, not a base model"),
    (only("control_model.time_embed.0.weight"), "a ControlNet"),
    (only("down_blocks.0.resnets.0.norm1.weight"), "a U-Net alone; give the diffusers folder"),
    (only("encoder.conv_in.weight"), "a VAE alone; .* this by --vae"),
    (only("text_model.final_layer_norm.weight"), "a text encoder alone"),
    (only("something"), "not a Stable Diffusion checkpoint, no .* but 1 other tensor: something"),
    (more(f"{STEM}.input_blocks.0.0.weight", 8, 9, 3, 3), r"U-Net with 9 .*\(inpainting has 9"),
    (
        tensors(lambda t: {k: v for k, v in t.items() if "first_stage_model.decoder" not in k}),
        r"138 missing tensors: (vae\.[\w.]+, ){5}\.\.; fetch it again, whole",
    ),
    (
        tensors(lambda t: {k: v for k, v in t.items() if "first_stage" not in k}),
        r"tiny\.safetensors: no VAE inside; give one by --vae$",
    ),
    (more(f"{STEM}.input_blocks.12.0.weight", 3), "1 unknown tensor: .*12.0.weight; a model of"),
    (more("first_stage_model.loss.logvar", 3), r"1 unknown tensor: first_stage_model\.loss"),
    (
        tensors(lambda t: t | {f"{STEM}.extra.{n}": torch.zeros(1) for n in range(7)}),
        r"7 unknown tensors: (model\.diffusion_model\.extra\.\d, ){5}\.\.; a model",
    ),
    (
        more(f"{STEM}.middle_block.1.proj_in.weight", 24, 23, 1, 1),
        r"proj_in.weight has shape \[24, 23, 1, 1\], the network wants \[24, 24, 1, 1\]",
    ),
]
FOLDER_ERRORS = [
    (holds(POINTER, VAE), "vae/.*: a git-LFS pointer"),
    (more("add_embedding.weight", 3, name=UNET), f"{UNET}: 1 unknown tensor: add_embedding"),
    (more("final_layer_norm.weight", 12, name=TEXT), r"are both text_encoder\.text_model\.final"),
    (says("unet/config.json", act_fn="gelu"), "act_fn is 'gelu'; only 'silu' is implemented"),
    (says("unet/config.json", up_block_types=["UpBlock2D"] * 4), "only SD's, mirrored, are"),
    (says("unet/config.json", norm_num_groups=7), "divisible .*; a model of another kind"),
    (says("vae/config.json", shift_factor=0.1), "shift_factor is 0.1; only None is implemented"),
    (says("text_encoder/config.json", layer_norm_eps=1e-6), "layer_norm_eps is 1e-06"),
    (says("text_encoder/config.json", num_attention_heads=5), r"\(5\).*; a model of another kind"),
    (says(SCHEDULER, beta_schedule="linear"), "beta_schedule is 'linear'"),
    (says(SCHEDULER, prediction_type="x0"), "'x0' is not one of epsilon"),
    (holds(b"{", SCHEDULER), r"scheduler_config\.json: no JSON obj"),
    (holds(b"[]", "unet/config.json"), r"unet/config\.json: no JSON object \(a list\)"),
    (says("model_index.json", _class_name="StableDiffusionXLPipeline"), "a StableDiffusionXL"),
    (gone("vae/config.json"), r"vae/config\.json: no such file"),
    (gone(VAE), r"vae: no diffusion_pytorch_model\[\|\.fp16\|\.bf16\]\.safe.* by --vae"),
    (shard_gone, "unet: no diffusion_pytorch_model.*, whole or in shards"),
    (gone("tokenizer/merges.txt"), r"tokenizer: no vocab\.json and merges\.txt; put those of ope"),
]


@pytest.mark.parametrize(
    "layout, change, message",
    [("file", *row) for row in FILE_ERRORS] + [("folder", *row) for row in FOLDER_ERRORS],
)
def test_what_is_wrong_with_a_checkpoint_is_one_line_with_its_place(
    places, read, layout, change, message
):
    change(places[layout])
    with refused(CheckpointError, message, places[layout]):
        read(layout)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with refused(CheckpointError, r"none\.safetensors: no such file or folder"):
        load(tmp_path / "none.safetensors")


# --- the tokenizer


def test_without_a_tokenizer_the_hub_cache_has_it_or_the_files_to_fetch_are_named(
    places, tmp_path, tokenizer_folder, monkeypatch
):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("a network call"))
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(hub))
    message = "no tokenizer: --tokenizer openai/clip-vit-large-patch14 fetches it from the hub;"
    with refused(CheckpointError, message):
        load(places["file"], config=UNTOLD)
    repository = hub / "models--openai--clip-vit-large-patch14"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(tokenizer_folder)
    assert len(load(places["file"], config=UNTOLD).tokenizer) == 194


def test_prompts_are_marked_cut_and_padded_to_the_towers_length(tiny, tokenizer_folder):
    ids = tokenize(load_tokenizer(tokenizer_folder, TextConfig()), ["fetal", "a " * 100, ""])
    begin, end, word = 192, 193, 94 + ord("a") - 33
    assert ids.tolist() == [
        [begin, 191] + [end] * 75,
        [begin] + [word] * 75 + [end],
        [begin] + [end] * 76,
    ]
    prompts = ["fetal brain", "fetal femur"]
    ids = tokenize(tiny.tokenizer, prompts, tiny.text_encoder.config)
    context = encode_prompts(tiny.tokenizer, tiny.text_encoder, prompts, clip_skip=2)
    assert context.shape == (2, 16, 12)
    assert torch.equal(context, tiny.text_encoder(ids, clip_skip=2))


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_the_text_encoder_and_no_json_says_what_pads_and_a_typed_exclamation_mark_is_a_word(
    tokenizer_folder, tmp_path, act
):
    folder, config = shutil.copytree(tokenizer_folder, tmp_path / "t"), TextConfig(hidden_act=act)
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!"}
    added = {"added_tokens_decoder": {"0": {"content": "!", "special": True}}}  # SD 2's
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    (folder / "tokenizer_config.json").write_text(json.dumps(marks | added))
    ids = tokenize(load_tokenizer(folder, config), ["fetal !"], config)[0].tolist()
    exclamation = 94  # "!</w>"; "!" within a word is 0, which pads SD 2's prompts
    assert ids == [192, 191, exclamation, 193] + [0 if act == "gelu" else 193] * 73


@pytest.mark.parametrize("form", ["ours", "transformers 4", "transformers 5"])
def test_a_tokenizer_and_the_tokens_that_were_added_come_back(tokenizer_folder, tmp_path, form):
    config, known = TextConfig(vocab_size=196), load_tokenizer(tokenizer_folder, TextConfig())
    known.add_tokens(["<us>", "<probe>"])
    if form == "ours":
        save_tokenizer(known, tmp_path, config)
    elif form == "transformers 4":
        shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
        added = {"<probe>": 195, "<us>": 194, "<|endoftext|>": 193}
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    else:  # one file
        known.save_pretrained(tmp_path)
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).unlink(missing_ok=True)
    again = load_tokenizer(tmp_path, config)
    ids = tokenize(again, ["fetal <probe> <us>"], config)
    assert ids[0, :5].tolist() == [192, 191, 195, 194, 193]
    assert tokenizer_hash(again) == tokenizer_hash(known) and len(again) == len(known) == 196


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("vocab.json", "[1", "no tokenizer of CLIP's kind .*; fetch it again$"),
        ("added_tokens.json", "{", "no tokenizer of CLIP's kind .*; fetch it again$"),
        ("added_tokens.json", '{"<us>": 194}', "195 tokens, the text encoder knows 194; give the"),
    ],
)
def test_a_damaged_tokenizer_is_named(tokenizer_folder, tmp_path, name, content, message):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "damaged")
    (folder / name).write_text(content)
    with refused(CheckpointError, message):
        load_tokenizer(folder, TextConfig(vocab_size=194))


# --- writing


def test_a_folder_saved_in_float16_loads_alike_and_is_not_overwritten(tiny, tmp_path):
    save_folder(tiny, tmp_path / "half", dtype=torch.float16)
    for name in (UNET, VAE, TEXT):
        assert {v.dtype for v in load_file(tmp_path / "half" / name).values()} == {torch.float16}
    assert_same(load(tmp_path / "half"), parameters(tiny))  # the model's numbers are float16's
    side = read_json(tmp_path / "half/vae/config.json")["sample_size"]
    assert side == tiny.sample_size * tiny.vae.config.downsampling
    before = (tmp_path / "half" / UNET).read_bytes()
    with refused(CheckpointError, "half: exists already; remove it first"):
        save_folder(tiny, tmp_path / "half")
    assert (tmp_path / "half" / UNET).read_bytes() == before


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

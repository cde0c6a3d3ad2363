"""LoRA files: kohya's keys spelled out, exact round trips, all that is refused, and diffusers as a
second reader."""

import copy
import hashlib
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.text import TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from lora import LoRAError, inject, load_lora, lora_layers, lora_parameters, remove, save_lora

# ours and diffusers' alike
LEVEL = dict(block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=12)
MID = "mid_block.attentions.0"
TO_K = f"lora_unet_{MID}.transformer_blocks.0.attn2.to_k".replace(".", "_")
PROJ_IN = f"lora_unet_{MID}.proj_in".replace(".", "_")
Q_PROJ = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.fixture
def models():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**LEVEL, attention=(True, False), num_heads=(4, 4)))
    text = TextConfig(
        vocab_size=20,
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return {"lora_unet": unet, "lora_te": TextEncoder(text)}


@pytest.fixture
def trained(models):
    """The models with LoRAs of two ranks, B as if trained."""
    trained = copy.deepcopy(models)
    inject(trained["lora_unet"], 4, 2, "transformer")
    inject(trained["lora_te"], 2, 3, "text-encoder", init="kaiming")
    for model in trained.values():
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.B, std=0.3)
    return trained


@pytest.fixture
def file(trained, tmp_path):
    """Rewrites a good file: file(change) lets `change` alter its dict of tensors; returns the
    path."""
    save_lora(tmp_path / "good.safetensors", trained, dtype=torch.float32)

    def write(change=lambda tensors: None, metadata=None):
        tensors = load_file(tmp_path / "good.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "changed.safetensors", metadata)
        return tmp_path / "changed.safetensors"

    return write


def outputs(models):
    latents, context = (
        torch.linspace(-1, 1, 64).view(1, 4, 4, 4),
        torch.linspace(-2, 2, 36).view(1, 3, 12),
    )
    with torch.no_grad():
        return models["lora_unet"](latents, torch.tensor([10]), context), models["lora_te"](
            torch.tensor([[1, 5, 9]])
        )


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_keys_shapes_and_metadata_are_kohyas(trained, tmp_path):
    save_lora(
        tmp_path / "a.safetensors",
        trained,
        {"ss_v2": False, "ss_base_model_version": "sd_v1", "note": "x"},
    )
    with safe_open(tmp_path / "a.safetensors", "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(tmp_path / "a.safetensors")
    digest = metadata.pop("sshs_model_hash")
    data = (tmp_path / "a.safetensors").read_bytes()
    assert digest == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert metadata == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "Dynamic",
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "note": "x",
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert len(tensors) == 3 * (4 * 12 + 6)
    block = "lora_unet_up_blocks_1_attentions_1"
    shapes = {
        f"{block}_proj_in": ((4, 32, 1, 1), (32, 4, 1, 1)),
        f"{block}_proj_out": ((4, 32, 1, 1), (32, 4, 1, 1)),
        f"{block}_transformer_blocks_0_attn1_to_q": ((4, 32), (32, 4)),
        f"{block}_transformer_blocks_0_attn2_to_k": ((4, 12), (32, 4)),
        f"{block}_transformer_blocks_0_attn2_to_out_0": ((4, 32), (32, 4)),
        f"{block}_transformer_blocks_0_ff_net_0_proj": ((4, 32), (256, 4)),
        f"{block}_transformer_blocks_0_ff_net_2": ((4, 128), (32, 4)),
        "lora_te_text_model_encoder_layers_0_self_attn_out_proj": ((2, 12), (12, 2)),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": ((2, 12), (24, 2)),
    }
    for name, (down, up) in shapes.items():
        assert tensors[f"{name}.lora_down.weight"].shape == down
        assert tensors[f"{name}.lora_up.weight"].shape == up
        assert tensors[f"{name}.alpha"].shape == () and tensors[f"{name}.alpha"] == (
            3 if "_te_" in name else 2
        )

    save_lora(
        tmp_path / "a.safetensors", {"lora_unet": trained["lora_unet"]}, {"ss_network_dim": "wrong"}
    )
    with safe_open(tmp_path / "a.safetensors", "pt") as stored:
        metadata = stored.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")


def test_convolutions_are_written_as_kohyas_with_conv_dim(models, tmp_path):
    inject(models["lora_unet"], 4, 2, "locon")
    save_lora(tmp_path / "a.safetensors", {"lora_unet": models["lora_unet"]})
    tensors, shapes = load_file(tmp_path / "a.safetensors"), {}
    for name in (
        "resnets_0_conv1",
        "resnets_0_conv_shortcut",
        "resnets_0_time_emb_proj",
        "upsamplers_0_conv",
    ):
        parts = (
            tensors[f"lora_unet_up_blocks_0_{name}.lora_{part}.weight"] for part in ("down", "up")
        )
        shapes[name] = [tuple(part.shape) for part in parts]
    assert shapes == {
        "resnets_0_conv1": [(4, 128, 3, 3), (64, 4, 1, 1)],
        "resnets_0_conv_shortcut": [(4, 128, 1, 1), (64, 4, 1, 1)],
        "resnets_0_time_emb_proj": [(4, 128), (64, 4)],
        "upsamplers_0_conv": [(4, 64, 3, 3), (64, 4, 1, 1)],
    }
    with safe_open(tmp_path / "a.safetensors", "pt") as stored:
        assert stored.metadata()["ss_network_args"] == '{"conv_dim": "4", "conv_alpha": "2.0"}'


def test_saved_in_float32_and_loaded_is_bit_equal_and_can_be_trained_on(models, trained, tmp_path):
    save_lora(tmp_path / "a.safetensors", trained, {"ss_v2": False}, dtype=torch.float32)
    base = copy.deepcopy([model.state_dict() for model in models.values()])
    summary = load_lora(tmp_path / "a.safetensors", models)
    assert summary.layers == {"lora_unet": 48, "lora_te": 6} and summary.dtype == torch.float32
    assert summary.ranks == {(4, 2.0): 48, (2, 3.0): 6} and summary.metadata["ss_v2"] == "False"
    for prefix in models:
        assert same_bits(models[prefix].state_dict(), trained[prefix].state_dict())
        trainable = {
            id(parameter) for parameter in models[prefix].parameters() if parameter.requires_grad
        }
        assert trainable == {id(parameter) for parameter in lora_parameters(models[prefix])}
    assert all(torch.equal(a, b) for a, b in zip(outputs(models), outputs(trained)))
    for model, weights in zip(models.values(), base):
        remove(model)
        assert same_bits(model.state_dict(), weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_round_the_weights_once(models, trained, tmp_path, dtype):
    save_lora(tmp_path / "a.safetensors", trained, dtype=dtype)
    assert load_lora(tmp_path / "a.safetensors", models).dtype == dtype
    for loaded, kept in zip(
        lora_parameters(models["lora_unet"]), lora_parameters(trained["lora_unet"])
    ):
        assert loaded.dtype == torch.float32 and torch.equal(loaded, kept.to(dtype).float())


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (None, 4.0),
        (torch.tensor(8), 8.0),
        (torch.tensor([1.5]), 1.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    ],
)
def test_alpha_is_the_rank_where_absent_and_may_have_any_type(models, file, alpha, expected):
    def change(tensors):
        del tensors[f"{TO_K}.alpha"]
        if alpha is not None:
            tensors[f"{TO_K}.alpha"] = alpha

    load_lora(file(change), models)
    assert (
        lora_layers(models["lora_unet"])[f"{MID}.transformer_blocks.0.attn2.to_k"].alpha == expected
    )


def test_alpha_zero_is_read_as_the_rank_with_a_warning(models, file):
    with pytest.warns(UserWarning, match="alpha 0 of 1 layers is read as their rank"):
        load_lora(file(lambda tensors: tensors[f"{TO_K}.alpha"].zero_()), models)
    assert lora_layers(models["lora_unet"])[f"{MID}.transformer_blocks.0.attn2.to_k"].alpha == 4


def test_matrices_without_the_convolutions_ones_are_read_alike(models, trained, file):
    def change(tensors):
        for part in ("down", "up"):
            tensors[f"{PROJ_IN}.lora_{part}.weight"] = tensors[
                f"{PROJ_IN}.lora_{part}.weight"
            ].flatten(1)

    load_lora(file(change), models)
    assert torch.equal(outputs(models)[0], outputs(trained)[0])


@pytest.mark.parametrize(
    "start", ["lora_te_encoder", "lora_te1_text_model_encoder", "lora_te1_encoder"]
)
def test_other_names_of_a_single_text_encoder_are_read(models, trained, file, start):
    def change(tensors):
        for key in [key for key in tensors if key.startswith("lora_te_")]:
            tensors[key.replace("lora_te_text_model_encoder", start)] = tensors.pop(key)

    assert load_lora(file(change), models).layers["lora_te"] == 6
    assert torch.equal(outputs(models)[1], outputs(trained)[1])


def test_the_level_text_model_is_written_whether_or_not_the_module_has_it(
    models, trained, tmp_path
):
    bare, bare_trained = models["lora_te"].text_model, trained["lora_te"].text_model
    assert not any(path.startswith("text_model") for path in lora_layers(bare_trained))
    save_lora(tmp_path / "bare.safetensors", {"lora_te": bare_trained}, dtype=torch.float32)
    save_lora(tmp_path / "level.safetensors", {"lora_te": trained["lora_te"]}, dtype=torch.float32)
    tensors = load_file(tmp_path / "bare.safetensors")
    assert (
        same_bits(tensors, load_file(tmp_path / "level.safetensors"))
        and f"{Q_PROJ}.alpha" in tensors
    )
    load_lora(tmp_path / "level.safetensors", {"lora_te": bare})
    assert same_bits(bare.state_dict(), bare_trained.state_dict())


def _set(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


def _drop(name):
    return lambda tensors: tensors.pop(name)


BAD_FILES = {
    "no up": (_drop(f"{TO_K}.lora_up.weight"), rf"{TO_K}: lora_up is missing"),
    "no down": (_drop(f"{TO_K}.lora_down.weight"), "attn2_to_k: lora_down is missing"),
    "unknown layers": (
        lambda tensors: tensors.update(
            {
                f"lora_unet_x{i}.lora_{part}.weight": torch.ones(2, 2)
                for i in range(3)
                for part in ("down", "up")
            }
        ),
        (
            "6 of 168 keys have no place in lora_unet, lora_te, such as"
            " lora_unet_x0.lora_down.weight, lora_unet_x0.lora_up.weight, .*,"
            " lora_unet_x2.lora_down.weight: pass the models"
        ),
    ),
    "unknown part": (
        _set(f"{TO_K}.bias", torch.ones(3)),
        "1 of 163 keys have no place in a LoRA's layers.*bias",
    ),
    "one layer twice": (
        _set(Q_PROJ.replace("text_model_", "") + ".alpha", torch.ones(())),
        "1 of 163 keys have no place",
    ),
    "other width": (
        _set(f"{TO_K}.lora_down.weight", torch.zeros(4, 16)),
        r"lora_down \[4, 16\] and lora_up \[64, 4\] for a weight \[64, 12\]: made for another base"
        r" model "
        r"\(its metadata says sd_v2\)",
    ),
    "other rank": (
        _set(f"{TO_K}.lora_up.weight", torch.zeros(64, 3)),
        r"lora_up \[64, 3\].*ranks differ",
    ),
    "rank 0": (
        lambda tensors: tensors.update(
            {
                f"{TO_K}.lora_up.weight": torch.zeros(64, 0),
                f"{TO_K}.lora_down.weight": torch.zeros(0, 12),
            }
        ),
        "ranks differ or are 0",
    ),
    "3x3 for 1x1": (
        _set(f"{PROJ_IN}.lora_down.weight", torch.zeros(4, 64, 3, 3)),
        r"\[4, 64, 3, 3\].*for a weight \[64, 64, 1, 1\]: made for another base model",
    ),
    "3x3 up": (
        _set(f"{PROJ_IN}.lora_up.weight", torch.zeros(64, 4, 3, 3)),
        r"\[64, 4, 3, 3\]: lora_up must be 1x1",
    ),
    "vector": (
        _set(f"{PROJ_IN}.lora_up.weight", torch.zeros(64)),
        r"\[64\]: neither matrices nor convolutions",
    ),
    "1x1 for 3x3": (
        lambda tensors: tensors.update(
            {
                "lora_unet_conv_in.lora_down.weight": torch.zeros(4, 4),
                "lora_unet_conv_in.lora_up.weight": torch.zeros(32, 4),
            }
        ),
        (
            r"lora_down \[4, 4\] and lora_up \[32, 4\] for a weight \[32, 4, 3, 3\]: made for"
            r" another base model"
        ),
    ),
    "nan": (
        lambda tensors: tensors[f"{TO_K}.lora_up.weight"][3].fill_(torch.nan),
        r"to_k: a value is not finite",
    ),
    "infinite alpha": (lambda tensors: tensors[f"{TO_K}.alpha"].fill_(torch.inf), "not finite"),
    "negative alpha": (
        lambda tensors: tensors[f"{TO_K}.alpha"].fill_(-1),
        "alpha of shape.*not negative",
    ),
    "alpha of two": (
        _set(f"{TO_K}.alpha", torch.ones(2)),
        r"alpha of shape \[2\] must be one number",
    ),
    "integers": (
        _set(f"{TO_K}.lora_up.weight", torch.zeros(64, 4, dtype=torch.int8)),
        "weights of torch.int8",
    ),
    "LoHa": (_set(f"{TO_K}.hada_w1_a", torch.ones(3)), "a LoHa"),
    "LoKr": (_set(f"{TO_K}.lokr_w1", torch.ones(3)), "a LoKr"),
    "DoRA": (_set(f"{TO_K}.dora_scale", torch.ones(3)), "a DoRA"),
    "core tensor": (_set(f"{TO_K}.lora_mid.weight", torch.ones(3)), "a LoCon with a core tensor"),
    "SDXL": (_set(Q_PROJ.replace("te", "te2", 1) + ".alpha", torch.ones(())), "SDXL"),
    "PEFT's DoRA": (_set("unet.conv_in.lora_magnitude_vector", torch.ones(3)), "a DoRA"),
}


@pytest.mark.parametrize("problem", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_and_changes_nothing(models, file, problem):
    change, message = BAD_FILES[problem]
    weights = copy.deepcopy([model.state_dict() for model in models.values()])
    path = file(change, {"ss_base_model_version": "sd_v2"})
    with pytest.raises(LoRAError, match=message) as error:
        load_lora(path, models)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    for model, before in zip(models.values(), weights):
        assert same_bits(model.state_dict(), before)
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("unet:0:up", "unet:0:up: in the format of cloneofsimo's lora: convert it to kohya's"),
        ("emb_params", "emb_params: a textual inversion, no LoRA: load it as an embedding"),
        ("lora_te2_x.alpha", "for SDXL, with two text encoders: use one for SD 1 or SD 2"),
        (
            "model.diffusion_model.out.2.bias",
            "no LoRA among its 1 keys, such as model.diffusion_model.out.2.bias",
        ),
    ],
)
def test_other_kinds_of_files_are_named(models, tmp_path, key, message):
    save_file({key: torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(LoRAError, match=message):
        load_lora(tmp_path / "other.safetensors", models)


@pytest.mark.parametrize(("width", "family"), [(768, "SD 1"), (1024, "SD 2"), (2048, "SDXL")])
def test_a_file_without_metadata_tells_its_base_by_the_width_of_its_text(
    models, file, width, family
):
    path = file(_set(f"{TO_K}.lora_down.weight", torch.zeros(4, width)))
    save_file(load_file(path), path)
    with pytest.raises(
        LoRAError, match=rf"another base model \(by its shapes {family}\): load it into that one"
    ):
        load_lora(path, models)


class _Payload:
    def __reduce__(self):
        return pytest.fail, ("the pickle was executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, 0 bytes: download"),
        (b"<!DOCTYPE html><html></html>", "a web page, not the weights: download"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "git-LFS pointer.*git lfs pull",
        ),
        (pickle.dumps(_Payload()), "a pickle.*convert it to safetensors"),
        (b"\xff" * 100, "not a whole safetensors file: download"),
        (None, "not a whole safetensors file: download"),
    ],
    ids=["empty", "html", "git-LFS", "pickle", "huge header", "truncated"],
)
def test_what_is_no_whole_safetensors_file_is_named(models, file, content, message):
    path = file()
    path.write_bytes(path.read_bytes()[:-7] if content is None else content)
    with pytest.raises(LoRAError, match=message):
        load_lora(path, models)


def test_a_missing_file_an_empty_one_and_a_second_lora_are_refused(models, trained, file, tmp_path):
    with pytest.raises(LoRAError, match="no such file"):
        load_lora(tmp_path / "none.safetensors", models)
    save_file({}, tmp_path / "no_keys.safetensors")
    with pytest.raises(LoRAError, match="no LoRA among its 0 keys"):
        load_lora(tmp_path / "no_keys.safetensors", models)
    with pytest.raises(
        LoRAError, match="the lora_unet model has a LoRA named 'lora' already: remove it, or name"
    ):
        load_lora(file(), trained)
    with pytest.raises(
        LoRAError, match="18 of 162 keys have no place in lora_unet, such as lora_te"
    ):
        load_lora(file(), {"lora_unet": models["lora_unet"]})


def test_a_failed_save_leaves_the_older_file_and_nothing_else(
    models, trained, tmp_path, monkeypatch
):
    path = tmp_path / "a.safetensors"
    save_lora(path, trained)
    older = path.read_bytes()

    layer = next(iter(lora_layers(trained["lora_unet"]).values()))
    layer.B.data[0, 0] = 1e5
    with pytest.raises(
        LoRAError, match=r"lora_up.weight is not finite in torch.float16: .* save as float32"
    ):
        save_lora(path, trained)
    with pytest.raises(LoRAError, match="nothing to save"):
        save_lora(path, models)
    with pytest.raises(LoRAError, match="its folder does not exist"):
        save_lora(tmp_path / "no" / "a.safetensors", trained, dtype=torch.float32)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(LoRAError, match=r"cannot be written.*no space left"):
        save_lora(path, trained, dtype=torch.float32)
    assert path.read_bytes() == older and [entry.name for entry in tmp_path.iterdir()] == [
        "a.safetensors"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["transformer", "locon"])
def test_diffusers_reads_our_file_to_the_same_weights_and_output(models, tmp_path, target):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    inject((trained := copy.deepcopy(models))["lora_unet"], 4, 2, target)
    for layer in lora_layers(trained["lora_unet"]).values():
        torch.nn.init.normal_(layer.B, std=0.1)
    theirs = diffusers.UNet2DConditionModel(
        **LEVEL,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    theirs.load_state_dict(models["lora_unet"].state_dict())
    save_lora(
        tmp_path / "ours.safetensors", {"lora_unet": trained["lora_unet"]}, dtype=torch.float32
    )

    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    state, alphas = loader.lora_state_dict(
        tmp_path, weight_name="ours.safetensors", local_files_only=True
    )
    loader.load_lora_into_unet(state, alphas, theirs)
    for path, layer in lora_layers(trained["lora_unet"]).items():
        peer = theirs.get_submodule(path)
        assert torch.equal(peer.lora_A["default_0"].weight.flatten(1), layer.A)
        assert torch.equal(peer.lora_B["default_0"].weight.flatten(1), layer.B)
        assert peer.scaling["default_0"] == layer.alpha / layer.rank
    latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    with torch.no_grad():
        ours = trained["lora_unet"](latents, torch.tensor([17, 801]), context)
        peer = theirs(latents, torch.tensor([17, 801]), context).sample
        plain = models["lora_unet"](latents, torch.tensor([17, 801]), context)
    torch.testing.assert_close(ours, peer, atol=1e-5, rtol=0)
    assert (ours - plain).abs().max() > 0.05

"""The diffusers folder: which files hold the weights; its json files, read into configs and written
from them.

model_index.json, and a subfolder each: unet, vae, text_encoder (config.json and weights),
tokenizer, scheduler.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from fnmatch import filter as matching
from pathlib import Path
from typing import Any

from harness.files import json_text, write_text
from ldm import CheckpointError
from ldm.text import TextConfig
from ldm.unet import UNetConfig
from ldm.vae import VAEConfig

Json = dict[str, Any]

# file stems
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}

VARIANTS = ("", ".fp16", ".bf16")  # of a network's files, in the order of preference
# how the pipelines of other families are called
_OTHERS = ("StableDiffusionXL", "StableDiffusion3", "Flux")

# settings that leave no trace in the weights and that our networks and the noise schedule take for
# granted
_FIXED = {
    "unet": {
        "act_fn": "silu",
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "time_embedding_type": "positional",
    },
    "vae": {"act_fn": "silu", "shift_factor": None},
    "text_encoder": {"layer_norm_eps": 1e-5},
    "scheduler": {
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "rescale_betas_zero_snr": False,
        "trained_betas": None,
    },
}
# as in SD 1.5, and wrong there too: only the pooled output, which SD does not use, depends on them
_TEXT_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


@dataclass(frozen=True)
class Config:
    """What a Stable Diffusion is, but for its weights and its tokenizer; the defaults are SD 1.5's.

    prediction_type: what the U-Net returns, "epsilon" or "v_prediction"; None: to be probed
    sample_size: side of the latents that the U-Net was trained on
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoder: TextConfig = field(default_factory=TextConfig)
    prediction_type: str | None = "epsilon"
    sample_size: int = 64


def read_config(root: Path) -> Config:
    """The folder's config; CheckpointError where a json file is absent, incomplete or beyond these
    networks."""
    unet, vae, text = (_read(root / name / "config.json", _FIXED[name]) for name in WEIGHTS)
    scheduler = _read(root / "scheduler" / "scheduler_config.json", _FIXED["scheduler"])
    down, up = unet.get("down_block_types", []), unet.get("up_block_types")
    attention = tuple(name == "CrossAttnDownBlock2D" for name in down)
    if (down, up) != _block_types(attention):
        raise CheckpointError(
            f"{root}/unet/config.json: blocks {down} and {up}; only SD's, mirrored, are implemented"
        )
    heads = unet.get("attention_head_dim", 8)  # the number of heads, whatever it is called
    unet |= {
        "attention": attention,
        "num_heads": heads if isinstance(heads, list) else [heads] * len(attention),
    }
    return Config(
        _fill(UNetConfig, unet),
        _fill(VAEConfig, vae),
        _fill(TextConfig, text),
        scheduler.get("prediction_type", Config.prediction_type),
        unet.get("sample_size", Config.sample_size),
    )


def write_config(root: Path, config: Config) -> None:
    """The folder's json files, but for the tokenizer's."""
    unet, vae, text = asdict(config.unet), asdict(config.vae), asdict(config.text_encoder)
    attention, heads = unet.pop("attention"), unet.pop("num_heads")
    down, up = _block_types(attention)
    levels = len(vae["block_out_channels"])
    contents = {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": config.sample_size,
            **unet,
            "attention_head_dim": heads,
            "down_block_types": down,
            "up_block_types": up,
            **_FIXED["unet"],
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "sample_size": config.sample_size * config.vae.downsampling,
            **vae,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            **_FIXED["vae"],
        },
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "torch_dtype": "float32",
            **text,
            "projection_dim": config.text_encoder.hidden_size,
            **_TEXT_IDS,
            **_FIXED["text_encoder"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "PNDMScheduler",
            "clip_sample": False,
            "prediction_type": config.prediction_type,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            **_FIXED["scheduler"],
        },
    }
    for name, values in contents.items():
        write_text(root / name, json_text(values))


def read_vae_config(folder: Path) -> VAEConfig:
    """The config of a VAE's own folder."""
    return _fill(VAEConfig, _read(folder / "config.json", _FIXED["vae"]))


def weight_files(root: Path, networks: Iterable[str] = WEIGHTS) -> Iterator[tuple[str, Path]]:
    """(network, file) of every file that holds weights of these networks.

    CheckpointError where the folder is another family's pipeline, or a network has no weights.
    """
    if (root / "model_index.json").is_file():
        pipeline = str(_read(root / "model_index.json", {}).get("_class_name"))
        if pipeline.startswith(_OTHERS):
            raise CheckpointError(f"{root}: a {pipeline}; give a model of SD 1 or SD 2")
    for network in networks:
        yield from ((network, file) for file in network_files(root / network, WEIGHTS[network]))


def network_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a network, one or all of its shards."""
    if names := weight_names(stem, [path.name for path in folder.glob("*")]):
        return [folder / name for name in names]
    raise CheckpointError(
        f"{folder}: no {stem}[{'|'.join(VARIANTS)}].safetensors, whole or in shards; convert a"
        " pickle (*.bin) first, give a VAE by --vae"
    )


def weight_names(stem: str, names: Collection[str]) -> list[str]:
    """Of files' names those of a network's weights in the first precision that is there whole."""
    for variant in VARIANTS:
        if (whole := f"{stem}{variant}.safetensors") in names:
            return [whole]
        shards = sorted(matching(names, f"{stem}{variant}-*-of-*.safetensors"))
        if shards and len(shards) == int(re.findall(r"\d+", shards[0])[-1]):
            return shards
    return []


def _block_types(attention: tuple[bool, ...]) -> tuple[list[str], list[str]]:
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention]
    return down, [name.replace("Down", "Up") for name in reversed(down)]


def _fill(kind: type, values: Json) -> Any:
    """A config of the values that it has fields for, lists as tuples; a field that is absent keeps
    its default."""
    known = {field.name: values[field.name] for field in fields(kind) if field.name in values}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})


def _read(path: Path, fixed: Json) -> Json:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; is this a whole diffusers folder?")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__}")
    except ValueError as error:
        raise CheckpointError(f"{path}: no JSON object ({error}); fetch it again") from None
    for name, value in fixed.items():
        if values.get(name, value) != value:
            raise CheckpointError(
                f"{path}: {name} is {values[name]!r}; only {value!r} is implemented"
            )
    return values

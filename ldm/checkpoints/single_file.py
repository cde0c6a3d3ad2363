"""Stable Diffusion in one file, as CompVis, webui and kohya keep it: its family, its sizes, its
average, and writing.

SD 2 differs in its text tower (OpenCLIP's), in its linear projections, and in heads that are 64
channels wide where SD 1 has 8 heads at every width. No weight tells the heads, nor what the U-Net
predicts.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm import CheckpointError
from ldm.checkpoints.folder import Config
from ldm.checkpoints.keys import FUSED, SINGLE_FILE, SINGLE_FILE_2, inverse, rename, thirds
from ldm.checkpoints.weights import Stored, Weights, locate, named, open_weights
from ldm.text import TextConfig
from ldm.unet import UNet, UNetConfig

_HEAD = 64  # channels of a head in SD 2, in the U-Net and in the text tower
SD_2 = Config(
    unet=UNetConfig(
        num_heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
    ),
    text_encoder=TextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
    ),
)
"""SD 2.0 and 2.1 base; the heads are those of the published widths."""

_FAMILIES = {  # a mark in some tensor's name -> what the file is
    r"conditioner\.embedders\.|\blabel_emb\.": "an SDXL checkpoint; give one of SD 1 or SD 2",
    r"double_blocks\.": "a Flux checkpoint; give one of SD 1 or SD 2",
    r"joint_blocks\.": "an SD 3 checkpoint; give one of SD 1 or SD 2",
    r"lora_unet_|lora_te|\.lora_(down|up|A|B)\b": (
        "a LoRA, not a base model; give the model it was trained on"
    ),
    r"^(emb_params|\*|clip_[lg]|<.*>)$": (
        "an embedding, not a base model; give the model that it was made for"
    ),
    r"^control_(model\.|net)": "a ControlNet, not a base model; give the model it steers",
    r"^down_blocks\.": "a U-Net alone; give the diffusers folder around it",
    r"^(encoder\.conv_in|decoder\.conv_in|post_quant_conv)\.": (
        "a VAE alone; give a whole model, and this by --vae"
    ),
    r"^(text_model|embeddings)\.": "a text encoder alone; give the whole checkpoint",
}


def locate_single_file(
    path: Path, config: Config | None, ema: bool, prediction_type: str | None
) -> tuple[Config, dict[str, Stored]]:
    """The config of a file's model, and parameter -> where it lies in the file.

    config: where the shapes do not tell; prediction_type: what the U-Net predicts, if it is known
    ema: take the U-Net's running average
    CheckpointError where the tensors are no checkpoint of SD 1 or SD 2, naming what they are, or
    hold no average.
    """
    weights = open_weights(path)
    for mark, what in _FAMILIES.items():
        if any(re.search(mark, name) for name in weights.shapes):
            raise CheckpointError(f"{path}: {what}")
    if not any(name.startswith("model.diffusion_model.") for name in weights.shapes):
        raise CheckpointError(
            f"{path}: not a Stable Diffusion checkpoint, no tensor model.diffusion_model.* but"
            f" {named([*weights.shapes], 'other')}; give one of SD 1 or SD 2"
        )
    sd_2 = any(key.startswith("cond_stage_model.model.") for key in weights.shapes)
    networks = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    tensors = locate([("", weights)], SINGLE_FILE_2 if sd_2 else SINGLE_FILE, networks)
    if config is None:
        stated = prediction_type or _stated_prediction(weights) or (None if sd_2 else "epsilon")
        config = with_prediction(config_of(sd_2, tensors), stated)
    else:
        config = fit(config, tensors)
    if ema:
        # the average lies under the trained tensor's name without its dots
        for name, at in tensors.items():
            if name.startswith("unet."):
                key = "model_ema." + at.key.removeprefix("model.").replace(".", "")
                if key not in weights.shapes:
                    raise CheckpointError(
                        f"{path}: no averaged U-Net inside, or not whole ({key}); load it without"
                        " --ema"
                    )
                tensors[name] = Stored(weights, key, weights.shapes[key])
    return config, tensors


def _stated_prediction(weights: Weights) -> str | None:
    """What the U-Net predicts, as webui's .yaml beside the file or else the file says; None where
    neither does."""
    yaml = weights.path.with_suffix(".yaml")
    if yaml.is_file():
        v = r"""^\s*parameterization:\s*["']?v["']?\s*(#|$)"""
        says_v = re.search(v, yaml.read_text("utf-8"), re.MULTILINE)
        return "v_prediction" if says_v else "epsilon"
    mark = "v" if "v_pred" in weights.shapes else None
    stated = weights.metadata.get("modelspec.prediction_type", mark)
    return "v_prediction" if stated == "v" else stated


def with_prediction(config: Config, prediction_type: str | None) -> Config:
    """The family's config with what the U-Net predicts; SD 2's v-models were trained on latents of
    96."""
    config = replace(config, prediction_type=prediction_type)
    if config.unet.use_linear_projection and prediction_type == "v_prediction":
        config = replace(config, sample_size=96)
    return config


def probe_prediction(unet: UNet, path: Path) -> str:
    """What an SD 2 U-Net predicts, by webui's probe: of a grey input at the last step, v lies well
    below it.

    Raises CheckpointError where the network overflows, as SD 2.1's does in float16.
    """
    weight = unet.conv_in.weight
    latents = weight.new_full((1, unet.config.in_channels, 8, 8), 0.5)
    context = weight.new_full((1, 2, unet.config.cross_attention_dim), 0.5)
    shift = (unet(latents, 999, context) - latents).float().mean()
    if not shift.isfinite():
        raise CheckpointError(
            f"{path}: the U-Net overflows in {weight.dtype}; give its --prediction-type, or --dtype"
            " fp32"
        )
    return "v_prediction" if shift < -1 else "epsilon"


def config_of(sd_2: bool, tensors: Mapping[str, Stored | Tensor]) -> Config:
    """The config of a single file's model: the sizes from its shapes, the rest as the family has
    it."""
    if not sd_2:
        return fit(Config(), tensors)
    config = fit(SD_2, tensors)
    unet, text = config.unet, config.text_encoder
    heads = tuple(width // _HEAD or 1 for width in unet.block_out_channels)
    return replace(
        config,
        unet=replace(unet, num_heads=heads),
        text_encoder=replace(text, num_attention_heads=text.hidden_size // _HEAD or 1),
    )


def single_file_tensors(config: Config, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a single file, from parameters that are named behind their network's.

    Raises CheckpointError where every reader of the file would take the model for another one.
    """
    sd_2 = config.unet.use_linear_projection
    read = config_of(sd_2, state)
    for network in ("unet", "vae", "text_encoder"):
        has, seen = getattr(config, network), getattr(read, network)
        if has != seen:
            raise CheckpointError(
                f"a single file would be read as {seen}, the model has {has}; save it as a folder"
            )
    table = inverse(SINGLE_FILE_2 if sd_2 else SINGLE_FILE)
    wholes = dict.fromkeys(
        re.sub(r"\b[qkv]_proj\b", FUSED, name) if sd_2 else name for name in state
    )
    tensors = {
        rename(whole, table): torch.cat([state[part] for part in thirds(whole)]) for whole in wholes
    }
    return {  # the VAE's attention is of 1x1 convolutions there
        key: value[:, :, None, None] if ".attn_1." in key and value.ndim == 2 else value
        for key, value in tensors.items()
    }


_SIZES = {  # network, field of its config -> the tensor and the axis that tell it
    "unet": {
        "in_channels": ("conv_in.weight", 1),
        "out_channels": ("conv_out.weight", 0),
        "cross_attention_dim": (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
            1,
        ),
    },
    "vae": {"latent_channels": ("post_quant_conv.weight", 0)},
    "text_encoder": {
        "vocab_size": ("text_model.embeddings.token_embedding.weight", 0),
        "hidden_size": ("text_model.embeddings.token_embedding.weight", 1),
        "intermediate_size": ("text_model.encoder.layers.0.mlp.fc1.weight", 0),
        "max_position_embeddings": ("text_model.embeddings.position_embedding.weight", 0),
    },
}
_LEVELS = {"unet": "unet.down_blocks", "vae": "vae.encoder.down_blocks"}


def fit(config: Config, tensors: Mapping[str, Stored | Tensor]) -> Config:
    """The config with every size that the tensors' shapes tell; where one is missing, its size
    stays as it was."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for network, rows in _SIZES.items():
        found = {
            field: shapes[f"{network}.{key}"][axis]
            for field, (key, axis) in rows.items()
            if len(shapes.get(f"{network}.{key}", ())) > axis
        }
        if network in _LEVELS:
            found["block_out_channels"] = tuple(
                shapes.get(f"{_LEVELS[network]}.{n}.resnets.0.conv2.bias", (width,))[0]
                for n, width in enumerate(getattr(config, network).block_out_channels)
            )
        config = replace(config, **{network: replace(getattr(config, network), **found)})
    projection = shapes.get("unet.down_blocks.0.attentions.0.proj_in.weight", ())
    tower = "text_encoder.text_model.encoder.layers."
    layers = {name.split(".")[4] for name in shapes if name.startswith(tower)}
    return replace(
        config,
        unet=replace(config.unet, use_linear_projection=len(projection) == 2),
        text_encoder=replace(config.text_encoder, num_hidden_layers=len(layers)),
    )

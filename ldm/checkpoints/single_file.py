"""Stable Diffusion in one file, as CompVis, webui and kohya keep it: its family, its sizes, its
average, and writing.

SD 2 differs in its text tower (OpenCLIP's), in its linear projections, and in heads that are 64
channels wide where SD 1 has 8 heads at every width. No weight tells the heads, nor what the U-Net
predicts.
"""

import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from ldm import CheckpointError
from ldm.checkpoints.folder import Config
from ldm.checkpoints.keys import FUSED, SINGLE_FILE, SINGLE_FILE_2, inverse, rename, thirds
from ldm.checkpoints.weights import Stored, Weights, locate, named
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


def refuse_other_families(weights: Weights) -> None:
    """CheckpointError where a single file's tensors are no checkpoint of SD 1 or SD 2, naming what
    they are."""
    names = list(weights.shapes)
    for mark, what in _FAMILIES.items():
        if any(re.search(mark, name) for name in names):
            raise CheckpointError(f"{weights.path}: {what}")
    if not any(name.startswith("model.diffusion_model.") for name in names):
        example = f", the first is {names[0]!r}" if names else ""
        raise CheckpointError(
            f"{weights.path}: not a Stable Diffusion checkpoint: no tensor"
            f" model.diffusion_model.*{example}; give one of SD 1 or SD 2"
        )


def locate_single_file(weights: Weights, ema: bool) -> dict[str, Stored]:
    """Parameter -> where it lies in the file; with `ema` the U-Net's are those of its running
    average."""
    networks = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    tensors = locate([("", weights)], SINGLE_FILE_2 if is_sd_2(weights) else SINGLE_FILE, networks)
    if not ema:
        return tensors
    copies = {  # the average lies under the trained tensor's name without its dots
        name: "model_ema." + stored.key.removeprefix("model.").replace(".", "")
        for name, stored in tensors.items()
        if name.startswith("unet.")
    }
    absent = [key for key in copies.values() if key not in weights.shapes]
    if len(absent) == len(copies):
        raise CheckpointError(
            f"{weights.path}: no averaged U-Net (model_ema.*) inside; load it without --ema"
        )
    if absent:
        raise CheckpointError(f"{weights.path}: {named(absent, 'missing')}; load it without --ema")
    return tensors | {
        name: Stored(weights, key, weights.shapes[key]) for name, key in copies.items()
    }


def is_sd_2(weights: Weights) -> bool:
    return any(key.startswith("cond_stage_model.model.") for key in weights.shapes)


def stated_prediction(weights: Weights) -> str | None:
    """What the U-Net predicts, as the file or webui's .yaml beside it says; None where an SD 2 file
    leaves it open."""
    yaml = weights.path.with_suffix(".yaml")
    if yaml.is_file():
        says_v = re.search(
            r"""^\s*parameterization:\s*["']?v["']?\s*(#|$)""",
            yaml.read_text("utf-8"),
            re.MULTILINE,
        )
        return "v_prediction" if says_v else "epsilon"
    stated = weights.metadata.get(
        "modelspec.prediction_type", "v" if "v_pred" in weights.shapes else None
    )
    if stated is None:
        return None if is_sd_2(weights) else "epsilon"
    return "v_prediction" if stated == "v" else stated


def with_prediction(config: Config, prediction_type: str) -> Config:
    """The family's config with what the U-Net predicts; SD 2's v-models were trained on latents of
    96."""
    size = (
        96
        if config.unet.use_linear_projection and prediction_type == "v_prediction"
        else config.sample_size
    )
    return replace(config, prediction_type=prediction_type, sample_size=size)


def probe_prediction(unet: UNet, path: Path) -> str:
    """What an SD 2 U-Net predicts, by webui's probe: of a grey input at the last step, v lies well
    below it.

    Raises CheckpointError where the network overflows, as SD 2.1's does in float16.
    """
    weight = unet.conv_in.weight
    latents = torch.full(
        (1, unet.config.in_channels, 8, 8), 0.5, device=weight.device, dtype=weight.dtype
    )
    context = torch.full(
        (1, 2, unet.config.cross_attention_dim), 0.5, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        shift = (
            (unet(latents, torch.tensor([999], device=weight.device), context) - latents)
            .float()
            .mean()
        )
    if not shift.isfinite():
        kind = str(weight.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{path}: the U-Net overflows in {kind}; give its --prediction-type, or --dtype fp32"
        )
    return "v_prediction" if shift < -1 else "epsilon"


def config_of(sd_2: bool, shapes: dict[str, tuple[int, ...]]) -> Config:
    """The config of a single file's model: the sizes from its shapes, the rest as the family has
    it."""
    if not sd_2:
        return fit(Config(), shapes)
    config = fit(SD_2, shapes)
    unet, text = config.unet, config.text_encoder
    return replace(
        config,
        unet=replace(
            unet, num_heads=tuple(width // _HEAD or 1 for width in unet.block_out_channels)
        ),
        text_encoder=replace(text, num_attention_heads=text.hidden_size // _HEAD or 1),
    )


def single_file_tensors(config: Config, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a single file, from parameters that are named behind their network's.

    Raises CheckpointError where every reader of the file would take the model for another one.
    """
    sd_2 = config.unet.use_linear_projection
    read = config_of(sd_2, {name: tuple(value.shape) for name, value in state.items()})
    for network in ("unet", "vae", "text_encoder"):
        has, seen = asdict(getattr(config, network)), asdict(getattr(read, network))
        for name in has:
            if has[name] != seen[name]:
                raise CheckpointError(
                    f"a single file would be read with {network} {name} {seen[name]}, the model has"
                    f" {has[name]}; save it as a folder"
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


def fit(config: Config, shapes: dict[str, tuple[int, ...]]) -> Config:
    """The config with every size that the shapes tell; where a tensor is missing, its size stays as
    it was."""

    def size(name: str, axis: int, default: int) -> int:
        shape = shapes.get(name, ())
        return shape[axis] if axis < len(shape) else default

    def widths(prefix: str, defaults: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            size(f"{prefix}.{n}.resnets.0.conv2.bias", 0, default)
            for n, default in enumerate(defaults)
        )

    unet, vae, text = config.unet, config.vae, config.text_encoder
    attention = "unet.down_blocks.0.attentions.0"
    tower = "text_encoder.text_model"
    layers = {name.split(".")[4] for name in shapes if name.startswith(f"{tower}.encoder.layers.")}
    projection = shapes.get(f"{attention}.proj_in.weight")
    return replace(
        config,
        unet=replace(
            unet,
            in_channels=size("unet.conv_in.weight", 1, unet.in_channels),
            out_channels=size("unet.conv_out.weight", 0, unet.out_channels),
            block_out_channels=widths("unet.down_blocks", unet.block_out_channels),
            cross_attention_dim=size(
                f"{attention}.transformer_blocks.0.attn2.to_k.weight", 1, unet.cross_attention_dim
            ),
            use_linear_projection=(
                len(projection) == 2 if projection else unet.use_linear_projection
            ),
        ),
        vae=replace(
            vae,
            latent_channels=size("vae.post_quant_conv.weight", 0, vae.latent_channels),
            block_out_channels=widths("vae.encoder.down_blocks", vae.block_out_channels),
        ),
        text_encoder=replace(
            text,
            vocab_size=size(f"{tower}.embeddings.token_embedding.weight", 0, text.vocab_size),
            hidden_size=size(f"{tower}.embeddings.token_embedding.weight", 1, text.hidden_size),
            intermediate_size=size(
                f"{tower}.encoder.layers.0.mlp.fc1.weight", 0, text.intermediate_size
            ),
            num_hidden_layers=len(layers) or text.num_hidden_layers,
            max_position_embeddings=size(
                f"{tower}.embeddings.position_embedding.weight", 0, text.max_position_embeddings
            ),
        ),
    )

"""Which tensor of a checkpoint is which parameter: tables from the files' names to ours, which are
diffusers'.

A row renames a dotted prefix and keeps the rest. `{}` is one part between dots, carried over in
order; None drops the tensor. The first row that matches decides; a tensor without a row is an
error.
"""

import re
from functools import cache

Table = dict[str, str | None]

FUSED = "qkv_proj"  # OpenCLIP keeps an attention's q, k and v in one tensor, one third each


def rename(key: str, table: Table) -> str | None:
    """The parameter that a file's key is, or None where the table drops it; KeyError where no row
    matches."""
    for source, target in table.items():
        if found := _pattern(source).match(key):
            return None if target is None else target.format(*found.groups()) + key[found.end() :]
    raise KeyError(key)


def thirds(name: str) -> list[str]:
    """The parameters that a renamed tensor holds: itself, or q, k and v where it is all three of an
    attention."""
    return [name.replace(FUSED, f"{part}_proj") for part in "qkv"] if FUSED in name else [name]


def inverse(table: Table) -> Table:
    """The table from our names to the files'; where several files' names are one of ours, the first
    of them."""
    result: Table = {}
    for source, target in table.items():
        if target is not None:
            result.setdefault(target, source)
    return result


@cache
def _pattern(source: str) -> re.Pattern:
    return re.compile(re.escape(source).replace(r"\{\}", r"([^.]+)") + r"(?=\.|$)")


def _each(rows: Table, parts: Table) -> Table:
    """The rows of every part inside every row."""
    return {f"{a}.{b}": f"{rows[a]}.{parts[b]}" for a in rows for b in parts}


def _under(source: str, target: str, table: Table) -> Table:
    return {f"{source}.{a}": b and f"{target}.{b}" for a, b in table.items()}


# CompVis numbers the U-Net's blocks straight through, we number levels and layers
_UNET_RESNETS: Table = {
    "input_blocks.1.0": "down_blocks.0.resnets.0",
    "input_blocks.2.0": "down_blocks.0.resnets.1",
    "input_blocks.4.0": "down_blocks.1.resnets.0",
    "input_blocks.5.0": "down_blocks.1.resnets.1",
    "input_blocks.7.0": "down_blocks.2.resnets.0",
    "input_blocks.8.0": "down_blocks.2.resnets.1",
    "input_blocks.10.0": "down_blocks.3.resnets.0",
    "input_blocks.11.0": "down_blocks.3.resnets.1",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.2": "mid_block.resnets.1",
    "output_blocks.0.0": "up_blocks.0.resnets.0",
    "output_blocks.1.0": "up_blocks.0.resnets.1",
    "output_blocks.2.0": "up_blocks.0.resnets.2",
    "output_blocks.3.0": "up_blocks.1.resnets.0",
    "output_blocks.4.0": "up_blocks.1.resnets.1",
    "output_blocks.5.0": "up_blocks.1.resnets.2",
    "output_blocks.6.0": "up_blocks.2.resnets.0",
    "output_blocks.7.0": "up_blocks.2.resnets.1",
    "output_blocks.8.0": "up_blocks.2.resnets.2",
    "output_blocks.9.0": "up_blocks.3.resnets.0",
    "output_blocks.10.0": "up_blocks.3.resnets.1",
    "output_blocks.11.0": "up_blocks.3.resnets.2",
}
_UNET_RESNET: Table = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET: Table = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.1": "down_blocks.0.attentions.0",
    "input_blocks.2.1": "down_blocks.0.attentions.1",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.1": "down_blocks.1.attentions.0",
    "input_blocks.5.1": "down_blocks.1.attentions.1",
    "input_blocks.6.0.op": "down_blocks.1.downsamplers.0.conv",
    "input_blocks.7.1": "down_blocks.2.attentions.0",
    "input_blocks.8.1": "down_blocks.2.attentions.1",
    "input_blocks.9.0.op": "down_blocks.2.downsamplers.0.conv",
    "middle_block.1": "mid_block.attentions.0",
    "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.3.1": "up_blocks.1.attentions.0",
    "output_blocks.4.1": "up_blocks.1.attentions.1",
    "output_blocks.5.1": "up_blocks.1.attentions.2",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.6.1": "up_blocks.2.attentions.0",
    "output_blocks.7.1": "up_blocks.2.attentions.1",
    "output_blocks.8.1": "up_blocks.2.attentions.2",
    "output_blocks.8.2.conv": "up_blocks.2.upsamplers.0.conv",
    "output_blocks.9.1": "up_blocks.3.attentions.0",
    "output_blocks.10.1": "up_blocks.3.attentions.1",
    "output_blocks.11.1": "up_blocks.3.attentions.2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
} | _each(_UNET_RESNETS, _UNET_RESNET)

# three generations of names for the one attention of the VAE: CompVis, diffusers before 0.18,
# diffusers since
_VAE_ATTENTION: Table = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
    "group_norm": "group_norm",
    "to_q": "to_q",
    "to_k": "to_k",
    "to_v": "to_v",
    "to_out.0": "to_out.0",
}
_VAE_RESNETS: Table = {
    "encoder.down.{}.block.{}": "encoder.down_blocks.{}.resnets.{}",
    "{}.mid.block_1": "{}.mid_block.resnets.0",
    "{}.mid.block_2": "{}.mid_block.resnets.1",
    "decoder.up.0.block.{}": "decoder.up_blocks.3.resnets.{}",
    "decoder.up.1.block.{}": "decoder.up_blocks.2.resnets.{}",
    "decoder.up.2.block.{}": "decoder.up_blocks.1.resnets.{}",
    "decoder.up.3.block.{}": "decoder.up_blocks.0.resnets.{}",
}
_VAE: Table = (
    _each(_VAE_RESNETS, {"nin_shortcut": "conv_shortcut"})
    | _VAE_RESNETS
    | _each({"{}.mid.attn_1": "{}.mid_block.attentions.0"}, _VAE_ATTENTION)
    | {
        "{}.conv_in": "{}.conv_in",
        "encoder.down.{}.downsample.conv": "encoder.down_blocks.{}.downsamplers.0.conv",
        "decoder.up.1.upsample.conv": "decoder.up_blocks.2.upsamplers.0.conv",
        "decoder.up.2.upsample.conv": "decoder.up_blocks.1.upsamplers.0.conv",
        "decoder.up.3.upsample.conv": "decoder.up_blocks.0.upsamplers.0.conv",
        "{}.norm_out": "{}.conv_norm_out",
        "{}.conv_out": "{}.conv_out",
        "quant_conv": "quant_conv",
        "post_quant_conv": "post_quant_conv",
    }
)
# some files lack the level `text_model.`; merges often corrupt the position ids, which are 0, 1, 2,
# .. anyway
_TEXT: Table = {
    "text_model.embeddings.position_ids": None,
    "embeddings.position_ids": None,
    "text_model": "text_model",
    "embeddings": "text_model.embeddings",
    "encoder": "text_model.encoder",
    "final_layer_norm": "text_model.final_layer_norm",
}

# OpenCLIP's tower, of SD 2; the U-Net reads the penultimate layer, so the last is as useless as the
# projection
_OPEN_CLIP: Table = {
    "transformer.resblocks.23": None,
    "text_projection": None,
    "logit_scale": None,
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
} | _each(
    {"transformer.resblocks.{}": "text_model.encoder.layers.{}"},
    {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.in_proj_weight": f"self_attn.{FUSED}.weight",
        "attn.in_proj_bias": f"self_attn.{FUSED}.bias",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    },
)

_BESIDE: Table = (
    _under("model.diffusion_model", "unet", _UNET)
    | _under("first_stage_model", "vae", _VAE)
    | dict.fromkeys(
        (
            # a second U-Net, averaged; its names have lost their dots, see
            # single_file.locate_single_file
            "model_ema",
            "v_pred",  # a mark of v-prediction
            "betas",
            "alphas_cumprod",
            "alphas_cumprod_prev",
            "sqrt_alphas_cumprod",
            "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod",
            "sqrt_recip_alphas_cumprod",
            "sqrt_recipm1_alphas_cumprod",
            "posterior_variance",
            "posterior_log_variance_clipped",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
        )
    )
)
SINGLE_FILE: Table = _under("cond_stage_model.transformer", "text_encoder", _TEXT) | _BESIDE
"""CompVis and webui, SD 1: all three networks in one file, beside the schedule's buffers and the
U-Net's average."""

SINGLE_FILE_2: Table = _under("cond_stage_model.model", "text_encoder", _OPEN_CLIP) | _BESIDE
"""The same of SD 2, with OpenCLIP's text tower."""

_FOLDER_VAE: Table = _each(
    {"vae.{}.mid_block.attentions.0": "vae.{}.mid_block.attentions.0"}, _VAE_ATTENTION
)

FOLDER: Table = (
    {"unet": "unet"} | _FOLDER_VAE | {"vae": "vae"} | _under("text_encoder", "text_encoder", _TEXT)
)
"""The diffusers folder, each key behind its subfolder's name."""

VAE_FILE: Table = (
    {"vae.loss": None, "vae.model_ema": None}
    | _under("vae.first_stage_model", "vae", _VAE)
    | _under("vae", "vae", _VAE)
    | _FOLDER_VAE
    | {"vae": "vae"}
)
"""A VAE alone, each key behind `vae.`, in CompVis's names or in diffusers'; training leaves its
loss beside it."""

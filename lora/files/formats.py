"""LoRA files without a model: the layouts that are met, read into one form.

| layout | key of the A of `mid_block.attentions.0.proj_in`; r is the rank | alpha |
|---|---|---|
| kohya, webui | `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight` | `.alpha`, or r |
| the same with dots | `lora_unet.mid_block.attentions.0.proj_in.lora_down.weight` | the same |
| PEFT through diffusers | `unet.mid_block.attentions.0.proj_in.lora_A.weight` | header, or r |
| PEFT alone, a folder | `base_model.model.mid_block...proj_in.lora_A.weight` | config beside |
| diffusers' scripts | `unet.mid_block.attentions.0.proj_in.lora.down.weight` | r |
| the same, text encoder | `text_encoder.text_model...q_proj.lora_linear_layer.down.weight` | r |
| diffusers to 0.17 | `mid_block...attn2.processor.to_k_lora.down.weight` | r |

A is (r, in), B is (out, r), with two more dimensions of 1 where the layer is a 1x1 convolution. The
one form is kohya's name. Its underscores cannot be turned back into dots but with a model's names
or, without it, with the words of SD's.
"""

import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora.layer import LoRAError

KEYS: dict[str, re.Pattern] = {
    "kohya": re.compile(r"(.+)\.(lora_down\.weight|lora_up\.weight|alpha)"),
    "PEFT": re.compile(r"(.+)\.(lora_[AB])(?:\.default)?\.weight"),
    "diffusers": re.compile(r"(.+)\.lora(?:_linear_layer)?\.(down|up)\.weight"),
    "attention processor": re.compile(r"(.+)_lora\.(down|up)\.weight"),
}
"""Layout -> its keys, as (layer, part)."""

COMPVIS = re.compile(r"^lora_unet_(?:(input|output)_blocks_(\d+)_1|middle_block_1)_")

PARTS = {"lora_down.weight": "down", "lora_A": "down", "lora_up.weight": "up", "lora_B": "up"}

NETWORKS = {"unet": "lora_unet", "text_encoder": "lora_te"}
"""Diffusers' name of a network -> kohya's."""

REFUSED: dict[str, str] = {
    r".*\.hada_w": "a LoHa (LyCORIS): use a plain LoRA",
    r".*\.lokr_w": "a LoKr (LyCORIS): use a plain LoRA",
    r".*(\.dora_scale|lora_magnitude_vector)": "a DoRA: use a plain LoRA",
    r".*\.lora_mid\.": "a LoCon with a core tensor (LyCORIS): use a plain LoRA",
    r"lora_te2_|text_encoder_2\.": "for SDXL, with two text encoders: use one for SD 1 or SD 2",
    r"(unet|text_encoder):\d+:": "in the format of cloneofsimo's lora: convert it to kohya's",
    r"diffusion_model\.": (
        "in ComfyUI's names, as LoRAs of Flux, Wan and others are: use one for SD 1 or SD 2 in "
        "kohya's names (lora_unet_) or diffusers' (unet.)"
    ),
    r"transformer\.|lora_transformer_": (
        "for a diffusion transformer (Flux, SD 3 and others): use one for SD 1 or SD 2"
    ),
    r"emb_params$": "a textual inversion, no LoRA: load it as an embedding",
}
"""A pattern that the beginning of some key matches -> what the file is and what to do, where it
cannot be read."""

KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""PEFT's init_lora_weights that leave W0 as it was. PiSSA, CorDA, OLoRA, LoftQ and LoRA-GA take
from it what A and B begin with (`tuners/lora/layer.py` of PEFT 0.21): behind the original W0 it
counts twice. What is unknown may too."""

WORDS = (
    r"down_blocks|mid_block|up_blocks|transformer_blocks|to_[qkv]|to_out|proj_in|proj_out"
    r"|text_model|self_attn|[qkv]_proj|out_proj|time_emb_proj|conv_in|conv_out|conv_shortcut"
    r"|time_embedding|linear_[12]"
)
PIECES = (
    rf"{WORDS}|\d+|attentions|resnets|attn[12]|ff|net|proj|encoder|layers|mlp|fc[12]|conv[12]?"
    r"|(down|up)samplers"
)
"""The names in SD's networks that have underscores of their own, and all of them."""


class Pair(NamedTuple):
    """One layer's LoRA. down: A, (r, in[, height, width]); up: B, (out, r[, 1, 1]); alpha: above
    0."""

    down: Tensor
    up: Tensor
    alpha: float


@dataclass(frozen=True)
class LoRAFile:
    """A file's pairs by kohya's name of the layer, the keys that each came from, and the
    metadata."""

    pairs: dict[str, Pair]
    keys: dict[str, list[str]]
    metadata: dict[str, str]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; float32 where they differ."""
        dtypes = {tensor.dtype for pair in self.pairs.values() for tensor in (pair.down, pair.up)}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32


def kohya_name(prefix: str, path: str) -> str:
    """Kohya's name of a layer; of a text encoder's always with text_model, which CLIP had before
    transformers 5.6."""
    if prefix == "lora_te":
        path = f"text_model.{path.removeprefix('text_model.')}"
    return f"{prefix}.{path}".replace(".", "_")


def text_width(pairs: Mapping[str, Pair]) -> int | None:
    """How wide the text is that the layers take, which tells the base model; None where none
    takes it."""
    keys_values = (pair for name, pair in pairs.items() if re.search(r"attn2[._]to_[kv]$", name))
    return next((pair.down.shape[1] for pair in keys_values), None)


def read(path: str | Path) -> LoRAFile:
    """Reads a file of any layout above, or PEFT's folder, told by the keys.

    Raises LoRAError, one line with the file and what to do, where it is another kind of file, holds
    keys that no layout knows, or a layer is not whole.
    """
    path = Path(path)
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    tensors, metadata = _read_tensors(path)
    for pattern, what in REFUSED.items():
        if key := next((key for key in tensors if re.match(pattern, key)), None):
            raise LoRAError(f"{path}: {key}: {what}")
    configs = _read_configs(path, tensors, metadata)

    parts, keys, paths, leftover = defaultdict(dict), defaultdict(list), {}, []
    for key, tensor in tensors.items():
        layer, part = _layer_of(key) or ("", "")
        prefix, _, module = layer.partition(".")
        name = kohya_name(prefix, module) if module else layer
        if not layer or part in parts[name]:  # unknown, or one layer under two names
            leftover.append(key)
            continue
        parts[name][part] = tensor
        keys[name].append(key)
        if module and prefix in configs:
            paths[name] = (configs[prefix], module)
    if not keys:
        example = f", such as {min(tensors)}" if tensors else ""
        raise LoRAError(
            f"{path}: no LoRA among its {len(tensors)} keys{example}: give a LoRA file, not a"
            " model's checkpoint"
        )
    if leftover:
        raise no_place(
            path, leftover, len(tensors), "a LoRA's layers", "use a plain LoRA, not a variant"
        )
    pairs = {}
    for name in keys:
        pairs[name] = pair = _checked(f"{path}: {name}", parts[name])
        if name in paths and "alpha" not in parts[name]:
            alpha = _config_alpha(f"{path}: {name}", *paths[name], rank=len(pair.down))
            pairs[name] = pair._replace(alpha=alpha)
    if zeros := sum(bool((part["alpha"] == 0).all()) for part in parts.values() if "alpha" in part):
        warnings.warn(
            f"{path}: alpha 0 of {zeros} layers is read as their rank, as kohya does", stacklevel=3
        )
    return LoRAFile(pairs, dict(keys), metadata)


def no_place(
    path: str | Path, leftover: list[str], total: int, where: str, remedy: str
) -> LoRAError:
    """The error for keys that nothing takes: how many of the file's, and the first five."""
    named = ", ".join(sorted(leftover)[:5])
    return LoRAError(
        f"{path}: {len(leftover)} of {total} keys have no place in {where}, such as {named}:"
        f" {remedy}"
    )


def dotted(name: str) -> str | None:
    """lora_unet_mid_block_attentions_0_proj_in -> lora_unet.mid_block.attentions.0.proj_in; None
    where unknown."""
    prefix = next((prefix for prefix in NETWORKS.values() if name.startswith(f"{prefix}_")), None)
    if prefix is None:
        return None
    flat = name.removeprefix(f"{prefix}_")
    path = re.sub(rf"(?<![^_])({WORDS})(?![^_])|_", lambda match: match[1] or ".", flat)
    known = all(re.fullmatch(PIECES, piece) for piece in path.split("."))
    return f"{prefix}.{path}" if known else None


def _layer_of(key: str) -> tuple[str, str] | None:
    """The layer of a key, prefix and dotted path but in kohya's layout without dots, and its
    part."""
    found = ((layout, match) for layout, p in KEYS.items() if (match := p.fullmatch(key)))
    layout, match = next(found, (None, None))
    if match is None:
        return None
    path, part = match[1], PARTS.get(match[2], match[2])
    if layout == "kohya":
        head, dot, rest = path.partition(".")
        path = f"{NETWORKS.get(head, head)}_{rest.replace('.', '_')}" if dot else path
        path = re.sub(r"^lora_te1?_(text_model_)?", "lora_te_text_model_", path)
        return COMPVIS.sub(_from_compvis, path), part

    path = path.removeprefix("base_model.model.")
    head, _, rest = path.partition(".")
    if head in NETWORKS:
        prefix, path = NETWORKS[head], rest
    else:  # one network's own file
        prefix = "lora_te" if head in ("text_model", "encoder") else "lora_unet"
    if layout == "attention processor":
        path = path.replace(".processor.", ".")
        path = re.sub(r"self_attn\.to_(q|k|v|out)$", r"self_attn.\1_proj", path)
        path = re.sub(r"\.to_out$", ".to_out.0", path)
    return f"{prefix}.{path}", part


def _from_compvis(match: re.Match) -> str:
    """The transformers in CompVis' numbered blocks, three to a level, as diffusers names them."""
    side, number = match.groups()
    if side is None:
        return "lora_unet_mid_block_attentions_0_"
    level, place = divmod(int(number) - (side == "input"), 3)
    return f"lora_unet_{'down' if side == 'input' else 'up'}_blocks_{level}_attentions_{place}_"


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise LoRAError(f"{path}: no such file: give the path of a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        with path.open("rb") as file:
            start = file.read(40)  # of a git-LFS pointer, a web page or a pickle it shows which
        what = f"no whole safetensors file ({error}), it begins with {start!r}"
        raise LoRAError(f"{path}: {what}: download or convert it again") from None


def _read_configs(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, dict]:
    """PEFT's configuration of each network, by kohya's prefix; empty where there is none."""
    beside = path.parent / "adapter_config.json"
    alone = any(key.startswith("base_model.model.") for key in tensors)
    if alone and not beside.is_file():
        raise LoRAError(f"{beside}: missing, it holds alpha: put PEFT's file beside {path.name}")
    source = beside if alone else path
    try:
        text = beside.read_text() if alone else metadata.get("lora_adapter_metadata", "{}")
        flat = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        what = f"PEFT's configuration is not a JSON object ({error})"
        raise LoRAError(f"{source}: {what}: get it again") from None
    configs = defaultdict(dict)
    for key, value in flat.items():
        head, _, rest = key.partition(".")
        for prefix in [NETWORKS[head]] if head in NETWORKS else NETWORKS.values():
            configs[prefix][rest if head in NETWORKS else key] = value
    for config in configs.values():
        if config.get("use_dora"):
            raise LoRAError(
                f"{source}: a DoRA (use_dora), which cannot be loaded: use a plain LoRA"
            )
        if (init := config.get("init_lora_weights", True)) not in KEEP_BASE:
            raise LoRAError(
                f"{source}: made for weights that init_lora_weights {init!r} changed, not for the"
                " model's own: save it with PEFT's path_initial_model_for_weight_conversion, or"
                " use a plain LoRA"
            )
    return dict(configs)


def _config_alpha(where: str, config: Mapping, module: str, rank: int) -> float:
    """A layer's alpha by PEFT's configuration, whose patterns match the end of a path."""
    try:
        patterns = (config.get("alpha_pattern") or {}).items()
        found = (alpha for p, alpha in patterns if re.fullmatch(rf"(.*\.)?({p})", module))
        alpha = float(next(found, config.get("lora_alpha", rank)))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        reason = f"PEFT's configuration has no readable alpha ({error}): mend it"
        raise LoRAError(f"{where}: {reason}") from None
    if not math.isfinite(alpha) or alpha <= 0:
        reason = f"PEFT's configuration has alpha {alpha}: it must be a positive number: mend it"
        raise LoRAError(f"{where}: {reason}")
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _checked(where: str, parts: Mapping[str, Tensor]) -> Pair:
    for part in ("down", "up"):
        if part not in parts:
            raise LoRAError(f"{where}: lora_{part} is missing: the file is damaged, get it again")
    down, up = parts["down"], parts["up"]
    rank = len(down) if down.ndim else 0
    shapes = f"lora_down {list(down.shape)} and lora_up {list(up.shape)}"
    alpha = parts.get("alpha", torch.tensor(rank)).float()
    if not {down.dtype, up.dtype} <= {torch.float16, torch.bfloat16, torch.float32}:
        kinds = f"{down.dtype} and {up.dtype}"
        reason = f"weights of {kinds}: convert the file to float16, bfloat16 or float32"
    elif not {down.ndim, up.ndim} <= {2, 4}:
        reason = f"{shapes}: neither matrices nor convolutions: the file is damaged, get it again"
    elif not all(tensor.isfinite().all() for tensor in (down, up, alpha)):
        reason = f"a value is not finite ({shapes}): training diverged, use an earlier file"
    elif up.shape[2:].numel() != 1:
        reason = f"{shapes}: lora_up must be 1x1: use a LoCon as kohya and LyCORIS write it"
    elif rank != up.shape[1] or rank == 0:
        reason = f"{shapes}: the ranks differ or are 0: the file is damaged, get it again"
    elif alpha.numel() != 1 or alpha < 0:
        shape = list(alpha.shape)
        reason = f"alpha of shape {shape} must be one number, not negative: mend the file"
    else:
        return Pair(down, up, float(alpha) or float(rank))
    raise LoRAError(f"{where}: {reason}")

"""LoRA files: kohya's format (sd-scripts, networks/lora.py), which AUTOMATIC1111, ComfyUI and diffusers read too.

A key is `<prefix>_<module path, dots as underscores>.<part>`, for example, with r the rank:

    lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight    A, (r, in)
    lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight      B, (out, r)
    lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.alpha               a scalar; absent: r

with two more dimensions of 1 where the layer is a 1x1 convolution. Underscores cannot be turned back into dots, so
names are looked up in a table made from the model.
"""

import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lora.layer import LoRAError, LoRALayer, adaptable, lora_layers, unfit

Models = Mapping[str, nn.Module]
Parts = dict[str, Tensor]  # "down", "up" and perhaps "alpha" of one layer
Found = dict[tuple[str, str], Parts]  # by prefix and module path

PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}


@dataclass(frozen=True)
class LoRASummary:
    """What load_lora found: layers for each prefix, each (rank, alpha) with its number of layers, the metadata."""

    layers: dict[str, int]
    ranks: dict[tuple[int, float], int]
    dtype: torch.dtype
    metadata: dict[str, str]


def save_lora(
    path: str | Path, models: Models, metadata: Mapping[str, object] | None = None, dtype: torch.dtype = torch.float16
) -> None:
    """Writes the LoRAs of the models into one kohya file; the file appears whole or not at all.

    models: by prefix, {"lora_unet": unet, "lora_te": text_encoder}; one without LoRALayers adds nothing
    metadata: for the header, written as str; it should have ss_base_model_version ("sd_v1") and ss_v2 (False), which
        the layers cannot tell, whereas ss_network_module, ss_network_dim and ss_network_alpha are computed
    dtype: of weights and alphas; float32 keeps every bit

    Raises LoRAError where there is no LoRA, a weight is not finite in `dtype`, or the file cannot be written.
    """
    path = Path(path)
    layers = {
        kohya_names(prefix, where)[0]: layer
        for prefix, model in models.items()
        for where, layer in lora_layers(model).items()
    }
    if not layers:
        raise LoRAError(f"{path}: nothing to save, no model has a LoRA: inject first")
    tensors = {}
    for name, layer in layers.items():
        ones = (1, 1) if isinstance(layer.base, nn.Conv2d) else ()
        parts = {
            "lora_down.weight": layer.A.detach().view(*layer.A.shape, *ones),
            "lora_up.weight": layer.B.detach().view(*layer.B.shape, *ones),
            "alpha": torch.tensor(layer.alpha),
        }
        for part, tensor in parts.items():
            tensor = tensor.to("cpu", dtype).contiguous()
            if not tensor.isfinite().all():
                raise LoRAError(
                    f"{path}: {name}.{part} is not finite in {dtype}: training diverged, or save as float32"
                )
            tensors[f"{name}.{part}"] = tensor

    ranks, alphas = {layer.rank for layer in layers.values()}, {layer.alpha for layer in layers.values()}
    computed = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": min(ranks) if len(ranks) == 1 else "Dynamic",  # kohya's word for mixed ones
        "ss_network_alpha": min(alphas) if len(alphas) == 1 else "Dynamic",
    }
    if not path.parent.is_dir():
        raise LoRAError(f"{path}: its folder does not exist: make it first")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(_serialize(tensors, {**(metadata or {}), **computed}))
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise LoRAError(f"{path}: cannot be written ({error}): choose another place") from error
    finally:
        partial.unlink(missing_ok=True)


def _serialize(tensors: dict[str, Tensor], metadata: Mapping[str, object]) -> bytes:
    """A safetensors file with sorted metadata: the library writes several in an order that changes from run to run."""
    data = save(tensors)
    length = int.from_bytes(data[:8], "little")
    header = {"__metadata__": {key: str(metadata[key]) for key in sorted(metadata)}, **json.loads(data[8 : 8 + length])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def load_lora(path: str | Path, models: Models) -> LoRASummary:
    """Injects a LoRA file into models: all of the file, or nothing and a LoRAError that names file, module and shapes.

    models: by prefix, {"lora_unet": unet, "lora_te": text_encoder}; they are frozen, and the LoRA can be trained on

    Each layer has its own rank and alpha. A file that was made for another base model, that holds a key without a
    place, a weight that is not finite or a variant other than plain LoRA is refused.
    """
    for prefix, model in models.items():
        if lora_layers(model):
            raise LoRAError(f"{path}: the {prefix} model has a LoRA already: remove it first")
    tensors, metadata = _read(Path(path))
    found, leftover = _reader(path, tensors)(tensors, metadata, models)
    if leftover:
        raise LoRAError(
            f"{path}: {len(leftover)} of {len(tensors)} keys have no place in {', '.join(models)}, such as "
            f"{', '.join(sorted(leftover)[:3])}: pass the models that the file was made for{_made_for(metadata)}"
        )

    # everything is checked before the first model changes
    layers = {}
    for (prefix, where), parts in found.items():
        layers[prefix, where] = _checked(
            f"{path}: {prefix} {where}", models[prefix].get_submodule(where), parts, metadata
        )
    for model in models.values():
        model.requires_grad_(False)
    for (prefix, where), (down, up, alpha) in layers.items():
        layer = LoRALayer(models[prefix].get_submodule(where), len(down), alpha)
        with torch.no_grad():
            layer.A.copy_(down)
            layer.B.copy_(up)
        models[prefix].set_submodule(where, layer)

    return LoRASummary(
        layers={prefix: sum(p == prefix for p, _ in layers) for prefix in models},
        ranks=dict(Counter((len(down), alpha) for down, _, alpha in layers.values())),
        dtype=next(iter(found.values()))["down"].dtype,
        metadata=metadata,
    )


def kohya_names(prefix: str, path: str) -> list[str]:
    """The names of a layer in kohya's format: the one to write, then the others that are met in files.

    A text encoder's name always begins lora_te_text_model_, the level that CLIPTextModel had before transformers 5.6.
    Files written through later versions lack it, and some tools number a single text encoder lora_te1.
    """
    if prefix == "lora_te":
        path = path.removeprefix("text_model.")
        full = [f"{te}.{level}{path}" for te in ("lora_te", "lora_te1") for level in ("text_model.", "")]
    else:
        full = [f"{prefix}.{path}"]
    return [name.replace(".", "_") for name in full]


def read_kohya(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], models: Models) -> tuple[Found, list[str]]:
    """Kohya's keys by layer and part, and the keys left over; the metadata say nothing that the keys do not."""
    table = {
        name: (prefix, path)
        for prefix, model in models.items()
        for path, _ in adaptable(model)
        for name in kohya_names(prefix, path)
    }
    found, leftover = defaultdict(dict), []
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        part = PARTS.get(suffix)
        if name in table and part and part not in found[table[name]]:
            found[table[name]][part] = tensor
        else:  # no such layer, no such part, or the same layer under two names
            leftover.append(key)
    return dict(found), leftover


DIALECTS = {r".*\.lora_(down|up)\.weight": read_kohya}
"""A pattern that the beginning of some key matches -> the reader of the file, (tensors, metadata, models) -> parts by
layer, leftover keys."""

REFUSED: dict[str, str] = {
    r".*\.hada_w": "a LoHa (LyCORIS)",
    r".*\.lokr_w": "a LoKr (LyCORIS)",
    r".*(\.dora_scale|lora_magnitude_vector)": "a DoRA",
    r".*\.lora_mid\.": "a LoCon with a core tensor (LyCORIS)",
    r"lora_te2_": "for SDXL, with two text encoders",
    r"lora_unet_(input|middle|output)_block": "named after CompVis' blocks, as for SDXL",
    r".*(\.lora_[AB]\.|\.lora\.(up|down)\.|lora_linear_layer|\.processor\.)": "in the format of diffusers or PEFT",
    r"(unet|text_encoder):\d+:": "in the format of cloneofsimo's lora",
    r"emb_params$": "a textual inversion",
}
"""A pattern that the beginning of some key matches -> what the file is, where it cannot be read."""


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise LoRAError(f"{path}: no such file: pass the path of a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise LoRAError(f"{path}: not a whole safetensors file ({error}): download or convert it again") from None


def _reader(path: str | Path, tensors: Mapping[str, Tensor]) -> Callable[..., tuple[Found, list[str]]]:
    for pattern, what in REFUSED.items():
        if key := next((key for key in tensors if re.match(pattern, key)), None):
            raise LoRAError(f"{path}: {what} ({key}), which cannot be loaded: use a plain LoRA in kohya's format")
    for pattern, reader in DIALECTS.items():
        if any(re.match(pattern, key) for key in tensors):
            return reader
    example = f", such as {min(tensors)}" if tensors else ""
    raise LoRAError(
        f"{path}: no LoRA among its {len(tensors)} keys{example}: pass a LoRA file, not a model's checkpoint"
    )


def _checked(where: str, base: nn.Module, parts: Parts, metadata: Mapping[str, str]) -> tuple[Tensor, Tensor, float]:
    """A, B and alpha of one layer, as matrices and a number, or a LoRAError."""
    if reason := unfit(base):
        raise LoRAError(f"{where}: {reason}: use a plain LoRA, no LoCon")
    for part in ("down", "up"):
        if part not in parts:
            raise LoRAError(f"{where}: lora_{part} is missing: the file is damaged, get it again")
    down, up = parts["down"], parts["up"]
    shapes = f"lora_down {list(down.shape)} and lora_up {list(up.shape)} for a weight {list(base.weight.shape)}"
    for tensor in (down, up):
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise LoRAError(f"{where}: weights of {tensor.dtype}: convert the file to float16, bfloat16 or float32")
        if tensor.ndim not in (2, 4) or tensor.shape[2:].numel() != 1:
            raise LoRAError(f"{where}: {shapes}: only 1x1 convolutions can be loaded, no LoCon: use a plain LoRA")
    for tensor in parts.values():
        if not tensor.isfinite().all():
            raise LoRAError(f"{where}: a value is not finite ({shapes}): training diverged, use an earlier file")
    down, up = down.flatten(1), up.flatten(1)
    if down.shape[0] != up.shape[1] or len(down) == 0:
        raise LoRAError(f"{where}: {shapes}: the ranks differ or are 0: the file is damaged, get it again")
    if (up.shape[0], down.shape[1]) != base.weight.shape[:2]:
        raise LoRAError(f"{where}: {shapes}: made for another base model{_made_for(metadata)}: load it into that one")

    alpha = parts.get("alpha", torch.tensor(len(down)))
    if alpha.numel() != 1 or alpha < 0:
        raise LoRAError(f"{where}: alpha of shape {list(alpha.shape)} must be one number, not negative: mend the file")
    if alpha == 0:
        warnings.warn(f"{where}: alpha 0 is read as the rank, {len(down)}, as kohya does", stacklevel=3)
        alpha = torch.tensor(len(down))
    return down, up, float(alpha)


def _made_for(metadata: Mapping[str, str]) -> str:
    base = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")
    return f" (its metadata says {base})" if base else ""

"""LoRA files written: kohya's layout and PEFT's, with the metadata that their tools show."""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from lora.files.formats import NETWORKS, Pair, dotted, text_width
from lora.layer import LoRAError

BASES = {
    768: {"ss_base_model_version": "sd_v1", "ss_v2": False},
    1024: {"ss_base_model_version": "sd_v2", "ss_v2": True},
}
"""Width of the text embedding -> what kohya's tools call the base model."""

TOOLS_OWN = ("format", "lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata that describe a file's bytes or layout, and hold for no other file."""


def write(
    path: str | Path,
    pairs: Mapping[str, Pair],
    metadata: Mapping[str, object],
    layout: str,
    dtype: torch.dtype,
) -> None:
    """Writes a file, whole or not at all, the same bytes for the same arguments; alpha is the rank
    in a "peft" one.

    pairs: by kohya's name of the layer, or by prefix and path, dotted, which "peft" needs beyond
        SD's own names
    metadata: for the header, as str; what describes the layers is computed

    PEFT's layout has no tensor for alpha, and not all tools read it in the header: alpha / r goes
    into B. Where they differ, float32 keeps what half precision would round. Raises LoRAError.
    """
    path = Path(path)
    metadata = {key: value for key, value in metadata.items() if key not in TOOLS_OWN}
    if not pairs:
        raise LoRAError(f"{path}: nothing to save, no model has a LoRA: inject first")
    if layout == "kohya":
        tensors, header = _kohya(pairs)
        header = BASES.get(text_width(pairs), {}) | metadata | header
    elif layout == "peft":
        tensors, header = _peft(path, pairs)
        header = metadata | header
    else:
        raise LoRAError(f"layout {layout!r}: must be 'kohya' or 'peft'")
    for key, tensor in tensors.items():
        tensors[key] = tensor.detach().to("cpu", dtype).contiguous()
        if not tensors[key].isfinite().all():
            raise LoRAError(
                f"{path}: {key} is not finite in {dtype}: training diverged, or save as float32"
            )
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_bytes(_serialize(tensors, header))
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise LoRAError(f"{path}: cannot be written ({error}): choose another place") from error
    finally:
        partial.unlink(missing_ok=True)


def _kohya(pairs: Mapping[str, Pair]) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors = {}
    for name, (down, up, alpha) in pairs.items():
        parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
        tensors |= {f"{name.replace('.', '_')}.{part}": tensor for part, tensor in parts.items()}
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _one({len(pair.down) for pair in pairs.values()}),
        "ss_network_alpha": _one({pair.alpha for pair in pairs.values()}),
    }
    if kernels := [pair for pair in pairs.values() if pair.down.shape[2:].numel() > 1]:
        rank, alpha = _one({len(pair.down) for pair in kernels}), _one({p.alpha for p in kernels})
        header["ss_network_args"] = json.dumps({"conv_dim": str(rank), "conv_alpha": str(alpha)})
    return tensors, header


def _one(values: set) -> object:
    """The only one, or kohya's word for mixed ones."""
    return min(values) if len(values) == 1 else "Dynamic"


def _peft(path: Path, pairs: Mapping[str, Pair]) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors, ranks = {}, defaultdict(dict)
    for name, (down, up, alpha) in pairs.items():
        full = name if "." in name else dotted(name)
        if full is None:
            raise LoRAError(
                f"{path}: {name} is no layer of Stable Diffusion that PEFT's layout has a name for"
            )
        prefix, _, module = full.partition(".")
        network = next(network for network, kohya in NETWORKS.items() if kohya == prefix)
        key = f"{network}.{module}"
        tensors[f"{key}.lora_A.weight"] = down
        tensors[f"{key}.lora_B.weight"] = (
            up if alpha == len(down) else up.float() * (alpha / len(down))
        )
        # CLIP has no level text_model since transformers 5.6; PEFT compares the end of a path, so
        # both are found
        ranks[network][module.removeprefix("text_model.")] = len(down)
    config = {}
    for network, rank_of in ranks.items():
        rank = Counter(rank_of.values()).most_common(1)[0][0]
        others = {module: r for module, r in rank_of.items() if r != rank}
        settings = {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others}
        settings["target_modules"] = sorted(rank_of)
        config |= {f"{network}.{key}": value for key, value in settings.items()}
    return tensors, {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True),
    }


def _serialize(tensors: dict[str, Tensor], metadata: Mapping[str, object]) -> bytes:
    """A safetensors file with sorted metadata: the library writes several in an order that changes
    from run to run."""
    data = save(tensors)
    length = int.from_bytes(data[:8], "little")
    metadata = {**metadata, "sshs_model_hash": hashlib.sha256(data[8 + length :]).hexdigest()}
    header = {
        "__metadata__": {key: str(metadata[key]) for key in sorted(metadata)},
        **json.loads(data[8 : 8 + length]),
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]

"""LoRA files in and out of models, and from one layout to another:

    python -m lora.files fetal.safetensors fetal_peft.safetensors --to peft

| concept | where |
|---|---|
| a file into models, all or nothing, or beside others; models' LoRAs into a file; converting | this file |
| reading the layouts of kohya, PEFT and diffusers, without a model | `formats.py` |
| writing the first two | `export.py` |
| what a file says of its training | `metadata.py` |
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lora.files.export import write
from lora.files.formats import LoRAFile, Pair, kohya_name, no_place, read
from lora.layer import LoRAError, LoRALayer, unfit
from lora.model import adaptable, check_strength, lora_layers, lora_names

Models = Mapping[str, nn.Module]

TEXT_WIDTHS = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}
"""Width of the text embedding -> the models that have it."""


@dataclass(frozen=True)
class LoRASummary:
    """What load_lora found: layers for each prefix, each (rank, alpha) with its number of layers,
    the metadata."""

    layers: dict[str, int]
    ranks: dict[tuple[int, float], int]
    dtype: torch.dtype
    metadata: dict[str, str]


def save_lora(
    path: str | Path,
    models: Models,
    metadata: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.float16,
    layout: str = "kohya",
) -> None:
    """Writes the LoRAs of the models into one file; it appears whole or not at all.

    models: by prefix, {"lora_unet": unet, "lora_te": text_encoder}; one without LoRALayers adds
        nothing
    metadata: for the header, written as str; what the layers tell (ranks, alphas, SD 1 or 2) is
        added
    dtype: of weights and alphas; float32 keeps every bit
    layout: "kohya" for its tools, AUTOMATIC1111 and ComfyUI, or "peft" for diffusers (alpha / r
        goes into B)

    Raises LoRAError where there is no LoRA or a layer has several, a weight is not finite in
    `dtype`, or the file cannot be written.
    """
    pairs = {}
    for prefix, model in models.items():
        for where, layer in lora_layers(model).items():
            if len(layer.loras) > 1:
                names = ", ".join(lora.name for lora in layer.loras)
                raise LoRAError(f"{path}: {where} has several LoRAs ({names}): remove all but one")
            if prefix == "lora_te":
                where = f"text_model.{where.removeprefix('text_model.')}"
            kernel, ones = (
                (layer.root.kernel_size, (1, 1)) if isinstance(layer.root, nn.Conv2d) else ((), ())
            )
            A, B = layer.A.view(layer.rank, -1, *kernel), layer.B.view(*layer.B.shape, *ones)
            pairs[f"{prefix}.{where}"] = Pair(A, B, layer.alpha)
    write(path, pairs, metadata or {}, layout, dtype)


def load_lora(
    path: str | Path, models: Models, name: str = "lora", strength: float = 1.0
) -> LoRASummary:
    """Injects a LoRA file into models: all of the file, or nothing and a LoRAError that names file,
    layer and shapes.

    path: of a file in any of the layouts in formats.py, or of PEFT's folder
    models: by prefix, {"lora_unet": unet, "lora_te": text_encoder}; they are frozen, and the LoRA
        can be trained on
    name: tells it from those that the models have already, which are frozen too and to which it is
        added
    strength: of all its layers, as by set_strength

    Each layer has its own rank and alpha. A file that was made for another base model, that holds a
    key without a place, a weight that is not finite or a variant other than plain LoRA is refused.
    """
    check_strength(strength)
    for prefix, model in models.items():
        if name in lora_names(model):
            raise LoRAError(
                f"{path}: the {prefix} model has a LoRA named {name!r} already: remove it, or name"
                " this one"
            )
        if any(layer.original is not None for layer in lora_layers(model).values()):
            raise LoRAError(f"{path}: the {prefix} model's LoRA is merged: unmerge first")
    file = read(path)
    table = {
        kohya_name(prefix, where): (prefix, where)
        for prefix, model in models.items()
        for where, _ in adaptable(model)
    }
    if leftover := [
        key for key_of in file.pairs.keys() - table.keys() for key in file.keys[key_of]
    ]:
        total = sum(map(len, file.keys.values()))
        remedy = f"pass the models that the file was made for{_made_for(file)}"
        raise no_place(path, leftover, total, ", ".join(models), remedy)

    # everything is made and checked before the first model changes
    layers = {}
    for layer_name, pair in file.pairs.items():
        prefix, where = table[layer_name]
        base = models[prefix].get_submodule(where)
        _check_fit(f"{path}: {prefix} {where}", base, pair, file)
        layers[prefix, where] = base, pair
    for model in models.values():
        model.requires_grad_(False)
    for (prefix, where), (base, pair) in layers.items():
        layer = LoRALayer(base, len(pair.down), pair.alpha, name=name)
        layer.strength = float(strength)
        with torch.no_grad():
            layer.A.copy_(pair.down.flatten(1))
            layer.B.copy_(pair.up.flatten(1))
        models[prefix].set_submodule(where, layer)

    return LoRASummary(
        layers={prefix: sum(p == prefix for p, _ in layers) for prefix in models},
        ranks=dict(Counter((len(pair.down), pair.alpha) for pair in file.pairs.values())),
        dtype=file.dtype,
        metadata=file.metadata,
    )


def convert(source: str | Path, path: str | Path, layout: str) -> None:
    """Writes a LoRA file of any layout in another, "kohya" or "peft", without a model; the metadata
    go along.

    The weights keep their bits, but where alpha is not the rank and goes into PEFT's B: those are
    written in float32.
    """
    file = read(source)
    dtype = file.dtype
    for pair in file.pairs.values():
        rounded = pair.alpha != float(torch.tensor(pair.alpha, dtype=dtype))
        if pair.alpha != len(pair.down) if layout == "peft" else rounded:
            dtype = torch.float32
    write(path, file.pairs, file.metadata, layout, dtype)


def _check_fit(where: str, base: nn.Module, pair: Pair, file: LoRAFile) -> None:
    if reason := unfit(base):
        raise LoRAError(f"{where}: {reason}")
    weight = (base.root if isinstance(base, LoRALayer) else base).weight
    inputs, wanted = (tuple([*shape[1:], 1, 1][:3]) for shape in (pair.down.shape, weight.shape))
    # of 1x1 convolutions there are files without the ones
    if len(pair.up) != len(weight) or inputs != wanted:
        raise LoRAError(
            f"{where}: lora_down {list(pair.down.shape)} and lora_up {list(pair.up.shape)} for a"
            f" weight {list(weight.shape)}: made for another base model{_made_for(file)}: load it"
            " into that one"
        )


def _made_for(file: LoRAFile) -> str:
    """The base that a file was made for, by its metadata or the width of the text that its layers
    take."""
    base = file.metadata.get("ss_base_model_version") or file.metadata.get("modelspec.architecture")
    if base:
        return f" (its metadata says {base})"
    widths = {
        pair.down.shape[1]
        for name, pair in file.pairs.items()
        if re.search(r"attn2_to_[kv]$", name)
    }
    families = sorted({TEXT_WIDTHS[width] for width in widths if width in TEXT_WIDTHS})
    return f" (by its shapes {' or '.join(families)})" if families else ""

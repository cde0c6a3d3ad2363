"""LoRA files into a model's weights, trained layers into files, and from one layout to another:

    python -m lora.files fetal.safetensors fetal_peft.safetensors --to peft

| concept | where |
|---|---|
| files into weights, all or nothing; models' LoRAs into a file; converting | this file |
| reading the layouts of kohya, PEFT and diffusers, without a model | `formats.py` |
| writing the first two | `export.py` |
| what a file says of its training | `metadata.py` |
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lora.files.export import write
from lora.files.formats import LoRAFile, Pair, kohya_name, no_place, read, text_width
from lora.layer import LoRAError, unfit
from lora.model import adaptable, add_updates, lora_layers

Models = Mapping[str, nn.Module]

TEXT_WIDTHS = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}
"""Width of the text embedding -> the models that have it."""


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
    metadata: for the header, as str; what the layers tell (ranks, alphas, SD 1 or 2) is added
    dtype: of weights and alphas; float32 keeps every bit
    layout: "kohya" for its tools, AUTOMATIC1111 and ComfyUI, or "peft" for diffusers (alpha / r
        goes into B)

    Raises LoRAError where there is no LoRA, a weight is not finite in `dtype`, or the file cannot
    be written.
    """
    pairs = {}
    for prefix, model in models.items():
        for where, layer in lora_layers(model).items():
            if prefix == "lora_te":
                where = f"text_model.{where.removeprefix('text_model.')}"
            pairs[f"{prefix}.{where}"] = Pair(layer.A.weight, layer.B.weight, layer.alpha)
    write(path, pairs, metadata or {}, layout, dtype)


def load_loras(loras: Sequence[tuple[str | Path, float]], models: Models) -> list[LoRAFile]:
    """Puts LoRA files into the weights of models, W0 + the sum of strength * (alpha / r) * B A (Eq.
    2), summed in float32 and cast once: all of all files, or nothing and a LoRAError that names
    file, layer and shapes.

    loras: (file in any of the layouts in formats.py, or PEFT's folder; its strength: 1 as trained)
    models: by prefix, {"lora_unet": unet, "lora_te": text_encoder}

    They are summed in the order of their names, so that the order given changes no bit. A file that
    was made for another base model, that holds a key without a place, a weight that is not finite
    or a variant other than plain LoRA is refused. Returns what was read, in the order given.
    """
    for path, strength in loras:
        if not math.isfinite(strength):
            raise LoRAError(f"{path}: strength {strength}: must be a finite number")
    files = [read(path) for path, _ in loras]
    table = {
        kohya_name(prefix, where): layer
        for prefix, model in models.items()
        for where, layer in adaptable(model)
    }
    updates: dict[str, list[tuple[float, Tensor, Tensor]]] = {}
    for (path, strength), file in sorted(zip(loras, files), key=lambda lora: Path(lora[0][0]).stem):
        if leftover := [
            key for name in file.pairs.keys() - table.keys() for key in file.keys[name]
        ]:
            remedy = f"pass the models that the file was made for{_made_for(file)}"
            total = sum(map(len, file.keys.values()))
            raise no_place(path, leftover, total, ", ".join(models), remedy)
        for name, pair in file.pairs.items():
            _check_fit(f"{path}: {name}", table[name], pair, file)
            scale = strength * pair.alpha / len(pair.down)
            updates.setdefault(name, []).append((scale, pair.down, pair.up))
    for name, sums in updates.items():
        add_updates(table[name].weight, sums)
    return files


def convert(source: str | Path, path: str | Path, layout: str) -> None:
    """Writes a LoRA file of any layout in another, "kohya" or "peft", without a model; the metadata
    go along.

    The weights keep their bits, but where an alpha is not the rank and goes into PEFT's B, or would
    be rounded by the file's dtype: the file is then written in float32.
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
    wanted = list(base.weight.shape)
    # of 1x1 convolutions there are files without the ones
    inputs, own = ([*shape[1:], 1, 1][:3] for shape in (pair.down.shape, wanted))
    if len(pair.up) != wanted[0] or inputs != own:
        shapes = f"lora_down {list(pair.down.shape)} and lora_up {list(pair.up.shape)}"
        raise LoRAError(
            f"{where}: {shapes} for a weight {wanted}: made for another base model"
            f"{_made_for(file)}: load it into that one"
        )


def _made_for(file: LoRAFile) -> str:
    """The base that a file was made for, by its metadata or the width of the text that it takes."""
    said = file.metadata.get("ss_base_model_version") or file.metadata.get("modelspec.architecture")
    if said:
        return f" (its metadata says {said})"
    family = TEXT_WIDTHS.get(text_width(file.pairs))
    return f" (by its shapes {family})" if family else ""

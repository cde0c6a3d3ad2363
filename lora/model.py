"""LoRA on all layers of a model that a target names; merging, strength and removal of all at once.

Wider targets than the paper's are those of diffusers and of kohya's sd-scripts.
"""

import math
import re
import warnings
import zlib
from collections.abc import Iterator

import torch
from torch import nn

from lora.layer import LoRAError, LoRALayer, check_settings, unfit

TRANSFORMER = r"attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|attentions\.\d+\.proj_(in|out)"
RESNET = r"resnets\.\d+\.(conv[12]|conv_shortcut|time_emb_proj)|(down|up)samplers\.0\.conv"

TARGETS: dict[str, str] = {
    "cross-attention": r"(.*\.)?attn2\.(to_[qkv]|to_out\.0)",
    "attention": r"(.*\.)?attn[12]\.(to_[qkv]|to_out\.0)",
    "transformer": rf"(.*\.)?({TRANSFORMER})",
    "locon": rf"(.*\.)?({TRANSFORMER}|{RESNET})",
    "text-encoder": r"(.*\.)?layers\.\d+\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])",
}
"""Layers by name, as regular expressions for a whole module path: the paper's choice (four layers
for each transformer block), diffusers' (eight), kohya's for the U-Net (twelve), kohya's with
conv_dim (ResNet blocks and samplers too, with their 3x3 convolutions: LoCon, or LoRA-C3Lier) and
kohya's for CLIP (six for each encoder layer)."""


def inject(
    model: nn.Module,
    rank: int,
    alpha: float,
    target: str = "cross-attention",
    init: str = "gaussian",
    generator: torch.Generator | None = None,
) -> list[str]:
    """Freezes a model and wraps the layers that `target` names in LoRALayers; returns their paths.

    target: a name in TARGETS, or a regular expression that matches the whole path of a layer
    generator: its seed and a layer's path decide the layer's A, so that neither the order of
        wrapping nor the other layers matter; None is seed 0

    The model's output stays bit-equal. Raises LoRAError, with the model untouched, where nothing
    matches, a layer has a LoRA already or cannot have one, or a setting is wrong.
    """
    check_settings(rank, alpha, init)
    try:
        pattern = re.compile(TARGETS.get(target, target))
    except re.error as error:
        raise LoRAError(
            f"target {target!r} is neither of {', '.join(TARGETS)} nor a regular expression:"
            f" {error}"
        ) from None
    bases = {path: layer for path, layer in adaptable(model) if pattern.fullmatch(path)}
    if not bases:
        example = next((path for path, _ in adaptable(model)), None)
        raise LoRAError(
            f"target {target!r} matches no layer of {type(model).__name__}: use one of"
            f" {', '.join(TARGETS)} or a regular expression for a whole path"
            + (f" such as {example}" if example else "")
        )
    for path, base in bases.items():
        if isinstance(base, LoRALayer):
            raise LoRAError(
                f"{path}: has a LoRA already: remove it first, or inject into other layers"
            )
        if reason := unfit(base):
            raise LoRAError(f"{path}: {reason}")
    full = min(min(base.weight.shape[:2]) for base in bases.values())
    if rank > full:
        warnings.warn(
            f"rank {rank}: the narrowest of the layers has full rank at {full}", stacklevel=2
        )

    seed = 0 if generator is None else generator.initial_seed()
    model.requires_grad_(False)
    for path, base in bases.items():
        own = torch.Generator().manual_seed(seed ^ zlib.crc32(path.encode()))
        model.set_submodule(path, LoRALayer(base, rank, alpha, init, own))
    return list(bases)


def adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of each layer that is linear, convolutional or already a LoRALayer (then not
    what it wraps)."""
    wrapped = {module.base for module in model.modules() if isinstance(module, LoRALayer)}
    for path, module in model.named_modules():
        if path and module not in wrapped and isinstance(module, nn.Linear | nn.Conv2d | LoRALayer):
            yield path, module


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The model's LoRALayers by path, in the model's order, the outermost of each; empty where it
    has none."""
    return {path: module for path, module in adaptable(model) if isinstance(module, LoRALayer)}


def lora_names(model: nn.Module) -> set[str]:
    """Names of the LoRAs in the model."""
    return {lora.name for layer in lora_layers(model).values() for lora in layer.loras}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of each LoRA: all that an optimizer should see."""
    loras = [lora for layer in lora_layers(model).values() for lora in layer.loras]
    return [parameter for lora in loras for parameter in (lora.A, lora.B)]


def set_strength(model: nn.Module, strength: float, name: str | None = None) -> None:
    """Scales the LoRA of a name, or all: 1 as trained, 0 bit-equal to the model without it,
    negative away from it.

    Raises LoRAError where it is merged, or none has the name.
    """
    check_strength(strength)
    _check_name(model, name)
    layers = lora_layers(model)
    for path, layer in layers.items():
        if layer.original is not None:
            raise LoRAError(
                f"{path}: the LoRA is merged, its strength is in the weights: unmerge first"
            )
    for layer in layers.values():
        for lora in layer.loras:
            if name in (None, lora.name):
                lora.strength = float(strength)


def merge(model: nn.Module, strength: float | None = None) -> None:
    """Puts all LoRAs into the weights, at the strength given or else set (1 at first): sampling
    then costs no more.

    Raises LoRAError where they are merged already.
    """
    if any(layer.original is not None for layer in lora_layers(model).values()):
        raise LoRAError("the LoRA is merged already: unmerge first")
    if strength is not None:
        set_strength(model, strength)
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undoes merge: the weights are bit-equal to those before it, the LoRA acts at run time
    again."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def remove(model: nn.Module, name: str | None = None) -> None:
    """Takes the LoRA of a name out, or all: the original modules stand in their places, bit-equal;
    they stay frozen.

    What was merged is unmerged first. Raises LoRAError where none has the name.
    """
    _check_name(model, name)
    unmerge(model)
    for path, layer in lora_layers(model).items():
        module, kept = layer.root, [lora for lora in layer.loras if name not in (None, lora.name)]
        for lora in kept:
            lora.base = module
            module = lora
        model.set_submodule(path, module)


def check_strength(strength: float) -> None:
    """Raises LoRAError for what is no strength."""
    if not math.isfinite(strength):
        raise LoRAError(f"strength {strength}: must be a finite number")


def _check_name(model: nn.Module, name: str | None) -> None:
    names = lora_names(model)
    if name is not None and name not in names:
        raise LoRAError(f"no LoRA is named {name!r}: {', '.join(sorted(names)) or 'none'} there")

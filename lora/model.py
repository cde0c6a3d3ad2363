"""LoRA on all layers of a model that a target names; updates of LoRA files put into the weights.

Wider targets than the paper's are those of diffusers and of kohya's sd-scripts.
"""

import re
import warnings
import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

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
    seed: int = 0,
) -> list[str]:
    """Freezes a model and wraps the layers that `target` names in LoRALayers; returns their paths.

    target: a name in TARGETS, or a regular expression that matches the whole path of a layer
    seed: it and a layer's path decide the layer's A, so that neither the order of wrapping nor the
        other layers matter

    The model's output stays bit-equal. Raises LoRAError, with the model untouched, where nothing
    matches, a layer has a LoRA already or cannot have one, or a setting is wrong.
    """
    check_settings(rank, alpha, init)
    names = ", ".join(TARGETS)
    try:
        pattern = re.compile(TARGETS.get(target, target))
    except re.error as error:
        reason = f"is neither of {names} nor a regular expression: {error}"
        raise LoRAError(f"{target!r} {reason}") from None
    bases = {path: layer for path, layer in adaptable(model) if pattern.fullmatch(path)}
    if not bases:
        example = next((f" such as {path}" for path, _ in adaptable(model)), "")
        raise LoRAError(
            f"{target!r} matches no layer of {type(model).__name__}: use one of {names} or"
            f" a regular expression for a whole path{example}"
        )
    for path, base in bases.items():
        if reason := unfit(base):
            raise LoRAError(f"{path}: {reason}")
    full = min(min(base.weight.shape[:2]) for base in bases.values())
    if rank > full:
        text = f"rank {rank}: the narrowest of the layers has full rank at {full}"
        warnings.warn(text, stacklevel=2)

    model.requires_grad_(False)
    for path, base in bases.items():
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(path.encode()))
        model.set_submodule(path, LoRALayer(base, rank, alpha, init, generator))
    return list(bases)


def adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of each linear or convolutional layer; a LoRALayer in place of what it
    wraps."""
    inside = set()
    for path, module in model.named_modules():
        if isinstance(module, LoRALayer):
            inside |= {module.base, module.A, module.B}
        if path and module not in inside and isinstance(module, nn.Linear | nn.Conv2d | LoRALayer):
            yield path, module


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The model's LoRALayers by path, in the model's order; empty where it has none."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALayer)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of each LoRA: all that an optimizer should see."""
    return [m.weight for layer in lora_layers(model).values() for m in (layer.A, layer.B)]


@torch.no_grad()
def add_updates(weight: nn.Parameter, updates: Sequence[tuple[float, Tensor, Tensor]]) -> None:
    """W0 + the sum of scale * B A becomes a layer's weight: summed in float32, cast once.

    updates: (scale, A (r, in[, height, width]), B (out, r[, 1, 1])) of each LoRA, where scale is
        its strength * alpha / r
    """
    total = weight.float()
    for scale, A, B in updates:
        A, B = (matrix.to(weight.device, torch.float32).flatten(1) for matrix in (A, B))
        total = total + scale * (B @ A).view_as(weight)
    weight.data = total.to(weight.dtype)

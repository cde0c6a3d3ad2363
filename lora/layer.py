"""LoRA on single layers, and on all layers of a model that a target names.

Sources: Wang et al. 2024 (FU-LoRA, Eq. 2), Hu et al. 2021 (LoRA), kohya's sd-scripts (wider targets, Kaiming init).
"""

import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS: dict[str, str] = {
    "cross-attention": r"(.*\.)?attn2\.(to_[qkv]|to_out\.0)",
    "attention": r"(.*\.)?attn[12]\.(to_[qkv]|to_out\.0)",
    "transformer": r"(.*\.)?(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|attentions\.\d+\.proj_(in|out))",
    "text-encoder": r"(.*\.)?layers\.\d+\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])",
}
"""Layers by name, as regular expressions for a whole module path: the paper's choice (four layers for each transformer
block), diffusers' (eight), kohya's for the U-Net (twelve) and kohya's for CLIP (six for each encoder layer)."""


class LoRAError(ValueError):
    """A LoRA that cannot be made, read or written as asked; the model is as it was before."""


class LoRALayer(nn.Module):
    """h = W0 x + strength * (alpha / r) * B A x, Eq. 2 of Wang et al. 2024, around a frozen layer.

    base: nn.Linear, or an nn.Conv2d that acts on single pixels (1x1, stride 1, no groups); or another LoRALayer, to
        whose correction this one's is added
    rank: r, at least 1; alpha: positive
    init: A is "gaussian" with standard deviation 1 / r (the paper, diffusers) or "kaiming", uniform within
        1 / sqrt(in) (kohya); B is zero, hence the layer begins as its base
    generator: draws A; None is a generator of its own, seeded with 0: the global one is never touched
    name: tells it from the others around the same layer; they are summed in the order of their names

    A: (r, in) and B: (out, r) are float32 and stay so where the model is cast to half precision, since steps of
    1e-4 would be lost there. Raises LoRAError.
    """

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        rank: int,
        alpha: float,
        init: str = "gaussian",
        generator: torch.Generator | None = None,
        name: str = "lora",
    ):
        super().__init__()
        _check_settings(rank, alpha, init)
        if reason := unfit(base):
            raise LoRAError(reason)
        if isinstance(base, LoRALayer) and base.original is not None:
            raise LoRAError("the LoRA below is merged: unmerge first")
        self.base = base.requires_grad_(False)
        self.name, self.rank, self.alpha, self.strength = name, rank, float(alpha), 1.0
        base = self.root
        out_features, in_features = base.weight.shape[:2]
        self.original: Tensor | None = None  # W0, while the base's weight is the merged one

        generator = torch.Generator().manual_seed(0) if generator is None else generator
        A = torch.empty(rank, in_features, dtype=torch.float32, device=generator.device)
        if init == "gaussian":
            A.normal_(0, 1 / rank, generator=generator)
        else:
            A.uniform_(-(in_features**-0.5), in_features**-0.5, generator=generator)
        device = base.weight.device
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=device))
        self.train(base.training)

    @property
    def root(self) -> nn.Linear | nn.Conv2d:
        """The layer below all LoRAs."""
        return self.base.root if isinstance(self.base, LoRALayer) else self.base

    @property
    def loras(self) -> list["LoRALayer"]:
        """This LoRA and those below it, by name: an order of its own, so that their sum has the same bits in any."""
        below = self.base.loras if isinstance(self.base, LoRALayer) else []
        return sorted([self, *below], key=lambda lora: lora.name)

    def forward(self, x: Tensor) -> Tensor:
        h = total = self.root(x)
        if self.original is None:
            for lora in self.loras:
                if lora.strength != 0:
                    delta = lora._linear(lora._linear(x.to(lora.A.dtype), lora.A), lora.B)
                    total = total + lora.strength * lora.alpha / lora.rank * delta
        # half precision promotes to the LoRA's float32 and is rounded once
        return total.to(h.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """W0 + the sum of strength * (alpha / r) * B A becomes the root's weight, summed in float32 and cast once."""
        if self.original is not None:
            raise LoRAError("merged already: unmerge first")
        total = weight = self.root.weight
        for lora in self.loras:
            total = total + lora.strength * lora.alpha / lora.rank * (lora.B @ lora.A).view_as(weight)
        self.original = weight.data
        weight.data = total.to(weight.dtype)

    def unmerge(self) -> None:
        """The saved W0 comes back: a subtraction would leave rounding errors."""
        if self.original is not None:
            self.root.weight.data, self.original = self.original, None

    def _linear(self, x: Tensor, matrix: Tensor) -> Tensor:
        if isinstance(self.root, nn.Conv2d):
            return F.conv2d(x, matrix[:, :, None, None])
        return F.linear(x, matrix)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRALayer":
        # .half(), .to(...), .cuda() all pass here: the base takes dtype and device, A and B the device alone
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            self.base._apply(fn)
        if self.original is not None:
            self.original = fn(self.original)
        return super()._apply(keep_dtype, recurse=False)

    def extra_repr(self) -> str:
        return f"name={self.name}, rank={self.rank}, alpha={self.alpha:g}, strength={self.strength:g}"


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
    generator: its seed and a layer's path decide the layer's A, so that neither the order of wrapping nor the other
        layers matter; None is seed 0

    The model's output stays bit-equal. Raises LoRAError, with the model untouched, where nothing matches, a layer has
    a LoRA already or cannot have one, or a setting is wrong.
    """
    _check_settings(rank, alpha, init)
    try:
        pattern = re.compile(TARGETS.get(target, target))
    except re.error as error:
        raise LoRAError(
            f"target {target!r} is neither of {', '.join(TARGETS)} nor a regular expression: {error}"
        ) from None
    bases = {path: layer for path, layer in adaptable(model) if pattern.fullmatch(path)}
    if not bases:
        example = next((path for path, _ in adaptable(model)), None)
        raise LoRAError(
            f"target {target!r} matches no layer of {type(model).__name__}: use one of {', '.join(TARGETS)} or a "
            f"regular expression for a whole path" + (f" such as {example}" if example else "")
        )
    for path, base in bases.items():
        if isinstance(base, LoRALayer):
            raise LoRAError(f"{path}: has a LoRA already: remove it first, or inject into other layers")
        if reason := unfit(base):
            raise LoRAError(f"{path}: {reason}")
    full = min(min(base.weight.shape[:2]) for base in bases.values())
    if rank > full:
        warnings.warn(f"rank {rank}: the narrowest of the layers has full rank at {full}", stacklevel=2)

    seed = 0 if generator is None else generator.initial_seed()
    model.requires_grad_(False)
    for path, base in bases.items():
        own = torch.Generator().manual_seed(seed ^ zlib.crc32(path.encode()))
        model.set_submodule(path, LoRALayer(base, rank, alpha, init, own))
    return list(bases)


def adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of each layer that is linear, convolutional or already a LoRALayer (then not what it wraps)."""
    wrapped = {module.base for module in model.modules() if isinstance(module, LoRALayer)}
    for path, module in model.named_modules():
        if path and module not in wrapped and isinstance(module, nn.Linear | nn.Conv2d | LoRALayer):
            yield path, module


def unfit(base: nn.Module) -> str | None:
    """Why a layer cannot be the base of a LoRALayer, or None where it can."""
    if isinstance(base, nn.Linear | LoRALayer):
        return None
    if not isinstance(base, nn.Conv2d):
        return f"{type(base).__name__} is neither nn.Linear nor nn.Conv2d"
    if base.kernel_size == base.stride == (1, 1) and base.padding == (0, 0) and base.groups == 1:
        return None
    size = "x".join(map(str, base.kernel_size))
    return f"a {size} convolution: only 1x1 with stride 1, no padding and no groups can have a LoRA"


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The model's LoRALayers by path, in the model's order, the outermost of each; empty where it has none."""
    return {path: module for path, module in adaptable(model) if isinstance(module, LoRALayer)}


def lora_names(model: nn.Module) -> set[str]:
    """Names of the LoRAs in the model."""
    return {lora.name for layer in lora_layers(model).values() for lora in layer.loras}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of each LoRA: all that an optimizer should see."""
    loras = [lora for layer in lora_layers(model).values() for lora in layer.loras]
    return [parameter for lora in loras for parameter in (lora.A, lora.B)]


def set_strength(model: nn.Module, strength: float, name: str | None = None) -> None:
    """Scales the LoRA of a name, or all: 1 as trained, 0 bit-equal to the model without it, negative away from it.

    Raises LoRAError where it is merged, or none has the name.
    """
    check_strength(strength)
    _check_name(model, name)
    layers = lora_layers(model)
    for path, layer in layers.items():
        if layer.original is not None:
            raise LoRAError(f"{path}: the LoRA is merged, its strength is in the weights: unmerge first")
    for layer in layers.values():
        for lora in layer.loras:
            if name in (None, lora.name):
                lora.strength = float(strength)


def merge(model: nn.Module, strength: float | None = None) -> None:
    """Puts all LoRAs into the weights, at the strength given or else set (1 at first): sampling then costs no more.

    Raises LoRAError where they are merged already.
    """
    if any(layer.original is not None for layer in lora_layers(model).values()):
        raise LoRAError("the LoRA is merged already: unmerge first")
    if strength is not None:
        set_strength(model, strength)
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undoes merge: the weights are bit-equal to those before it, the LoRA acts at run time again."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def remove(model: nn.Module, name: str | None = None) -> None:
    """Takes the LoRA of a name out, or all: the original modules stand in their places, bit-equal; they stay frozen.

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


def _check_settings(rank: int, alpha: float, init: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise LoRAError(f"rank {rank!r}: must be a whole number of at least 1")
    if not math.isfinite(alpha) or alpha <= 0:
        raise LoRAError(f"alpha {alpha}: must be a positive number; alpha = rank leaves B A as it is")
    if init not in ("gaussian", "kaiming"):
        raise LoRAError(f"init {init!r}: must be 'gaussian' or 'kaiming'")

"""LoRA on a single layer.

Sources: Wang et al. 2024 (FU-LoRA, Eq. 2), Hu et al. 2021 (LoRA), kohya's sd-scripts (Kaiming init,
convolutions).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRAError(ValueError):
    """A LoRA that cannot be made, read or written as asked; the model is as it was before."""


class LoRALayer(nn.Module):
    """h = W0 x + strength * (alpha / r) * B A x, Eq. 2 of Wang et al. 2024, around a frozen layer.

    strength is 1 in training, and in sampling what sample.py calls --lora-weight.

    base: nn.Linear, or an nn.Conv2d without groups, whose A then is a convolution of its kernel,
        stride and padding, and B one of 1x1 (LoCon); or another LoRALayer, to whose correction this
        one's is added
    rank: r, at least 1; alpha: positive
    init: A is "gaussian" with standard deviation 1 / r (the paper, diffusers) or "kaiming", uniform
        within 1 / sqrt(in) (kohya); B is zero, hence the layer begins as its base
    generator: draws A; None is a generator of its own, seeded with 0: the global one is never
        touched
    name: tells it from the others around the same layer; they are summed in the order of their
        names

    A: (r, in), or (r, in * height * width) with a kernel's, and B: (out, r) are float32 and stay so
    where the model is cast to half precision, since steps of 1e-4 would be lost there. Raises
    LoRAError.
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
        check_settings(rank, alpha, init)
        if reason := unfit(base):
            raise LoRAError(reason)
        if isinstance(base, LoRALayer) and base.original is not None:
            raise LoRAError("the LoRA below is merged: unmerge first")
        self.base = base.requires_grad_(False)
        self.name, self.rank, self.alpha, self.strength = name, rank, float(alpha), 1.0
        weight = self.root.weight
        out_features, in_features, device = len(weight), weight[0].numel(), weight.device
        self.original: Tensor | None = None  # W0, while the base's weight is the merged one
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        A = torch.empty(rank, in_features, dtype=torch.float32, device=generator.device)
        if init == "gaussian":
            A.normal_(0, 1 / rank, generator=generator)
        else:
            A.uniform_(-(in_features**-0.5), in_features**-0.5, generator=generator)
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=device))
        self.train(base.training)

    @property
    def root(self) -> nn.Linear | nn.Conv2d:
        """The layer below all LoRAs."""
        return self.base.root if isinstance(self.base, LoRALayer) else self.base

    @property
    def loras(self) -> list["LoRALayer"]:
        """This LoRA and those below it, by name: in whichever order they were loaded, their sum has
        the same bits."""
        below = self.base.loras if isinstance(self.base, LoRALayer) else []
        return sorted([self, *below], key=lambda lora: lora.name)

    def forward(self, x: Tensor) -> Tensor:
        h = total = self.root(x)
        if self.original is None:
            for lora in self.loras:
                if lora.strength != 0:  # the scale where the data is narrowest: between A and B
                    down = lora.strength * lora.alpha / lora.rank * lora.down(lora._own_type(x))
                    total = total + lora.up(down)
        # a base in half precision: products and sum are float32 and rounded once, or under autocast
        # all half
        return total.to(h.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """W0 + the sum of strength * (alpha / r) * B A becomes the root's weight, summed in float32
        and cast once."""
        if self.original is not None:
            raise LoRAError("merged already: unmerge first")
        total = weight = self.root.weight
        for lora in self.loras:
            total = total + lora.strength * lora.alpha / lora.rank * (lora.B @ lora.A).view_as(
                weight
            )
        self.original = weight.data
        weight.data = total.to(weight.dtype)

    def unmerge(self) -> None:
        """The saved W0 comes back: a subtraction would leave rounding errors."""
        if self.original is not None:
            self.root.weight.data, self.original = self.original, None

    def down(self, x: Tensor) -> Tensor:
        """A x, a convolution as the base is one."""
        if not isinstance(self.root, nn.Conv2d):
            return F.linear(x, self.A)
        A = self.A.view(self.rank, -1, *self.root.kernel_size)
        return F.conv2d(
            x, A, stride=self.root.stride, padding=self.root.padding, dilation=self.root.dilation
        )

    def up(self, x: Tensor) -> Tensor:
        """B x, for each pixel where the base is a convolution."""
        return (
            F.conv2d(x, self.B[:, :, None, None])
            if isinstance(self.root, nn.Conv2d)
            else F.linear(x, self.B)
        )

    def _own_type(self, x: Tensor) -> Tensor:
        # autocast casts both to its own
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.A.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRALayer":
        # .half(), .to(...), .cuda() all pass here: the base takes dtype and device, A and B the
        # device alone
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            self.base._apply(fn)
        if self.original is not None:
            self.original = fn(self.original)
        return super()._apply(keep_dtype, recurse=False)

    def extra_repr(self) -> str:
        return (
            f"name={self.name}, rank={self.rank}, alpha={self.alpha:g}, strength={self.strength:g}"
        )


def unfit(base: nn.Module) -> str | None:
    """Why a layer cannot be the base of a LoRALayer, or None where it can."""
    if isinstance(base, nn.Linear | LoRALayer):
        return None
    if not isinstance(base, nn.Conv2d):
        return f"{type(base).__name__} is neither nn.Linear nor nn.Conv2d"
    if base.groups == 1 and base.padding_mode == "zeros":
        return None
    kind = (
        f"in {base.groups} groups" if base.groups > 1 else f"padded with {base.padding_mode} values"
    )
    return f"a convolution {kind}: only plain ones, padded with zeros, can have a LoRA"


def check_settings(rank: int, alpha: float, init: str) -> None:
    """Raises LoRAError for what no LoRA can have."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise LoRAError(f"rank {rank!r}: must be a whole number of at least 1")
    if not math.isfinite(alpha) or alpha <= 0:
        raise LoRAError(
            f"alpha {alpha}: must be a positive number; alpha = rank leaves B A as it is"
        )
    if init not in ("gaussian", "kaiming"):
        raise LoRAError(f"init {init!r}: must be 'gaussian' or 'kaiming'")

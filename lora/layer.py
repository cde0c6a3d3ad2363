"""LoRA on a single layer.

Sources: Wang et al. 2024 (FU-LoRA, Eq. 2), Hu et al. 2021 (LoRA), kohya's sd-scripts (Kaiming init,
convolutions).
"""

import math

import torch
from torch import Tensor, nn


class LoRAError(ValueError):
    """A LoRA that cannot be made, read or written as asked; the model is as it was before."""


class LoRALayer(nn.Module):
    """h = W0 x + (alpha / r) * B A x, Eq. 2 of Wang et al. 2024, around a frozen layer.

    base: nn.Linear, or an nn.Conv2d without groups, whose A then is a convolution of its kernel,
        stride and padding, and B one of 1x1 (LoCon)
    rank: r, at least 1; alpha: positive
    init: A is "gaussian" with standard deviation 1 / r (the paper, diffusers) or "kaiming", uniform
        within 1 / sqrt(in) (kohya); B is zero, hence the layer begins as its base
    generator: draws A; None is a generator of its own, seeded with 0: the global one is never
        touched

    A and B are float32 whatever the base is, since steps of 1e-4 would be lost in half precision:
    cast a model before, and train under autocast. Raises LoRAError.
    """

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        rank: int,
        alpha: float,
        init: str = "gaussian",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        check_settings(rank, alpha, init)
        if reason := unfit(base):
            raise LoRAError(reason)
        self.base, self.rank, self.alpha = base.requires_grad_(False), rank, float(alpha)
        weight, make = base.weight, nn.utils.skip_init  # which draws nothing
        out_features, in_features, device = len(weight), weight.shape[1], weight.device
        if isinstance(base, nn.Linear):
            self.A = make(nn.Linear, in_features, rank, bias=False, device=device)
            self.B = make(nn.Linear, rank, out_features, bias=False, device=device)
        else:
            same = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
            kernel, plain = base.kernel_size, {"bias": False, "device": device}
            self.A = make(nn.Conv2d, in_features, rank, kernel, **same, **plain)
            self.B = make(nn.Conv2d, rank, out_features, 1, **plain)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        A = torch.empty(self.A.weight.shape, device=generator.device)
        if init == "gaussian":
            A.normal_(0, 1 / rank, generator=generator)
        else:
            bound = A[0].numel() ** -0.5
            A.uniform_(-bound, bound, generator=generator)
        self.A.weight.data.copy_(A)
        nn.init.zeros_(self.B.weight)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.B(self.alpha / self.rank * self.A(x))


def unfit(base: nn.Module) -> str | None:
    """Why a layer cannot be the base of a LoRALayer, or None where it can."""
    if isinstance(base, nn.Linear):
        return None
    if isinstance(base, LoRALayer):
        return "has a LoRA already"
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

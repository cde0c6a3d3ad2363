"""Around the training loop: the order of the images, the optimizer, and a checkpoint that the same run goes on from."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora.layer import LoRAError


def images_of_step(step: int, count: int, repeats: int, size: int, seed: int) -> Tensor:
    """Indices of the `size` images of an optimizer step (fewer at an epoch's end): a function of (seed, step) alone.

    An epoch is each of the `count` images `repeats` times, shuffled.
    """
    epoch, within = divmod(step, math.ceil(count * repeats / size))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count * repeats, generator=generator) % count
    return order.split(size)[within]


def make_optimizer(groups: list[dict], weight_decay: float, eight_bit: bool) -> tuple[torch.optim.Optimizer, str]:
    """AdamW (Loshchilov & Hutter 2019) over groups of {"params", "lr"}: 8-bit where that runs, else torch's.

    Also returns why it is not 8-bit though `eight_bit` asked for it; "" where there is nothing to say.
    """
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
    reason = ""
    if eight_bit:
        reason = "no CUDA device"
        if groups[0]["params"][0].is_cuda:
            try:
                from bitsandbytes.optim import AdamW8bit

                return AdamW8bit(groups, **settings), ""
            except (ImportError, OSError, RuntimeError) as error:
                reason = f"bitsandbytes does not load: {str(error).splitlines()[0]}"
    return torch.optim.AdamW(groups, **settings), reason


def save_checkpoint(path: Path, identity: Mapping[str, str], **state) -> None:
    """Write all that a run goes on from; replaced in one go, so that a run killed meanwhile keeps the one before.

    identity: the settings that a run which goes on must share
    """
    torch.save({"identity": dict(identity), **state}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(path: Path, identity: Mapping[str, str], device: str) -> dict:
    """What save_checkpoint wrote; raises LoRAError, which names them, where settings of `identity` were others."""
    state = torch.load(path, weights_only=True, map_location=device)
    before = state["identity"]
    keys = [key for key in before | identity if before.get(key) != identity.get(key)]
    if changed := [f"{key} was {before.get(key)}, is {identity.get(key)}" for key in keys]:
        raise LoRAError(f"{path}: other settings ({'; '.join(changed)}): use its own, or another --out")
    return state

"""One epoch of training and one pass of prediction, as plain loops (the paper: SGD 1e-3, batch 24;
momentum 0.9 is its notebook's)."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from classify import ClassifyError
from classify.data import Augmentation, BalancedSampler, prepare

MOMENTUM = 0.9

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]
"""(images (B, 1 or 3, H, W) uint8, targets (B,), indices (B,)) as `data.batches` gives them."""


def train_epoch(
    model: nn.Module,
    loader: Batches,
    optimizer: torch.optim.Optimizer,
    input_range: str,
    augmentation: Augmentation | None = None,
    dtype: torch.dtype = torch.float32,
    contrast: Augmentation | None = None,
    rates: Iterator[float] | None = None,
) -> float:
    """Train on every batch once, by cross-entropy; returns the mean loss per image.

    augmentation, contrast: what alters the images (`data.draw_augmentation`, `data.draw_contrast`)
    rates: the learning rate of each step; None: the optimizer's own
    dtype: autocast to it unless float32; parameters stay float32
    Raises ClassifyError where the loss was not finite.
    """
    model.train()
    device = next(model.parameters()).device
    total = count = 0
    for images, targets, indices in loader:
        affine = augmentation(indices) if augmentation else None
        colour = contrast(indices) if contrast else None
        inputs = prepare(images.to(device, non_blocking=True), input_range, affine, colour)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(inputs), targets.to(device, non_blocking=True))

        if rates:
            optimizer.param_groups[0]["lr"] = next(rates)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        total, count = total + loss.item() * len(targets), count + len(targets)
    if not math.isfinite(total):
        raise ClassifyError("the training loss is no longer finite; lower the learning rate")
    return total / count


@torch.no_grad()
def outputs(
    model: nn.Module, loader: Batches, input_range: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What a network gives for the images of a loader, in its order: (N, ..) float32.
    ClassifyError where it is not finite."""
    model.eval()
    device, found = next(model.parameters()).device, []
    for images, _, _ in loader:
        inputs = prepare(images.to(device, non_blocking=True), input_range)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found.append(model(inputs).float())
    found = torch.cat(found)
    if not found.isfinite().all():
        raise ClassifyError(
            "the network's output is not finite; lower the learning rate, or take another network"
        )
    return found


def predict(*arguments: Any) -> Tensor:
    """Class probabilities (N, K) on the CPU; arguments and errors of `outputs`."""
    return outputs(*arguments).softmax(dim=1).cpu()


def training_state(
    history: list[dict], model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader
) -> dict[str, Any]:
    """Weights, momentum, and the states of what is random: the loader's order, and dropout.

    history: a row for each epoch that is done
    """
    return {
        "history": history,
        "loader": loader.generator.get_state(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def restore(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader
) -> list[dict]:
    """Put what `training_state` gave into its places; returns the history."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    loader.generator.set_state(state["loader"])
    if isinstance(loader.sampler, BalancedSampler):
        loader.sampler.passes = len(state["history"])
    torch.set_rng_state(state["random"])
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    return state["history"]

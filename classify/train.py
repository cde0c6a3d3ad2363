"""One epoch of training and one pass of prediction, as plain loops (the paper: SGD 1e-3, momentum
0.9, batch 24)."""

from collections.abc import Callable, Iterable
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
    rate: Callable[[], float] | None = None,
) -> float:
    """Train on every batch once, by cross-entropy; returns the mean loss per image.

    augmentation, contrast: what alters the images (`data.draw_augmentation`,
        `contrast.draw_contrast`)
    rate: the learning rate of the next step, asked before each; None: the optimizer's own
    dtype: autocast to it unless float32; parameters stay float32
    Raises ClassifyError where the loss was not finite.
    """
    model.train()
    device = next(model.parameters()).device
    # which Apple's GPUs do not have
    kind = torch.float32 if device.type == "mps" else torch.float64
    # read at the end: a GPU need not be waited for
    total, count = torch.zeros((), dtype=kind, device=device), 0
    for images, targets, indices in loader:
        affine = augmentation(indices) if augmentation else None
        inputs = prepare(
            images.to(device, non_blocking=True),
            input_range,
            affine,
            contrast(indices) if contrast else None,
        )
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(inputs), targets.to(device, non_blocking=True))
        if rate:
            optimizer.param_groups[0]["lr"] = rate()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        total, count = total + loss.detach().to(kind) * len(targets), count + len(targets)
    if not total.isfinite():
        raise ClassifyError("the training loss is no longer finite; lower the learning rate")
    return total.item() / count


@torch.no_grad()
def predict(
    model: nn.Module, loader: Batches, input_range: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Class probabilities (N, K), float32 on the CPU, in the loader's order. ClassifyError where
    one is not finite."""
    model.eval()
    device = next(model.parameters()).device
    probabilities = []
    for images, _, _ in loader:
        inputs = prepare(images.to(device, non_blocking=True), input_range)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(inputs)
        probabilities.append(logits.float().softmax(dim=1))
    found = torch.cat(probabilities).cpu()
    if not found.isfinite().all():
        raise ClassifyError(
            "what the network says is not finite; lower the learning rate, or take other weights"
        )
    return found


def training_state(
    history: list[dict], model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader
) -> dict[str, Any]:
    """Weights, momentum, and the states of what is random: the loader's order, and dropout.

    history: a row for each epoch that is done
    """
    state = {"history": history, "loader": loader.generator.get_state()}
    state |= {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


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
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    return state["history"]

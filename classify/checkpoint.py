"""What a training that was stopped goes on from, after whole epochs."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from classify.balanced import BalancedSampler


def training_state(
    history: list[dict], model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader
) -> dict[str, Any]:
    """Weights, momentum, and the states of what is random: the loader's order, and dropout.

    history: a row for each epoch that is done
    """
    state = {"history": history, "loader": loader.generator.get_state()}
    state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
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

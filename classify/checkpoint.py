"""What a training that was stopped goes on from: written after whole epochs, gone when the run is done."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from classify import ClassifyError
from classify.data import BalancedSampler


def save_checkpoint(
    path: Path,
    identity: Mapping[str, str],
    history: list[dict],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
) -> None:
    """Replaced in one go. identity: what a run that goes on must share; history: a row for each epoch that is done.

    Besides weights and momentum, the states of what is random: the loader's order, and dropout. Raises OSError.
    """
    state = {"identity": dict(identity), "history": history, "loader": loader.generator.get_state()}
    state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        torch.save(state, part)
        part.replace(path)
    except RuntimeError as error:  # torch's word for a disk that is full
        raise OSError(f"{path}: cannot be written; is the disk full? ({str(error).splitlines()[0]})") from None
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(
    path: Path, identity: Mapping[str, str], model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader
) -> list[dict]:
    """Put what save_checkpoint wrote into its places; returns the history.

    Raises ClassifyError, which names them, where settings or images were others.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        before = state["identity"]
    except Exception:  # a broken or foreign file may make the unpickler raise anything
        raise ClassifyError(f"{path}: no checkpoint of classify.py, or a damaged one: remove it") from None
    keys = [key for key in before | identity if before.get(key) != identity.get(key)]
    if changed := [f"{key} was {before.get(key)}, is {identity.get(key)}" for key in keys]:
        raise ClassifyError(f"{path}: other settings ({'; '.join(changed)}): use its own, or another --out")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    loader.generator.set_state(state["loader"])
    if isinstance(loader.sampler, BalancedSampler):
        loader.sampler.passes = len(state["history"])
    torch.set_rng_state(state["random"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    return state["history"]

"""Several processes at one run, as torchrun starts them: who does what, and what they sum.

Without torchrun a run is one process, number 0 of 1, and nothing here does anything.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=7)  # some have hours more to do than others
_apart = False


def join(together: bool) -> None:
    """Meet the other processes of torchrun, where there are some; "cuda" is a GPU of this process's
    own, if there are enough.

    NCCL takes no two processes on one GPU: then, and on CPUs, they meet by gloo. Raises OSError,
    one line, for what is one process's work (`together` is False), and for a WORLD_SIZE of somebody
    else's making.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    if size == "1" or dist.is_initialized():
        return
    names = "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
    if not together:
        raise OSError(f"is one process's work: unset WORLD_SIZE={size}, or start with python alone")
    if not size.isdecimal() or not all(map(os.environ.get, names)):
        raise OSError(f"WORLD_SIZE={size} is not torchrun's: unset it, or start with torchrun")
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    alone = gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    dist.init_process_group("nccl" if alone else "gloo", timeout=PATIENCE)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """While this process does something alone, it is number 0 of 1."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def _together() -> bool:
    return dist.is_initialized() and not _apart


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if _together() else 0


def size() -> int:
    """How many there are."""
    return dist.get_world_size() if _together() else 1


def is_first() -> bool:
    """Is this the one that writes what there is one of?"""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that are this process's: number rank, rank + size, .."""
    return items[rank() :: size()]


def barrier() -> None:
    """Until all are here."""
    if _together():
        dist.barrier()


def broadcast(value: bool) -> bool:
    """What the first process says, on all."""
    if not _together():
        return value
    told = [value]
    dist.broadcast_object_list(told)
    return told[0]


def all_reduce(parameters: Sequence[nn.Parameter], *numbers: float) -> Sequence[float]:
    """Sums over the processes, on all of them: of gradients, in place, a missing one being 0, and
    of numbers, returned.

    parameters: float32 and on one device; the same, in the same order, in every process
    """
    if not _together():
        return numbers
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    tensors = [*gradients, torch.tensor(numbers, dtype=torch.float32, device=parameters[0].device)]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for parameter, part in zip(parameters, parts):
        parameter.grad = part.view_as(parameter)
    return parts[-1].tolist()

"""Several processes at one run, as torchrun starts them: who does what, and what they sum.

Without torchrun, and without `launch`, a run is one process, number 0 of 1.
"""

import contextlib
import datetime
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=7)  # some have hours more to do than others
LAUNCHER = "LAUNCHED_BY"
"""The variable that holds the number of the process that started this one (`launch`)."""

LOOPBACK = {"linux": "lo", "darwin": "lo0"}
_apart = False


def cores() -> int:
    """How many of the CPU's cores this process may use, by its affinity and its container
    (cgroup v2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


def launch(count: int, command: Sequence[str]) -> None:
    """Run a Python command in so many processes by torch's own launcher, each with one thread if
    OMP_NUM_THREADS says no other number, and end with the exit code that they end with.

    What stops this process stops them; they see to it themselves where it is killed (`join`).
    """
    logging.disable()  # the launcher's
    # whose import may log too
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
    if sys.platform in LOOPBACK:  # whatever the machine's name leads to
        settings["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
    os.environ |= settings | os.environ | {LAUNCHER: str(os.getpid())}
    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    where |= {"run_id": str(uuid.uuid4()), "signals_to_handle": "SIGINT,SIGTERM,SIGQUIT"}
    try:
        with tempfile.TemporaryDirectory() as logs:
            specs = DefaultLogsSpecs(logs)
            config = LaunchConfig(1, 1, count, logs_specs=specs, max_restarts=0, **where)
            elastic_launch(config, sys.executable)(*command)
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        sys.stderr.write(f"process {rank} of {count} was ended by {name}\n")
        sys.exit(128 - failure.exitcode)
    finally:
        del os.environ[LAUNCHER]


def _end_with(parent: int) -> None:
    """Ends this process, as SIGTERM does, when the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def join(together: bool) -> None:
    """Meet the other processes of torchrun, where there are some; "cuda" is a GPU of this process's
    own, if there are enough.

    NCCL takes no two processes on one GPU: then, and on CPUs, they meet by gloo. Raises OSError,
    one line, for what is one process's work (`together` is False), and for a WORLD_SIZE of somebody
    else's making.
    """
    if LAUNCHER in os.environ:
        parent = int(os.environ[LAUNCHER])
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
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


def speaks() -> bool:
    """Is this the one whose progress is shown, also while others do something alone?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that are this process's: number rank, rank + size, .."""
    return items[rank() :: size()]


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """Ends this process, as SIGTERM does, where one that it would meet has ended; says why."""
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's word for a closed connection
        sys.stderr.write(f"the other processes cannot be met: {str(error).splitlines()[0]}\n")
        sys.exit(128 + signal.SIGTERM)


def barrier() -> None:
    """Until all are here."""
    if _together():
        with _meeting():
            dist.barrier()


def broadcast(value: bool) -> bool:
    """What the first process says, on all."""
    if not _together():
        return value
    told = [value]
    with _meeting():
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
    with _meeting():
        dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for parameter, part in zip(parameters, parts):
        parameter.grad = part.view_as(parameter)
    return parts[-1].tolist()

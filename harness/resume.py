"""When a long run saves, from time to time and where it is asked to stop; how it does, and what may
go on from it."""

import math
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from harness.files import whole_file
from harness.record import differences

PERIOD = 300.0  # seconds
T = TypeVar("T")


def rate_share(schedule: str, step: int, steps: int) -> float:
    """What is left of a learning rate at a step: all of it, or half a cosine from 1 to 0
    (Loshchilov & Hutter 2017)."""
    return 1.0 if schedule == "constant" else (1 + math.cos(math.pi * step / steps)) / 2


class SaveTimes:
    """Says after each step whether to save: every `every` steps, or where that is None every five
    minutes.

    SIGINT, from a person, and SIGTERM, from SLURM and others, no longer end the process where it
    stands: the step is finished, saved, and `leave_if_asked` exits with 130 or 143. They may come
    twice, since torchrun passes on to its processes what a scheduler sends to every one; SIGQUIT
    ends at once.
    """

    def __init__(self, every: int | None):
        self.every, self.last, self.asked, self.everywhere = every, time.monotonic(), 0, None
        self.before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: object) -> None:
        if not self.asked:
            sys.stderr.write("\nstops when this step is saved; Ctrl-\\ (SIGQUIT) stops at once\n")
        self.asked = self.asked or number

    @property
    def stops(self) -> bool:
        """Is this the last step? Several processes at one run say `everywhere`, how many of them
        were asked, so that each stops at the same step."""
        return bool(self.asked if self.everywhere is None else self.everywhere)

    def due(self, step: int) -> bool:
        """Save now? step: how many are done."""
        now = time.monotonic()
        due = self.stops or (step % self.every == 0 if self.every else now - self.last >= PERIOD)
        self.last = now if due else self.last
        return due

    def leave_if_asked(self, text: str) -> None:
        """Exits, having said `text`, where a signal has come since this was made."""
        if self.stops:
            self.restore()
            sys.stderr.write(f"\n{text}\n")
            sys.exit(128 + (self.asked or signal.SIGTERM))

    def restore(self) -> None:
        """Signals are again what they were."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """torch.save, whole or not at all. Raises OSError."""
    try:
        # to a file: given a name, torch would write that into it, and no two runs were equal
        with whole_file(path) as part, part.open("wb") as file:
            torch.save(dict(state), file)
    except RuntimeError as error:  # torch's word for a disk that is full
        reason = str(error).splitlines()[0]
        raise OSError(f"{path}: cannot be written; is the disk full? ({reason})") from None


def read_state(
    path: Path,
    identity: Mapping[str, str],
    script: str,
    error: type[Exception],
    restore: Callable[[dict[str, Any]], T],
    device: torch.device | str = "cpu",
) -> T:
    """Gives `restore` what `write_state` wrote, if its "identity" (what a run that goes on must
    share) is this one.

    Raises `error`, one line, for a file that is none of `script`'s or is damaged, and where
    something was otherwise, which it names.
    """
    damaged = error(f"{path}: no checkpoint of {script}, or a damaged one: remove it to begin anew")
    try:
        # its sums, and its marks of folders, which torch would read as it likes
        with zipfile.ZipFile(path) as file:
            if file.testzip() or any(entry.external_attr for entry in file.infolist()):
                raise damaged
        state = torch.load(path, weights_only=True, map_location=device)
        before = dict(state["identity"])
    except Exception:  # a broken or foreign file may make the unpickler raise anything
        raise damaged from None
    if changed := differences(before, identity):
        raise error(f"{path}: other settings ({changed}): use its own, or another --out")
    try:
        return restore(state)
    except Exception:  # what is missing in it, or has another shape or type
        raise damaged from None

"""When a long run saves, from time to time and where it is asked to stop; how it does, and what may go on from it.

Of any training: nothing here is LoRA's.
"""

import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

PERIOD = 300.0  # seconds
ECHO = 3.0  # seconds within which a signal that comes again is the same request
T = TypeVar("T")


class SaveTimes:
    """Says after each step whether to save: every `every` steps, or where that is None every five minutes.

    SIGINT, from a person, and SIGTERM, from SLURM and others, no longer end the process where it stands: the step is
    finished, saved, and `leave_if_asked` exits with 130 or 143. One that comes ECHO seconds later or more ends it as
    ever; sooner it is the first again, which a scheduler sends to every process of a job and torchrun passes on to its
    own. Only the main thread can listen to signals; elsewhere they stay what they were.
    """

    def __init__(self, every: int | None):
        self.every, self.last, self.asked, self.asked_at, self.before = every, time.monotonic(), 0, 0.0, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: object) -> None:
        now = time.monotonic()
        self.asked, self.asked_at = self.asked or number, self.asked_at or now
        if now - self.asked_at >= ECHO:
            self.restore()
            signal.raise_signal(number)

    def heed(self, others: float) -> None:
        """How many of the processes that work at one run were asked; each then stops at the same step."""
        self.asked = self.asked or int(signal.SIGTERM) * (others > 0)

    def due(self, step: int) -> bool:
        """Save now? step: how many are done."""
        now = time.monotonic()
        due = bool(self.asked) or (step % self.every == 0 if self.every else now - self.last >= PERIOD)
        self.last = now if due else self.last
        return due

    def leave_if_asked(self, text: str) -> None:
        """Exits, having said `text`, where a signal has come since this was made."""
        if self.asked:
            sys.stderr.write(f"\n{text}\n")
            sys.exit(128 + self.asked)

    def restore(self) -> None:
        """Signals are again what they were."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """torch.save, replaced in one go: a run killed meanwhile keeps the state before. Raises OSError; leaves no part.

    Equal states are equal bytes, whether what is in them was made or read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        torch.save(_plain(state), part)
        part.replace(path)
    except RuntimeError as error:  # torch's word for a disk that is full
        raise OSError(f"{path}: cannot be written; is the disk full? ({str(error).splitlines()[0]})") from None
    finally:
        part.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """The same in containers of its own, equal texts one object: pickle writes down which objects are the same one."""
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    return type(value)(map(_plain, value)) if isinstance(value, list | tuple) else value


def read_state(
    path: Path,
    identity: Mapping[str, str],
    script: str,
    error: type[Exception],
    restore: Callable[[dict[str, Any]], T],
    device: torch.device | str = "cpu",
) -> T:
    """Gives `restore` what `write_state` wrote, if its "identity" (what a run that goes on must share) is this one.

    Raises `error`, one line, for a file that is none of `script`'s or is damaged, and where something was otherwise,
    which it names.
    """
    damaged = error(f"{path}: no checkpoint of {script}, or a damaged one: remove it to begin anew")
    try:
        with zipfile.ZipFile(path) as file:  # its sums, and its marks of folders, which torch would read as it likes
            if file.testzip() or any(entry.external_attr for entry in file.infolist()):
                raise damaged
        state = torch.load(path, weights_only=True, map_location=device)
        before = dict(state["identity"])
    except Exception:  # a broken or foreign file may make the unpickler raise anything
        raise damaged from None
    keys = [key for key in before | identity if before.get(key) != identity.get(key)]
    names = [f"--{key.replace('_', '-')}" if key.isidentifier() else key for key in keys]  # a flag, or a file's name
    if changed := [f"{name} was {before.get(key)}, is {identity.get(key)}" for name, key in zip(names, keys)]:
        raise error(f"{path}: other settings ({'; '.join(changed)}): use its own, or another --out")
    try:
        return restore(state)
    except Exception:  # what is missing in it, or has another shape or type
        raise damaged from None

"""Runs scripts one after the other, each into its own folder, and does not do again what is
done."""

import json
import runpy
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from math import ceil
from pathlib import Path
from statistics import mean

from harness import processes
from harness.files import write_text
from harness.record import arguments_of

SCRIPTS = Path(__file__).resolve().parents[1]


class Stages:
    """Runs scripts one after the other; what was made with the same arguments from the same things
    is kept."""

    def __init__(
        self, say: Callable[[str], object], *common: object, ahead: Mapping[str, int] | None = None
    ) -> None:
        self.say = say  # is told each command before it runs
        self.ahead = Counter(ahead)  # stages to come, of all processes, by what they are
        self.count, self.began = self.ahead.total(), time.monotonic()
        # that each stage took, by what it was, and how many are done at once
        self.minutes: dict[tuple[str, int], list[float]] = {}
        self.common = common  # flags of every stage
        # commands of this run, which several others may need
        self.seen: set[tuple[str, ...]] = set()

    def run(
        self,
        script: str,
        out: Path,
        *flags: object,
        inputs: Mapping[str, str],
        by: int | None = None,
        what: str = "",
    ) -> Path:
        """Run script.py with these flags into `out`, unless that is done; returns `out`.

        flags: name what a script would else fill in by itself (--repeats): it is recorded, and
            would look like a change
        inputs: what it reads -> its hash, kept in inputs.json with its settings; a checkpoint of
            another stage's is removed, so that this one begins anew
        by: which process of torchrun does it alone; None: all are at it, and the first says whether
            it is done
        what: it is, a key of `ahead`
        """
        command = (script, *(str(flag) for flag in (*flags, *self.common, "--out", out)))
        if command in self.seen:
            return out
        self.seen.add(command)
        told = self._progress(what)
        if by not in (None, processes.rank()):
            return out
        self.say(f"\n{told}$ python {shlex.join([f'{script}.py', *command[1:]])}")
        module = runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="stage")
        args = module["parse_args"](command[1:])
        # where things lie, and what computes, makes no other stage of it
        settings = {
            name: value
            for name, value in vars(args).items()
            if name != "device" and not isinstance(value, Path)
        }
        asked = json.loads(json.dumps({**inputs, "arguments": settings}, default=str))
        with nullcontext() if by is None else processes.apart():
            if processes.broadcast(is_done(out, asked)):
                self.say("done before")
                return out
            if processes.is_first():
                out.mkdir(parents=True, exist_ok=True)
                (out / "args.json").unlink(missing_ok=True)
                if _read(out / "inputs.json") != asked:
                    (out / "checkpoint.pt").unlink(missing_ok=True)
                write_text(out / "inputs.json", json.dumps(asked, indent=2) + "\n")
            began = time.monotonic()
            module["main"](args)
            processes.barrier()  # for the first, which writes
        # where each process has its own, as many are done at once
        at_once = 1 if by is None else processes.size()
        self.minutes.setdefault((what, at_once), []).append((time.monotonic() - began) / 60)
        return out

    def _progress(self, what: str) -> str:
        """Counts a stage: a line that says which of how many it is, and how long the others take,
        as those of their kind did that were run."""
        if not self.count:
            return ""
        number, known = 1 + self.count - self.ahead.total(), {kind for kind, _ in self.minutes}
        turns = {key: ceil(self.ahead[key[0]] / key[1]) for key in self.minutes}
        left = sum(turns[key] * mean(minutes) for key, minutes in self.minutes.items())
        least = "about" if {kind for kind, n in self.ahead.items() if n} <= known else "at least"
        self.ahead[what] -= 1
        gone = f"{(time.monotonic() - self.began) / 60:.0f} min so far"
        more = f", {least} {left:.0f} min left" if known and left >= 0.5 else ""
        return f"stage {number} of {self.count} ({what}), {gone}{more}\n"


def is_done(out: Path, asked: Mapping[str, object]) -> bool:
    """Was it made so, of these things? args.json is what a script writes last."""
    done = asked["arguments"].items() <= arguments_of(out).items()
    return done and _read(out / "inputs.json") == asked


def _read(file: Path) -> dict:
    """What a file of JSON holds; nothing where it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}

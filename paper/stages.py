"""Runs scripts one after the other, each into its own folder, and does not do again what is
done."""

import argparse
import json
import runpy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path

from harness import processes
from harness.files import sha256_of_all, write_text
from planes import PLANES
from planes.datasets import read_synthetic

SCRIPTS = Path(__file__).resolve().parents[1]


@cache
def images_hash(manifest: Path, classes: tuple[str, ...] = PLANES) -> str:
    """One hash of a list of synthetic images and of the images, which rows share: they are read
    once in a run."""
    return sha256_of_all([manifest, *(record.path for record in read_synthetic(manifest, classes))])


class Stages:
    """Runs scripts one after the other; what was made with the same arguments from the same things
    is kept."""

    def __init__(self, say: Callable[[str], object], *common: object) -> None:
        self.say = say  # is told each command before it runs
        self.common = common  # flags of every stage
        # commands of this run, which several others may need
        self.seen: set[tuple[str, ...]] = set()

    def run(
        self,
        script: str,
        out: Path,
        *flags: object,
        needs: tuple[Path, ...] = (),
        inputs: Mapping[str, str],
        by: int | None = None,
    ) -> Path:
        """Run script.py with these flags into `out`, unless that is done and younger than `needs`;
        returns `out`.

        flags: name what a script would else fill in by itself (--repeats): it is recorded, and
            would look like a change
        needs: folders of stages whose outputs this one reads
        inputs: what it reads besides -> its hash, kept in inputs.json
        by: which process of torchrun does it alone; None: all are at it, and the first says whether
            it is done
        """
        argv = [str(flag) for flag in (*flags, *self.common, "--out", out)]
        if (script, *argv) in self.seen:
            return out
        self.seen.add((script, *argv))
        if by not in (None, processes.rank()):
            return out
        self.say(f"\n$ python {script}.py {' '.join(argv)}")
        module = runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="stage")
        args = module["parse_args"](argv)
        with nullcontext() if by is None else processes.apart():
            if processes.broadcast(self.is_done(out, args, needs, inputs)):
                self.say("done before")
                return out
            if processes.is_first():
                out.mkdir(parents=True, exist_ok=True)
                (out / "args.json").unlink(missing_ok=True)
                write_text(out / "inputs.json", json.dumps(dict(inputs), indent=2) + "\n")
            module["main"](args)
            processes.barrier()  # for the first, which writes
        return out

    def is_done(
        self,
        out: Path,
        args: argparse.Namespace,
        needs: tuple[Path, ...],
        inputs: Mapping[str, str],
    ) -> bool:
        """args.json is what a script writes last: its time is the stage's."""
        try:
            before = json.loads((out / "args.json").read_text(encoding="utf-8"))["arguments"]
            read = json.loads((out / "inputs.json").read_text(encoding="utf-8"))
            made = (out / "args.json").stat().st_mtime_ns
            stale = any((need / "args.json").stat().st_mtime_ns > made for need in needs)
        except (OSError, ValueError, KeyError):
            return False
        return (
            not stale
            and read == dict(inputs)
            and before == json.loads(json.dumps(vars(args), default=str))
        )

"""What every script is wrapped in: alone in its --out, a mistake told in one line, progress that a
log can hold."""

import contextlib
import errno
import functools
import logging
import os
import platform
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from harness import processes

try:
    import fcntl
except ImportError:  # Windows has no such lock: nothing is refused there
    fcntl = None

LOCK = ".lock"
"""The file in --out that a run holds, in which its process stands."""

MINUTE = 60.0
SILENCE = 10.0  # seconds: what the first process says of a mistake that all make is enough
ROOT = Path(__file__).resolve().parents[1]


def run(
    parse_args: Callable[[], Namespace],
    main: Callable[[Namespace], object],
    *mistakes: type[Exception],
    together: bool = False,
) -> None:
    """A script: main(parse_args()). One of `mistakes`, an OSError, a full GPU or a --compile that
    cannot be is one line and exit code 2; SIGINT is 130.

    together: several processes of torchrun may be at it
    """
    args, name, show = Namespace(), Path(sys.argv[0]).name, warnings.showwarning

    def show_own_in_a_line(message, category, filename, *where):
        own = Path(filename).is_relative_to(ROOT) and "site-packages" not in filename
        sys.stderr.write(f"{name}: {message}\n") if own else show(
            message, category, filename, *where
        )

    warnings.showwarning = show_own_in_a_line
    if hasattr(sys.stdout, "reconfigure"):  # a name in letters that a Windows console lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        processes.join(together)
        if not processes.is_first():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, one of many speaks
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        args = parse_args()
        if processes.size() > 1 and "batch_size" in args:
            sys.stdout.write(f"{processes.size()} processes share the work\n")
        main(args)
        processes.leave()
    except Exception as error:
        if not (line := _in_a_line(error, (*mistakes, OSError))):
            raise
        if not processes.is_first():
            time.sleep(SILENCE)
        sys.stderr.write(f"{name}: {line}\n")
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        code = getattr(stop, "code", 130)
        if code > 128 and processes.LAUNCHER not in os.environ:
            again = "--resume goes on" if "resume" in args else "give the same command again"
            sys.stderr.write(f"\n{name}: stopped; {again}\n")
        sys.exit(code)


def _in_a_line(error: Exception, mistakes: tuple[type[Exception], ...]) -> str:
    """What a user is told of an error; "" where it is no mistake of theirs."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, mistakes):
        if "Original Traceback" in str(error):  # a DataLoader's worker sends its own along
            return lines[-1].partition(": ")[2]
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        return str(error) + "; make room where --out is, and give the same command again" * full
    if isinstance(error, torch.OutOfMemoryError):
        return f"{lines[0].partition('. ')[0]}; give a lower --batch-size or --size"
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return f"--compile: {lines[0]}; leave it out"
    return ""


def alone(main: Callable[[Namespace], object]) -> Callable[[Namespace], object]:
    """A script's main that has args.out to itself while it runs (`alone_in`)."""

    @functools.wraps(main)
    def _held(args: Namespace) -> object:
        with alone_in(args.out):
            return main(args)

    return _held


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Holds a folder, made if need be; it goes again where nothing was written into it. The first
    of torchrun's processes holds it for all of them, who begin when it does.

    Raises OSError, one line, where it is no folder that can be written to, or where another process
    holds it, which is named. The lock is the system's: it ends with the process, however that ends.
    """
    if not processes.is_first():
        processes.barrier()
        yield
        return
    above = [out.absolute(), *out.absolute().parents]
    made = [folder for folder in above if not folder.exists()]
    there = above[len(made)]
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise NotADirectoryError(
            f"--out {out}: {there} is not a folder that can be written to; give another"
        )
    out.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(out):
            processes.barrier()
            yield
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    with open(out / LOCK, "a+", encoding="utf-8") as file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # others: of a file system without locks
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                other = file.read().strip() or "another process"
                raise OSError(
                    f"--out {out}: {other} is at work there; wait for it, or give another"
                ) from None
        try:
            with contextlib.suppress(OSError):  # of a disk that is full
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()} ({Path(sys.argv[0]).name})")
                file.flush()
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)


class LogLines:
    """A stream for tqdm that is no terminal's: each state of a bar a line of its own, none
    overwritten."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(iterable: Iterable | None = None, **settings: object) -> tqdm:
    """tqdm's bar; where standard error is no terminal, a line a minute, and none of what takes
    less."""
    if not sys.stderr.isatty():
        settings |= dict.fromkeys(("mininterval", "maxinterval", "delay"), MINUTE)
        settings["file"] = LogLines()
    return tqdm(iterable, disable=not processes.speaks(), **settings)

"""What every script is wrapped in: the lock on --out, one line for a mistake, progress in a log."""

import errno
import io
import os
import runpy
import subprocess
import sys
import warnings
from argparse import Namespace
from weakref import WeakSet

import pytest
import torch
from shorthand import ROOT, exits, refused

from harness.script import LOCK, alone, alone_in, progress, run

HOLD = """
import sys, time
from pathlib import Path
from harness.script import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


class Mistake(Exception):
    pass


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A folder, and a process that holds it."""
    out = tmp_path_factory.mktemp("held") / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, out], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield out, process
        process.kill()


@pytest.mark.slow
def test_a_second_run_in_one_folder_is_refused_and_the_first_named(held, tmp_path):
    out, process = held
    line = rf"out: process {process.pid} on .* is at work there; wait for it, or give another$"
    with refused(OSError, line), alone_in(out):
        raise AssertionError("two at once")
    with alone_in(tmp_path / "other"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_lora", "sample", "classify", "reproduce"])
def test_every_script_keeps_out_of_a_folder_that_is_held(held, script):
    out, process = held
    main = runpy.run_path(str(ROOT / f"{script}.py"), run_name="refused")["main"]
    # what reproduce.py asks first
    before = dict.fromkeys(("model", "manifests", "plan", "source", "spanish", "african"))
    before |= {"processes": 1, "device": "cpu", "rows": (), "seeds": ()}
    with refused(OSError, rf"process {process.pid} on .* is at work there"):
        main(Namespace(out=out, quick=True, seed=0, **before))
    assert [path.name for path in out.iterdir()] == [LOCK]


@pytest.mark.slow
def test_a_lock_ends_with_its_process_however_that_ends(held):
    out, process = held
    process.kill()
    process.wait()
    assert (out / LOCK).exists()  # what is left of it holds nobody up
    with alone_in(out):
        assert str(os.getpid()) in (out / LOCK).read_text()
    assert not out.exists() or not (out / LOCK).exists()


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path):
    @alone
    def refuses(args):
        assert args.out.is_dir()
        raise Mistake("no such model")

    with refused(Mistake):
        refuses(Namespace(out=tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()  # a person's own
    with alone_in(tmp_path / "empty"):
        pass
    with alone_in(tmp_path / "full" / "deep"):
        (tmp_path / "full" / "x").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


@pytest.mark.parametrize(
    "error, code, line",
    [
        (Mistake("x: no such plane"), 2, "train_lora.py: x: no such plane\n"),
        (FileNotFoundError(errno.ENOENT, "no", "x"), 2, "train_lora.py: [Errno 2] no: 'x'\n"),
        (OSError(errno.ENOSPC, "full"), 2, "full; make room where --out is, and give the same"),
        (
            Mistake(
                "Caught Mistake in a worker.\nOriginal Traceback (..):\n..\nMistake: x: none\n"
            ),
            2,
            "train_lora.py: x: none\n",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee docs"),
            2,
            "train_lora.py: CUDA out of memory; give a lower --batch-size or --size\n",
        ),
        (
            torch._dynamo.exc.TorchDynamoException("no C++ compiler\nSet TORCH_LOGS"),
            2,
            "train_lora.py: --compile: no C++ compiler; leave it out\n",
        ),
        (KeyboardInterrupt(), 130, "\ntrain_lora.py: stopped; give the same command again\n"),
        (SystemExit(143), 143, "\ntrain_lora.py: stopped; give the same command again\n"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code, line):
    def main(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/train_lora.py"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as stop:
        run(Namespace, main, Mistake)
    said = capsys.readouterr().err
    assert stop.value.code == code and line in said and "\n" not in said.strip()


def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch):
    def lockf(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", lockf)
    with alone_in(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK).exists()
    assert not (tmp_path / "out").exists()


def test_letters_that_a_console_lacks_are_written_as_numbers(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    run(Namespace, lambda args: print("\u809d caf\xe9", flush=True))
    assert console.buffer.getvalue().strip() == b"\\u809d caf\xe9"


@pytest.mark.parametrize("size", ["2", "two"])
def test_a_world_size_that_is_not_meant_is_a_line(monkeypatch, capsys, size):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("RANK", raising=False)
    with exits(capsys, f"x.py: is one process's work: unset WORLD_SIZE={size}, "):
        run(Namespace, print)
    with exits(capsys, f"x.py: WORLD_SIZE={size} is not torchrun's: "):
        run(Namespace, print, together=True)


def test_what_is_no_users_mistake_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(ZeroDivisionError):
        run(Namespace, lambda args: 1 / 0, Mistake)


def test_a_warning_of_our_own_is_one_line_and_others_say_where_they_come_from(monkeypatch, capsys):
    def main(args):
        warnings.warn("alpha 0 of 16 layers", stacklevel=1)
        warnings.warn_explicit("deprecated", UserWarning, "/elsewhere/torch.py", 3)

    def show(message, category, filename, line, *_):
        sys.stderr.write(f"{filename}:{line}: {message}\n")

    monkeypatch.setattr(sys, "argv", ["sample.py"])
    monkeypatch.setattr(warnings, "showwarning", show)
    run(Namespace, main)
    said = "sample.py: alpha 0 of 16 layers\n/elsewhere/torch.py:3: deprecated\n"
    assert capsys.readouterr().err == said


def test_a_log_gets_a_line_a_minute_and_none_of_what_takes_less(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    # bars of runs that other tests broke off would stand above this one
    monkeypatch.setattr("tqdm.std.tqdm._instances", WeakSet(), raising=False)
    for step in progress(range(290), desc="LoRA", unit="step"):
        clock[0] += 1.0
        assert step >= 0
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert "\r" not in said and all(line.startswith("LoRA: ") for line in lines)
    seen = "60/290 120/290 180/290 240/290 290/290"
    assert [line.split("|")[-1].split()[0] for line in lines] == seen.split()
    for _ in progress(range(50)):
        clock[0] += 1.0
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_tqdms_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in progress(range(3), desc="LoRA"):
        pass
    assert "\rLoRA: 100%" in capsys.readouterr().err

"""reproduce.py in processes that it starts itself: the same report, and nobody left behind."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shorthand import write_site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
HERE = Path(__file__).resolve().parent
SAME = "report.md", "report.html", "results.csv", "environment.json"


def alive(root):
    """The processes whose command names this folder."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = line.read_bytes()
        except OSError:
            continue  # it has ended
        if str(root).encode() in text:
            found.append(int(line.parent.name))
    return sorted(found)


def start(root, model, more):
    sites = ["--source", root / "shop", "--target", root / "shed"]
    words = ["--prompt-template", "a photograph of a {class}", "--out", root / "run"]
    command = [sys.executable, HERE / "small_reproduce.py", model, "--quick", "--seeds", "0"]
    command += ["--only", "BAL+DA", "HB+DA", "HB-styles+DA"]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE"}
    command = [str(part) for part in (*command, *sites, *words, *more)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipe)


def finish(root, model, *more):
    run = start(root, model, more)
    said, _ = run.communicate()
    assert run.returncode == 0, said
    return said, [(root / "run" / name).read_bytes() for name in SAME]


@pytest.fixture
def sites(tmp_path):
    write_site(tmp_path / "shop", {"bolt": 8, "nut": 8}, 240)
    write_site(tmp_path / "shed", {"bolt": 3, "nut": 3}, 120)
    return tmp_path


def test_one_process_and_two_make_the_same_report_and_one_that_is_stopped_goes_on_to_it(
    sites, tiny_model
):
    began = time.monotonic()
    said, alone = finish(sites, tiny_model, "--processes", "1")
    took = time.monotonic() - began
    assert said.startswith("1 process at work, as --processes says, each with 1 thread; load of")
    (sites / "run").rename(sites / "alone")
    rng, stopped = random.Random(), 0
    for number in (signal.SIGINT, signal.SIGKILL, signal.SIGKILL):
        run = start(sites, tiny_model, ("--processes", "2"))
        begun = next(line for line in run.stdout if line.startswith("stage "))
        time.sleep(rng.uniform(0, took / 4))
        # one of those that work, or the first, which passes it on or is missed by them
        others = [pid for pid in alive(sites) if pid != run.pid]
        worker = number == signal.SIGKILL and not stopped % 2
        target = rng.choice(others) if worker and others else run.pid
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(target, number)
        said, _ = run.communicate()
        stopped += run.returncode != 0
        assert begun and "Traceback" not in said and said.count("stopped; ") <= 1, said
        assert run.returncode in (0, -number, 128 + number, 143), said
        if number == signal.SIGINT and run.returncode:
            assert said.endswith("stopped; give the same command again\n"), said
        assert not alive(sites)
    assert stopped
    said, again = finish(sites, tiny_model, "--processes", "2")
    assert again == alone and "done before" in said


def test_what_is_wrong_is_told_once_and_nobody_is_left(sites, tiny_model):
    (sites / "shed" / "bolt" / "0.png").write_bytes(b"x")
    run = start(sites, tiny_model, ("--processes", "2"))
    said, _ = run.communicate()
    assert run.returncode == 2 and said.count("not a readable image") == 1, said
    assert "Traceback" not in said and not alive(sites)

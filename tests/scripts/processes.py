"""Runs scripts in several processes, as torchrun would, but forked where torch is loaded already.

    python tests/scripts/processes.py JOBS.json

A job is {"size": 2, "script": "sample", "argv": [..]} with, if it is to be killed, "until": a
pattern of files; when one is there, all processes get SIGKILL. The exit codes go to JOBS.codes.
"""

import glob
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def child(job, rank, port):
    """One process of a job; its exit code."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    names |= {"WORLD_SIZE": job["size"], "LOCAL_WORLD_SIZE": job["size"]}
    os.environ |= {name: str(value) for name, value in names.items()}
    sys.argv = [f"{job['script']}.py", *job["argv"]]
    try:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(job):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port, pids = server.getsockname()[1], []
    for rank in range(job["size"]):
        if not (pid := os.fork()):
            code = child(job, rank, port)
            sys.stdout.flush()
            os._exit(code)
        pids.append(pid)
    while "until" in job and not glob.glob(job["until"]):
        time.sleep(0.01)
    if "until" in job:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    import ldm.generate

    ldm.generate.generate = partial(ldm.generate.generate, steps=2)  # of sample sheets, not twenty
    for name in ("train_lora", "sample"):
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="loaded")
    codes = [run(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    Path(sys.argv[1]).with_suffix(".codes").write_text(json.dumps(codes))

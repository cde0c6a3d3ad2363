"""Runs scripts in worlds of several processes, as torchrun would, but forked where torch is loaded
already.

    python tests/scripts/processes.py JOBS.json

A job is {"world": 2, "script": "sample", "argv": [..]} with, if it is to be killed, "until": a
pattern of files; when one is there, all processes get SIGKILL. "tiny" replaces reproduce.py's
scale. The exit codes go to JOBS.codes.
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
SCRIPTS = ("train_lora", "sample", "classify", "reproduce")


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def child(job, rank, port):
    """One process of a job's world; its exit code."""
    size = str(job["world"])
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = [f"{job['script']}.py", *job["argv"]]
    try:
        path = str(ROOT / f"{job['script']}.py")
        if "tiny" in job:
            space = runpy.run_path(path, run_name="world")["parse_args"].__globals__
            space |= {
                "QUICK": space["Scale"](**job["tiny"]["scale"]),
                "PHANTOMS": job["tiny"]["phantoms"],
            }
            space["run"](space["parse_args"], space["main"])
        else:
            runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(job):
    pids, port = [], free_port()
    for rank in range(job["world"]):
        if not (pid := os.fork()):
            code = child(job, rank, port)
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    while "until" in job and not glob.glob(job["until"], recursive=True):
        time.sleep(0.01)
    if "until" in job:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    import paper.adapt  # whose sheets, which are to be looked at alone, need not take twenty steps

    paper.adapt.generate = partial(paper.adapt.generate, steps=2)
    for name in SCRIPTS:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="loaded")
    codes = [run(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    Path(sys.argv[1]).with_suffix(".codes").write_text(json.dumps(codes))

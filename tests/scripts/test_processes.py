"""Several processes at one run: the same images to the bit, LoRA up to the order of sums."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shorthand import read_json

from planes.phantoms.phantom import write_spanish_layout

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
if sys.platform == "linux":
    ENVIRONMENT |= {"GLOO_SOCKET_IFNAME": "lo"}  # whatever the machine's name leads to


def run(tmp_path, script, line, *jobs):
    """The exit codes of the processes of jobs (how many, --out, more flags, until), and what they
    print."""
    path = tmp_path / "jobs.json"
    jobs = [
        {"size": size, "script": script, "argv": f"{line} --out {tmp_path / out} {more}".split()}
        | ({"until": str(tmp_path / out / until)} if until else {})
        for size, out, more, until in jobs
    ]
    path.write_text(json.dumps(jobs))
    command = [sys.executable, HERE / "processes.py", path]
    done = subprocess.run(command, cwd=HERE.parents[1], env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return read_json(path.with_suffix(".codes")), done.stdout.decode()


def files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_images_are_the_same_bits_in_any_number_of_processes_also_killed_and_resumed_in_another(
    tiny_model, tmp_path
):
    line = f"--model {tiny_model} --device cpu --planes brain femur --count 3 --steps 2"
    line += " --batch-size 2"
    jobs = [(1, "one", "", ""), (2, "two", "", ""), (3, "three", "", "")]
    jobs += [(3, "cut", "", "*/*.png"), (2, "cut", "", "")]
    codes, said = run(tmp_path, "sample", line, *jobs)
    assert codes == [[0], [0] * 2, [0] * 3, [-9] * 3, [0] * 2]
    assert said.count("12 images: 0 are there, 12 to make") == 4  # the first process alone speaks
    assert "2 processes share the work" in said
    one = files(tmp_path / "one")
    assert sum(name.endswith(".png") for name in one) == 2 * 2 * 3 + 1 and "manifest.csv" in one
    for out in ("two", "three", "cut"):
        found = files(tmp_path / out)
        assert found.keys() == one.keys()
        # which names --out
        assert [name for name in one if found[name] != one[name]] == ["args.json"]


def test_lora_is_that_of_one_process_up_to_the_order_of_sums_also_resumed_in_another_number(
    tiny_model, tmp_path
):
    write_spanish_layout(tmp_path / "spanish", 2, test=0, seed=0)
    line = f"--model {tiny_model} --spanish {tmp_path / 'spanish'} --per-plane 1 --repeats 2"
    line += " --rank 4 --lr 1e-3 --device cpu --save-every 1 --train-text-encoder"
    big, small = "--batch-size 4", "--batch-size 2 --accumulate 2"
    jobs = [(1, "sum", small, ""), (1, "one", big, ""), (2, "two", big, ""), (3, "three", big, "")]
    jobs += [(3, "cut", big, "checkpoint.pt"), (2, "cut", f"{big} --resume", "")]
    codes, _ = run(tmp_path, "train_lora", line, *jobs)
    assert codes == [[0], [0], [0] * 2, [0] * 3, [-9] * 3, [0] * 2]
    states = {
        out: torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)
        for out in ("one", "sum", "two", "three", "cut")
    }
    one = torch.cat([tensor.flatten() for tensor in states["one"]["lora"]]).double()
    for state in states.values():
        other = torch.cat([tensor.flatten() for tensor in state["lora"]]).double()
        assert (other - one).norm() < 1e-6 * one.norm()
        assert len(state["rows"]) == len(states["one"]["rows"]) == 3
    assert files(tmp_path / "three").keys() == files(tmp_path / "one").keys()

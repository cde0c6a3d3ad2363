"""Several processes at one run: the same images to the bit, LoRA up to the order of sums, the same
report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from planes.phantoms.phantom import write_spanish_layout

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
IMAGES = [
    "--planes",
    "brain",
    "femur",
    "--count",
    "3",
    "--steps",
    "2",
    "--batch-size",
    "2",
    "--device",
    "cpu",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
if sys.platform == "linux":
    ENVIRONMENT |= {"GLOO_SOCKET_IFNAME": "lo"}  # whatever the machine's name leads to
TINY = {
    "scale": {
        "per_plane": {"all": 3, "balanced": 3, "lora": 2},
        "train_lora": "--batch-size 4",
        "repeats": 2,
        "rank": 4,
        "sample": "--steps 1",
        "count": 1,
        "classify": "--size 64 --batch-size 6 --workers 0",
        "passes": {"resnet18": 15},
    },
    "phantoms": {
        "train": dict.fromkeys(("abdomen", "brain", "femur", "thorax", "other"), 4),
        "patients": 4,
    },
}


def run(tmp_path, *jobs):
    """The exit codes of each job's processes."""
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(HERE / "processes.py"), str(tmp_path / "jobs.json")]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=1200)
    return json.loads((tmp_path / "jobs.codes").read_text())


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_images_are_the_same_bits_in_worlds_of_any_size_also_killed_and_resumed_in_another(
    tmp_path,
):
    def job(world, out, **more):
        return {
            "world": world,
            "script": "sample",
            "argv": [*IMAGES, "--out", str(tmp_path / out)],
            **more,
        }

    jobs = [job(1, "one"), job(2, "two"), job(3, "three")]
    jobs += [job(3, "cut", until=str(tmp_path / "cut" / "*" / "*.png")), job(2, "cut")]
    codes = run(tmp_path, *jobs)
    assert codes[3] == [-9] * 3 and all(code == 0 for n in (0, 1, 2, 4) for code in codes[n])
    one = files(tmp_path / "one")
    assert sum(name.endswith(".png") for name in one) == 2 * 2 * 3 + 1 and "manifest.csv" in one
    for out in ("two", "three", "cut"):
        found = files(tmp_path / out)
        assert found.keys() == one.keys()
        # which names --out
        assert [name for name in one if found[name] != one[name]] == ["args.json"]


def test_lora_is_that_of_one_process_up_to_the_order_of_sums_also_resumed_in_another_world(
    tmp_path,
):
    write_spanish_layout(tmp_path / "spanish", 2, test=0, seed=0)
    flags = [
        "--spanish",
        str(tmp_path / "spanish"),
        "--per-plane",
        "1",
        "--repeats",
        "2",
        "--rank",
        "4",
        "--lr",
        "1e-3",
    ]
    flags += ["--device", "cpu", "--save-every", "1", "--train-text-encoder"]

    def job(world, out, *more, **settings):
        argv = [*flags, "--out", str(tmp_path / out), *more]
        return {"world": world, "script": "train_lora", "argv": argv, **settings}

    big, small = ("--batch-size", "4"), ("--batch-size", "2", "--accumulate", "2")
    jobs = [job(1, "sum", *small), job(1, "one", *big), job(2, "two", *big), job(3, "three", *big)]
    jobs += [
        job(3, "cut", *big, until=str(tmp_path / "cut" / "checkpoint.pt")),
        job(2, "cut", *big, "--resume"),
    ]
    codes = run(tmp_path, *jobs)
    assert codes[4] == [-9] * 3 and all(code == 0 for n in (0, 1, 2, 3, 5) for code in codes[n])
    states = {
        out: torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)
        for out in ("one", "sum", "two", "three", "cut")
    }
    one = torch.cat([tensor.flatten() for tensor in states["one"]["lora"]]).double()
    assert one.norm() > 0
    for out, state in states.items():
        other = torch.cat([tensor.flatten() for tensor in state["lora"]]).double()
        assert (
            state["step"] == states["one"]["step"] and (other - one).norm() < 1e-6 * one.norm()
        ), out
    assert (
        load_file(tmp_path / "two" / "lora.safetensors").keys()
        == load_file(tmp_path / "one" / "lora.safetensors").keys()
    )
    assert len(list((tmp_path / "three" / "samples").iterdir())) == 1


def test_a_reproduction_by_two_processes_gives_the_report_of_one(tmp_path):
    flags = ["--quick", "--seeds", "0", "1", "--only", "ES", "HB+DA", "--device", "cpu"]
    jobs = [
        {
            "world": world,
            "script": "reproduce",
            "argv": [*flags, "--out", str(tmp_path / f"{world}" / "run")],
            "tiny": TINY,
        }
        for world in (1, 2)
    ]
    assert run(tmp_path, *jobs) == [[0], [0, 0]]
    one, two = (files(tmp_path / str(world) / "run") for world in (1, 2))
    assert one.keys() == two.keys() and "report.md" in one
    same = [
        name
        for name in one
        if name.endswith(("metrics.json", ".png")) or name in ("results.csv", "report.md")
    ]
    assert len(same) > 15
    different = [name for name in same if one[name] != two[name]]
    text = {
        n: files_["report.md"].decode().replace(f"{tmp_path}/{n}/", "")
        for n, files_ in ((1, one), (2, two))
    }
    assert text[1] == text[2] and {*different} <= {"report.md"}


def test_torchrun_itself_starts_a_script(tmp_path):
    command = (
        f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 --local-addr"
        " 127.0.0.1 "
    )
    command += (
        "sample.py --prompt x --samplers euler --count 2 --batch-size 1 --steps 1 --device cpu"
        " --out"
    )
    command = [*command.split(), str(tmp_path / "o")]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0 and done.stdout.count("2 images: 0 are there") == 1
    assert "2 processes share the work" in done.stdout
    assert len([Image.open(path).size for path in (tmp_path / "o" / "prompt").glob("*.png")]) == 2

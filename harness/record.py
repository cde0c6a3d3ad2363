"""What a run was: its arguments, the versions it ran on, the hashes of what it read; written beside
its outputs."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from harness.files import write_text

# flags that a run of the same outcome may have otherwise
ELSEWHERE = ("out", "device", "workers", "compile", "resume", "overwrite", "features")

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "safetensors",
    "numpy",
    "pillow",
    "scikit-learn",
    "bitsandbytes",
)


def record_run(
    folder: Path,
    args: argparse.Namespace,
    inputs: dict[str, str],
    name: str = "args.json",
    **more: object,
) -> None:
    """Write a record into a folder: the arguments, versions, inputs, and what `more` there is. No
    times in it, so equal runs leave equal files.

    inputs: data, weights and lists that were read -> their hashes
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    arguments = dict(sorted(vars(args).items()))
    record = {"arguments": arguments, "versions": versions, "inputs": inputs, **more}
    write_text(folder / name, json.dumps(record, indent=2, default=str) + "\n")


def refuse_to_replace(args: argparse.Namespace) -> None:
    """Raises FileExistsError, one line, where args.out holds a finished run of other settings,
    unless --overwrite is given, or --resume goes on from a checkpoint, which knows its own; and
    where a trained classifier's own folder would get what it is used for, or another run's
    images."""
    before, given = arguments_of(args.out), vars(args)
    used = given.get("classifier") and not before.get("classifier")
    if before and (used or ("samplers" in given and "samplers" not in before)):
        raise FileExistsError(f"--out {args.out}: holds a run, whose record would go; give another")
    resumes = given.get("resume") and (args.out / "checkpoint.pt").exists()
    if given.get("overwrite", True) or resumes or not before:
        return
    now = json.loads(json.dumps(given, default=str))
    if changed := differences(before, now | {key: before.get(key) for key in ELSEWHERE}):
        raise FileExistsError(
            f"--out {args.out}: holds a finished run of other settings ({changed:.200}):"
            " give another, or --overwrite"
        )


def arguments_of(folder: Path) -> dict:
    """The arguments of the run whose record a folder holds; {} without one."""
    try:
        return json.loads((folder / "args.json").read_text(encoding="utf-8"))["arguments"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Flags, or files' names, whose values differ, as "--lr was 0.1, is 0.2"; "" if none does."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    names = (f"--{key.replace('_', '-')}" if key.isidentifier() else key for key in keys)
    return "; ".join(
        f"{name} was {before.get(key)}, is {now.get(key)}" for name, key in zip(names, keys)
    )


def record_environment(folder: Path, args: argparse.Namespace, inputs: dict[str, str]) -> None:
    """Write folder/environment.json: what record_run writes, the machine, and the commit of this
    code."""
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    machine = {"system": platform.platform(), "cpus": os.cpu_count(), "gpus": gpus}
    record_run(folder, args, inputs, "environment.json", machine=machine, code=code_version())


def code_version() -> str | None:
    """The commit of this code's git checkout, "-dirty" behind it where tracked files differ; None
    where it is none."""
    # and not one of a folder around it
    checkout = Path(__file__).resolve().parents[1]
    command = ["git", "--git-dir=.git", "describe", "--always", "--dirty", "--abbrev=40"]
    command += ["--exclude=*"]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git here, or no repository
        return None
    return done.stdout.strip()

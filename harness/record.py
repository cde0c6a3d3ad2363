"""What a run was: its arguments, the versions it ran on, the hashes of what it read; written beside
its outputs."""

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from harness.files import write_text

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


def record_run(folder: Path, args: argparse.Namespace, inputs: dict[str, str]) -> None:
    """Write folder/args.json. inputs: what was read -> its hash; no times in it, so equal runs
    leave equal files."""
    _write_json(folder / "args.json", _describe(args, inputs))


def record_environment(folder: Path, args: argparse.Namespace, inputs: dict[str, str]) -> None:
    """Write folder/environment.json: what record_run writes, the machine, and the commit of this
    code.

    inputs: data, weights and manifests that were read -> their hashes
    """
    machine = {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
    }
    code = code_version(Path(__file__).resolve().parents[1])
    _write_json(
        folder / "environment.json", _describe(args, inputs) | {"machine": machine, "code": code}
    )


def code_version(checkout: Path) -> dict[str, str | bool] | None:
    """The commit of a git checkout, and whether tracked files differ from it; None if it is
    none."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(checkout), *command], check=True, capture_output=True, text=True
        ).stdout.strip()

    if not (checkout / ".git").exists():
        return None
    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    # no git here, or a repository without a commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _describe(args: argparse.Namespace, inputs: dict[str, str]) -> dict:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    arguments = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in sorted(vars(args).items())
    }
    return {"arguments": arguments, "versions": versions, "inputs": inputs}


def _write_json(path: Path, record: dict) -> None:
    write_text(path, json.dumps(record, indent=2, default=str) + "\n")


def _cpu_name() -> str:
    """The processor's own name where Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

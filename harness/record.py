"""What a run was: its arguments, the versions it ran on, the hashes of what it read; written beside its outputs."""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "transformers", "safetensors", "numpy", "pillow", "scikit-learn", "bitsandbytes")


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> str:
    """One hash of many files, in order."""
    return hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()


def folder_hash(path: Path) -> str:
    """One hash of a file, or of all files in a folder and of their names; hidden ones do not count."""
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    lines = (f"{file.relative_to(path)} {sha256(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def json_text(value: object) -> str:
    """A result as JSON, in which what is no number is null: NaN is none of JSON's words."""

    def plain(part: object) -> object:
        if isinstance(part, Mapping):
            return {key: plain(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [plain(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), indent=2, allow_nan=False) + "\n"


def require_folder(out: Path) -> None:
    """OSError unless a folder `out` is there or can be made, and written to; makes nothing."""
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise NotADirectoryError(f"--out {out}: {nearest} is not a folder that can be written to; give another")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file in one go: whoever reads it finds the old text or the new one, whole."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # of a disk that was full


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A folder to write files into, which are moved into `folder` when all of them are whole, or are gone."""
    part = folder / ".part"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    part.mkdir(parents=True)
    try:
        yield part
        for path in sorted(part.iterdir()):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows of the same columns as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def record_run(folder: Path, args: argparse.Namespace, inputs: dict[str, str]) -> None:
    """Write folder/args.json. inputs: what was read -> its hash; no times in it, so equal runs leave equal files."""
    _write_json(folder / "args.json", _describe(args, inputs))


def record_environment(folder: Path, args: argparse.Namespace, inputs: dict[str, str]) -> None:
    """Write folder/environment.json: what record_run writes, the machine, and the commit of this code.

    inputs: data, weights and manifests that were read -> their hashes
    """
    machine = {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
    }
    code = code_version(Path(__file__).resolve().parents[1])
    _write_json(folder / "environment.json", _describe(args, inputs) | {"machine": machine, "code": code})


def code_version(checkout: Path) -> dict[str, str | bool] | None:
    """The commit of a git checkout, and whether tracked files differ from it; None if it is none."""

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
    except (OSError, subprocess.CalledProcessError):  # no git here, or a repository without a commit
        return None


def _describe(args: argparse.Namespace, inputs: dict[str, str]) -> dict:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(args).items())}
    return {"arguments": arguments, "versions": versions, "inputs": inputs}


def _write_json(path: Path, record: dict) -> None:
    write_atomically(path, json.dumps(record, indent=2, default=str) + "\n")


def _cpu_name() -> str:
    """The processor's own name where Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

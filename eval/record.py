"""What a run was: its arguments, the versions it ran on, the hashes of what it read; written beside its outputs."""

import argparse
import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "transformers", "safetensors", "numpy", "pillow", "scikit-learn", "bitsandbytes")


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file in one go: whoever reads it finds the old text or the new one, whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def record_run(folder: Path, args: argparse.Namespace, inputs: dict[str, str]) -> None:
    """Write folder/args.json. inputs: what was read -> its hash; no times in it, so equal runs leave equal files."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(args).items())}
    record = {"arguments": arguments, "versions": versions, "inputs": inputs}
    write_atomically(folder / "args.json", json.dumps(record, indent=2, default=str) + "\n")

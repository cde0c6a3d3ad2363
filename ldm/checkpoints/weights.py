"""Weight files, opened with care: what is broken, or is no Stable Diffusion, gets named before any
loading.

Safetensors: 8 bytes with the header's length, the header as JSON (name -> dtype, shape,
data_offsets), the tensors' bytes. A pickle is read by torch's restricted unpickler alone, which
builds tensors and plain containers, nothing else.
"""

import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm import CheckpointError
from ldm.checkpoints.keys import Table, rename, thirds

_HEADER_LIMIT = 100_000_000  # bytes; the format's own
OTHER_KIND = "a model of another kind, or a damaged one; give a checkpoint of SD 1 or SD 2"
# zipped, as torch.save writes since 1.6, or bare
_PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")


@dataclass(frozen=True)
class Weights:
    """A weight file: its tensors' shapes by name, free text by key, and the tensors where it is a
    pickle."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    unpickled: dict[str, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of most of its tensors."""
        return Counter(tensor.dtype for _, tensor in self.read(self.shapes)).most_common(1)[0][0]

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of each key, one at a time; a tensor may be a view of the file."""
        if self.unpickled is not None:
            yield from ((key, self.unpickled[key]) for key in keys)
            return
        with safe_open(self.path, "pt") as file:
            for key in keys:
                yield key, file.get_tensor(key)


class Stored(NamedTuple):
    """Where a parameter lies: a tensor of a file, or a third of it along the first axis."""

    weights: Weights
    key: str
    shape: tuple[int, ...]
    third: int | None = None


def open_weights(path: Path) -> Weights:
    """A whole weight file, safetensors or a pickle of plain tensors; CheckpointError says what it
    is where it is none.

    Of a safetensors file only the header is read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4096)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{" or length > _HEADER_LIMIT:
            if _PICKLE.match(start):
                return _unpickle(path, zipped=start.startswith(b"PK"))
            raise CheckpointError(f"{path}: {_other_content(start)}")
        file.seek(8)
        text = file.read(length)
    if len(text) < length:
        raise CheckpointError(
            f"{path}: cut short, {size} bytes where its header ends at {8 + length}; fetch it again"
        )
    try:
        tensors = json.loads(text)
        metadata = tensors.pop("__metadata__", {})
        shapes = {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}
        wanted = (
            8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        )
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(
            f"{path}: a damaged safetensors header ({error!r}); fetch the file again"
        ) from None
    if size != wanted:
        what = "cut short" if size < wanted else "too long"
        raise CheckpointError(
            f"{path}: {what}, {size} bytes where its header says {wanted}; fetch it again"
        )
    try:
        with safe_open(path, "pt"):  # which looks closer
            return Weights(path, shapes, metadata)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: a damaged safetensors header ({error}); fetch the file again"
        ) from None


def locate(
    files: Iterable[tuple[str, Weights]], table: Table, inside: tuple[str, ...] = ("",)
) -> dict[str, Stored]:
    """Parameter, behind its network's name -> where it lies; dropped tensors are left out.

    files: (prefix of the keys, "" for none; file)
    inside: how the keys of the networks begin; what has no row in the table and begins otherwise is
    let be, and said Raises CheckpointError where another tensor has no row in the table, or two are
    the same parameter.
    """
    tensors: dict[str, Stored] = {}
    for prefix, weights in files:
        unknown, beside = [], []
        for key, shape in weights.shapes.items():
            try:
                name = rename(f"{prefix}.{key}" if prefix else key, table)
            except KeyError:
                (unknown if key.startswith(inside) else beside).append(key)
                continue
            if name is None:
                continue
            parts = thirds(name)
            if shape and len(parts) > 1:
                shape = (shape[0] // len(parts), *shape[1:])
            for third, part in enumerate(parts):
                if part in tensors:
                    raise CheckpointError(
                        f"{weights.path}: {key} and {tensors[part].key} are both {part}"
                    )
                tensors[part] = Stored(weights, key, shape, third if len(parts) > 1 else None)
        if unknown:
            raise CheckpointError(f"{weights.path}: {named(unknown, 'unknown')}; {OTHER_KIND}")
        if beside:
            warnings.warn(
                f"{weights.path}: {named(beside, 'more')} beside the model, not read", stacklevel=4
            )
    return tensors


def named(keys: list[str], what: str) -> str:
    """How many tensors, and the names of the first five."""
    more = ", .." if len(keys) > 5 else ""
    return f"{len(keys)} {what} tensor{'s' * (len(keys) > 1)}: {', '.join(keys[:5])}{more}"


def _unpickle(path: Path, zipped: bool) -> Weights:
    """The tensors of a pickle, mapped from the file where they can be; CheckpointError where it
    holds anything else."""
    try:
        with path.open("rb") as file:
            if zipped and zipfile.ZipFile(file).testzip():  # the sums, which torch does not look at
                raise zipfile.BadZipFile(path)
            file.seek(0)
            # torch takes what is called so for what it is called
            mapped = zipped and path.suffix != ".safetensors"
            state = torch.load(
                path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped
            )
    except Exception:  # a hostile or broken file may make the unpickler raise anything
        raise CheckpointError(
            f"{path}: a pickle that torch.load(weights_only=True) refuses, broken or able to run"
            " code; convert it to safetensors in a sandbox"
        ) from None
    for level in ("state_dict", "string_to_param"):  # a model's, and the webui's of an embedding
        state = state.get(level, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: a pickle of a {type(state).__name__}, no dict of tensors; {OTHER_KIND}"
        )
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return Weights(path, {key: tuple(value.shape) for key, value in tensors.items()}, {}, tensors)


def _other_content(start: bytes) -> str:
    """What a file that holds no weights is, by its first bytes."""
    text = start.decode("utf-8", errors="replace").lstrip("\ufeff \r\n\t")
    if not start:
        return "empty, 0 bytes; fetch it again"
    if text.startswith("version https://git-lfs"):
        size = re.search(r"^size (\d+)", text, re.MULTILINE)
        return (
            f"a git-LFS pointer, not the weights ({size[1] if size else '?'} bytes); run `git lfs"
            " pull`"
        )
    if text.startswith("<"):
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        about = f" titled {' '.join(title[1].split())[:80]!r}" if title else ""
        return f"a web page{about}, not the weights; fetch it again"
    if text.startswith("{"):
        return f"a JSON text, not the weights: {' '.join(text[:80].split())}; fetch the weights"
    return "not a safetensors file; fetch it again, or convert it"

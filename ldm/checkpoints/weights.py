"""Weight files, opened with care: what is broken, or is no Stable Diffusion, gets named before any
loading.

Safetensors: 8 bytes with the header's length, the header as JSON (name -> dtype, shape,
data_offsets), the tensors' bytes. A pickle is read by torch's restricted unpickler alone, which
builds tensors and plain containers, nothing else.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm import CheckpointError
from ldm.checkpoints.keys import Table, rename, thirds

OTHER_KIND = "a model of another kind, or a damaged one; give a checkpoint of SD 1 or SD 2"


@dataclass(frozen=True)
class Weights:
    """A weight file: its tensors' shapes by name, free text by key, and a tensor by its name, which
    may be a view of the file."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    tensor: Callable[[str], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Of most of its tensors."""
        return Counter(self.tensor(key).dtype for key in self.shapes).most_common(1)[0][0]


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
    with path.open("rb") as file:
        start = file.read(200)
    # a safetensors header is a JSON object; its length before it may look like a pickle's mark
    if start[8:9] != b"{":
        # zipped, as torch.save writes since 1.6, or bare
        if start.startswith((b"PK\x03\x04", b"\x80")):
            return _unpickle(path, zipped=start.startswith(b"PK"))
        raise CheckpointError(f"{path}: {_other_content(start)}")
    try:
        file = safe_open(path, "pt")
        keys = file.keys()
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
        return Weights(path, shapes, file.metadata() or {}, file.get_tensor)
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: {size} bytes, cut short or damaged ({error}); fetch it again"
        ) from None


def locate(
    files: Iterable[tuple[str, Weights]], table: Table, inside: tuple[str, ...] = ("",)
) -> dict[str, Stored]:
    """Parameter, behind its network's name -> where it lies; dropped tensors are left out.

    files: (prefix of the keys, "" for none; file)
    inside: how the keys of the networks begin; what has no row in the table and begins otherwise is
        let be, and said

    Raises CheckpointError where another tensor has no row in the table, or two are the same
    parameter.
    """
    tensors: dict[str, Stored] = {}
    for prefix, weights in files:
        unknown = []
        for key, shape in weights.shapes.items():
            try:
                name = rename(f"{prefix}.{key}" if prefix else key, table)
            except KeyError:
                unknown.append(key)
                continue
            parts = [] if name is None else thirds(name)
            for third, part in enumerate(parts):
                if part in tensors:
                    raise CheckpointError(
                        f"{weights.path}: {key} and {tensors[part].key} are both {part}"
                    )
                if len(parts) == 1:
                    tensors[part] = Stored(weights, key, shape)
                else:
                    tensors[part] = Stored(weights, key, (shape[0] // 3, *shape[1:]), third)
        if wrong := [key for key in unknown if key.startswith(inside)]:
            raise CheckpointError(f"{weights.path}: {named(wrong, 'unknown')}; {OTHER_KIND}")
        if unknown:
            warnings.warn(
                f"{weights.path}: {named(unknown, 'more')} beside the model, not read", stacklevel=4
            )
    return tensors


def named(keys: list[str], what: str) -> str:
    """How many tensors, and the names of the first five."""
    more = ", .." if len(keys) > 5 else ""
    return f"{len(keys)} {what} tensor{'s' * (len(keys) > 1)}: {', '.join(keys[:5])}{more}"


def _unpickle(path: Path, zipped: bool) -> Weights:
    """The tensors of a pickle, mapped from the file where they can be; CheckpointError where it
    holds anything else."""
    mapped = zipped and path.suffix != ".safetensors"  # torch takes that for what it says
    try:
        with path.open("rb") as file:
            source = path if mapped else file
            state = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
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
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    return Weights(path, shapes, {}, tensors.__getitem__)


def _other_content(start: bytes) -> str:
    """What a file that holds no weights is, by its first bytes."""
    text = " ".join(start.decode("utf-8", errors="replace").lstrip("\ufeff").split())
    if text.startswith("version https://git-lfs"):
        return "a git-LFS pointer, not the weights; run `git lfs pull`"
    if text.startswith(("<", "{")):
        return f"a web page, not the weights ({text[:80]}); fetch it again"
    if not start:
        return "empty, 0 bytes; fetch it again"
    return "not a safetensors file; fetch it again, or convert it"

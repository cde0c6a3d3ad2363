"""A safetensors file's header, read by hand: what is broken, or is no Stable Diffusion, gets named before any loading.

Format: 8 bytes with the header's length, the header as JSON (name -> dtype, shape, data_offsets), the tensors' bytes.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

_HEADER_LIMIT = 100_000_000  # bytes; the format's own

_FAMILIES = {  # a mark in some tensor's name -> what the file is
    r"conditioner\.embedders\.|\blabel_emb\.": "an SDXL checkpoint, only SD 1 can be read",
    r"double_blocks\.": "a Flux checkpoint, only SD 1 can be read",
    r"joint_blocks\.": "an SD 3 checkpoint, only SD 1 can be read",
    r"cond_stage_model\.model\.": "an SD 2 checkpoint in one file, only its diffusers folder can be read",
    r"lora_unet_|lora_te|\.lora_(down|up|A|B)\b": "a LoRA, not a base model",
    r"^control_(model\.|net)": "a ControlNet, not a base model",
    r"^down_blocks\.": "a U-Net alone; give the diffusers folder around it",
    r"^encoder\.conv_in\.": "a VAE alone; give the whole checkpoint",
    r"^(text_model|embeddings)\.": "a text encoder alone; give the whole checkpoint",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; one line: what is wrong, where, what to do."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: its tensors' shapes by name, and free text by key."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a whole safetensors file; CheckpointError says what the file is where it is none."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4096)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{" or length > _HEADER_LIMIT:
            raise CheckpointError(f"{path}: {_other_content(start)}")
        file.seek(8)
        text = file.read(length)
    if len(text) < length:
        raise CheckpointError(f"{path}: cut short, {size} bytes where its header ends at {8 + length}; fetch it again")
    try:
        tensors = json.loads(text)
        metadata = tensors.pop("__metadata__", {})
        shapes = {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}
        wanted = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{path}: a damaged safetensors header ({error!r}); fetch the file again") from None
    if size != wanted:
        what = "cut short" if size < wanted else "too long"
        raise CheckpointError(f"{path}: {what}, {size} bytes where its header says {wanted}; fetch it again")
    return Header(shapes, metadata)


def refuse_other_families(path: Path, names: list[str]) -> None:
    """CheckpointError where a single file's tensors are no SD 1 checkpoint's, naming what they are."""
    for mark, what in _FAMILIES.items():
        if any(re.search(mark, name) for name in names):
            raise CheckpointError(f"{path}: {what}")
    if not any(name.startswith("model.diffusion_model.") for name in names):
        example = f", the first is {names[0]!r}" if names else ""
        raise CheckpointError(f"{path}: not a Stable Diffusion checkpoint: no tensor model.diffusion_model.*{example}")


def _other_content(start: bytes) -> str:
    """What a file that is no safetensors is, by its first bytes."""
    text = start.decode("utf-8", errors="replace").lstrip("\ufeff \r\n\t")
    if not start:
        return "empty, 0 bytes; fetch it again"
    if text.startswith("version https://git-lfs"):
        size = re.search(r"^size (\d+)", text, re.MULTILINE)
        return f"a git-LFS pointer, not the weights ({size[1] if size else '?'} bytes); run `git lfs pull`"
    if text.startswith("<"):
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        named = f" titled {' '.join(title[1].split())[:80]!r}" if title else ""
        return f"a web page{named}, not the weights; fetch it again"
    if text.startswith("{"):
        return f"a JSON text, not the weights: {' '.join(text[:80].split())}"
    if re.match(rb"PK\x03\x04|\x80[\x02-\x05]", start):
        return "a pickle, which can run any code when loaded; convert it to safetensors first"
    return "not a safetensors file"

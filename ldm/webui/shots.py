"""One image to make: its settings, and the PNG that carries them, as AUTOMATIC1111's webui
writes it."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from harness.files import whole_file
from planes.pictures import require_sums

OWN_CHUNK = "fu-lora"  # beside the webui's `parameters`: the same settings exactly, as JSON
WEBUI_SAMPLERS = {"euler": "Euler", "unipc": "UniPC"}


@dataclass(frozen=True)
class Shot:
    """One image to make: a row of manifest.csv, and the text that its PNG carries."""

    image: str  # path in the run's folder
    plane: str  # or "prompt", for one of the user's own
    prompt: str
    negative_prompt: str
    sampler: str
    steps: int
    guidance: float
    seed: int
    width: int
    height: int
    clip_skip: int
    spacing: str | None  # the sampler's own where None, as the order
    order: int | None
    loras: str  # as <lora:name:weight>, one after the other
    lora_hashes: str  # name: hash, ..
    model: str
    model_hash: str
    dtype: str  # of the U-Net and the text encoder
    prediction_type: str
    ema: bool
    tokenizer: str  # hash


def webui_text(shot: Shot) -> str:
    """The webui's `parameters` of an image: the prompts as a person types them, LoRAs as
    <lora:name:weight>, and below them all settings on one line, quoted where they hold a comma, a
    colon or a newline."""
    karras = "Karras" if shot.spacing == "karras" else "Automatic"
    settings = {
        "Steps": shot.steps,
        "Sampler": WEBUI_SAMPLERS[shot.sampler],
        "Schedule type": karras if shot.spacing in (None, "karras") else shot.spacing,
        "CFG scale": _number(shot.guidance),
        "Seed": shot.seed,
        "Size": f"{shot.width}x{shot.height}",
        "Model hash": shot.model_hash,
        "Model": shot.model,
        "Clip skip": shot.clip_skip if shot.clip_skip > 1 else None,
        "RNG": "CPU",  # where noise is drawn, on any device
        "UniPC order": shot.order,
        "Lora hashes": shot.lora_hashes or None,
        "Version": "fu-lora",
    }
    pairs = [f"{name}: {_quote(str(v))}" for name, v in settings.items() if v is not None]
    negative = f"\nNegative prompt: {shot.negative_prompt}" if shot.negative_prompt else ""
    return f"{f'{shot.prompt} {shot.loras}'.strip()}{negative}\n{', '.join(pairs)}".strip()


def save_shot(path: Path, pixels: np.ndarray, shot: Shot) -> None:
    """A PNG with its settings inside; it appears whole or not at all. pixels: (H, W, 3) uint8."""
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", webui_text(shot))
    text.add_text(OWN_CHUNK, json.dumps(asdict(shot)))
    with whole_file(path) as part:
        Image.fromarray(pixels).save(part, format="PNG", pnginfo=text)


def is_saved(path: Path, shot: Shot) -> bool:
    """Is the image there, whole, and made with the same settings?"""
    try:
        require_sums(path)
        with Image.open(path) as image:
            image.load()  # a file that is cut off has its text, but not all its pixels
            return json.loads(image.text[OWN_CHUNK]) == asdict(shot)
    except Exception:  # what is not there, and the decoders of damaged files raise anything
        return False


def model_hash(digests: Mapping[str, str]) -> str:
    """The webui's short hash of a model: 10 digits of its file's sha256, or where it has several,
    of all of theirs."""
    if len(digests) == 1:
        return next(iter(digests.values()))[:10]
    ordered = "".join(digests[part] for part in sorted(digests))
    return hashlib.sha256(ordered.encode()).hexdigest()[:10]


def lora_hash(path: Path) -> str:
    """The webui's short hash of a LoRA: 12 digits of the sha256 of a safetensors file behind its
    header."""
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    with file.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def lora_labels(paths: Sequence[Path]) -> list[str]:
    """What LoRAs are called in the text: by their files, and by their folders too where two files
    have one name. What would end a tag or a hash there, <, :, > and the comma, becomes an
    underline."""
    stems = [re.sub(r"[<:>,]", "_", path.stem) for path in paths]
    parents = [path.absolute().parent.name for path in paths]
    return [s if stems.count(s) == 1 else f"{p}-{s}" for s, p in zip(stems, parents)]


def lora_hashes(paths: Sequence[Path]) -> str:
    """The webui's "Lora hashes"."""
    return ", ".join(f"{label}: {lora_hash(p)}" for label, p in zip(lora_labels(paths), paths))


def tags(paths: Sequence[Path], weights: Sequence[float]) -> str:
    """Names and weights of LoRAs as the webui's users write them into a prompt."""
    loras = zip(lora_labels(paths), weights)
    return " ".join(f"<lora:{label}:{_number(weight)}>" for label, weight in loras)


def _number(value: float) -> str:
    """7 for 7.0."""
    return str(value).removesuffix(".0")


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", value) else value

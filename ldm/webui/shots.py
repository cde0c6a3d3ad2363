"""One image to make: its settings, the PNG that carries them, and the way back from a PNG to its
settings."""

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from ldm.webui.infotext import Infotext, format_parameters, lora_tags, parse_parameters
from planes.pictures import ImageError, require_sums

OWN_CHUNK = "fu-lora"  # beside the webui's `parameters`: the same settings exactly, as JSON
WEBUI_SAMPLERS = {"euler": "Euler", "unipc": "UniPC"}
WEBUI_SCHEDULES = {"Automatic": None, "Uniform": None, "Karras": "karras"}
WEBUI_SETTINGS = (
    "Steps",
    "Sampler",
    "Schedule type",
    "CFG scale",
    "Seed",
    "Size",
    "Model hash",
    "Model",
    "Clip skip",
    "RNG",
    "UniPC order",
    "Lora hashes",
    "Batch size",
    "Batch pos",
    "Version",
    "User",
)
"""What of the webui's settings can be followed, or says nothing about the pixels."""


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
    init_image: str  # hash of the image that is varied, or ""
    strength: float | None  # of the variation
    model: str
    model_hash: str
    # of the U-Net and the text encoder; "" where a foreign PNG does not say, as of what follows
    dtype: str = ""
    prediction_type: str = ""
    ema: bool = False
    tokenizer: str = ""  # hash


def webui_text(shot: Shot, batch: Sequence[int] = (1, 0)) -> str:
    """The webui's `parameters` of an image; batch: how many were made at once, and which of them
    this is."""
    several = batch[0] > 1
    karras = "Karras" if shot.spacing == "karras" else "Automatic"
    return format_parameters(
        f"{shot.prompt} {shot.loras}".strip(),
        shot.negative_prompt,
        {
            "Steps": shot.steps,
            "Sampler": WEBUI_SAMPLERS[shot.sampler],
            "Schedule type": karras if shot.spacing in (None, "karras") else shot.spacing,
            "CFG scale": _number(shot.guidance),
            "Seed": shot.seed,
            "Size": f"{shot.width}x{shot.height}",
            "Model hash": shot.model_hash,
            "Model": shot.model,
            "Batch size": batch[0] if several else None,
            "Batch pos": batch[1] if several else None,
            "Denoising strength": None if shot.strength is None else _number(shot.strength),
            "Clip skip": shot.clip_skip if shot.clip_skip > 1 else None,
            "Init image hash": shot.init_image or None,
            "RNG": "CPU",  # where noise is drawn, on any device
            "UniPC order": shot.order,
            "Lora hashes": shot.lora_hashes or None,
            "Version": "fu-lora",
        },
    )


def save_shot(path: Path, pixels: np.ndarray, shot: Shot, batch: Sequence[int] = (1, 0)) -> None:
    """A PNG with its settings inside; it appears whole or not at all.

    pixels: (H, W, 3) uint8; batch: as for webui_text
    """
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", webui_text(shot, batch))
    text.add_text(OWN_CHUNK, json.dumps(asdict(shot) | {"batch": list(batch)}))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        Image.fromarray(pixels).save(part, format="PNG", pnginfo=text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # of a disk that was full


class Saving:
    """Saves images by threads, as `save_shot`, while the next ones are made; a context that ends
    when all are saved."""

    def __enter__(self) -> "Saving":
        self.pool, self.begun = ThreadPoolExecutor(), []
        return self

    def save(self, images: Sequence[tuple[Path, np.ndarray, Shot, Sequence[int]]]) -> None:
        """Begin to save images, each by the arguments of `save_shot`. Raises what saving those
        before them raised."""
        self._wait()
        self.begun = [self.pool.submit(save_shot, *image) for image in images]

    def _wait(self) -> None:
        for image in self.begun:
            image.result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.pool.shutdown()
        if kind is None:
            self._wait()


def is_saved(path: Path, shot: Shot) -> bool:
    """Is the image there, whole, and made with the same settings?"""
    try:
        return _own_text(_read_text(path))[0] == shot
    except (ImageError, KeyError, TypeError, ValueError):
        return False


def read_shot(path: Path) -> tuple[Shot, tuple[int, int]]:
    """The settings of a PNG, and the batch that it was made in, as for webui_text.

    Of a webui's own PNG the fields that its text does not tell are empty. Raises ImageError where
    there are none, or they are not all ours to follow.
    """
    text = _read_text(path)
    if OWN_CHUNK in text:
        try:
            return _own_text(text)
        except (KeyError, TypeError, ValueError):
            raise ImageError(
                f"{path}: was made by another version of sample.py; give its settings as flags"
            ) from None
    if "parameters" not in text:
        raise ImageError(
            f"{path}: no settings in it, neither ours nor the webui's; give them as flags"
        )
    try:
        shot = _webui_shot(parse_parameters(text["parameters"]))
    except KeyError as error:
        raise ImageError(
            f"{path}: the webui's text does not say {error.args[0]}; give the settings as flags"
        ) from None
    except ValueError as error:
        raise ImageError(f"{path}: cannot be repeated: {error}") from None
    return shot, (1, 0)


def same_pixels(*paths: Path) -> bool:
    """Have two images the same size and colours?"""
    one, other = (np.asarray(Image.open(path).convert("RGB")) for path in paths)
    return np.array_equal(one, other)


def require_same(shot: Shot, wanted: Shot, like: Path) -> None:
    """Raises ImageError where --like would take another model, LoRA or init image than its image
    was made with."""
    flags = {
        "model_hash": "--model",
        "loras": "--lora",
        "lora_hashes": "--lora",
        "init_image": "--init-image",
    }
    flags |= {
        name: f"--{name.replace('_', '-')}"
        for name in ("dtype", "prediction_type", "ema", "tokenizer")
    }
    for name, flag in flags.items():
        before, now = getattr(wanted, name), getattr(shot, name)
        if before != now and (before or name in ("loras", "init_image")):
            raise ImageError(
                f"{like}: was made with {flag} {before or 'none'}, not {now or 'none'}; give its"
                f" {flag}"
            )


def model_hash(digests: dict[str, str]) -> str:
    """The webui's short hash of a model: 10 digits of its file's sha256, or where it has several,
    of all of theirs."""
    if len(digests) == 1:
        return next(iter(digests.values()))[:10]
    return hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()[
        :10
    ]


def lora_hash(path: Path) -> str:
    """The webui's short hash of a LoRA, 12 digits of the sha256 of a safetensors file behind its
    header."""
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    with file.open("rb") as stream:
        if file.suffix == ".safetensors":
            stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def _read_text(path: Path) -> dict[str, str]:
    try:
        require_sums(path)
        with Image.open(path) as image:
            image.load()  # a file that is cut off has its text, but not all its pixels
            return dict(getattr(image, "text", {}))
    except Exception as error:  # the decoders of damaged files raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageError(f"{path}: not a readable image ({reason})") from None


def _own_text(text: dict[str, str]) -> tuple[Shot, tuple[int, int]]:
    fields = json.loads(text[OWN_CHUNK])
    size, position = fields.pop("batch")
    return Shot(**fields), (size, position)


def _webui_shot(info: Infotext) -> Shot:
    """Raises KeyError, with a setting that is missing, or ValueError, which says what cannot be
    followed."""
    settings = info.settings
    samplers = {theirs: ours for ours, theirs in WEBUI_SAMPLERS.items()}
    # webui's UniPC has a schedule of its own, whatever its text says
    schedule = (
        "Automatic"
        if settings["Sampler"] == "UniPC"
        else settings.get("Schedule type", "Automatic")
    )
    if settings["Sampler"] not in samplers:
        raise ValueError(f"sampler {settings['Sampler']}; only {' and '.join(samplers)} are here")
    if schedule not in WEBUI_SCHEDULES:
        raise ValueError(f"schedule {schedule}; only {', '.join(WEBUI_SCHEDULES)} are here")
    if others := [name for name in settings if name not in WEBUI_SETTINGS]:
        raise ValueError(f"{', '.join(others)}: not done here")
    prompt, loras = lora_tags(info.prompt)
    if found := re.search(
        r"\[[^\[\]()]*[:|][^\[\]()]*\]|\bAND\b|<\w+:[^>]*>", f"{prompt}\n{info.negative_prompt}"
    ):
        raise ValueError(f"{found[0]} in its prompt: prompt editing is not done here")
    width, height = settings["Size"].split("x")
    sampler, seed = samplers[settings["Sampler"]], int(settings["Seed"])
    return Shot(
        image=f"prompt/{sampler}_{seed}.png",
        plane="prompt",
        prompt=prompt,
        negative_prompt=info.negative_prompt,
        sampler=sampler,
        steps=int(settings["Steps"]),
        guidance=float(settings["CFG scale"]),
        seed=seed,
        width=int(width),
        height=int(height),
        clip_skip=int(settings.get("Clip skip", 1)),
        spacing=WEBUI_SCHEDULES[schedule],
        order=int(settings["UniPC order"]) if "UniPC order" in settings else None,
        loras=tags(loras),
        lora_hashes=settings.get("Lora hashes", ""),
        init_image="",
        strength=None,
        model=settings.get("Model", ""),
        model_hash=settings.get("Model hash", ""),
    )


def lora_labels(paths: Sequence[Path]) -> list[str]:
    """What LoRAs are called in the text: by their files, and by their folders too where two files
    have one name.

    What would end a tag or a hash there, <, :, > and the comma, becomes an underline.
    """
    stems = [re.sub(r"[<:>,]", "_", path.stem) for path in paths]
    return [
        s if stems.count(s) == 1 else f"{path.absolute().parent.name}-{s}"
        for s, path in zip(stems, paths)
    ]


def lora_hashes(paths: Sequence[Path]) -> str:
    """The webui's "Lora hashes"."""
    return ", ".join(
        f"{label}: {lora_hash(path)}" for label, path in zip(lora_labels(paths), paths)
    )


def tags(loras: Sequence[tuple[str, float]]) -> str:
    """Names and weights of LoRAs as the webui's users write them into a prompt."""
    return " ".join(f"<lora:{name}:{_number(weight)}>" for name, weight in loras)


def _number(value: float) -> str:
    """7 for 7.0, and every digit that matters of the rest."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)

"""What all images of a run of sample.py share, and --like: the flags by which one of them is made
again."""

import contextlib
import hashlib
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.checkpoints import Model
from ldm.checkpoints.tokenizer import tokenizer_hash
from ldm.webui.infotext import lora_tags
from ldm.webui.shots import lora_hashes, model_hash, read_shot, tags


def common_fields(
    args: Namespace,
    model: Model,
    hashes: Mapping[str, str],
    loras: Sequence[tuple[str, float]],
    size: tuple[int, int],
) -> dict[str, object]:
    """The fields of a Shot that all images of a run share: whatever else an image depends on is one
    of its own.

    args: of sample.py; hashes: of the model's files; loras: the names and weights of args.lora;
        size: (w, h) in px
    """
    same = ("negative_prompt", "steps", "spacing", "clip_skip", "strength", "dtype", "ema")
    return {name: getattr(args, name) for name in same} | {
        "guidance": args.guidance_scale,
        "width": size[0],
        "height": size[1],
        "loras": tags(loras),
        "lora_hashes": lora_hashes(args.lora),
        "init_image": _digest(args.init_image)[:10] if args.init_image else "",
        "model": Path(args.model).name.removesuffix(".safetensors"),
        "model_hash": model_hash(hashes),
        "prediction_type": model.prediction_type,
        "tokenizer": tokenizer_hash(model.tokenizer)[:10],
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_of(like: Path) -> dict[str, object]:
    """Defaults of the flags by which an image is made again, with the files that its run names
    where it still lies."""
    shot, _ = read_shot(like)
    recorded, run = {}, like.resolve().parent.parent
    if like.resolve() == run / shot.image:
        # without a record the files are the flags' to name
        with contextlib.suppress(OSError, ValueError, KeyError):
            recorded = json.loads((run / "args.json").read_text(encoding="utf-8"))["arguments"]
    files = (
        "model",
        "tokenizer",
        "vae",
        "ema",
        "prediction_type",
        "lora",
        "embedding",
        "token",
        "init_image",
        "dtype",
    )
    found = {name: getattr(shot, name) for name in ("dtype", "ema") if getattr(shot, name)}
    found |= {name: recorded[name] for name in files if recorded.get(name)}
    found |= {"lora": [Path(file) for file in found.get("lora", ())]}
    found |= {name: Path(found[name]) for name in ("embedding", "init_image") if name in found}
    weights = [weight for _, weight in lora_tags(shot.loras)[1]]
    same = ("prompt", "negative_prompt", "steps", "spacing", "order", "clip_skip", "strength")
    return (
        found
        | {name: getattr(shot, name) for name in same}
        | {
            "samplers": [shot.sampler],
            "seeds": [shot.seed],
            "guidance_scale": shot.guidance,
            "size": (shot.width, shot.height),
            "lora_weight": weights or [1.0],
            "batch_size": 1,
        }
    )

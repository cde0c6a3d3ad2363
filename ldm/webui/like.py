"""sample.py --like: the flags by which an image is made again, from its PNG and the record of its run."""

import contextlib
import json
from pathlib import Path

from ldm.webui.infotext import lora_tags
from ldm.webui.shots import read_shot


def settings_of(like: Path) -> dict[str, object]:
    """Defaults of the flags by which an image is made again, with the files that its run names where it still lies."""
    shot, _ = read_shot(like)
    recorded, run = {}, like.resolve().parent.parent
    if like.resolve() == run / shot.image:
        with contextlib.suppress(OSError, ValueError, KeyError):  # without a record the files are the flags' to name
            recorded = json.loads((run / "args.json").read_text(encoding="utf-8"))["arguments"]
    files = ("model", "tokenizer", "vae", "ema", "prediction_type", "lora", "embedding", "token", "init_image", "dtype")
    found = {name: recorded[name] for name in files if recorded.get(name)}
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

"""What a LoRA file says of its training, in the words of kohya's tools and of the standard
modelspec."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = {
    (768, "epsilon"): "stable-diffusion-v1",
    (1024, "epsilon"): "stable-diffusion-v2-512",
    (1024, "v_prediction"): "stable-diffusion-v2-768-v",
}
"""Width of the text embedding and prediction type -> the name in the metadata standard
modelspec."""


def metadata(
    settings: Mapping[str, Any],
    images: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    context_dim: int,
) -> dict[str, object]:
    """What kohya's tools and the webui show of a training, by their ss_ keys, and by those of the
    standard modelspec.

    settings: the arguments of train_lora.py, the `size` in px, the `steps` of the run, the
        `batches` of an epoch, and the U-Net's `prediction` type
    images: each with a `path`, `caption` and `repeats`
    context_dim: width of the text embedding

    No times and no paths: equal runs leave equal files.
    """
    folders: dict[str, dict[str, int]] = {}
    tags: dict[str, Counter] = {}
    for image in images:
        name = image.path.parent.name
        folders.setdefault(name, {"n_repeats": image.repeats, "img_count": 0})["img_count"] += 1
        tags.setdefault(name, Counter()).update(
            tag.strip() for tag in image.caption.split(",") if tag.strip()
        )
    name, size, prediction = "lora", settings["size"], settings["prediction"]
    keys = {
        "ss_output_name": name,
        "ss_sd_model_name": Path(settings["model"]).name,
        "ss_resolution": f"({size}, {size})",
        "ss_enable_bucket": settings["bucket"],
        "ss_bucket_no_upscale": settings["bucket"],
        "ss_clip_skip": settings["clip_skip"],
        "ss_num_train_images": sum(image.repeats for image in images),  # kohya counts repeats in
        "ss_num_batches_per_epoch": settings["batches"],
        "ss_dataset_dirs": json.dumps(folders),
        "ss_tag_frequency": json.dumps(tags),
        "ss_learning_rate": settings["lr"],
        "ss_unet_lr": settings["lr"],
        "ss_text_encoder_lr": (
            settings["text_encoder_lr"] if settings["train_text_encoder"] else None
        ),
        "ss_optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        "ss_lr_scheduler": settings["schedule"],
        "ss_debiased_estimation": settings["debiased_estimation_loss"],
        "ss_max_grad_norm": 1.0,
        "ss_num_epochs": settings["epochs"],
        "ss_epoch": settings["epochs"],
        "ss_max_train_steps": settings["steps"],
        "ss_steps": settings["steps"],
        "ss_gradient_accumulation_steps": settings["accumulate"],
        "ss_gradient_checkpointing": settings["gradient_checkpointing"],
        "ss_mixed_precision": "no" if settings["dtype"] == "fp32" else settings["dtype"],
        "ss_cache_latents": True,
        "ss_seed": settings["seed"],
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
        "modelspec.encoder_layer": settings["clip_skip"],
    }
    if architecture := ARCHITECTURES.get((context_dim, prediction)):
        keys["modelspec.architecture"] = f"{architecture}/lora"
    return keys


def trained_otherwise(said: Mapping[str, str], clip_skip: int, prediction_type: str) -> list[str]:
    """What a file's metadata says of its training that is other than what it is used with, a
    sentence each.

    said: the header's metadata, whoever wrote it; what it does not say cannot differ
    """
    found = []
    if (before := said.get("ss_clip_skip", "None")) not in ("None", str(clip_skip)):
        found.append(f"was trained with clip skip {before}: sample.py --clip-skip {before} does so")
    stated = said.get("modelspec.prediction_type") or {"True": "v", "False": "epsilon"}.get(
        said.get("ss_v_parameterization", "")
    )
    if stated and (stated == "v") != (prediction_type == "v_prediction"):
        own = "v" if prediction_type == "v_prediction" else "epsilon"
        found.append(f"was trained on a model that predicts {stated}, this one predicts {own}")
    return found

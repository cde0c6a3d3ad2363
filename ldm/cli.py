"""The flags that choose a base model, the same in every script, and the model that they name."""

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from ldm import MINI, CheckpointError
from ldm.checkpoints import PREDICTION_TYPES, Model, load
from ldm.checkpoints.hub import find_model, resolve_model
from ldm.checkpoints.tokenizer import CLIP_REPOSITORY

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_model_arguments(parser: ArgumentParser, positional: bool = False) -> None:
    """--model, --tokenizer, --vae, --ema and --prediction-type; `positional`: MODEL, without a
    default, for --model."""
    add = parser.add_argument_group("base model").add_argument
    forms = "a .safetensors file, a diffusers folder or a hub id, owner/name[@revision]"
    if positional:
        add("model", metavar="MODEL", help=forms)
    else:
        add("--model", default=str(MINI), help=f"{forms} (else: the embedded one)")
    add("--tokenizer", help=f"of a single file: a folder with its vocabulary, or {CLIP_REPOSITORY}")
    add("--vae", help="a VAE's file, folder or hub id, instead of the one in --model")
    add("--ema", action="store_true", help="the U-Net's running average, if the file keeps one")
    add("--prediction-type", choices=PREDICTION_TYPES, help="(else: what the checkpoint says)")


def load_model(
    args: Namespace, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Model:
    """The model that the flags of `add_model_arguments` name; what is not here is downloaded from
    the hub.

    Raises CheckpointError, also for a weight that is not finite: it is named here, before a picture
    is black by it.
    """
    paths = model_paths(args)
    model = load(
        paths["model"],
        device=device,
        dtype=dtype,
        tokenizer=paths.get("tokenizer"),
        prediction_type=args.prediction_type,
        ema=args.ema,
        vae=paths.get("vae"),
    )
    for name, weight in model.networks.state_dict().items():
        if not weight.isfinite().all():
            where = f"{args.model}: {name} is not finite in {weight.dtype}"
            raise CheckpointError(f"{where}; try --dtype fp32, or fetch or train it again")
    return model


def lora_path(text: str) -> Path:
    """A LoRA's file or folder: a path, or a hub id, owner/name of an adapter or
    owner/name/file.safetensors, [@revision], downloaded if need be."""
    try:
        return resolve_model(text, "lora")
    except CheckpointError as error:
        raise ArgumentTypeError(str(error)) from None


def one_of_each(
    parser: ArgumentParser, flag: str, numbers: list[float], loras: Sequence[Path]
) -> list[float]:
    """The number of each LoRA, of a flag that takes one of all, or one of each; another count ends
    the script with a line."""
    if len(numbers) not in (1, len(loras)):
        given = f"{len(numbers)} numbers for {len(loras)} LoRAs"
        parser.error(f"{flag}: {given}; give one, or one of each")
    return numbers * len(loras) if len(numbers) < len(loras) else numbers


def image_size(text: str) -> tuple[int, int]:
    """(width, height) in px: "512", a square's side, or "576x384"."""
    if not (found := re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)):
        raise ArgumentTypeError(
            f"{text}: give the side of a square, such as 512, or both, such as 576x384"
        )
    return int(found[1]), int(found[2] or found[1])


def fitting_size(model: Model, size: tuple[int, int] | int | None) -> tuple[int, int]:
    """(width, height) in px of the --size that was asked for, a square where it is one number, the
    model's own where it is None. Raises CheckpointError where the U-Net cannot halve the latents as
    often as it does."""
    factor = model.vae.config.downsampling
    size = model.sample_size * factor if size is None else size
    width, height = (size, size) if isinstance(size, int) else size
    multiple = factor * model.unet.config.multiple
    if width % multiple or height % multiple:
        raise CheckpointError(f"--size {width}x{height}: both must be multiples of {multiple}")
    return width, height


def model_flags(args: Namespace) -> list[str]:
    """The flags that give another script the same model."""
    flags = []
    for part in ("model", "tokenizer", "vae", "prediction_type"):
        if value := getattr(args, part):
            flags += [f"--{part.replace('_', '-')}", value]
    return flags + ["--ema"] * args.ema


def model_paths(args: Namespace) -> dict[str, Path]:
    """The files and folders of --model, or the embedded one, and of --vae and --tokenizer, fetched
    if need be."""
    given = {"model": args.model or str(MINI), "vae": args.vae, "tokenizer": args.tokenizer}
    return {part: resolve_model(name, part) for part, name in given.items() if name}


def describe_models(args: Namespace) -> list[str]:
    """A line for each of --model, --vae and --tokenizer: is it on this machine? Asks nothing of the
    hub."""
    lines = []
    for part in ("model", "vae", "tokenizer"):
        if source := getattr(args, part):
            try:
                here = find_model(source, part)
                state = "there" if here else "downloaded from the hub when needed"
                lines.append(f"{source}: {state}")
            except CheckpointError as error:
                lines.append(str(error))
    return lines

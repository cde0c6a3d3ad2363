"""Stage 2 of FU-LoRA: synthetic ultrasound images, prompts x samplers x seeds.

    python sample.py --model v1-5-pruned.safetensors --lora runs/lora/lora.safetensors --count 500 --out runs/synthetic

Writes one PNG per image, manifest.csv, a contact sheet (the paper's figure 2) and args.json. An image depends on its
own seed and settings alone, whatever its batch (but for the rounding of the last bit); what is there already, whole and
made with these settings, is not made again.
"""

import argparse
import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from eval.figures import contact_sheet, save
from eval.record import record_run, sha256, write_atomically
from ldm import MINI
from ldm.checkpoint import CheckpointError, load
from ldm.embedding import load_embedding
from ldm.generate import SAMPLERS, generate
from ldm.images import decode_images
from ldm.text import encode_prompts
from lora.files import load_lora
from lora.layer import LoRAError, merge
from planes import PLANES, Plane
from planes.captions import choose_prompt, read_prompts, with_token
from planes.datasets import DatasetError
from samplers import SamplerError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SEEDS_APART = 100_000  # between the first seeds of two (prompt, sampler) pairs: no two images share their noise


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=MINI, help="a .safetensors file or a diffusers folder; default: the embedded one")
    add("--tokenizer", type=Path, help="folder with vocab.json and merges.txt, where --model is a single file")
    add("--lora", type=Path, help="a LoRA file of kohya, PEFT or diffusers, merged into U-Net and text encoder")
    add("--strength", type=float, default=1.0, help="weight of the LoRA (1.0)")
    add("--embedding", type=Path, help="a token of Textual Inversion, which every prompt then names")
    add("--token", help="another name for the token of --embedding (default: the file's)")
    add("--rare-token", help="DreamBooth's, which every prompt then names: a photo of sks fetal femur")
    add("--prompts", default="paper", help="paper, detailed, or a JSON file of a list of prompts per plane (paper)")
    add("--planes", nargs="+", choices=[*PLANES], default=[*PLANES], help="planes whose prompts are sampled (all five)")
    add("--samplers", nargs="+", choices=[*SAMPLERS], default=[*SAMPLERS], help="(euler unipc)")
    add("--count", type=int, default=500, help="images per plane and sampler (500)")
    add("--steps", type=int, default=20, help="model calls per image (20)")
    add("--guidance-scale", type=float, default=7.0, help="classifier-free guidance (7)")
    add("--clip-skip", type=int, default=1, help="1: the text encoder's last layer, 2: the last but one (1)")
    add("--size", type=int, help="square side in px (default: the model's own, 512 for SD 1.5)")
    add("--batch-size", type=int, default=8)
    add("--seed", type=int, default=0, help="the first seed (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, help="of the U-Net and the text encoder (default: fp16 on CUDA, else fp32)")
    add("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("fp16" if args.device.startswith("cuda") else "fp32")
    for name in ("steps", "batch_size", "count"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    if args.embedding and args.rare_token:
        parser.error("give --embedding FILE or --rare-token WORD, not both: a prompt names one token")
    if args.token and not args.embedding:
        parser.error(f"--token {args.token}: names the token of an --embedding FILE, which is not given")
    if args.count > SEEDS_APART:
        parser.error(f"--count {args.count}: at most {SEEDS_APART}; sample more with another --seed and --out")
    return args


@dataclass(frozen=True)
class Shot:
    """One image to make: a row of manifest.csv, and the text that its PNG carries."""

    image: str
    plane: str
    prompt: str
    sampler: str
    steps: int
    guidance: float
    clip_skip: int
    seed: int
    size: int
    strength: float
    lora: str
    model: str


def plan(
    args: argparse.Namespace, prompts: dict[Plane, tuple[str, ...]], size: int, lora: str, model: str
) -> Iterator[list[Shot]]:
    """The images of each (plane, sampler), in order; seeds do not depend on which planes or samplers were asked for.

    prompts: of each plane; an image's seed chooses among them
    """
    for plane in args.planes:
        for sampler in args.samplers:
            group = PLANES.index(plane) * len(SAMPLERS) + [*SAMPLERS].index(sampler)
            first = args.seed + SEEDS_APART * group
            yield [
                Shot(
                    image=f"{plane}/{sampler}_{seed}.png",
                    plane=str(plane),
                    prompt=choose_prompt(prompts[plane], seed),
                    sampler=sampler,
                    steps=args.steps,
                    guidance=args.guidance_scale,
                    clip_skip=args.clip_skip,
                    seed=seed,
                    size=size,
                    strength=args.strength if lora else 0.0,
                    lora=lora,
                    model=model,
                )
                for seed in range(first, first + args.count)
            ]


def is_done(path: Path, shot: Shot) -> bool:
    """Is the image there, whole, and made with the same settings?"""
    try:
        with Image.open(path) as image:
            image.load()
            return image.text.get("fu-lora") == json.dumps(asdict(shot))
    except (OSError, SyntaxError, AttributeError):  # absent, cut off, or no PNG
        return False


def save_image(path: Path, pixels: np.ndarray, shot: Shot) -> None:
    """A PNG with its settings inside; it appears whole or not at all."""
    text = PngImagePlugin.PngInfo()
    text.add_text("fu-lora", json.dumps(asdict(shot)))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    Image.fromarray(pixels).save(part, format="PNG", pnginfo=text)
    part.replace(path)


def save_manifest(path: Path, shots: list[Shot]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, list(asdict(shots[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(shot) for shot in shots)
    write_atomically(path, table.getvalue())


def save_contact_sheet(path: Path, groups: list[list[Shot]], folder: Path, args: argparse.Namespace) -> None:
    """Figure 2: a column for each plane, rows of the first images of each sampler."""
    by_sampler = {sampler: [g for g in groups if g[0].sampler == sampler] for sampler in args.samplers}
    rows, labels = [], []
    for sampler, columns in by_sampler.items():
        for n in range(min(4, args.count)):
            rows.append([np.asarray(Image.open(folder / group[n].image)) for group in columns])
            labels.append(sampler if n == 0 else "")
    save(contact_sheet(rows, labels, [str(plane) for plane in args.planes]), path)


def main(args):
    prompts_of = read_prompts(args.prompts)
    model = load(args.model, tokenizer=args.tokenizer, device=args.device, dtype=DTYPES[args.dtype])
    model.vae.float()  # SD's VAE can overflow in fp16
    factor = model.vae.config.downsampling
    size = args.size or model.sample_size * factor
    if size % (factor * model.unet.config.multiple):
        raise CheckpointError(f"--size {size}: must be a multiple of {factor * model.unet.config.multiple}")
    if args.lora:
        load_lora(args.lora, {"lora_unet": model.unet, "lora_te": model.text_encoder})
        for network in (model.unet, model.text_encoder):
            merge(network, args.strength)
    hashes, token = model.sha256(), args.rare_token
    if args.embedding:
        token, _ = load_embedding(args.embedding, model.tokenizer, model.text_encoder, args.token)
        hashes[args.embedding.name] = sha256(args.embedding)  # one more row of the text encoder: part of the model
    prompts_of = {plane: tuple(with_token(prompt, token) for prompt in prompts_of[plane]) for plane in prompts_of}
    lora_hash = sha256(args.lora) if args.lora else ""
    model_hash = hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()  # of all files
    groups = list(plan(args, prompts_of, size, lora_hash[:16], model_hash[:16]))
    prompts = sorted({shot.prompt for group in groups for shot in group})
    with torch.no_grad():
        embeddings = encode_prompts(model.tokenizer, model.text_encoder, [*prompts, ""], args.clip_skip)

    missing = [[shot for shot in group if not is_done(args.out / shot.image, shot)] for group in groups]
    total, left = sum(map(len, groups)), sum(map(len, missing))
    print(f"{total} images: {total - left} are there, {left} to make")
    with tqdm(total=left, desc="images", unit="image") as progress:
        for group in missing:
            for start in range(0, len(group), args.batch_size):
                batch = group[start : start + args.batch_size]
                context = embeddings[[prompts.index(shot.prompt) for shot in batch]]
                latents = generate(
                    model.unet,
                    context,
                    embeddings[-1:],
                    [shot.seed for shot in batch],
                    (size // factor, size // factor),
                    sampler=batch[0].sampler,
                    steps=args.steps,
                    guidance_scale=args.guidance_scale,
                    prediction_type=model.prediction_type,
                )
                for shot, pixels in zip(batch, decode_images(model.vae, latents)):
                    save_image(args.out / shot.image, pixels.numpy(), shot)
                progress.update(len(batch))

    save_manifest(args.out / "manifest.csv", [shot for group in groups for shot in group])
    save_contact_sheet(args.out / "contact_sheet.png", groups, args.out, args)
    record_run(args.out, args, hashes | ({args.lora.name: lora_hash} if args.lora else {}))


if __name__ == "__main__":
    try:
        main(parse_args())
    except (CheckpointError, DatasetError, LoRAError, SamplerError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)

"""Stage 2 of FU-LoRA: synthetic ultrasound images, prompts x samplers x seeds.

    python sample.py --model v1-5-pruned.safetensors --lora runs/lora/lora.safetensors \\
        --count 500 --out runs/synthetic

Writes one PNG per image, with all settings in it as the webui writes them, manifest.csv, a contact
sheet (the paper's figure 2) and args.json. What is there already, whole and made with these
settings, is not made again. An image depends on its own seed and settings alone; its last bits, on
how many are made at once too.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image

from eval.figures import contact_sheet, save
from harness import processes
from harness.files import folder_hash, sha256, write_text
from harness.flags import (
    DEVICE,
    LAST_SEED,
    HelpFormatter,
    plain_text,
    require_at_least,
    seed_number,
)
from harness.record import record_run, refuse_to_replace
from harness.script import alone, progress, run
from ldm import CheckpointError
from ldm.checkpoints import Model
from ldm.checkpoints.tokenizer import tokenizer_hash
from ldm.cli import (
    DTYPES,
    add_model_arguments,
    fitting_size,
    image_size,
    load_model,
    lora_path,
    one_of_each,
)
from ldm.embedding import load_embedding
from ldm.generate import SAMPLERS, generate, make_nodes
from ldm.images import decode_images
from ldm.webui import manifest, shots
from ldm.webui.prompts import encode_weighted
from lora.files import load_loras
from lora.files.metadata import trained_otherwise
from lora.layer import LoRAError
from planes.captions import (
    choose_prompt,
    prompt_in_turn,
    prompts_beside,
    read_prompts,
    with_token,
)
from planes.datasets import DatasetError
from samplers import SamplerError

SEEDS_APART = 100_000
"""Between the first seeds of (plane, sampler) pairs: only --seeds shares noise."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.usage = "%(prog)s [flags] --out OUT"
    add_model_arguments(parser)
    text = {"type": plain_text}
    group = parser.add_argument_group("LoRA and learned tokens")
    add, token = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--lora", type=lora_path, nargs="+", default=[], help="kohya's, PEFT's: files or hub ids")
    add("--lora-weight", type=float, nargs="+", default=[1.0], help="one of all, or one of each")
    token("--embedding", type=Path, help="Textual Inversion's token, which every prompt then names")
    token("--rare-token", **text, help="DreamBooth's, named by every prompt: a photo of sks ..")
    add = parser.add_argument_group("prompts").add_argument
    add("--prompts", help="paper, styles, detailed, or a JSON file: lists per class (else: paper)")
    add("--planes", nargs="+", help="planes, or a LoRA's own classes, that are sampled (else: all)")
    add("--prompt", **text, help="instead; (word:1.2), [word] and BREAK as in the webui")
    add("--negative-prompt", **text, default="", help="what guidance leads away from")
    add("--clip-skip", type=int, default=1, help="1: CLIP's last layer, 2: the last but one")
    group = parser.add_argument_group("sampling")
    add, which = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--samplers", nargs="+", choices=[*SAMPLERS], default=[*SAMPLERS], help="one or both")
    which("--count", type=int, help="images per prompt and sampler (else: 500)")
    which("--seeds", type=seed_number, nargs="+", help="instead, for every prompt and sampler")
    add("--seed", type=seed_number, default=0, help="the first of --count")
    add("--steps", type=int, default=20, help="model calls per image")
    add("--spacing", help="linspace, leading, trailing, karras, time_uniform (else: the sampler's)")
    add("--order", type=int, choices=(1, 2, 3), help="UniPC's (else: 3)")
    add("--guidance-scale", type=float, default=7.0, help="classifier-free guidance; 1: none")
    add("--size", type=image_size, help="in px, 512 or 576x384 (else: the model's own, 512)")
    add = parser.add_argument_group("machine and output").add_argument
    add("--batch-size", type=int, default=8, help="images at once")
    add("--compile", action="store_true", help="faster on a GPU, but for a start of a minute")
    add("--device", **DEVICE)
    add("--dtype", choices=DTYPES, help="of U-Net and CLIP (else: fp16 on CUDA, else fp32)")
    add("--out", type=Path, required=True, help="a folder")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("fp16" if args.device.startswith("cuda") else "fp32")
    if args.prompt is not None and (args.prompts or args.planes):
        parser.error("give --prompt, or --prompts and --planes, not both")
    if args.order is not None and "unipc" not in args.samplers:
        parser.error(f"--order {args.order}: UniPC has one, {' '.join(args.samplers)} does not")
    args.prompts = args.prompts or "paper"
    for name in ("seeds", "samplers", "planes"):  # by which images are named
        given = getattr(args, name)
        setattr(args, name, given and [*dict.fromkeys(given)])
    args.count = len(args.seeds) if args.seeds else 500 if args.count is None else args.count
    require_at_least(parser, args, 1, "steps", "batch_size", "count")
    if args.count > SEEDS_APART:
        parser.error(
            f"--count {args.count}: at most {SEEDS_APART}; more with another --seed and --out"
        )
    args.lora_weight = one_of_each(parser, "--lora-weight", args.lora_weight, args.lora)
    if args.lora_weight != [1.0] and not args.lora:
        parser.error(f"--lora-weight {args.lora_weight[0]:g}: of a --lora FILE, which is not given")
    if "<lora:" in f"{args.prompt} {args.negative_prompt}":
        parser.error("--prompt with <lora:..>: give LoRAs by --lora and --lora-weight")
    if len({*shots.lora_labels(args.lora)}) < len(args.lora):
        parser.error("--lora: two files of one name in folders of one name; rename one")
    return args


def adapt(model: Model, args) -> tuple[str | None, dict[str, str]]:
    """Puts the LoRAs into the weights, each at its own weight, and the learned token into the
    vocabulary; returns the token that prompts are to name, and the hashes of all that the model
    then is."""
    networks = {"lora_unet": model.unet, "lora_te": model.text_encoder}
    for path, file in zip(args.lora, load_loras([*zip(args.lora, args.lora_weight)], networks)):
        for difference in trained_otherwise(file.metadata, args.clip_skip, model.prediction_type):
            print(f"{path}: {difference}")
    hashes, token = model.sha256(), args.rare_token
    if args.embedding:
        token, _ = load_embedding(args.embedding, model.tokenizer, model.text_encoder)
        hashes[args.embedding.name] = sha256(args.embedding)  # one more row of the text encoder
    return token, hashes


def plan(
    args,
    prompts: Mapping[str, Sequence[str]],
    model: Model,
    hashes: Mapping[str, str],
    size: tuple[int, int],
) -> Iterator[list[shots.Shot]]:
    """The images of each (plane, sampler), in order; seeds do not depend on which planes or
    samplers were asked for.

    prompts: of each plane; an image's seed chooses among them, in turn where they are styles, else
        at random
    """
    choose = prompt_in_turn if args.prompts == "styles" else choose_prompt
    if unknown := [plane for plane in args.planes or () if plane not in prompts]:
        raise DatasetError(f"--planes {' '.join(unknown)}: choose from {', '.join(prompts)}")
    if args.seed > LAST_SEED - len(prompts) * len(SAMPLERS) * SEEDS_APART:
        raise DatasetError(
            f"--seed {args.seed}: those of the last plane would lie beyond {LAST_SEED}"
        )
    for plane in args.planes or prompts:
        for sampler in args.samplers:
            pair = [*prompts].index(plane) * len(SAMPLERS) + [*SAMPLERS].index(sampler)
            first = args.seed + SEEDS_APART * pair
            yield [
                shots.Shot(
                    image=f"{plane}/{sampler}_{seed}.png",
                    plane=str(plane),
                    prompt=choose(prompts[plane], seed),
                    negative_prompt=args.negative_prompt,
                    sampler=sampler,
                    steps=args.steps,
                    guidance=args.guidance_scale,
                    seed=seed,
                    width=size[0],
                    height=size[1],
                    clip_skip=args.clip_skip,
                    spacing=args.spacing,
                    order=args.order if sampler == "unipc" else None,
                    loras=shots.tags(args.lora, args.lora_weight),
                    lora_hashes=shots.lora_hashes(args.lora),
                    model=Path(args.model).name.removesuffix(".safetensors"),
                    model_hash=shots.model_hash(hashes),
                    dtype=args.dtype,
                    prediction_type=model.prediction_type,
                    ema=args.ema,
                    tokenizer=tokenizer_hash(model.tokenizer)[:10],
                )
                for seed in args.seeds or range(first, first + args.count)
            ]


def batches(
    group: Sequence[shots.Shot], size: int, contexts: Mapping[str, torch.Tensor]
) -> Iterator[list[shots.Shot]]:
    """At most `size` images at once, consecutive and with equally many tokens. Those made already
    count too: else the sizes, and with them the last bits, would depend on where a run was
    interrupted."""
    for _, alike in groupby(group, key=lambda shot: contexts[shot.prompt].shape[1]):
        alike = list(alike)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def arrange(model: Model, args) -> None:
    """On a GPU channels last, and a decoder in float16 where the U-Net is in half precision; else
    the decoder is float32. Compiled where that is asked for."""
    on_gpu = args.device.startswith("cuda")
    model.vae.to(torch.float16 if on_gpu and args.dtype != "fp32" else torch.float32)
    for network in (model.unet, model.vae.decoder):
        if on_gpu:
            network.to(memory_format=torch.channels_last)
        if args.compile:
            network.compile(dynamic=False)


def write_outputs(args, groups, others, hashes) -> None:
    """The table of all images, a sheet of the first four of each prompt and sampler, what the
    run was."""
    every = [shot for group in groups for shot in group]
    write_text(args.out / "manifest.csv", manifest.manifest_text(every, others, args.out))
    rows = {}
    for group in groups:
        for n, shot in enumerate(group[:4]):
            rows.setdefault((shot.sampler, n), []).append(Image.open(args.out / shot.image))
    labels = ["" if n else sampler for sampler, n in rows]
    titles = dict.fromkeys(group[0].plane for group in groups)
    save(contact_sheet([*rows.values()], labels, [*titles]), args.out / "contact_sheet.png")
    files = {str(path): folder_hash(path) for path in args.lora}
    record_run(args.out, args, hashes | files)


@alone
def main(args):
    refuse_to_replace(args)
    # what is wrong with samplers and prompts is told before the model is loaded
    for name in args.samplers:
        make_nodes(name, args.steps, args.spacing)
    prompts = {"prompt": (args.prompt,)}
    if args.prompt is None:
        prompts = read_prompts(args.prompts, prompts_beside(args.lora, args.model))

    # the model, with LoRAs in its weights and a learned token in its vocabulary
    model = load_model(args, device=args.device, dtype=DTYPES[args.dtype])
    width, height = fitting_size(model, args.size)
    token, hashes = adapt(model, args)
    arrange(model, args)

    # what is to be made, and the text embeddings for it
    prompts = {name: [with_token(text, token) for text in prompts[name]] for name in prompts}
    groups = list(plan(args, prompts, model, hashes, (width, height)))
    every = [shot for group in groups for shot in group]
    others = manifest.other_rows(every, args.out, prompts if args.prompt is None else ())
    with torch.no_grad():
        contexts = {
            text: encode_weighted(model.tokenizer, model.text_encoder, text, args.clip_skip)
            for text in sorted({shot.prompt for shot in every} | {args.negative_prompt})
        }

    # the loop: every batch of which an image is missing
    missing = {shot for shot in every if not shots.is_saved(args.out / shot.image, shot)}
    print(f"{len(every)} images: {len(every) - len(missing)} are there, {len(missing)} to make")
    processes.barrier()  # each has seen what is there before the first adds to it
    work = [batch for group in groups for batch in batches(group, args.batch_size, contexts)]
    work = processes.share([batch for batch in work if missing & {*batch}])
    bar = progress(total=sum(len(missing & {*batch}) for batch in work), unit="image")
    with bar, ThreadPoolExecutor() as pool:
        for batch in work:
            latents = generate(
                model.unet,
                torch.cat([contexts[shot.prompt] for shot in batch]),
                contexts[args.negative_prompt],
                [shot.seed for shot in batch],
                (height // model.vae.config.downsampling, width // model.vae.config.downsampling),
                sampler=batch[0].sampler,
                steps=args.steps,
                guidance_scale=args.guidance_scale,
                prediction_type=model.prediction_type,
                spacing=args.spacing,
                order=batch[0].order,
            )
            images = zip(batch, decode_images(model.vae, latents).numpy())
            made = [
                (args.out / shot.image, image, shot) for shot, image in images if shot in missing
            ]
            list(pool.map(shots.save_shot, *zip(*made)))
            bar.update(len(made))

    processes.barrier()
    if processes.is_first():
        write_outputs(args, groups, others, hashes)


if __name__ == "__main__":
    run(parse_args, main, CheckpointError, DatasetError, LoRAError, SamplerError, together=True)

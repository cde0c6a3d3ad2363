"""Stage 2 of FU-LoRA: synthetic ultrasound images, prompts x samplers x seeds.

    python sample.py --model v1-5-pruned.safetensors --lora runs/lora/lora.safetensors --count 500 --out runs/synthetic
    python sample.py --like runs/synthetic/brain/euler_200000.png --out runs/again

Writes one PNG per image, with all settings in it as the webui writes them, manifest.csv, a contact
sheet (the paper's figure 2) and args.json. What is there already, whole and made with these
settings, is not made again. An image depends on its own seed and settings alone; its last bits, on
how many are made at once too, and so --like, which repeats one image to the bit, fills a batch of
the same size.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image

from eval.figures import first_images_figure, save
from harness import processes
from harness.files import sha256, write_text
from harness.flags import LAST_SEED, device_name, plain_text, require_at_least, seed_number
from harness.record import record_run
from harness.script import alone_together, progress, run
from ldm import CheckpointError, fast, webui
from ldm.cli import DTYPES, add_model_arguments, fitting_size, image_size, load_model, lora_path
from ldm.embedding import load_embedding
from ldm.generate import SAMPLERS, generate, make_nodes
from ldm.images import decode_images, read_image
from lora.files import load_lora
from lora.files.metadata import trained_otherwise
from lora.layer import LoRAError
from lora.model import merge
from planes.captions import choose_prompt, prompt_in_turn, prompts_beside, read_prompts, with_token
from planes.datasets import DatasetError
from samplers import SamplerError

# from the first seed of a (plane, sampler) pair to the next: only --seeds shares noise
SEEDS_APART = 100_000


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.usage = "%(prog)s [flags] --out OUT"
    add = parser.add_argument
    add_model_arguments(parser)
    add(
        "--lora",
        type=lora_path,
        nargs="+",
        default=[],
        help="LoRAs of kohya, PEFT or diffusers: files or hub ids",
    )
    add(
        "--lora-weight",
        type=float,
        nargs="+",
        default=[1.0],
        help="one of all LoRAs, or one of each (1)",
    )
    add(
        "--embedding", type=Path, help="a token of Textual Inversion, which every prompt then names"
    )
    add(
        "--token",
        type=plain_text,
        help="another name for the token of --embedding (default: the file's)",
    )
    add(
        "--rare-token",
        type=plain_text,
        help="DreamBooth's, which every prompt then names: a photo of sks fetal femur",
    )
    add(
        "--prompts",
        help="of each plane: paper, styles, detailed, or a JSON file of a list per plane (paper)",
    )
    add(
        "--planes",
        nargs="+",
        help="planes, or classes of the LoRA's own, whose prompts are sampled (all)",
    )
    add(
        "--prompt",
        type=plain_text,
        help="instead of the planes'; (word:1.2), [word] and BREAK as in the webui",
    )
    add(
        "--negative-prompt",
        type=plain_text,
        default="",
        help="what guidance leads away from (nothing)",
    )
    add("--samplers", nargs="+", choices=[*SAMPLERS], default=[*SAMPLERS], help="(euler unipc)")
    add("--count", type=int, help="images per prompt and sampler (500)")
    add("--seed", type=seed_number, default=0, help="the first seed (0)")
    add(
        "--seeds",
        type=seed_number,
        nargs="+",
        help="instead of --seed and --count, for every prompt and sampler",
    )
    add("--steps", type=int, default=20, help="model calls per image (20)")
    add(
        "--spacing",
        help=(
            "linspace, leading, trailing, karras or UniPC's time_uniform (default: the sampler's"
            " own)"
        ),
    )
    add("--order", type=int, help="UniPC's, 1 to 3 (3)")
    add("--guidance-scale", type=float, default=7.0, help="classifier-free guidance (7)")
    add(
        "--clip-skip",
        type=int,
        default=1,
        help="1: the text encoder's last layer, 2: the last but one (1)",
    )
    add(
        "--size",
        type=image_size,
        help="in px, 512 or 576x384 (default: a square of the model's own, 512 for SD 1.5)",
    )
    add("--init-image", type=Path, help="an image to vary: image-to-image")
    add(
        "--strength",
        type=float,
        help="of the variation, up to 1; int(steps * strength) steps are done (0.75)",
    )
    add(
        "--like",
        type=Path,
        help="a PNG of this script or of the webui: its settings are the flags' defaults",
    )
    add("--batch-size", type=int, default=8)
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="faster, once begun (many images on CUDA: yes)",
    )
    add("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the U-Net and the text encoder (default: fp16 on CUDA, else fp32)",
    )
    add("--out", type=Path, required=True)
    if like := parser.parse_args(argv).like:
        parser.set_defaults(**webui.settings_of(like))
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("fp16" if args.device.startswith("cuda") else "fp32")
    if args.prompt is not None and (args.prompts or args.planes):
        parser.error("give --prompt, or --prompts and --planes, not both")
    if args.seeds and args.count is not None:
        parser.error("give --seeds, or --seed and --count, not both")
    if args.strength is not None and not args.init_image:
        parser.error(
            f"--strength {args.strength:g}: of the variation of an --init-image FILE, which is not"
            " given"
        )
    args.prompts = args.prompts or "paper"
    args.count = len(args.seeds) if args.seeds else 500 if args.count is None else args.count
    args.strength = 0.75 if args.init_image and args.strength is None else args.strength
    require_at_least(parser, args, 1, "steps", "batch_size", "count")
    if args.embedding and args.rare_token:
        parser.error(
            "give --embedding FILE or --rare-token WORD, not both: a prompt names one token"
        )
    if args.order is not None and "unipc" not in args.samplers:
        parser.error(f"--order {args.order}: UniPC has one, {' '.join(args.samplers)} does not")
    if args.token and not args.embedding:
        parser.error(
            f"--token {args.token}: names the token of an --embedding FILE, which is not given"
        )
    if args.count > SEEDS_APART:
        parser.error(
            f"--count {args.count}: at most {SEEDS_APART}; sample more with another --seed and"
            " --out"
        )
    if len(args.lora_weight) not in (1, len(args.lora)):
        parser.error(
            f"--lora-weight: {len(args.lora_weight)} weights for {len(args.lora)} LoRAs; give one,"
            " or one each"
        )
    if args.lora_weight != [1.0] and not args.lora:
        parser.error(f"--lora-weight {args.lora_weight[0]:g}: of a --lora FILE, which is not given")
    if len({*(args.seeds or ())}) < len(args.seeds or ()):
        parser.error("--seeds: one is there twice; they name the images")
    if args.like and args.out.resolve() in args.like.resolve().parents:
        parser.error(
            f"--out {args.out}: its manifest.csv of --like's own run would be lost; give another"
            " folder"
        )
    if "<lora:" in f"{args.prompt} {args.negative_prompt}":
        parser.error(
            "--prompt with <lora:..>: give LoRAs by --lora and --lora-weight; the PNGs then have"
            " the tags"
        )
    if len({*webui.lora_labels(args.lora)}) < len(args.lora):
        parser.error("--lora: two files of one name in folders of one name; rename one")
    return args


def plan(
    args, prompts: dict[str, tuple[str, ...]], common: dict[str, object]
) -> Iterator[list[webui.Shot]]:
    """The images of each (plane, sampler), in order; seeds do not depend on which planes or
    samplers were asked for.

    prompts: of each plane; an image's seed chooses among them, in turn where they are styles, else
        at random
    common: fields of every shot
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
            number = [*prompts].index(plane)
            first = args.seed + SEEDS_APART * (number * len(SAMPLERS) + [*SAMPLERS].index(sampler))
            yield [
                webui.Shot(
                    image=f"{plane}/{sampler}_{seed}.png",
                    plane=str(plane),
                    prompt=choose(prompts[plane], seed),
                    sampler=sampler,
                    seed=seed,
                    order=args.order if sampler == "unipc" else None,
                    **common,
                )
                for seed in args.seeds or range(first, first + args.count)
            ]


def batches(
    shots: Sequence[webui.Shot], size: int, contexts: dict[str, torch.Tensor]
) -> Iterator[list[webui.Shot]]:
    """At most `size` images at once, consecutive and with equally many tokens. Those made already
    count too: else the sizes, and with them the last bits, would depend on where a run was
    interrupted."""
    for _, alike in groupby(shots, key=lambda shot: contexts[shot.prompt].shape[1]):
        alike = list(alike)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


@alone_together
def main(args):
    strength = 1.0 if args.strength is None else args.strength
    for sampler in args.samplers:  # raises what is wrong with it, before the model is loaded
        make_nodes(
            sampler, args.steps, args.spacing, args.order if sampler == "unipc" else None, strength
        )
    own = args.prompt is not None
    prompts_of = (
        {"prompt": (args.prompt,)} if own else read_prompts(args.prompts, prompts_beside(args.lora))
    )
    wanted, (at_once, position) = webui.read_shot(args.like) if args.like else (None, (1, 0))
    model = load_model(args, device=args.device, dtype=DTYPES[args.dtype])
    factor = model.vae.config.downsampling
    width, height = fitting_size(model, args.size)
    init_latents = None
    if args.init_image:
        image = read_image(args.init_image, (width, height))[None].to(args.device)
        with torch.no_grad():
            # the mean: all that varies it is the sampler's noise
            init_latents = model.vae.float().to_latents(image)

    # LoRAs, each at its weight, and the learned token
    networks = {"lora_unet": model.unet, "lora_te": model.text_encoder}
    weights = args.lora_weight * len(args.lora) if len(args.lora_weight) == 1 else args.lora_weight
    loras = [*zip(webui.lora_labels(args.lora), weights)]
    for path, (name, weight) in zip(args.lora, loras):
        said = load_lora(path, networks, name, weight).metadata
        for difference in trained_otherwise(said, args.clip_skip, model.prediction_type):
            print(f"{path}: {difference}")
    for network in networks.values():
        merge(network)
    hashes, token = model.sha256(), args.rare_token
    if args.embedding:
        token, _ = load_embedding(args.embedding, model.tokenizer, model.text_encoder, args.token)
        # one more row of the text encoder: part of the model
        hashes[args.embedding.name] = sha256(args.embedding)
    prompts_of = {
        plane: tuple(with_token(prompt, token) for prompt in prompts_of[plane])
        for plane in prompts_of
    }

    # what is to be made, and the text embeddings for it
    groups = list(
        plan(args, prompts_of, webui.common_fields(args, model, hashes, loras, (width, height)))
    )
    if wanted:
        webui.require_same(groups[0][0], wanted, args.like)
    shots = [shot for group in groups for shot in group]
    others = webui.other_rows(shots, args.out)
    texts = sorted({shot.prompt for shot in shots} | {args.negative_prompt})
    with torch.no_grad():
        contexts = {
            t: webui.encode_weighted(model.tokenizer, model.text_encoder, t, args.clip_skip)
            for t in texts
        }

    # the rows of each batch, and which of them are missing; --like: as often and where its image
    # was
    work = []
    compiled = fast.wants_compiling(args.compile, args.device, len(shots))
    for group in groups:
        for rows in batches(group, args.batch_size, contexts):
            missing = [
                n for n, shot in enumerate(rows) if not webui.is_saved(args.out / shot.image, shot)
            ]
            # of one shape, which is compiled once
            rows += rows[-1:] * (args.batch_size - len(rows)) * compiled
            work.append((rows * at_once, [position] * len(missing)) if wanted else (rows, missing))
    left = sum(len(missing) for _, missing in work)
    print(f"{len(shots)} images: {len(shots) - left} are there, {left} to make")
    # of several processes each has seen what is there before the first adds to it
    processes.barrier()
    work = processes.share([(rows, missing) for rows, missing in work if missing])
    fast.arrange(model.unet, model.vae)
    if compiled:
        fast.compile_whole(model.unet, model.vae.decoder)
    decoded_at_once = fast.decoded_at_once(model.vae, width, height, args.batch_size)
    mine, start = sum(len(missing) for _, missing in work), time.perf_counter()
    with webui.Saving() as saving, progress(total=mine, desc="images", unit="image") as bar:
        for rows, missing in work:
            latents = generate(
                model.unet,
                torch.cat([contexts[shot.prompt] for shot in rows]),
                contexts[args.negative_prompt],
                [shot.seed for shot in rows],
                (height // factor, width // factor),
                sampler=rows[0].sampler,
                steps=args.steps,
                guidance_scale=args.guidance_scale,
                prediction_type=model.prediction_type,
                spacing=args.spacing,
                order=rows[0].order,
                init_latents=init_latents,
                strength=strength,
            )
            pixels = decode_images(model.vae, latents, decoded_at_once).numpy()
            if compiled and bar.n == 0:
                print(f"the first batch, compiled, took {time.perf_counter() - start:.0f} s")
            saving.save(
                [(args.out / rows[n].image, pixels[n], rows[n], (len(rows), n)) for n in missing]
            )
            bar.update(len(missing))
    processes.barrier()
    if not processes.is_first():
        return

    write_text(args.out / "manifest.csv", webui.manifest_text(shots, others, args.out))
    images = {sampler: {} for sampler in args.samplers}
    for (first, *_), group in zip(groups, groups):
        images[first.sampler][str(first.plane)] = [
            Image.open(args.out / shot.image) for shot in group[:4]
        ]
    save(first_images_figure(images), args.out / "contact_sheet.png")
    files = {
        path.name: sha256(path)
        for path in [*args.lora, args.init_image, args.like]
        if path and path.is_file()
    }
    record_run(args.out, args, hashes | files)
    if wanted:
        again = args.out / shots[0].image
        print(
            f"{again}: {'the very' if webui.same_pixels(again, args.like) else 'not the'} pixels of"
            f" {args.like}"
        )


if __name__ == "__main__":
    run(parse_args, main, CheckpointError, DatasetError, LoRAError, SamplerError)

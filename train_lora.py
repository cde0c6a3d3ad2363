"""Stage 1 of FU-LoRA: fine-tune the U-Net of Stable Diffusion with LoRA on a hundred ultrasound
images.

    python train_lora.py --model v1-5.safetensors --spanish FETAL_PLANES_ZENODO --out runs/lora

Each step predicts the noise that was added to a batch of latents (Ho et al. 2020, eq. 14), and
AdamW moves A and B of h = W0 x + (alpha/r) B A x (the paper's eq. 2). Writes lora.safetensors,
loss.csv, loss.png, args.json, sample sheets and a checkpoint that --resume goes on from. --preset
kohya takes the authors' configuration, with LoRA on CLIP too.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from eval.figures import loss_figure, save
from harness import processes
from harness.files import sha256, whole_file, write_text
from harness.flags import (
    DEVICE,
    HELD_OUT,
    OVERWRITE,
    TEMPLATE,
    HelpFormatter,
    require_at_least,
    seed_number,
)
from harness.record import arguments_of, record_run, refuse_to_replace
from harness.resume import SaveTimes, rate_share, read_state, write_state
from harness.script import alone, progress, run
from ldm import CheckpointError
from ldm.buckets import read_bucketed
from ldm.checkpoints import Model
from ldm.checkpoints.tokenizer import tokenizer_hash
from ldm.cli import DTYPES, add_model_arguments, fitting_size, load_model
from ldm.generate import generate
from ldm.images import decode_images, encode_images, read_image
from ldm.text import Contexts
from lora.files import save_lora
from lora.files.metadata import metadata
from lora.layer import LoRAError
from lora.model import TARGETS, inject, lora_parameters
from lora.training import Draws, held_out_loss, loss_weights, make_optimizer
from planes.captions import PROMPTS_FILE, say_style, training_images, write_prompts
from planes.datasets import DatasetError
from planes.folders import REPEATS, Captioned
from planes.pictures import ImageError
from planes.sites import classes_of, prompts_of, read_site
from samplers import SamplerError
from samplers.schedule import NoiseSchedule

PRESETS: dict[str, dict[str, object]] = {
    "paper": {},
    "kohya": {
        "layers": "transformer",
        "init": "kaiming",
        "train_text_encoder": True,
        "clip_skip": 2,
        "bucket": True,
        "batch_size": 1,
        "seed": 1234,
    },
}
"""Defaults by --preset: the script's own are the paper's; "kohya" is what differs in the
configuration of kohya's script that the authors published."""

SAME = (
    *("rank", "alpha", "layers", "init", "train_text_encoder", "style_words", "bucket"),
    *("repeats", "batch_size", "accumulate", "lr", "text_encoder_lr", "schedule", "weight_decay"),
    *("debiased_estimation_loss", "clip_skip", "seed", "dtype", "ema"),
)
"""Arguments that a run which goes on must have as they were."""


def add_data_arguments(parser: argparse.ArgumentParser) -> Callable:
    """The flags that choose images, for beyond.py too; returns what adds more to their group."""
    group = parser.add_argument_group("data")
    add, site = group.add_argument, group.add_mutually_exclusive_group(required=True).add_argument
    site("--spanish", type=Path, help="the Spanish dataset, or phantoms in its layout")
    site("--source", type=Path, help="any site, a folder of images for each class")
    site("--images", type=Path, help="a folder of captioned images, or of kohya's N_name folders")
    add("--manifest", type=Path, help="the list of images to take from --spanish, if not drawn")
    add("--per-plane", type=int, default=20, help="images of a plane or class to draw")
    add("--prompt-template", **TEMPLATE)
    add("--held-out", **HELD_OUT)
    add("--size", type=int, help="square side in px (else: the model's own, 512 for SD 1.5)")
    return add


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.usage = "%(prog)s [flags] --out OUT"
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    count = {"type": int}
    add_model_arguments(parser)
    add = add_data_arguments(parser)
    add("--style-words", action="store_true", help="captions also say brightness and contrast")
    add("--bucket", **switch, help="images in their own shapes, of that area at most, not squares")
    add("--validation", **count, default=0, help="images held out, whose loss is shown")
    add("--validation-every", **count, default=100, help="optimizer steps between looks at it")
    add = parser.add_argument_group("LoRA").add_argument
    add("--preset", choices=PRESETS, default="paper", help="defaults: the paper's, or kohya's")
    add("--rank", **count, default=128, help="r, the inner width of B A")
    add("--alpha", type=float, help="the update is scaled by alpha / r (else: the rank)")
    add("--layers", default="cross-attention", help=f"{', '.join(TARGETS)}, or a regex for paths")
    add("--init", choices=("gaussian", "kaiming"), default="gaussian", help="of A; kohya: kaiming")
    add("--train-text-encoder", **switch, help="LoRA on CLIP too, on six layers of each block")
    add("--clip-skip", **count, default=1, help="1: CLIP's last layer, 2: the last but one")
    add = parser.add_argument_group("optimisation").add_argument
    add("--repeats", **count, help="passes per epoch, times N of N_name (else: 100; 1 with those)")
    add("--epochs", **count, default=1, help="of repeats x images")
    add("--batch-size", **count, default=2, help="images at once, of all processes")
    add("--accumulate", **count, default=1, help="batches per optimizer step, each of one shape")
    add("--lr", type=float, default=1e-4, help="learning rate")
    add("--text-encoder-lr", type=float, default=5e-5, help="that of --train-text-encoder")
    add("--schedule", choices=("constant", "cosine"), default="constant", help="of all rates")
    add("--debiased-estimation-loss", action="store_true", help="errors count 1 / sqrt(SNR)")
    add("--weight-decay", type=float, default=0.01, help="AdamW's")
    add("--optimizer", choices=("adamw8bit", "adamw"), default="adamw8bit", help="8 bit on CUDA")
    add("--seed", type=seed_number, default=0, help="of drawn images, A, batches, noise and times")
    add = parser.add_argument_group("machine and output").add_argument
    add("--compile", action="store_true", help="faster on a GPU, but for a start of a minute")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--device", **DEVICE)
    add("--dtype", choices=DTYPES, help="of base and autocast (else: fp16 on CUDA, else fp32)")
    add("--save-every", **count, help="optimizer steps between checkpoints (else: five minutes)")
    add("--sample-every", **count, default=0, help="the same of sample sheets; 0: one at the end")
    add("--guidance-scale", type=float, default=7.0, help="of the sample sheets")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--overwrite", **OVERWRITE)
    add("--out", type=Path, required=True, help="a folder")
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    args = parser.parse_args(argv)
    args.alpha = args.rank if args.alpha is None else args.alpha
    args.dtype = args.dtype or ("fp16" if args.device.startswith("cuda") else "fp32")
    if args.manifest and not args.spanish:
        parser.error("--manifest lists images of --spanish, which is not given")
    if args.bucket and args.compile:
        parser.error("--compile: compiles each shape, of which --bucket has many: give one")
    counts = ("size", "per_plane", "repeats", "epochs", "batch_size", "accumulate", "save_every")
    require_at_least(parser, args, 1, *counts, "validation_every")
    require_at_least(parser, args, 0, "validation")
    require_at_least(parser, args, 1e-12, "lr", "text_encoder_lr")
    if args.repeats is None:  # kohya, which has no such flag, says all by its folders' names
        named = args.images and any(REPEATS.fullmatch(path.name) for path in args.images.glob("*/"))
        args.repeats = 1 if named else 100
    return args


def read_data(args) -> tuple[list[Captioned], list[Captioned]]:
    """The images to train on with their captions and repeats, and those that are held out."""
    if args.held_out and not args.source:
        raise DatasetError("--held-out: a share of the patients of --source, which is not given")
    groups = training_images(args, print)
    if args.style_words:
        groups = [list(map(say_style, group)) for group in groups]
    images, held_out = groups
    return [replace(image, repeats=image.repeats * args.repeats) for image in images], held_out


def adapt(model: Model, args) -> list[dict]:
    """Freezes the base, in args.dtype, and puts LoRA into it, whose A and B are float32; returns
    them as the optimizer's groups."""
    targets, groups = [(model.unet, args.layers, args.lr)], []
    if args.train_text_encoder:
        targets.append((model.text_encoder, "text-encoder", args.text_encoder_lr))
    for network, target, lr in targets:
        network.to(args.device, DTYPES[args.dtype])
        layers = inject(network, args.rank, args.alpha, target, args.init, args.seed)
        groups.append({"params": lora_parameters(network), "lr": lr, "initial_lr": lr})
        count = sum(parameter.numel() for parameter in groups[-1]["params"])
        name = type(network).__name__
        print(f"{len(layers)} layers of {name} get LoRA of rank {args.rank}: {count:,} parameters")
    model.unet.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        model.unet.compile(dynamic=False)
    return groups


def mixed_precision(args) -> tuple[partial, torch.amp.GradScaler]:
    """Autocast to the base's dtype, none for float32; and what scales a float16 loss on a GPU."""
    device = args.device.split(":")[0]
    autocast = partial(torch.autocast, device, DTYPES[args.dtype], enabled=args.dtype != "fp32")
    scaler = torch.amp.GradScaler(enabled=args.dtype == "fp16" and device == "cuda")
    scaler.scale(torch.zeros((), device=args.device))  # begins here: a process may have no image
    return autocast, scaler


def read_contexts(
    args, model: Model, autocast: partial, images: list[Captioned], held_out: list[Captioned]
) -> Contexts:
    """The text embeddings of all captions and of "", computed once unless CLIP is trained too."""
    texts = sorted({image.caption for image in (*images, *held_out)} | {""})
    tokens = partial(model.tokenizer, verbose=False)
    limit = model.text_encoder.config.max_position_embeddings
    if cut := [text for text in texts if len(tokens(text).input_ids) > limit]:
        print(f"{len(cut)} captions are cut behind {limit - 2} tokens, such as {cut[0][:40]!r}..")
    settings = args.clip_skip, DTYPES[args.dtype], args.train_text_encoder
    with autocast(enabled=args.train_text_encoder and args.dtype != "fp32"):  # its A, B: float32
        contexts = Contexts(model.tokenizer, model.text_encoder, texts, *settings)
    if not args.train_text_encoder:
        model.text_encoder.to("cpu")
    return contexts


def read_latents(args, model: Model, images: list[Captioned], seed: int) -> list[torch.Tensor]:
    """Each image's latents, once, as kohya caches them; seed: of their noise."""
    size, _ = fitting_size(model, args.size)
    step = model.vae.config.downsampling * model.unet.config.multiple
    read = partial(read_bucketed, step=step) if args.bucket else read_image
    bar = progress(images, desc="latents", unit="image")
    pixels = (read(image.path, size=size, levels=image.levels) for image in bar)
    return [latent.to(args.device) for latent in encode_images(model.vae, pixels, seed)]


def make_draws(args, images: list[Captioned], latents: list[torch.Tensor]) -> Draws:
    """What each step sees; says how many image passes and steps that makes."""
    draws = Draws(
        latents,
        [image.caption for image in images],
        [image.repeats for image in images],
        args.batch_size,
        args.accumulate,
        args.seed,
        share=slice(processes.rank(), None, processes.size()),
    )
    if args.bucket:
        print(f"{len(draws.shapes)} shapes of images, a bucket each")
    passes, steps = args.epochs * int(draws.repeats.sum()), args.epochs * draws.steps_per_epoch
    print(f"{len(images)} images, {passes:,} image passes, {steps:,} optimizer steps")
    return draws


def identity_of(
    args,
    model: Model,
    images: list[Captioned],
    optimizer: torch.optim.Optimizer,
) -> dict[str, str]:
    """What a run that goes on must share: settings, weights, images and captions."""
    same = {name: str(getattr(args, name)) for name in SAME}
    if args.schedule != "constant":  # whose rates the length decides
        same["epochs"] = str(args.epochs)
    words = json.dumps([(image.caption, image.repeats, *image.levels) for image in images])
    files = "".join(sha256(image.path) for image in images)
    return same | {
        "size": str(fitting_size(model, args.size)[0]),
        "images and captions": hashlib.sha256((files + words).encode()).hexdigest()[:10],
        "tokenizer": tokenizer_hash(model.tokenizer)[:10],
        "prediction_type": model.prediction_type,
        "the optimizer": type(optimizer).__name__,
        **model.sha256(),
    }


def resume(args, state: dict, steps: int) -> list[tuple]:
    """Puts the checkpoint into the places that `state` names; the rows of the steps that are
    done."""
    checkpoint = args.out / "checkpoint.pt"
    if not args.resume or not checkpoint.exists():
        return []

    def restore(saved: dict) -> list[tuple]:
        for parameter, tensor in zip(state["lora"], saved["lora"], strict=True):
            parameter.data.copy_(tensor)
        state["optimizer"].load_state_dict(saved["optimizer"])
        state["scaler"].load_state_dict(saved["scaler"])
        return [tuple(row) for row in saved["rows"]]

    rows = read_state(
        checkpoint, state["identity"], "train_lora.py", LoRAError, restore, args.device
    )
    if len(rows) > steps:
        done = f"{len(rows):,} steps are done, these would be {steps:,}"
        raise LoRAError(f"{checkpoint}: {done}: give another --out")
    return rows


def require_finite(rows: list[tuple], patience: int) -> None:
    """LoRAError where more steps in a row than `patience` had a loss or gradient that is not
    finite: GradScaler skips single ones by design, as it looks for its scale."""
    last = rows[-patience - 1 :]
    finite = any(math.isfinite(float(loss) + float(norm)) for _, _, loss, norm, *_ in last)
    if len(last) > patience and not finite:
        advice = "try a lower --lr, or --dtype bf16 or fp32; the last checkpoint, if any, is good"
        raise LoRAError(f"step {len(rows)}: the loss or its gradient is not finite; {advice}")


def look(args, model, contexts, autocast, latents, held_out, step: int, steps: int) -> str:
    """The loss of the held-out images, whose latents lie behind the others'; "" where none is
    due."""
    due = step % args.validation_every == 0 or step == steps
    if not due or not processes.is_first():
        return ""
    with autocast():
        loss = held_out_loss(
            lambda x_t, t, captions: model.unet(x_t, t, contexts(captions)),
            latents[-len(held_out) :],
            [image.caption for image in held_out],
            NoiseSchedule(),
            model.prediction_type,
            args.seed,
        )
    return f"{loss:.6f}"


def save_state(args, state: dict, rows: list[tuple]) -> None:
    """All that --resume needs, and the losses as a table."""
    saved = state | {name: state[name].state_dict() for name in ("optimizer", "scaler")}
    lora = [parameter.detach().cpu() for parameter in state["lora"]]
    write_state(args.out / "checkpoint.pt", saved | {"lora": lora, "rows": rows})
    head = "step,images,loss,grad_norm,lr" + ",held_out" * bool(args.validation)
    write_text(
        args.out / "loss.csv", "\n".join([head, *(",".join(map(str, r)) for r in rows)]) + "\n"
    )


@torch.no_grad()
def save_sheet(
    args, model: Model, contexts: Contexts, autocast, images: list[Captioned], step: int
) -> None:
    """Four samples of each caption as they are now, by Euler; of many captions, eight at most. What
    cannot be sampled is said, and is no reason to lose a LoRA."""
    captions = sorted({image.caption for image in images})
    seeds, rows = [args.seed + n for n in range(4)], []
    side = fitting_size(model, args.size)[0] // model.vae.config.downsampling
    model.vae.to(args.device)
    for caption in captions[:: math.ceil(len(captions) / 8)]:
        try:
            with autocast():
                x0 = generate(
                    model.unet,
                    contexts([caption]).expand(len(seeds), -1, -1),
                    contexts([""]),
                    seeds,
                    (side, side),
                    guidance_scale=args.guidance_scale,
                    prediction_type=model.prediction_type,
                )
            try:
                pixels = decode_images(model.vae, x0)
            except torch.OutOfMemoryError:  # beside a training that fills the card
                pixels = decode_images(model.vae.to("cpu"), x0)
        except (SamplerError, ImageError) as error:
            model.vae.to("cpu")
            return print(f"no samples of step {step}: {error}")
        rows.append(torch.cat(list(pixels), dim=1))
    model.vae.to("cpu")
    path = args.out / "samples" / f"step{step:06}.png"
    with whole_file(path) as part:
        Image.fromarray(torch.cat(rows).numpy()).save(part, "PNG")


def save_curves(args, rows: list[tuple]) -> None:
    """loss.png: the training's loss, as running means over 50 steps, and that of held-out
    images."""
    steps, sums = [row[0] for row in rows], [0.0, *accumulate(float(row[2]) for row in rows)]
    means = [(sums[n] - sums[max(n - 50, 0)]) / min(n, 50) for n in range(1, len(sums))]
    curves = {
        "training, mean of 50 steps": [*zip(steps, means)],
        "held out": [(row[0], float(row[5])) for row in rows if args.validation and row[5]],
    }
    save(loss_figure(curves, "step"), args.out / "loss.png")


def keep_prompts(args) -> None:
    """prompts.json: what the classes of --source are called, which sample.py then draws; an earlier
    run's goes."""
    if args.source:
        classes = classes_of(read_site(args.source, "source", train=True))
        write_prompts(args.out, prompts_of(classes, args.prompt_template))
    elif arguments_of(args.out).get("source"):
        (args.out / PROMPTS_FILE).unlink(missing_ok=True)


def write_outputs(
    args, model: Model, optimizer, images: list[Captioned], held_out: list[Captioned], draws: Draws
) -> None:
    """The file that kohya's tools, the webui and load_loras read; a site's prompts; what the run
    was."""
    steps = args.epochs * draws.steps_per_epoch
    facts = {"size": fitting_size(model, args.size)[0], "steps": steps}
    facts |= {"batches": draws.batches_per_epoch, "prediction": model.prediction_type}
    said = metadata(vars(args) | facts, images, optimizer, model.unet.config.cross_attention_dim)
    networks = {"lora_unet": model.unet, "lora_te": model.text_encoder}
    save_lora(args.out / "lora.safetensors", networks, said, torch.float16)
    keep_prompts(args)
    files = {str(image.path): sha256(image.path) for image in (*images, *held_out)}
    record_run(args.out, args, model.sha256() | files)
    if args.device.startswith("cuda"):
        print(f"peak memory: {torch.cuda.max_memory_allocated(args.device) / 2**30:.1f} GiB")


@alone
def main(args):
    refuse_to_replace(args)
    # data: images and their captions, and those that are held out
    images, held_out = read_data(args)

    # model: a frozen base with LoRA in it, h = W0 x + (alpha/r) B A x; A and B alone are trained
    model = load_model(args, device=args.device)
    optimizer = make_optimizer(adapt(model, args), args.weight_decay, args.optimizer == "adamw8bit")
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    autocast, scaler = mixed_precision(args)
    schedule = NoiseSchedule()
    weights = loss_weights(
        schedule.alphas_cumprod, model.prediction_type, args.debiased_estimation_loss
    ).to(args.device)

    # contexts and latents once; image passes -> batches of one shape each -> optimizer steps
    contexts = read_contexts(args, model, autocast, images, held_out)
    latents = read_latents(args, model, [*images, *held_out], args.seed)
    model.vae.to("cpu")  # where it waits for the sheets
    draws = make_draws(args, images, latents[: len(images)])
    steps = args.epochs * draws.steps_per_epoch

    # resume: a checkpoint of the same run has a row for each step that is done
    state = {"lora": parameters, "optimizer": optimizer, "scaler": scaler}
    state["identity"] = identity_of(args, model, [*images, *held_out], optimizer)
    rows, saves = resume(args, state, steps), SaveTimes(args.save_every)

    bar = progress(
        range(len(rows), steps), initial=len(rows), total=steps, desc="LoRA", unit="step"
    )
    for step in bar:
        # E |eps - eps_theta(x_t, t, c)|^2 (Ho et al. 2020, eq. 14), all images of a step weighing
        # alike
        mean_loss = 0.0
        for batch in draws(step):
            x_t = schedule.add_noise(batch.latents, batch.noise, batch.t)
            with autocast():
                prediction = model.unet(x_t, batch.t, contexts(batch.captions))
            target = schedule.target(batch.latents, batch.noise, batch.t, model.prediction_type)
            error = F.mse_loss(prediction.float(), target, reduction="none")
            loss = (weights[batch.t] * error.mean(dim=(1, 2, 3))).sum() / batch.of
            scaler.scale(loss).backward()
            mean_loss += loss.item()

        # gradients and loss of all processes; and how many of these were asked to save and leave
        mean_loss, saves.everywhere = processes.all_reduce(parameters, mean_loss, bool(saves.asked))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate_share(args.schedule, step, steps)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # a row of the table, now and then with the loss of images that are not trained on
        row = [step + 1, sum(map(len, draws.indices(step))), f"{mean_loss:.6f}", f"{norm:.6f}"]
        row += [optimizer.param_groups[0]["lr"]]
        if held_out:
            row += [look(args, model, contexts, autocast, latents, held_out, step + 1, steps)]
        rows.append(tuple(row))
        require_finite(rows, patience=10 if scaler.is_enabled() else 0)
        bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)

        # what is saved now and then
        if args.sample_every and (step + 1) % args.sample_every == 0 and processes.is_first():
            save_sheet(args, model, contexts, autocast, images, step + 1)
        if saves.due(step + 1):
            if processes.is_first():
                save_state(args, state, rows)
            saves.leave_if_asked(f"{step + 1:,} steps are saved in {args.out}")
    saves.restore()

    if processes.is_first():
        if not args.sample_every:
            save_sheet(args, model, contexts, autocast, images, steps)
        save_state(args, state, rows)
        save_curves(args, rows)
        write_outputs(args, model, optimizer, images, held_out, draws)


if __name__ == "__main__":
    run(parse_args, main, CheckpointError, DatasetError, LoRAError, together=True)

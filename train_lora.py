"""Stage 1 of FU-LoRA: fine-tune the U-Net of Stable Diffusion with LoRA on a hundred ultrasound
images.

    python train_lora.py --model v1-5-pruned.safetensors --spanish FETAL_PLANES_ZENODO --out runs/lora

Each step predicts the noise that was added to a batch of latents (Ho et al. 2020, eq. 14), and
AdamW moves A and B of h = W0 x + (alpha/r) B A x (the paper's eq. 2). Writes lora.safetensors,
loss.csv, args.json, sample sheets and a checkpoint that --resume goes on from. --preset kohya takes
the authors' configuration, with LoRA on CLIP too. --learn-token trains the embedding of one new
token besides, or with --rank 0 instead (Textual Inversion, Gal et al. 2022, eq. 2), and writes
embedding.safetensors. --rare-token and --prior are DreamBooth (Ruiz et al. 2023, eq. 2).
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from eval.figures import loss_figure, save
from harness import processes
from harness.files import write_text
from harness.flags import device_name, plain_text, require_at_least, seed_number
from harness.resume import SaveTimes, rate_share
from harness.script import alone_together, progress, run
from ldm import CheckpointError, fast
from ldm.buckets import read_bucketed
from ldm.cli import DTYPES, add_model_arguments, fitting_size, load_model
from ldm.embedding import save_embedding
from ldm.images import encode_images, read_image
from lora import training
from lora.files import save_lora
from lora.files.metadata import metadata
from lora.layer import LoRAError
from lora.losses import Losses, nothing, upload
from lora.model import TARGETS
from lora.validation import HeldOut
from paper.adapt import (
    Contexts,
    adapt,
    captioned_images,
    default_repeats,
    material,
    record,
    sample_sheet,
)
from planes.captions import prior_pairs
from planes.datasets import DatasetError
from samplers.schedule import NoiseSchedule


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.usage = "%(prog)s [flags] --out OUT"
    add, switch = parser.add_argument, {"action": argparse.BooleanOptionalAction, "default": False}
    add(
        "--preset",
        choices=training.PRESETS,
        default="paper",
        help="defaults: paper's, or the authors' kohya run's",
    )
    add_model_arguments(parser)
    data = parser.add_mutually_exclusive_group(required=True).add_argument
    data(
        "--spanish",
        type=Path,
        help="the Spanish dataset (or phantoms in its layout): 20 images per plane are drawn",
    )
    data(
        "--source",
        type=Path,
        help="any site, a folder of images for each class: 20 of each are drawn",
    )
    add(
        "--prompt-template",
        default="an ultrasound image of {class}",
        help="the captions of --source's images",
    )
    add(
        "--manifest",
        type=Path,
        help="the list of images to take from --spanish, instead of drawing them",
    )
    add(
        "--per-plane", type=int, default=20, help="how many images of a plane or class to draw (20)"
    )
    data("--images", type=Path, help="a folder of captioned images, or of kohya's N_name folders")
    add("--out", type=Path, required=True)
    add("--rank", type=int, default=128, help="r, the inner width of B A; 0: no LoRA (128)")
    add("--alpha", type=float, help="the update is scaled by alpha / r (default: the rank)")
    add(
        "--target",
        default="cross-attention",
        help=f"{', '.join(TARGETS)}, or a regular expression for module paths",
    )
    add(
        "--init",
        choices=("gaussian", "kaiming"),
        default="gaussian",
        help="of A: the paper's, or kohya's (gaussian)",
    )
    add(
        "--train-text-encoder",
        **switch,
        help="LoRA on CLIP too, on kohya's six layers of each block (no)",
    )
    add(
        "--text-encoder-lr",
        type=float,
        default=5e-5,
        help="learning rate of --train-text-encoder (5e-5)",
    )
    add(
        "--learn-token",
        type=plain_text,
        help="a new token, such as <fetal-us>, in captions, which is trained",
    )
    add(
        "--init-word",
        type=plain_text,
        default="ultrasound",
        help="where --learn-token begins (ultrasound)",
    )
    add("--token-lr", type=float, default=5e-3, help="learning rate of --learn-token (5e-3)")
    add(
        "--style-words",
        action="store_true",
        help="captions also say how bright each image is, and its contrast",
    )
    add(
        "--rare-token",
        type=plain_text,
        help="a word that captions then name: a photo of sks fetal femur",
    )
    add(
        "--prior",
        type=Path,
        help="a manifest.csv of sample.py: images of the base model, to be held on to",
    )
    add(
        "--prior-weight",
        type=float,
        default=1.0,
        help="of the loss on a batch of --prior in each step (1)",
    )
    add("--size", type=int, help="square side in px (default: the model's own, 512 for SD 1.5)")
    add(
        "--resize",
        choices=("squash", "crop"),
        help="the whole frame, or its middle square (squash)",
    )
    add(
        "--bucket",
        **switch,
        help="instead, images in their own shapes, of --size x --size px at most (no)",
    )
    add(
        "--repeats",
        type=int,
        help="image passes per epoch, times N of an N_name folder (100, or 1 with those)",
    )
    add("--epochs", type=int, default=1)
    add("--batch-size", type=int, default=2)
    add(
        "--accumulate",
        type=int,
        default=1,
        help="batches per optimizer step, each of one shape (1)",
    )
    add("--lr", type=float, default=1e-4, help="learning rate (1e-4)")
    add(
        "--schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="of all rates; cosine: to 0 (constant)",
    )
    add(
        "--debiased-estimation-loss",
        action="store_true",
        help="weigh errors by 1 / sqrt(SNR), as kohya's flag",
    )
    add("--weight-decay", type=float, default=0.01)
    add(
        "--clip-skip",
        type=int,
        default=1,
        help="1: the text encoder's last layer, 2: the last but one (1)",
    )
    add(
        "--optimizer",
        choices=("adamw8bit", "adamw"),
        default="adamw8bit",
        help="adamw8bit needs CUDA (adamw8bit)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="faster, once begun (many steps on CUDA: yes)",
    )
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations: less memory, more time",
    )
    add("--save-every", type=int, help="optimizer steps between checkpoints (every five minutes)")
    add(
        "--sample-every",
        type=int,
        default=0,
        help="optimizer steps between sample sheets; 0: only the last (0)",
    )
    add("--guidance-scale", type=float, default=7.0, help="of the sample sheets (7)")
    add(
        "--validation",
        type=int,
        default=0,
        help="images held out, whose loss loss.csv and loss.png show (0)",
    )
    add(
        "--validation-every",
        type=int,
        default=100,
        help="optimizer steps between looks at them (100)",
    )
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--seed", type=seed_number, default=0)
    add("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the frozen base and of autocast (default: fp16 on CUDA, else fp32)",
    )
    parser.set_defaults(**training.PRESETS[parser.parse_args(argv).preset])
    args = parser.parse_args(argv)
    args.alpha = args.rank if args.alpha is None else args.alpha
    args.dtype = args.dtype or ("fp16" if args.device.startswith("cuda") else "fp32")
    if args.manifest and not args.spanish:
        parser.error("--manifest lists images of --spanish, which is not given")
    if args.learn_token and args.rare_token:
        parser.error("give --learn-token or --rare-token, not both: a caption names one token")
    if args.rank == 0 and (args.prior or args.train_text_encoder or not args.learn_token):
        parser.error(
            "--rank 0: no LoRA is trained, so give --learn-token, --no-train-text-encoder, and no"
            " --prior"
        )
    if args.bucket and args.resize:
        parser.error(
            f"--resize {args.resize}: makes squares, --bucket does not: give --no-bucket, or no"
            " --resize"
        )
    if args.bucket and args.compile:
        parser.error(
            "--compile: compiles each shape, of which --bucket has many: give --no-bucket, or no"
            " --compile"
        )
    args.resize = None if args.bucket else args.resize or "squash"
    counts = (
        "size",
        "per_plane",
        "repeats",
        "epochs",
        "batch_size",
        "accumulate",
        "save_every",
        "validation_every",
    )
    require_at_least(parser, args, 1, *counts)
    require_at_least(parser, args, 0, "prior_weight", "validation")
    require_at_least(parser, args, 1e-12, "lr", "text_encoder_lr", "token_lr")
    return args


@alone_together
def main(args):
    # images and their captions; behind them, for DreamBooth, images of the base model, and those
    # that are held out
    args.repeats = default_repeats(args.images) if args.repeats is None else args.repeats
    images, validation = captioned_images(args)
    prior = prior_pairs(args.prior) if args.prior else []
    paths, captions = map(list, zip(*[(i.path, i.caption) for i in images], *prior, *validation))
    model = load_model(args, device=args.device)
    downsampling, dtype, kind = (
        model.vae.config.downsampling,
        DTYPES[args.dtype],
        model.prediction_type,
    )
    (size, _), multiple = fitting_size(model, args.size), downsampling * model.unet.config.multiple

    # the frozen base with LoRA in it, h = W0 x + (alpha/r) B A x, of which A and B alone are
    # trained, kept in float32
    unet = model.unet.to(args.device, dtype)
    unet.gradient_checkpointing = args.gradient_checkpointing
    trained = adapt(model, args, dtype, print)
    parameters = trained.parameters
    autocast = partial(
        torch.autocast, args.device.split(":")[0], dtype, enabled=dtype != torch.float32
    )

    # contexts and latents once, for each image the same, as kohya caches them; the VAE waits on the
    # CPU for the sheets
    shown = sorted({image.caption for image in images})
    context_of = Contexts(
        model, [*shown, *sorted({*captions} - {*shown}), ""], args, dtype, autocast, print
    )
    read = (
        partial(read_bucketed, step=multiple)
        if args.bucket
        else partial(read_image, resize=args.resize)
    )
    pixels = (read(path, size=size) for path in progress(paths, desc="latents", unit="image"))
    latents = [latent.to(args.device) for latent in encode_images(model.vae, pixels, args.seed)]
    model.vae.to("cpu")

    # image passes -> batches of one shape each -> optimizer steps
    repeats = torch.tensor([image.repeats for image in images])
    shapes = sorted({latent.shape for latent in latents})
    bucket_of = torch.tensor([shapes.index(latent.shape) for latent in latents])
    passes = (repeats, bucket_of[: len(images)], args.batch_size)
    batches_per_epoch = training.batches_per_epoch(*passes)
    steps = args.epochs * math.ceil(batches_per_epoch / args.accumulate)
    if args.bucket:
        print(training.describe_buckets(shapes, bucket_of, downsampling))
    if fast.wants_compiling(False if args.bucket else args.compile, args.device, steps):
        fast.compile_blocks(unet)
    print(training.describe_passes(repeats, args.epochs, args.batch_size, args.accumulate, steps))

    save_sheet = partial(sample_sheet, args, model, context_of, autocast, size // downsampling)
    optimizer, reason = training.make_optimizer(
        trained.groups, args.weight_decay, args.optimizer == "adamw8bit"
    )
    if reason:
        print(f"optimizer: torch's AdamW in place of 8-bit AdamW ({reason})")
    rates, schedule = [group["lr"] for group in trained.groups], NoiseSchedule()
    scaler = torch.amp.GradScaler(enabled=args.dtype == "fp16" and args.device.startswith("cuda"))
    # it begins with its first loss, which a process may not have
    scaler.scale(torch.zeros((), device=args.device))
    behind = len(images) + len(prior)
    held, mine = torch.arange(len(images), behind), slice(processes.rank(), None, processes.size())
    draws_of_step = partial(
        training.draws_of_step, latents=latents, buckets=bucket_of, held=held, mine=mine
    )
    weights = training.loss_weights(
        schedule.alphas_cumprod, kind, args.debiased_estimation_loss
    ).to(args.device)

    # go on from a checkpoint of the same run
    checkpoint, rows, done = args.out / "checkpoint.pt", [], 0
    model_hashes, made_of = model.sha256(), material(paths, captions, repeats.tolist(), model, args)
    identity = training.run_identity(vars(args) | {"size": size}) | model_hashes | made_of
    identity |= {"the optimizer": type(optimizer).__name__}
    state = {"lora": parameters, "optimizer": optimizer, "scaler": scaler}
    if args.resume and checkpoint.exists():
        done, rows = training.load_checkpoint(checkpoint, identity, **state)
        if done > steps:
            raise LoRAError(
                f"{checkpoint}: {done:,} steps are done, these would be {steps:,}: give another"
                " --out"
            )

    losses = Losses(rows, 10 if scaler.is_enabled() else 0, checkpoint, bool(validation))
    unseen = HeldOut(
        latents[behind:], captions[behind:], schedule, kind, args.seed, args.validation_every, steps
    )
    saves = SaveTimes(args.save_every)

    def predict(noisy: torch.Tensor, t: torch.Tensor, words: list[str]) -> torch.Tensor:
        with autocast():
            return unet(noisy.to(dtype), t, context_of(words))

    def save_state(step: int) -> None:
        """All that --resume needs, and the losses as a table."""
        training.save_checkpoint(checkpoint, identity, step, losses.rows, **state)
        write_text(args.out / "loss.csv", losses.text())

    bar = progress(range(done, steps), initial=done, total=steps, desc="LoRA", unit="step")
    for step in bar:
        # the noise that was added is predicted: E |eps - eps_theta(x_t, t, c)|^2, all images of the
        # step weighing alike
        batches = training.batches_of_step(step, *passes, args.accumulate, args.seed)
        count, mean_loss = sum(map(len, batches)), nothing(args.device)
        for index, noise, t, is_held in draws_of_step(
            step, batches, args.seed, args.batch_size, len(schedule)
        ):
            noise, t = upload(noise, args.device), upload(t, args.device)
            x0 = torch.stack([latents[n] for n in index])
            target = noise if kind == "epsilon" else schedule.velocity(x0, noise, t)
            prediction = predict(schedule.add_noise(x0, noise, t), t, [captions[n] for n in index])
            error = F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))
            loss = (weights[t] * error).sum() / count * (args.prior_weight if is_held else 1.0)
            scaler.scale(loss).backward()
            mean_loss += loss.detach()

        # gradients and loss of all processes; and how many of these a SIGTERM has asked to save and
        # leave
        mean_loss, asked = processes.all_reduce(
            parameters, mean_loss, torch.tensor(bool(saves.asked))
        )
        for rate, group in zip(rates, optimizer.param_groups):
            group["lr"] = rate * rate_share(args.schedule, step, steps)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        held_out = unseen.look(step + 1, predict) if processes.is_first() else None
        losses.add(
            step + 1, count, optimizer.param_groups[0]["lr"], mean_loss, norm, asked, held_out
        )
        saves.heed(losses.asked)  # of other processes, which stop at the same step
        bar.set_postfix(losses.said, refresh=False)
        if args.sample_every and (step + 1) % args.sample_every == 0 and processes.is_first():
            save_sheet(step + 1, shown)
        if saves.due(step + 1):
            losses.read()  # nothing is saved of which it is not known that it is finite
            if processes.is_first():
                save_state(step + 1)
            saves.leave_if_asked(
                f"{checkpoint} has the {step + 1:,} steps that are done; --resume goes on from"
                " there"
            )
    losses.read()
    saves.restore()
    if not processes.is_first():
        return

    # the file that kohya's tools, the webui and load_lora read
    if not args.sample_every:
        save_sheet(steps, shown)
    if trained.networks:
        facts = {"size": size, "steps": steps, "batches": batches_per_epoch, "prediction": kind}
        said = metadata(vars(args) | facts, images, optimizer, unet.config.cross_attention_dim)
        save_lora(args.out / "lora.safetensors", trained.networks, said, torch.float16)
    if trained.token is not None:
        save_embedding(args.out / "embedding.safetensors", args.learn_token, trained.token)
    save_state(steps)
    save(loss_figure(losses.curves(), "step"), args.out / "loss.png")
    record(args, model_hashes, paths, print)


if __name__ == "__main__":
    run(parse_args, main, CheckpointError, DatasetError, LoRAError)

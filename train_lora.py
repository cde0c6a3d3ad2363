"""Stage 1 of FU-LoRA: fine-tune the U-Net of Stable Diffusion with LoRA on a hundred ultrasound images.

    python train_lora.py --model v1-5-pruned.safetensors --spanish FETAL_PLANES_ZENODO --out runs/lora

Each step predicts the noise that was added to a batch of latents (Ho et al. 2020, eq. 14), and AdamW moves A and B of
h = W0 x + (alpha/r) B A x (the paper's eq. 2). Writes lora.safetensors, loss.csv, args.json, sample sheets and a
checkpoint that --resume goes on from.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.record import record_run, sha256, write_atomically
from ldm import MINI
from ldm.checkpoint import CheckpointError, Model, load
from ldm.generate import generate, seeded_noise
from ldm.images import ImageError, decode_images, read_image
from ldm.text import encode_prompts
from lora.files import save_lora
from lora.layer import TARGETS, LoRAError, inject, lora_parameters
from planes import PROMPTS
from planes.datasets import DatasetError, balanced, read_captioned, read_manifest, read_spanish, require_images
from samplers.schedule import NoiseSchedule

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=MINI, help="a .safetensors file or a diffusers folder; default: the embedded one")
    add("--tokenizer", type=Path, help="folder with vocab.json and merges.txt, where --model is a single file")
    add("--spanish", type=Path, help="the Spanish dataset (or phantoms in its layout): 20 images per plane are drawn")
    add("--manifest", type=Path, help="the list of images to take from --spanish, instead of drawing them")
    add("--per-plane", type=int, default=20, help="how many images of a plane to draw from --spanish (20)")
    add("--images", type=Path, help="instead of --spanish: a folder of images with captions in .txt files beside them")
    add("--out", type=Path, required=True)
    add("--rank", type=int, default=128, help="r, the inner width of B A (128)")
    add("--alpha", type=float, help="the update is scaled by alpha / r (default: the rank)")
    add("--target", default="cross-attention", help=f"{', '.join(TARGETS)}, or a regular expression for module paths")
    add("--init", choices=("gaussian", "kaiming"), default="gaussian", help="of A: the paper's, or kohya's (gaussian)")
    add("--size", type=int, help="square side in px (default: the model's own, 512 for SD 1.5)")
    add("--resize", choices=("squash", "crop"), default="squash", help="the whole frame, or its middle square (squash)")
    add("--repeats", type=int, default=100, help="times an image is seen per epoch (100)")
    add("--epochs", type=int, default=1)
    add("--batch-size", type=int, default=2)
    add("--accumulate", type=int, default=1, help="batches per optimizer step (1)")
    add("--lr", type=float, default=1e-4, help="constant learning rate (1e-4)")
    add("--weight-decay", type=float, default=0.01)
    add("--clip-skip", type=int, default=1, help="1: the text encoder's last layer, 2: the last but one (1)")
    add("--optimizer", choices=("adamw8bit", "adamw"), default="adamw8bit", help="adamw8bit needs CUDA (adamw8bit)")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--save-every", type=int, default=500, help="optimizer steps between checkpoints (500)")
    add("--sample-every", type=int, default=0, help="optimizer steps between sample sheets; 0: only the last (0)")
    add("--guidance-scale", type=float, default=7.0, help="of the sample sheets (7)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, help="of the frozen base and of autocast (default: fp16 on CUDA, else fp32)")
    args = parser.parse_args(argv)
    args.alpha = args.rank if args.alpha is None else args.alpha
    args.dtype = args.dtype or ("fp16" if args.device.startswith("cuda") else "fp32")
    if (args.spanish is None) == (args.images is None):
        parser.error("give --spanish DIR or --images DIR, one of the two")
    for name in ("per_plane", "repeats", "epochs", "batch_size", "accumulate", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    return args


def read_training_set(args) -> list[tuple[Path, str]]:
    """(image, caption) pairs, each image there."""
    if args.images:
        return read_captioned(args.images)
    records = read_spanish(args.spanish)
    if args.manifest:
        records = read_manifest(args.manifest, records)
    else:
        records = balanced([r for r in records if r.train], args.per_plane, args.seed)
    require_images(records)
    return [(record.path, PROMPTS[record.plane]) for record in records]


@torch.no_grad()
def encode_images(model: Model, pairs: list[tuple[Path, str]], size: int, args) -> Tensor:
    """Latents (N, 4, size/8, size/8), scaled, on the CPU: each image is encoded once, with its own noise (as kohya)."""
    latents = []
    for n, (path, _) in enumerate(tqdm(pairs, desc="latents", unit="image")):
        image = read_image(path, size, args.resize)[None].to(args.device)
        side = size // model.vae.config.downsampling
        noise = seeded_noise([args.seed * 1_000_003 + n], (model.vae.config.latent_channels, side, side))
        latents.append(model.vae.to_latents(image, noise.to(args.device)).cpu())
    return torch.cat(latents)


def make_optimizer(parameters: list[Tensor], args) -> torch.optim.Optimizer:
    """8-bit AdamW where bitsandbytes runs, else torch's, with a line that says so."""
    settings = {"lr": args.lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": args.weight_decay}
    if args.optimizer == "adamw8bit":
        reason = "no CUDA device"
        if args.device.startswith("cuda"):
            try:
                from bitsandbytes.optim import AdamW8bit

                return AdamW8bit(parameters, **settings)
            except (ImportError, OSError, RuntimeError) as error:
                reason = f"bitsandbytes does not load: {str(error).splitlines()[0]}"
        print(f"optimizer: torch's AdamW in place of 8-bit AdamW ({reason})")
    return torch.optim.AdamW(parameters, **settings)


def images_of_step(step: int, steps_per_epoch: int, count: int, args) -> Tensor:
    """Indices of the images of optimizer step `step`: a function of (seed, step) alone.

    An epoch is every image `repeats` times, shuffled.
    """
    epoch, within = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
    order = torch.randperm(count * args.repeats, generator=generator) % count
    return order.split(args.batch_size * args.accumulate)[within]


def save_loss(path: Path, rows: list[tuple]) -> None:
    """One row per optimizer step."""
    lines = ["step,images,loss,grad_norm,lr", *(",".join(map(str, row)) for row in rows)]
    write_atomically(path, "\n".join(lines) + "\n")


def main(args):
    pairs = read_training_set(args)
    model = load(args.model, tokenizer=args.tokenizer, device=args.device)
    size = args.size or model.sample_size * model.vae.config.downsampling
    side = size // model.vae.config.downsampling  # of the latents
    dtype = DTYPES[args.dtype]
    multiple = model.vae.config.downsampling * model.unet.config.multiple
    if size % multiple:
        raise CheckpointError(f"--size {size}: must be a multiple of {multiple}")

    # latents and text embeddings once; then the text encoder is dropped and the VAE waits on the CPU for the sheets
    latents = encode_images(model, pairs, size, args)
    captions = sorted({caption for _, caption in pairs})
    with torch.no_grad():
        embeddings = encode_prompts(model.tokenizer, model.text_encoder, [*captions, ""], args.clip_skip)
    contexts, empty = embeddings[:-1], embeddings[-1:]
    caption_of = torch.tensor([captions.index(caption) for _, caption in pairs])
    model.text_encoder = None
    model.vae.to("cpu")

    # the frozen base, and float32 A and B inside it
    unet = model.unet.to(args.device, dtype)
    unet.gradient_checkpointing = args.gradient_checkpointing
    generator = torch.Generator().manual_seed(args.seed)
    paths = inject(unet, args.rank, args.alpha, args.target, init=args.init, generator=generator)
    parameters = lora_parameters(unet)
    args.out.mkdir(parents=True, exist_ok=True)
    optimizer = make_optimizer(parameters, args)
    scaler = torch.amp.GradScaler(enabled=args.dtype == "fp16" and args.device.startswith("cuda"))
    schedule = NoiseSchedule()

    # image passes -> optimizer steps
    passes = len(pairs) * args.repeats
    steps_per_epoch = math.ceil(passes / (args.batch_size * args.accumulate))
    steps = args.epochs * steps_per_epoch
    trained = sum(p.numel() for p in parameters)
    print(f"{len(paths)} layers of the U-Net get LoRA of rank {args.rank}: {trained:,} parameters")
    print(
        f"{len(pairs)} images x {args.repeats} repeats x {args.epochs} epochs = {args.epochs * passes:,} image passes; "
        f"batch {args.batch_size} x {args.accumulate} accumulated -> {steps:,} optimizer steps"
    )

    # go on from a checkpoint of the same run
    checkpoint, rows, done = args.out / "checkpoint.pt", [], 0
    same = ("rank", "alpha", "target", "init", "batch_size", "accumulate", "repeats", "lr", "weight_decay", "seed")
    model_hashes = model.sha256()
    identity = {key: str(getattr(args, key)) for key in same} | {"size": str(size)} | model_hashes
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=args.device)
        before = state["identity"]
        if changed := [f"{k} was {before.get(k)}, is {v}" for k, v in identity.items() if before.get(k) != v]:
            raise LoRAError(f"{checkpoint}: other settings ({'; '.join(changed)}): use its own, or another --out")
        for parameter, saved in zip(parameters, state["lora"], strict=True):
            parameter.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        done, rows = state["step"], state["rows"]

    def save_sheet(step: int) -> None:
        """Four samples of each caption as they are now, by Euler."""
        folder = args.out / "samples"
        folder.mkdir(exist_ok=True)
        seeds = [args.seed + n for n in range(4)]
        sheet = []
        for context in contexts[:8].to(dtype):
            with torch.autocast(args.device.split(":")[0], dtype, enabled=dtype != torch.float32):
                x0 = generate(
                    unet,
                    context.expand(len(seeds), -1, -1),
                    empty.to(dtype),
                    seeds,
                    (side, side),
                    guidance_scale=args.guidance_scale,
                    prediction_type=model.prediction_type,
                )
            sheet.append(torch.cat(list(decode_images(model.vae, x0)), dim=1))
        Image.fromarray(torch.cat(sheet).numpy()).save(folder / f"step{step:06}.png")

    def save_state(step: int) -> None:
        """All that --resume needs; replaced in one go, so that a run killed meanwhile keeps the one before."""
        state = {"identity": identity, "step": step, "rows": rows, "lora": [p.detach().cpu() for p in parameters]}
        state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)
        save_loss(args.out / "loss.csv", rows)

    bad = 0
    progress = tqdm(range(done, steps), initial=done, total=steps, desc="LoRA", unit="step")
    for step in progress:
        images = images_of_step(step, steps_per_epoch, len(pairs), args)
        draw = torch.Generator().manual_seed(args.seed * 1_000_003 + 500_009 + step)
        noise = torch.randn(latents[images].shape, generator=draw)
        t = torch.randint(schedule.num_train_timesteps, images.shape, generator=draw)
        noisy = schedule.add_noise(latents[images], noise, t)
        target = noise if model.prediction_type == "epsilon" else schedule.velocity(latents[images], noise, t)

        # the loss is the mean over all images of the step, however they are cut into batches
        mean_loss = 0.0
        context = contexts[caption_of[images]].to(dtype)
        parts = zip(*(tensor.split(args.batch_size) for tensor in (noisy, t, context, target)))
        for x, times, text, wanted in parts:
            with torch.autocast(args.device.split(":")[0], dtype, enabled=dtype != torch.float32):
                prediction = unet(x.to(args.device, dtype), times.to(args.device), text)
            loss = F.mse_loss(prediction.float(), wanted.to(args.device)) * len(x) / len(images)
            scaler.scale(loss).backward()
            mean_loss += loss.item()

        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # a GradScaler skips single steps by design; many in a row, or one without it, is a run gone wrong
        bad = 0 if math.isfinite(mean_loss) and math.isfinite(norm) else bad + 1
        if bad > (10 if scaler.is_enabled() else 0):
            raise LoRAError(
                f"step {step + 1}: the loss or its gradient is not finite; {checkpoint} holds the last good state: "
                "try a lower --lr or --dtype bf16 or fp32"
            )
        rows.append((step + 1, len(images), f"{mean_loss:.6f}", f"{norm:.6f}", args.lr))
        progress.set_postfix(loss=f"{mean_loss:.4f}")
        if args.sample_every and (step + 1) % args.sample_every == 0:
            save_sheet(step + 1)
        if (step + 1) % args.save_every == 0:
            save_state(step + 1)

    # the file that kohya's tools, the webui and load_lora read
    if not args.sample_every:
        save_sheet(steps)
    metadata = {
        "ss_base_model_version": "sd_v1",
        "ss_num_train_images": len(pairs),
        "ss_learning_rate": args.lr,
        "ss_max_train_steps": steps,
        "ss_seed": args.seed,
        "ss_clip_skip": args.clip_skip,
        "ss_resolution": f"({size}, {size})",
        "ss_sd_model_name": args.model.name,
    }
    save_lora(args.out / "lora.safetensors", {"lora_unet": unet}, metadata, torch.float16)
    save_state(steps)
    record_run(args.out, args, model_hashes | {str(path.name): sha256(path) for path, _ in pairs})
    if args.device.startswith("cuda"):
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (CheckpointError, DatasetError, ImageError, LoRAError) as error:
        print(f"train_lora.py: {error}", file=sys.stderr)
        sys.exit(2)

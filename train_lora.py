"""Stage 1 of FU-LoRA: fine-tune the U-Net of Stable Diffusion with LoRA on a hundred ultrasound images.

    python train_lora.py --model v1-5-pruned.safetensors --spanish FETAL_PLANES_ZENODO --out runs/lora

Each step predicts the noise that was added to a batch of latents (Ho et al. 2020, eq. 14), and AdamW moves A and B of
h = W0 x + (alpha/r) B A x (the paper's eq. 2). Writes lora.safetensors, loss.csv, args.json, sample sheets and a
checkpoint that --resume goes on from.

--learn-token trains the embedding of one new token besides, or with --rank 0 instead (Textual Inversion, Gal et al.
2022, eq. 2), and writes embedding.safetensors. --rare-token and --prior are DreamBooth (Ruiz et al. 2023, eq. 2).
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
from ldm.checkpoint import CheckpointError, load
from ldm.embedding import add_token, save_embedding, word_embedding
from ldm.generate import generate
from ldm.images import ImageError, decode_images, encode_images
from ldm.text import encode_prompts
from lora.files import save_lora
from lora.layer import TARGETS, LoRAError, inject, lora_parameters
from lora.training import images_of_step, load_checkpoint, make_optimizer, save_checkpoint
from planes.captions import prior_pairs, training_pairs, with_token
from planes.datasets import DatasetError
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
    add("--rank", type=int, default=128, help="r, the inner width of B A; 0: no LoRA (128)")
    add("--alpha", type=float, help="the update is scaled by alpha / r (default: the rank)")
    add("--target", default="cross-attention", help=f"{', '.join(TARGETS)}, or a regular expression for module paths")
    add("--init", choices=("gaussian", "kaiming"), default="gaussian", help="of A: the paper's, or kohya's (gaussian)")
    add("--learn-token", help="a new token, such as <fetal-us>, that captions name and whose embedding is trained")
    add("--init-word", default="ultrasound", help="whose embedding --learn-token begins at (ultrasound)")
    add("--token-lr", type=float, default=5e-3, help="learning rate of --learn-token (5e-3)")
    add("--rare-token", help="a word that captions then name: a photo of sks fetal femur")
    add("--prior", type=Path, help="a manifest.csv of sample.py: images of the base model, to be held on to")
    add("--prior-weight", type=float, default=1.0, help="of the loss on a batch of --prior in each step (1)")
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
    if args.learn_token and args.rare_token:
        parser.error("give --learn-token or --rare-token, not both: a caption names one token")
    if args.rank == 0 and (args.prior or not args.learn_token):
        parser.error("--rank 0: no LoRA is trained, so give --learn-token, and no --prior: its captions lack the token")
    if not 0 <= args.prior_weight < math.inf:
        parser.error(f"--prior-weight {args.prior_weight}: at least 0")
    for name in ("per_plane", "repeats", "epochs", "batch_size", "accumulate", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    return args


def main(args):
    pairs = training_pairs(args.spanish, args.images, args.manifest, args.per_plane, args.seed)
    pairs = [(path, with_token(caption, args.learn_token or args.rare_token)) for path, caption in pairs]
    prior = prior_pairs(args.prior) if args.prior else []
    model = load(args.model, tokenizer=args.tokenizer, device=args.device)
    size = args.size or model.sample_size * model.vae.config.downsampling
    side = size // model.vae.config.downsampling  # of the latents
    dtype = DTYPES[args.dtype]
    multiple = model.vae.config.downsampling * model.unet.config.multiple
    if size % multiple:
        raise CheckpointError(f"--size {size}: must be a multiple of {multiple}")

    def encode(texts: list[str]) -> Tensor:
        """Text embeddings (B, S, D)."""
        return encode_prompts(model.tokenizer, model.text_encoder, texts, args.clip_skip)

    # latents once; text embeddings too, unless a token is learned; the VAE waits on the CPU for the sheets
    learned = None
    if args.learn_token:
        vector = word_embedding(model.tokenizer, model.text_encoder, args.init_word)
        learned = add_token(model.tokenizer, model.text_encoder, args.learn_token, vector)
    paths = [path for path, _ in pairs + prior]
    latents = encode_images(model.vae, tqdm(paths, desc="latents", unit="image"), size, args.resize, args.seed)
    shown = sorted({caption for _, caption in pairs})
    captions = shown + sorted({caption for _, caption in prior} - {*shown})
    caption_of = torch.tensor([captions.index(caption) for _, caption in pairs + prior])
    with torch.no_grad():
        embeddings = encode([*captions, ""])
    contexts, empty = embeddings[:-1], embeddings[-1:]
    if learned is None:
        model.text_encoder = None
    model.vae.to("cpu")

    def context_of(numbers: Tensor) -> Tensor:
        """Embeddings (B, S, D) of captions by number: anew at each step where they depend on the learned token."""
        return contexts[numbers] if learned is None else encode([captions[n] for n in numbers])

    # the frozen base, and what is trained: float32 A and B inside it, the new token's embedding
    unet = model.unet.to(args.device, dtype)
    unet.gradient_checkpointing = args.gradient_checkpointing
    generator = torch.Generator().manual_seed(args.seed)
    groups = []
    if args.rank:
        layers = inject(unet, args.rank, args.alpha, args.target, init=args.init, generator=generator)
        groups.append({"params": lora_parameters(unet), "lr": args.lr})
    if learned:
        groups.append({"params": [learned.vector], "lr": args.token_lr})
    parameters = [parameter for group in groups for parameter in group["params"]]
    args.out.mkdir(parents=True, exist_ok=True)
    optimizer, reason = make_optimizer(groups, args.weight_decay, args.optimizer == "adamw8bit")
    if reason:
        print(f"optimizer: torch's AdamW in place of 8-bit AdamW ({reason})")
    scaler = torch.amp.GradScaler(enabled=args.dtype == "fp16" and args.device.startswith("cuda"))
    schedule = NoiseSchedule()

    # image passes -> optimizer steps
    passes = len(pairs) * args.repeats
    steps_per_epoch = math.ceil(passes / (args.batch_size * args.accumulate))
    steps = args.epochs * steps_per_epoch
    if args.rank:
        trained = sum(parameter.numel() for parameter in lora_parameters(unet))
        print(f"{len(layers)} layers of the U-Net get LoRA of rank {args.rank}: {trained:,} parameters")
    if learned:
        print(f"the token {args.learn_token} begins at {args.init_word}: {learned.vector.numel()} parameters")
    print(
        f"{len(pairs)} images x {args.repeats} repeats x {args.epochs} epochs = {args.epochs * passes:,} image passes; "
        f"batch {args.batch_size} x {args.accumulate} accumulated -> {steps:,} optimizer steps"
    )

    # go on from a checkpoint of the same run
    checkpoint, rows, done = args.out / "checkpoint.pt", [], 0
    same = ("rank", "alpha", "target", "init", "batch_size", "accumulate", "repeats", "lr", "weight_decay", "seed")
    for flag, more in {"learn_token": ("init_word", "token_lr"), "rare_token": (), "prior": ("prior_weight",)}.items():
        same += (flag, *more) if getattr(args, flag) else ()
    model_hashes = model.sha256()
    identity = {key: str(getattr(args, key)) for key in same} | {"size": str(size)} | model_hashes
    if args.resume and checkpoint.exists():
        state = load_checkpoint(checkpoint, identity, args.device)
        for parameter, saved in zip(parameters, state["lora"], strict=True):
            parameter.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        done, rows = state["step"], state["rows"]

    @torch.no_grad()
    def save_sheet(step: int) -> None:
        """Four samples of each caption as they are now, by Euler."""
        folder = args.out / "samples"
        folder.mkdir(exist_ok=True)
        seeds = [args.seed + n for n in range(4)]
        settings = {"guidance_scale": args.guidance_scale, "prediction_type": model.prediction_type}
        sheet = []
        for number in range(len(shown))[:8]:
            context = context_of(torch.tensor([number])).to(dtype).expand(len(seeds), -1, -1)
            with torch.autocast(args.device.split(":")[0], dtype, enabled=dtype != torch.float32):
                x0 = generate(unet, context, empty.to(dtype), seeds, (side, side), **settings)
            sheet.append(torch.cat(list(decode_images(model.vae, x0)), dim=1))
        Image.fromarray(torch.cat(sheet).numpy()).save(folder / f"step{step:06}.png")

    def save_state(step: int) -> None:
        """All that --resume needs, and the losses as a table."""
        states = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        moved = [parameter.detach().cpu() for parameter in parameters]
        save_checkpoint(checkpoint, identity, step=step, rows=rows, lora=moved, **states)
        lines = ["step,images,loss,grad_norm,lr", *(",".join(map(str, row)) for row in rows)]
        write_atomically(args.out / "loss.csv", "\n".join(lines) + "\n")

    def backward(images: Tensor, weight: float, draw: torch.Generator) -> float:
        """The gradients of weight times the loss, the mean over all the images however they are cut into batches."""
        noise = torch.randn(latents[images].shape, generator=draw)
        t = torch.randint(schedule.num_train_timesteps, images.shape, generator=draw)
        noisy = schedule.add_noise(latents[images], noise, t)
        target = noise if model.prediction_type == "epsilon" else schedule.velocity(latents[images], noise, t)
        total = 0.0
        parts = zip(*(tensor.split(args.batch_size) for tensor in (noisy, t, caption_of[images], target)))
        for x, times, numbers, wanted in parts:
            text = context_of(numbers).to(dtype)
            with torch.autocast(args.device.split(":")[0], dtype, enabled=dtype != torch.float32):
                prediction = unet(x.to(args.device, dtype), times.to(args.device), text)
            loss = F.mse_loss(prediction.float(), wanted.to(args.device)) * len(x) / len(images) * weight
            scaler.scale(loss).backward()
            total += loss.item()
        return total

    bad = 0
    progress = tqdm(range(done, steps), initial=done, total=steps, desc="LoRA", unit="step")
    for step in progress:
        images = images_of_step(step, len(pairs), args.repeats, args.batch_size * args.accumulate, args.seed)
        draw = torch.Generator().manual_seed(args.seed * 1_000_003 + 500_009 + step)
        mean_loss = backward(images, 1.0, draw)
        if prior:  # as many of them as images in the step, so that both losses weigh alike
            held = len(pairs) + torch.randint(len(prior), images.shape, generator=draw)
            mean_loss += backward(held, args.prior_weight, draw)

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
        rows.append((step + 1, len(images), f"{mean_loss:.6f}", f"{norm:.6f}", groups[0]["lr"]))
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
    if args.rank:
        save_lora(args.out / "lora.safetensors", {"lora_unet": unet}, metadata, torch.float16)
    if learned:
        save_embedding(args.out / "embedding.safetensors", args.learn_token, learned.vector)
    save_state(steps)
    record_run(args.out, args, model_hashes | {str(path.name): sha256(path) for path in paths})
    if args.device.startswith("cuda"):
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (CheckpointError, DatasetError, ImageError, LoRAError) as error:
        print(f"train_lora.py: {error}", file=sys.stderr)
        sys.exit(2)

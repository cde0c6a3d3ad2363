"""A LoRA training step at SD 1.5's size with random weights: this package beside diffusers + PEFT.

    python benchmarks/train_lora.py                                        # on a GPU: 512 px, rank 128, batch 2, fp16
    python benchmarks/train_lora.py --device cpu --size 256 --batch-size 1 --rounds 3

A step is what train_lora.py's loop does: draws, noise, prediction, loss, gradients, clipping,
AdamW, the loss read. All rivals have the same base, and an A and B of the same numbers; what is
compared is the loss of their first step.
"""

import argparse
import copy
import sys
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F

# before this folder: classify is the package, not this
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import UNETS, Rival, add_flags, bytes_of, diffusers_unet, report, side_by_side

from ldm import fast
from ldm.cli import DTYPES
from ldm.unet import UNet
from lora import training
from lora.losses import Losses, nothing, upload
from lora.model import inject, lora_layers, lora_parameters
from samplers.schedule import NoiseSchedule

RIVALS = ("ours", "ours-compiled", "peft", "peft-compiled")
IMAGES = 20


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, on_gpu = parser.add_argument, torch.cuda.is_available()
    add_flags(parser, RIVALS, DTYPES, rounds=5, half="fp16")
    add("--scale", choices=UNETS, default="sd15")
    add("--rank", type=int, default=128, help="(128)")
    add("--batch-size", type=int, default=2, help="(2)")
    add("--steps", type=int, default=20 if on_gpu else 1, help="in a reading")
    add("--optimizer", choices=("adamw8bit", "adamw"), default="adamw", help="(adamw)")
    args = parser.parse_args(argv)
    args.rivals = args.rivals or (["ours", "ours-compiled", "peft"] if on_gpu else ["ours", "peft"])
    return args


def material(args, width: int):
    """Latents, and contexts of five captions, on the device, as train_lora.py keeps them."""
    draw, side = torch.Generator().manual_seed(args.seed), args.size // 8
    latents = [torch.randn(4, side, side, generator=draw).to(args.device) for _ in range(IMAGES)]
    contexts = [
        torch.randn(77, width, generator=draw).to(args.device, DTYPES[args.dtype]) for _ in range(5)
    ]
    return latents, contexts


def ours(args, name: str, base: UNet) -> Rival:
    unet, dtype = copy.deepcopy(base).to(DTYPES[args.dtype]), DTYPES[args.dtype]
    inject(unet, args.rank, args.rank, generator=torch.Generator().manual_seed(args.seed))
    parameters = lora_parameters(unet)
    optimizer, reason = training.make_optimizer(
        [{"params": parameters, "lr": 1e-4}], 0.01, args.optimizer == "adamw8bit"
    )
    if reason:
        print(f"ours: {reason}")
    if name == "ours-compiled":
        fast.compile_blocks(unet)
    latents, contexts = material(args, unet.config.cross_attention_dim)
    schedule, scaler = NoiseSchedule(), scaler_of(args)
    draws_of_step = partial(
        training.draws_of_step,
        latents=latents,
        buckets=torch.zeros(IMAGES, dtype=torch.long),
        held=torch.arange(0),
    )
    batches_of_step = partial(
        training.batches_of_step,
        repeats=torch.full((IMAGES,), 100),
        buckets=torch.zeros(IMAGES, dtype=torch.long),
    )
    weights = training.loss_weights(schedule.alphas_cumprod, "epsilon", False).to(args.device)
    autocast = partial(torch.autocast, args.device, dtype, enabled=dtype != torch.float32)
    losses, numbers = Losses([], 10, Path("none")), count()

    def step() -> torch.Tensor:
        number = next(numbers)
        batches = batches_of_step(number, batch_size=args.batch_size, accumulate=1, seed=args.seed)
        images, total = sum(map(len, batches)), nothing(args.device)
        for index, noise, t, _ in draws_of_step(
            number, batches, args.seed, args.batch_size, len(schedule)
        ):
            noise, t = upload(noise, args.device), upload(t, args.device)
            noisy = schedule.add_noise(torch.stack([latents[n] for n in index]), noise, t).to(dtype)
            context = torch.stack([contexts[n % 5] for n in index])
            with autocast():
                prediction = unet(noisy, t, context)
            error = F.mse_loss(prediction.float(), noise, reduction="none").mean(dim=(1, 2, 3))
            loss = (weights[t] * error).sum() / images
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.add(number + 1, images, 1e-4, total, norm, torch.zeros((), device=args.device))
        return total

    return Rival(name, several(step, args.steps), bytes_of(unet))


def theirs(args, name: str, base: UNet) -> Rival:
    import diffusers
    from peft import LoraConfig

    dtype = DTYPES[args.dtype]
    unet = diffusers_unet(base, args.device)
    unet.to(dtype).requires_grad_(False)
    targets = r".*attn2\.(to_q|to_k|to_v|to_out\.0)"
    unet.add_adapter(
        LoraConfig(
            r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=targets
        )
    )
    copied = copy.deepcopy(base)
    inject(copied, args.rank, args.rank, generator=torch.Generator().manual_seed(args.seed))
    for path, layer in lora_layers(copied).items():
        unet.get_submodule(path).lora_A["default"].weight.data = layer.A.data.clone()
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    if args.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    optimizer = AdamW(parameters, lr=1e-4, weight_decay=0.01)
    if name == "peft-compiled":
        unet.compile()
    latents, contexts = material(args, base.config.cross_attention_dim)
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    scaler, numbers = scaler_of(args), count()
    autocast = partial(torch.autocast, args.device, dtype, enabled=dtype != torch.float32)

    def step() -> torch.Tensor:
        # as diffusers' train_text_to_image_lora.py does it, but for the draws, which are ours so
        # that the loss is too
        number = next(numbers)
        index = training.batches_of_step(
            number,
            torch.full((IMAGES,), 100),
            torch.zeros(IMAGES, dtype=torch.long),
            args.batch_size,
            1,
            args.seed,
        )[0]
        draws = training.draws_of_step(
            number,
            [index],
            args.seed,
            args.batch_size,
            len(scheduler),
            latents=latents,
            buckets=torch.zeros(IMAGES, dtype=torch.long),
            held=torch.arange(0),
        )
        ((_, noise, t, _),) = draws
        noise, t = noise.to(args.device), t.to(args.device)
        noisy = scheduler.add_noise(torch.stack([latents[n] for n in index]), noise, t).to(dtype)
        context = torch.stack([contexts[n % 5] for n in index])
        with autocast():
            prediction = unet(noisy, t, context, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()  # for its progress bar
        return loss

    return Rival(name, several(step, args.steps), bytes_of(unet))


def scaler_of(args) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(
        args.device, enabled=args.dtype == "fp16" and args.device.startswith("cuda")
    )


def several(step, steps: int):
    """Many steps as one piece of work, whose outcome is the first one's loss."""

    def work() -> torch.Tensor:
        return torch.stack([step().detach().float() for _ in range(steps)])[:1]

    return work


def main(args):
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        base = UNet(UNETS[args.scale]).requires_grad_(False)
    rivals = [
        (ours if name.startswith("ours") else theirs)(args, name, base) for name in args.rivals
    ]
    del base
    side_by_side(rivals, args.rounds, args.device)
    title = (
        f"LoRA step, {args.size} px, rank {args.rank}, batch {args.batch_size}, {args.dtype},"
        f" {args.optimizer}"
    )
    report(args, title, rivals, args.steps, "step")


if __name__ == "__main__":
    main(parse_args())

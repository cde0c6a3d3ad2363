"""Text to images at SD 1.5's size with random weights: this package beside diffusers, plain and
compiled.

    python benchmarks/sample.py                                          # on a GPU: 512 px, 20 steps, fp16, batch 16
    python benchmarks/sample.py --device cpu --size 256 --steps 2 --batch-size 1 --rounds 3
    python benchmarks/sample.py --device cpu --size 256 --steps 2 --batch-size 1 --rivals ours ours-bf16

A piece of work is what lies between text embeddings and pixels in the host's memory: Euler,
guidance 7, the decoder. All rivals have the same weights and start from the same noise.
"""

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

import torch

# before this folder: classify is the package, not this
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import (
    UNETS,
    Rival,
    add_flags,
    best_rate,
    bytes_of,
    diffusers_unet,
    flops,
    report,
    side_by_side,
)

from ldm import fast
from ldm.cli import DTYPES
from ldm.generate import generate, seeded_noise
from ldm.images import decode_images
from ldm.unet import UNet
from ldm.vae import AutoencoderKL, VAEConfig

VAES = {"sd15": VAEConfig(), "small": VAEConfig(block_out_channels=(32, 32, 32, 32))}
RIVALS = ("ours", "ours-compiled", "ours-bf16", "diffusers", "diffusers-compiled")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, on_gpu = parser.add_argument, torch.cuda.is_available()
    add_flags(parser, RIVALS, DTYPES, rounds=5, half="fp16")
    add("--scale", choices=UNETS, default="sd15")
    add("--steps", type=int, default=20, help="(20)")
    add("--batch-size", type=int, default=16 if on_gpu else 1)
    args = parser.parse_args(argv)
    args.rivals = args.rivals or (
        [r for r in RIVALS if r != "ours-bf16"] if on_gpu else ["ours", "diffusers"]
    )
    return args


def networks(args) -> tuple[UNet, AutoencoderKL]:
    """Random weights, the same for every rival."""
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        unet, vae = UNet(UNETS[args.scale]), AutoencoderKL(VAES[args.scale])
    return unet.eval().requires_grad_(False), vae.eval().requires_grad_(False)


def ours(args, name: str, unet: UNet, vae: AutoencoderKL, context, negative) -> Rival:
    dtype = torch.bfloat16 if name == "ours-bf16" else DTYPES[args.dtype]
    unet, vae = copy.deepcopy(unet).to(dtype), copy.deepcopy(vae).to(dtype)
    fast.arrange(unet, vae)
    if name == "ours-compiled":
        fast.compile_whole(unet, vae.decoder)
    context, negative, side = (
        context.to(dtype),
        negative.to(dtype),
        args.size // vae.config.downsampling,
    )
    at_once = fast.decoded_at_once(vae, args.size, args.size, args.batch_size)

    def work() -> torch.Tensor:
        latents = generate(
            unet, context, negative, range(args.batch_size), (side, side), steps=args.steps
        )
        return decode_images(vae, latents, at_once)

    return Rival(name, work, bytes_of(unet, vae))


def theirs(args, name: str, unet: UNet, vae: AutoencoderKL, context, negative) -> Rival:
    import diffusers

    dtype, v, count = DTYPES[args.dtype], vae.config, len(vae.config.block_out_channels)
    their_unet = diffusers_unet(unet, args.device)
    with torch.device(args.device):
        their_vae = diffusers.AutoencoderKL(
            block_out_channels=v.block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * count,
            up_block_types=("UpDecoderBlock2D",) * count,
            latent_channels=v.latent_channels,
            layers_per_block=v.layers_per_block,
        )
    their_vae.load_state_dict(vae.state_dict())
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="linspace",
        steps_offset=1,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=their_vae.to(dtype),
        unet=their_unet.to(dtype),
        text_encoder=None,
        tokenizer=None,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    if name == "diffusers-compiled":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        pipe.unet.compile(fullgraph=True)
        pipe.vae.decoder.compile(fullgraph=True)
    context, negative = (
        context.to(dtype),
        negative.to(dtype).expand(len(context), -1, -1).contiguous(),
    )
    side = args.size // vae.config.downsampling

    @torch.no_grad()
    def work() -> torch.Tensor:
        noise = seeded_noise(range(args.batch_size), (4, side, side)).to(args.device, dtype)
        images = pipe(
            prompt_embeds=context,
            negative_prompt_embeds=negative,
            latents=noise,
            num_inference_steps=args.steps,
            guidance_scale=7.0,
            height=args.size,
            width=args.size,
            output_type="np",
        ).images
        return torch.from_numpy((images * 255).round())

    return Rival(name, work, bytes_of(their_unet, their_vae))


def main(args):
    unet, vae = networks(args)
    draw = torch.Generator().manual_seed(args.seed)
    width = unet.config.cross_attention_dim
    texts = [
        torch.randn(n, 77, width, generator=draw).to(args.device) for n in (args.batch_size, 1)
    ]
    rivals = []
    for name in args.rivals:
        make = ours if name.startswith("ours") else theirs
        rivals.append(make(args, name, unet, vae, *texts))
    side, dtype = args.size // vae.config.downsampling, DTYPES[args.dtype]
    latents = torch.randn(2 * args.batch_size, 4, side, side, device=args.device)
    both = torch.cat([texts[0], texts[0]])
    count = (
        args.steps * flops(partial(unet, latents, torch.tensor(500.0), both))
        if args.scale == "sd15"
        else 0
    )
    del unet, vae
    side_by_side(rivals, args.rounds, args.device)
    title = f"sampling, {args.size} px, {args.steps} steps, batch {args.batch_size}, {args.dtype}"
    report(
        args,
        title,
        rivals,
        args.batch_size,
        "image",
        count,
        count and best_rate(args.device, dtype),
    )


if __name__ == "__main__":
    main(parse_args())

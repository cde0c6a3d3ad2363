"""The same work done here and by the peers, side by side: how long, and how much memory?

    python benchmarks/speed.py sampling      # text embeddings to pixels, beside diffusers
    python benchmarks/speed.py lora          # LoRA steps, beside diffusers + PEFT

All work in one process, in turn, from the same random weights. Outcomes are compared before
anything is timed: the images, or the first loss. Prints a Markdown table, whose last row is what
the others are measured by; a peer that is not installed is left out.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F

# before this folder, which is no package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.flags import HelpFormatter
from ldm.checkpoints.folder import Config, write_config
from ldm.cli import DTYPES
from ldm.generate import generate, seeded_noise
from ldm.images import decode_images
from ldm.unet import UNet, UNetConfig
from ldm.vae import AutoencoderKL, VAEConfig
from lora.model import inject, lora_parameters
from lora.training import Draws, make_optimizer
from sample import arrange
from samplers.schedule import NoiseSchedule
from train_lora import mixed_precision

CONFIGS = UNetConfig(), VAEConfig()  # Stable Diffusion 1.5
RANK, LATENTS = 128, 20


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("task", choices=TASKS)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, help="(else: fp16 on CUDA, else fp32)")
    add("--size", type=int, default=512, help="px")
    add("--batch-size", type=int, help="(else: 16, of LoRA 2)")
    add("--steps", type=int, default=20, help="of the sampler; of training, in a reading")
    add("--rounds", type=int, default=5, help="readings of each")
    add("--compile", action="store_true", help="ours, compiled")
    args = parser.parse_args(argv)
    args.batch_size = args.batch_size or TASKS[args.task][1]
    args.dtype = args.dtype or ("fp16" if args.device.startswith("cuda") else "fp32")
    return args


# A task makes its material, and returns ours(), theirs(), and how many images or steps there
# are. Either prepares all, and returns a function that works once and gives back what is compared.


def sampling(args):
    """Euler at guidance 7 and the decoder, from the same noise."""
    unet, vae = UNet(CONFIGS[0]), AutoencoderKL(CONFIGS[1])
    side, seeds = args.size // 8, range(args.batch_size)
    shape = 77, unet.config.cross_attention_dim
    text = seeded_noise(range(len(seeds) + 1), shape).to(args.device, DTYPES[args.dtype])
    context, negative = text[1:], text[:1]

    def ours():
        own, decoder = (prepared(copy.deepcopy(part), args) for part in (unet, vae))
        arrange(argparse.Namespace(unet=own, vae=decoder), args)

        def work():
            latents = generate(own, context, negative, seeds, (side, side), steps=args.steps)
            return decode_images(decoder, latents)

        return work

    def theirs():
        import diffusers

        scheduler = diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        )
        pipe = diffusers.StableDiffusionPipeline(
            theirs_of(vae, diffusers.AutoencoderKL, "vae", args),
            None,
            None,
            theirs_of(unet, diffusers.UNet2DConditionModel, "unet", args),
            scheduler,
            None,
            None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)

        def work():
            images = pipe(
                prompt_embeds=context,
                negative_prompt_embeds=negative.expand(len(seeds), -1, -1),
                latents=seeded_noise(seeds, (4, side, side)).to(context),
                num_inference_steps=args.steps,
                guidance_scale=7.0,
                height=args.size,
                width=args.size,
                output_type="np",
            ).images
            return torch.from_numpy((255 * images).round())

        return work

    return ours, theirs, args.batch_size


def lora(args):
    """Steps of train_lora.py on the same images, noise and times; B is 0 in the first, so that its
    loss is that of the base."""
    unet, side = UNet(CONFIGS[0]), args.size // 8
    latents = seeded_noise(range(LATENTS), (4, side, side)).to(args.device)
    contexts = seeded_noise(range(LATENTS), (77, unet.config.cross_attention_dim))
    contexts, schedule = contexts.to(args.device, DTYPES[args.dtype]), NoiseSchedule()

    def training(predict, parameters, optimizer):
        numbers, (autocast, scaler) = count(), mixed_precision(args)
        draws = Draws(latents, range(LATENTS), [100] * LATENTS, args.batch_size, 1, seed=0)

        def step():
            (batch,) = draws(next(numbers))
            x_t = schedule.add_noise(batch.latents, batch.noise, batch.t)
            with autocast():
                prediction = predict(x_t, batch.t, contexts[batch.captions])
            loss = F.mse_loss(prediction.float(), batch.noise)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return lambda: torch.tensor([step() for _ in range(args.steps)])[:1]

    def ours():
        own = prepared(copy.deepcopy(unet), args)
        inject(own, RANK, RANK)
        if args.compile:
            own.compile(dynamic=False)
        parameters = lora_parameters(own)
        optimizer = make_optimizer([{"params": parameters, "lr": 1e-4}], 0.01, eight_bit=False)
        return training(own, parameters, optimizer)

    def theirs():
        from diffusers import UNet2DConditionModel
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        network = theirs_of(unet, UNet2DConditionModel, "unet", args)
        targets = r".*attn2\.(to_[qkv]|to_out\.0)"
        network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        cast_training_params(network)
        parameters = [weight for weight in network.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
        return training(lambda *inputs: network(*inputs).sample, parameters, optimizer)

    return ours, theirs, args.steps


TASKS = {  # and batch size, what the peer needs
    "sampling": (sampling, 16, ["diffusers"]),
    "lora": (lora, 2, ["diffusers", "peft"]),
}


def theirs_of(network, kind: type, name: str, args):
    """The same network with the same weights as diffusers' class of it, on a CPU in the same
    memory."""
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), Config(*CONFIGS))
        theirs = kind.from_config(kind.load_config(f"{folder}/{name}"))
    theirs.load_state_dict(network.state_dict(), assign=True)
    return prepared(theirs, args)


def prepared(network, args):
    return network.eval().requires_grad_(False).to(args.device, DTYPES[args.dtype])


def side_by_side(args, makers: dict, items: int) -> dict[str, tuple[list[float], str]]:
    """Makes each and lets it work once, when outcomes and memory are taken; then all work in turn.
    Returns seconds an item, and what else the table says, of each."""
    on_gpu, works, outcomes, rows = args.device.startswith("cuda"), {}, [], {}
    for name, make in makers.items():
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # 0 where there is no GPU
        works[name] = make()
        outcomes.append(works[name]().double())
        difference = (outcomes[-1] - outcomes[0]).norm() / outcomes[0].norm()
        peak = f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}" if on_gpu else ""
        rows[name] = [], f"{peak} | {difference:.1e}"
    for _ in range(args.rounds):
        for name, work in works.items():
            begin = time.perf_counter()
            work()  # what it returns is read from the GPU: all is done
            rows[name][0].append((time.perf_counter() - begin) / items)
    return rows


def main(args):
    task, _, peers = TASKS[args.task]
    torch.manual_seed(0)
    ours, theirs, items = task(args)
    makers = {"ours": ours}
    if all(map(find_spec, peers)):
        makers[" + ".join(peers)] = theirs
    rows = side_by_side(args, makers, items)
    print(f"{args}\n\n| who | s each | speed | peak, GiB | differs by |\n|" + " --- |" * 5)
    *_, last = (statistics.median(seconds) for seconds, _ in rows.values())
    for name, (seconds, facts) in rows.items():
        median = statistics.median(seconds)
        spread = f"({min(seconds):.4g} to {max(seconds):.4g})"
        print(f"| {name} | {median:.4g} {spread} | {last / median:.2f} | {facts} |")


if __name__ == "__main__":
    main(parse_args())

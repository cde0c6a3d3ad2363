"""The pictures of docs/walkthrough.md, drawn from the package itself: two minutes on one CPU core,
no download.

    python docs/pictures.py     # writes docs/walkthrough/*.png and prints the numbers of the text

Equal versions give equal files: every draw has its own seed, and torch runs on one thread.
"""

import math
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))  # a script sees its own folder, not the repository

from eval.figures import LINES, contact_sheet, save  # noqa: E402
from ldm import MINI  # noqa: E402
from ldm.checkpoints import load  # noqa: E402
from ldm.generate import seeded_noise  # noqa: E402
from ldm.images import decode_images  # noqa: E402
from ldm.text import encode_prompts  # noqa: E402
from lora import LoRALayer  # noqa: E402
from planes import Plane  # noqa: E402
from planes.phantoms.phantom import phantom  # noqa: E402
from planes.phantoms.sites import SITES  # noqa: E402
from samplers import (  # noqa: E402
    Denoiser,
    Nodes,
    NoiseSchedule,
    euler_nodes,
    sample_euler,
    sample_unipc,
    unipc_nodes,
)

SCHEDULE = NoiseSchedule()
MODEL = load(MINI)
# in the words of the scenes that it has seen
CAPTION = (
    "a photo of large hyperechoic ring middle of hypoechoic, wide fine clear, bright, normal"
    " contrast"
)
STEPS = (5, 10, 20, 40, 80, 160)


def guided(nodes: Nodes, count: int = 1) -> Denoiser:
    """The embedded model as a denoiser, asked for `count` images of CAPTION."""
    texts = encode_prompts(MODEL.tokenizer, MODEL.text_encoder, [CAPTION, ""])
    contexts = (text.expand(count, -1, -1) for text in texts.split(1))
    return Denoiser(MODEL.unet, nodes, *contexts, guidance_scale=4.0)


def noise(*seeds: int) -> Tensor:
    return seeded_noise(seeds, (4, MODEL.sample_size, MODEL.sample_size))


def phantom_image() -> Tensor:
    """A brain phantom, (64, 64) in [-1, 1]."""
    pixels = phantom(Plane.BRAIN, SITES["A"], np.random.default_rng(3), np.random.default_rng(4))
    image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)) / 127.5 - 1


def to_bytes(image: Tensor) -> np.ndarray:
    """uint8 of an image in [-1, 1], for `contact_sheet`."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def plot(axes, lines: dict[str, tuple], **labels) -> None:
    """Lines in eval.figures' colours, with a marker for each so that colour is not alone."""
    for (label, (x, y)), colour, marker in zip(lines.items(), LINES, "os^D"):
        mark = marker if len(x) < 50 else None
        axes.plot(x, y, color=colour, label=label, marker=mark, ms=4, lw=1.5)
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)


# --- the pictures, one function each ---


def noise_schedule() -> Figure:
    """What is left of x_0 and how much noise there is at time t; sigma(t) with the nodes of both
    samplers."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    t, alphas_cumprod = np.arange(len(SCHEDULE)), SCHEDULE.alphas_cumprod.numpy()
    weights = {
        r"signal $\sqrt{\bar\alpha_t}$": (t, np.sqrt(alphas_cumprod)),
        r"noise $\sqrt{1-\bar\alpha_t}$": (t, np.sqrt(1 - alphas_cumprod)),
        r"$\bar\alpha_t$": (t, alphas_cumprod),
    }
    plot(left, weights, xlabel="t", ylabel="weight")

    nodes = ("Euler", euler_nodes(SCHEDULE)), ("UniPC", unipc_nodes(SCHEDULE))
    nodes = {f"{name}'s 20 nodes": (n.timesteps, n.sigmas[:-1]) for name, n in nodes}
    plot(right, nodes, xlabel="t", ylabel=r"$\sigma(t)$", yscale="log")
    for line, face in zip(right.lines, ("none", LINES[1])):
        line.set(linestyle="none", markerfacecolor=face)
    right.legend(frameon=False, fontsize=8)
    right.plot(t, SCHEDULE.sigma(t), color="0.6", lw=1, zorder=0)
    return figure


def forward_process() -> Figure:
    """One phantom at six times: the formula applied to pixels, and to latents, as Stable Diffusion
    does it."""
    times = torch.tensor([0, 100, 250, 500, 750, 999])
    image = phantom_image().expand(1, 3, -1, -1)

    def noisy(x: Tensor, seed: int) -> Tensor:
        noise = seeded_noise([seed], x.shape[1:]).expand(len(times), -1, -1, -1)
        return SCHEDULE.add_noise(x.expand_as(noise), noise, times)

    pixels = to_bytes(noisy(image[:, :1], 1)[:, 0])
    decoded = decode_images(MODEL.vae, noisy(MODEL.vae.to_latents(image), 2))
    return contact_sheet(
        [pixels, decoded], ["in pixels", "in latents,\ndecoded"], [f"t = {t}" for t in times]
    )


def denoising() -> Figure:
    """Euler from noise to an image: the noisy latents and the denoiser's estimate of x_0 at six of
    twenty nodes."""
    nodes, seen, shown = euler_nodes(SCHEDULE, 20), [], (0, 4, 8, 12, 16, 19)
    x = nodes.init_scale * noise(3)
    sample_euler(guided(nodes), x, nodes.sigmas, lambda i, *states: seen.append(states))
    x_vp = torch.cat([seen[i][0] / math.hypot(1, nodes.sigmas[i]) for i in shown])
    x0 = torch.cat([seen[i][1] for i in shown])
    labels = [f"step {i + 1}\nσ = {nodes.sigmas[i]:.2f}" for i in shown]
    rows = [decode_images(MODEL.vae, latents) for latents in (x_vp, x0)]
    return contact_sheet(rows, ["noisy x", "D(x; σ)"], labels)


@cache
def lora_updates() -> tuple[Tensor, dict[int, tuple[Tensor, float, float]]]:
    """A weight's true update (64, 64), a phantom's picture; and rank -> the B A that a LoRALayer
    learns of it, its relative error, and that of the best matrix of this rank (Eckart and Young
    1936).

    The task is linear regression: y = (W0 + dW) x for random x, of which the layer knows W0 and
    sees x and y.
    """
    torch.manual_seed(0)  # of nn.Linear's W0
    truth = (phantom_image() + 1) / 2
    base = nn.Linear(64, 64, bias=False).requires_grad_(False)
    x = torch.randn(1024, 64, generator=torch.Generator().manual_seed(1))
    y = x @ (base.weight + truth).T
    singular_values, learned = torch.linalg.svdvals(truth), {}
    for rank in (1, 4, 8):
        layer = LoRALayer(base, rank, alpha=rank)
        optimizer = torch.optim.Adam([layer.A.weight, layer.B.weight], lr=0.02)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
        for _ in range(1000):
            loss = (layer(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
        BA = (layer.B.weight @ layer.A.weight).detach()
        distances = (BA - truth).norm(), singular_values[rank:].norm()
        learned[rank] = BA, *(distance.item() / truth.norm().item() for distance in distances)
    return truth, learned


def lora_rank() -> Figure:
    """A weight update that is known, and what LoRA of rank 1, 4 and 8 learns of it."""
    truth, learned = lora_updates()
    images, titles = [to_bytes(2 * truth - 1)], ["true ΔW\n4096 numbers"]
    for rank, (BA, error, _) in learned.items():
        images.append(to_bytes(2 * BA - 1))
        titles.append(f"B A, r = {rank}\n{128 * rank} numbers, error {100 * error:.0f} %")
    return contact_sheet([images], column_labels=titles, cell=2)


@cache
def network_errors() -> dict[str, dict[int, float]]:
    """Solver -> for each of STEPS the relative rms distance of four images' latents from those of
    640 even steps."""
    sigmas = np.geomspace(SCHEDULE.sigma_max, SCHEDULE.sigma_min, 641).tolist()
    denoise = guided(Nodes(tuple(SCHEDULE.t(sigmas[:-1])), tuple(sigmas), sigmas[0]), count=4)
    x = sigmas[0] * noise(*range(4))
    last, errors = sample_unipc(denoise, x, sigmas), {}
    for name, sample, nodes, end in (
        ("Euler", sample_euler, euler_nodes, denoise(last, sigmas[-1])),
        ("UniPC", sample_unipc, unipc_nodes, last),
    ):
        paths = {steps: nodes(SCHEDULE, steps).sigmas for steps in STEPS}
        apart = {steps: sample(denoise, x, path) - end for steps, path in paths.items()}
        errors[name] = {steps: (x.norm() / end.norm()).item() for steps, x in apart.items()}
    return errors


def sampler_error() -> Figure:
    """Distance from the end of the embedded network's flow by number of steps."""
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    lines = {name: (STEPS, errors.values()) for name, errors in network_errors().items()}
    plot(axes, lines, xscale="log", yscale="log", ylabel="relative distance")
    axes.set(xlabel="steps = calls of the model")
    axes.set_xticks(STEPS, STEPS)
    axes.minorticks_off()
    return figure


PICTURES = (noise_schedule, forward_process, denoising, lora_rank, sampler_error)


def main() -> None:
    torch.set_num_threads(1)
    for draw in PICTURES:
        path = DOCS / "walkthrough" / f"{draw.__name__}.png"
        save(draw(), path, dpi=110)
        # nearly all grey: 64 colours lose nothing that the eye sees
        small = Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE)
        small.save(path, optimize=True)

    for rank, (_, error, best) in lora_updates()[1].items():
        print(f"LoRA of rank {rank}: error {error:.3f}, of the best matrix {best:.3f}")
    print("network:", network_errors())


if __name__ == "__main__":
    main()

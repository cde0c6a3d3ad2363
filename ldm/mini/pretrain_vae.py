"""The autoencoder of the embedded miniature model; what both stages of its pre-training share."""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from harness.resume import rate_share, read_state, write_state
from ldm.vae import AutoencoderKL, Posterior, VAEConfig

SIZE = 96  # image side, px
BATCH = 16
SAVE_EVERY = 500  # steps between checkpoints
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VAE = VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=8)


def to_input(images: Tensor) -> Tensor:
    """Grey bytes (B, H, W) -> (B, 3, H, W) in [-1, 1]."""
    return (images.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def draw_batch(count: int, size: int, seed: int, step: int) -> tuple[Tensor, torch.Generator]:
    """The indices of one batch and the generator for its noise, both functions of (seed, step)
    alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(count, (size,), generator=generator), generator


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then half a cosine down to zero."""
    return peak * min(1.0, (step + 1) / 100) * rate_share("cosine", step, steps)


def steps_left(
    name: str, steps: int, parts: dict[str, Any], args: argparse.Namespace
) -> Iterator[int]:
    """Yields the steps that are still to be done, from the last checkpoint of `parts` (networks,
    optimizer) on, and writes checkpoints."""
    path, done = args.work / f"{name}.pt", 0
    if path.exists():
        script = "ldm.mini.pretrain"
        done = read_state(
            path, _identity(args), script, SystemExit, partial(_restore, parts), DEVICE
        )
    for step in tqdm(range(done, steps), initial=done, total=steps, desc=name):
        yield step
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save(path, args, parts, step + 1)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One step of the optimizer, at the learning rate `rate`."""
    group = optimizer.param_groups[0]
    group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def train_vae(vae: AutoencoderKL, images: Tensor, args: argparse.Namespace) -> None:
    """Minimise the squared error plus 1e-4 times the KL divergence per latent value.

    Whose best answer where a pixel cannot be known is the mean: speckle comes out smooth.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    for step in steps_left("vae", args.vae_steps, {"vae": vae, "optimizer": optimizer}, args):
        index, generator = draw_batch(len(images), BATCH, args.seed + 1, step)
        x = to_input(images[index].to(DEVICE))
        shape = (len(x), VAE.latent_channels, SIZE // 8, SIZE // 8)
        noise = torch.randn(shape, generator=generator).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            posterior = vae.encode(x)
            decoded = vae.decode(posterior.sample(noise) * VAE.scaling_factor)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = F.mse_loss(decoded.float(), x) + 1e-4 * kl
        descend(loss, optimizer, learning_rate(step, args.vae_steps, args.vae_lr))


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor) -> Posterior:
    """The posteriors of all images; a fresh sample of them is drawn at every training step."""
    parts = []
    for batch in tqdm(images.split(64), desc="latents", unit="batch"):
        with torch.autocast(DEVICE, torch.bfloat16):
            p = vae.encode(to_input(batch.to(DEVICE)).contiguous(memory_format=torch.channels_last))
        parts.append(torch.stack([p.mean, p.logvar]).float().cpu())
    return Posterior(*torch.cat(parts, dim=1))


def save(path: Path, args: argparse.Namespace, parts: dict[str, Any], step: int) -> None:
    """Write networks, optimizer and the number of steps done, whole or not at all."""
    states = {name: part.state_dict() for name, part in parts.items()}
    write_state(path, states | {"identity": _identity(args), "step": step})


def _restore(parts: dict[str, Any], state: dict[str, Any]) -> int:
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


def _identity(args: argparse.Namespace) -> dict[str, str]:
    return {k: str(v) for k, v in vars(args).items() if k not in ("work", "out")}

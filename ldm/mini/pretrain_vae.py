"""The autoencoder of the embedded miniature model, and what both stages of its pre-training share.

`train_vae` trains encoder and decoder by the squared error, whose best answer where a pixel cannot
be known is the
mean: speckle comes out smooth. `train_decoder` then trains the decoder alone, against a critic that
looks at patches: latents stay what they are, and texture comes back. Stable Diffusion's was trained
against such a critic too.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ldm.vae import AutoencoderKL, Posterior, VAEConfig

SIZE = 96  # image side, px
BATCH = 16
CRITIC = 0.5  # what the critic says weighs, beside the error
VAE = VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=8)


def to_input(images: Tensor) -> Tensor:
    """Grey bytes (B, H, W) -> (B, 3, H, W) in [-1, 1]."""
    return (images.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def draw_batch(count: int, size: int, seed: int, step: int) -> tuple[Tensor, torch.Generator]:
    """The indices of one batch and the generator for its noise, both functions of (seed, step)
    alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(count, (size,), generator=generator), generator


def learning_rate(step: int, steps: int, peak: float, warm_up: int = 100) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    return peak * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + np.cos(np.pi * step / steps))


def train_vae(vae: AutoencoderKL, images: Tensor, args: argparse.Namespace) -> None:
    """Minimise the squared error plus 1e-4 times the KL divergence per latent value."""
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    done = resume(args.work / "vae.safetensors", {"vae": vae}, {"optimizer": optimizer})
    progress = tqdm(
        range(done, args.vae_steps), initial=done, total=args.vae_steps, desc="VAE", unit="step"
    )
    for step in progress:
        index, generator = draw_batch(len(images), BATCH, args.seed + 1, step)
        x = to_input(images[index].to(args.device))
        noise = torch.randn(
            len(x), VAE.latent_channels, SIZE // 8, SIZE // 8, generator=generator
        ).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            posterior = vae.encode(x)
            decoded = vae.decode(posterior.sample(noise) * VAE.scaling_factor)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        error = F.mse_loss(decoded.float(), x)
        loss = error + 1e-4 * 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()

        optimizer.param_groups[0]["lr"] = learning_rate(step, args.vae_steps, args.vae_lr)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress.set_postfix(psnr=f"{-10 * np.log10(error.item() / 4):.2f} dB")
        if (step + 1) % args.save_every == 0 or step + 1 == args.vae_steps:
            save_state(
                args.work / "vae.safetensors", {"vae": vae}, {"optimizer": optimizer}, step + 1
            )
            pairs = torch.stack([x[:8], decoded[:8].float()], 1).flatten(0, 1)
            save_sheet(pairs, args.work / f"vae_{step + 1:06}.png", columns=8)


class PatchCritic(nn.Module):
    """Says of each patch of an image whether it is real (Isola et al. 2017, PatchGAN): (B, 3, H, W)
    -> (B, 1, h, w)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128)):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, o in pairwise(widths):
            layers += [nn.Conv2d(i, o, 4, 2, 1), nn.GroupNorm(8, o), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def train_decoder(
    vae: AutoencoderKL, images: Tensor, posterior: Posterior, args: argparse.Namespace
) -> None:
    """Train the decoder alone against a critic: L1 + CRITIC w (-critic), w the ratio of the two
    gradients at the last layer (Esser et al. 2021, arXiv 2012.09841, eq. 7); the critic by the
    hinge loss.

    images: (N, H, W) grey bytes; posterior: of them, unscaled
    """
    decoder = nn.ModuleList([vae.decoder, vae.post_quant_conv])
    critic = PatchCritic().to(args.device, memory_format=torch.channels_last)
    networks = {"decoder": decoder, "critic": critic}
    rates = {"decoder": args.decoder_lr, "critic": 2 * args.decoder_lr}
    optimizers = {
        f"{name}_optimizer": torch.optim.AdamW(
            net.parameters(), rates[name], (0.5, 0.99), weight_decay=0.0
        )
        for name, net in networks.items()
    }
    done = resume(args.work / "decoder.safetensors", networks, optimizers)
    progress = tqdm(
        range(done, args.decoder_steps),
        initial=done,
        total=args.decoder_steps,
        desc="decoder",
        unit="step",
    )
    last = vae.decoder.conv_out.weight
    for step in progress:
        index, generator = draw_batch(len(images), BATCH // 2, args.seed + 3, step)
        x = to_input(images[index].to(args.device)).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(len(x), *posterior.mean.shape[1:], generator=generator)
        z = Posterior(posterior.mean[index], posterior.logvar[index]).sample(noise).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            decoded = vae.decode(z * vae.config.scaling_factor)
            realism = -critic(decoded).float().mean()
        error = F.l1_loss(decoded.float(), x)

        # the critic's say at the last layer is CRITIC times the error's, once it has learned
        # something
        of_error, of_critic = (
            torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
            for loss in (error, realism)
        )
        weight = CRITIC * of_error / (of_critic + 1e-6) * min(1.0, step / 100)
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        (error + weight.detach() * realism).backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizers["decoder_optimizer"].step()

        with torch.autocast(args.device, torch.bfloat16):
            real, drawn = critic(x).float(), critic(decoded.detach()).float()
        optimizers["critic_optimizer"].zero_grad(set_to_none=True)
        (F.relu(1 - real).mean() + F.relu(1 + drawn).mean()).backward()
        optimizers["critic_optimizer"].step()

        progress.set_postfix(
            error=f"{error.item():.4f}",
            real=f"{real.mean().item():.2f}",
            drawn=f"{drawn.mean().item():.2f}",
        )
        if (step + 1) % args.save_every == 0 or step + 1 == args.decoder_steps:
            save_state(args.work / "decoder.safetensors", networks, optimizers, step + 1)
            pairs = torch.stack([x, decoded.float()], 1).flatten(0, 1)
            save_sheet(pairs, args.work / f"decoder_{step + 1:06}.png", columns=8)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor, device: str) -> Posterior:
    """The posteriors of all images; a fresh sample of them is drawn at every training step."""
    parts = []
    for batch in tqdm(images.split(64), desc="latents", unit="batch"):
        with torch.autocast(device, torch.bfloat16):
            p = vae.encode(to_input(batch.to(device)).contiguous(memory_format=torch.channels_last))
        parts.append(Posterior(p.mean.float(), p.logvar.float()))
    return Posterior(
        torch.cat([p.mean.cpu() for p in parts]), torch.cat([p.logvar.cpu() for p in parts])
    )


def save_sheet(images: Tensor, path: Path, columns: int) -> None:
    """Images (N, 3, H, W) in [-1, 1] as one PNG."""
    grid = (images.detach().cpu().clamp(-1, 1) + 1) * 127.5
    rows = [torch.cat(list(row), dim=-1) for row in grid.split(columns) if len(row) == columns]
    Image.fromarray(torch.cat(rows, dim=-2).round().byte().permute(1, 2, 0).numpy()).save(path)


def save_state(
    path: Path,
    networks: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    step: int,
) -> None:
    """One safetensors file with the networks, AdamW's moments and the step; replaced in one go."""
    tensors = {
        f"{name}.{key}": value
        for name, net in networks.items()
        for key, value in net.state_dict().items()
    }
    for name, optimizer in optimizers.items():
        for n, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{n}.{key}": value for key, value in moments.items()}
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        f"{path}.tmp",
        {"step": str(step)},
    )
    Path(f"{path}.tmp").replace(path)


def resume(
    path: Path, networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> int:
    """Load what `save_state` wrote, if anything; returns the number of steps done."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    for name, net in networks.items():
        net.load_state_dict(
            {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")}
        )
    for name, optimizer in optimizers.items():
        state, parameters = (
            optimizer.state_dict(),
            [p for group in optimizer.param_groups for p in group["params"]],
        )
        for key, value in tensors.items():
            if key.startswith(name + "."):
                _, n, moment = key.split(".")
                # a fused optimizer reads moments in their weight's memory layout, whatever theirs
                # is
                if value.dim():
                    value = torch.empty_like(parameters[int(n)]).copy_(value)
                state["state"].setdefault(int(n), {})[moment] = value
        optimizer.load_state_dict(state)
    return step

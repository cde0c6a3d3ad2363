"""Pre-train the embedded miniature Stable Diffusion on generic scenes: autoencoder first, then
U-Net and text encoder.

    python -m ldm.mini.pretrain --work runs/mini --out runs/mini/model  # all from fresh weights
    python -m ldm.mini.pretrain --work runs/mini --out runs/mini/model \\
        --start ldm/mini --vae-steps 0  # on from the shipped weights

Hours on two CPU cores. Every batch is drawn from (seed, step), so a run that was stopped goes on
from its last checkpoint in --work as if it had not been. Sizes and vocabulary are the shipped
model's. No real image is used: nothing can leak into a test, no licence attaches.
"""

import argparse
import copy
import math
import multiprocessing
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from harness.resume import rate_share, read_state, write_state
from ldm import MINI
from ldm.checkpoints import load, save_folder
from ldm.mini.scenes import scene
from ldm.text import TextConfig, TextEncoder, tokenize
from ldm.unet import UNet
from ldm.vae import AutoencoderKL, Posterior
from planes import PROMPTS
from samplers.schedule import NoiseSchedule

SIZE = 96  # image side, px
VAE_BATCH = 16
SAVE_EVERY = 500  # steps between checkpoints
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# one token each, as in CLIP's
PLAIN_WORDS = sorted({word for prompt in PROMPTS.values() for word in prompt.split()})
BATCH = 32
PEAK_RATE = 5e-4
SNR_RANGE = 1.0, 5.0  # what the weight of a time is confined to


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/mini"), help="scenes and checkpoints")
    add("--out", type=Path, required=True, help="the folder to write when done")
    add("--start", type=Path, help="a folder of this model to go on from")
    add("--scenes", type=int, default=32_000)
    add("--vae-steps", type=int, default=1_800, help="0 leaves the autoencoder as it is")
    add("--unet-steps", type=int, default=12_000)
    add("--vae-lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def make_scenes(work: Path, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """The training set, drawn once and kept: images (N, 96, 96) uint8 and their captions."""
    path = work / f"scenes_{count}_{seed}.pt"
    if not path.exists():
        with multiprocessing.Pool() as pool:
            rngs = [np.random.default_rng((seed, n)) for n in range(count)]
            pairs = pool.map(partial(scene, size=SIZE), rngs, chunksize=64)
        images, captions = zip(*pairs)
        state = {"images": torch.from_numpy(np.stack(images)), "captions": list(captions)}
        write_state(path, state)
    scenes = torch.load(path, weights_only=True)
    return scenes["images"], scenes["captions"]


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


def steps_left(name: str, steps: int, parts: dict[str, Any], args) -> Iterator[int]:
    """Yields the steps that are still to be done, from the last checkpoint of `parts` (networks,
    optimizer) on, and writes checkpoints."""
    path, done = args.work / f"{name}.pt", 0
    identity = {key: str(value) for key, value in vars(args).items() if key not in ("work", "out")}
    if path.exists():
        state = read_state(path, identity, "ldm.mini.pretrain", SystemExit, dict, DEVICE)
        for key, part in parts.items():
            part.load_state_dict(state[key])
        done = state["step"]
    for step in tqdm(range(done, steps), initial=done, total=steps, desc=name):
        yield step
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            states = {key: part.state_dict() for key, part in parts.items()}
            write_state(path, states | {"identity": identity, "step": step + 1})


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One step of the optimizer, at the learning rate `rate`."""
    group = optimizer.param_groups[0]
    group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def train_vae(vae: AutoencoderKL, images: Tensor, args) -> None:
    """Minimise the squared error plus 1e-4 times the KL divergence per latent value.

    Whose best answer where a pixel cannot be known is the mean: speckle comes out smooth.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    for step in steps_left("vae", args.vae_steps, {"vae": vae, "optimizer": optimizer}, args):
        index, generator = draw_batch(len(images), VAE_BATCH, args.seed + 1, step)
        x = to_input(images[index].to(DEVICE))
        shape = (len(x), vae.config.latent_channels, SIZE // 8, SIZE // 8)
        noise = torch.randn(shape, generator=generator).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            posterior = vae.encode(x)
            decoded = vae.decode(posterior.sample(noise) * vae.config.scaling_factor)
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


def make_text_encoder(config: TextConfig) -> TextEncoder:
    """A CLIP text tower whose embeddings start wide, so that words never seen still differ."""
    encoder = TextEncoder(config)
    nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight, std=0.1)
    return encoder


@torch.no_grad()
def widen_unseen(encoder: TextEncoder, tokenizer: CLIPTokenizer, captions: list[str]) -> None:
    """Make the embeddings of PLAIN_WORDS that hardly a caption holds as long as what the encoder
    adds to them.

    Hardly: fewer than one in a hundred. CLIP has read every word and tells prompts apart. Ours
    knows its captions alone: its layers add nearly the same to every word that they never read,
    many times a fresh embedding's length, and behind the last layer norm all prompts of planes
    would look alike (differences of 2 % in place of 20 %), which no LoRA can learn from quickly.
    """
    counts = Counter(word for caption in captions for word in set(re.findall(r"\w+", caption)))
    vocabulary = tokenizer.get_vocab()
    rare = [word for word in PLAIN_WORDS if counts[word] < 0.01 * len(captions)]
    unseen = [vocabulary[word + "</w>"] for word in rare]
    table = encoder.text_model.embeddings.token_embedding
    weight = table.weight
    ids = tokenize(tokenizer, list(PROMPTS.values()), encoder.config).to(weight.device)
    words = torch.isin(ids, torch.tensor(unseen, device=weight.device))
    for _ in range(3):  # what is added depends on it a little
        states = encoder.text_model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        common = (states - table(ids))[words].mean(0).norm()
        weight[unseen] *= common / weight[unseen].norm(dim=1, keepdim=True)


def train_unet(
    networks: dict[str, nn.Module],
    posterior: Posterior,
    ids: Tensor,
    empty: Tensor,
    args,
) -> None:
    """Minimise w_t |eps - eps_theta(x_t, t, caption)|^2 (Ho et al. 2020, eq. 14); one caption in
    ten is left out.

    w_t = clamp(SNR_t, 1, 5) / SNR_t: an error of x_0 weighs as much as the signal outweighs the
    noise, but never more than 5 (min-SNR, Hang et al. 2023, arXiv 2303.09556, section 3.4), or
    hours go into the last grain, and never less than 1 (truncated SNR, Salimans & Ho 2022, arXiv
    2202.00512, section 4), or nothing is learned where the brightness and the whole of an image are
    decided, and the words with them.
    posterior: (N, 4, 12, 12) of the scenes; ids: (N, S) of their captions; empty: (S,) of the empty
        prompt
    networks: "unet", "text" and, under "ema", a module list of both whose weights are the running
        mean of theirs
    """
    unet, text = networks["unet"], networks["text"]
    values = [*unet.parameters(), *text.parameters()]
    means = [*networks["ema"].parameters()]
    schedule = NoiseSchedule()
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    weights = (snr.clamp(*SNR_RANGE) / snr).float().to(DEVICE)
    optimizer = torch.optim.AdamW(values, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    for step in steps_left("unet", args.unet_steps, networks | {"optimizer": optimizer}, args):
        index, generator = draw_batch(len(ids), BATCH, args.seed + 2, step)
        shape = (len(index), *posterior.mean.shape[1:])
        noise, wobble = torch.randn(2, *shape, generator=generator).unbind()
        t = torch.randint(1000, shape[:1], generator=generator)
        kept = torch.rand(shape[:1], generator=generator) > 0.1
        words = torch.where(kept[:, None], ids[index], empty)
        latents = Posterior(posterior.mean[index], posterior.logvar[index]).sample(wobble)
        noisy = schedule.add_noise(latents, noise, t)
        noisy, t, words, noise = (v.to(DEVICE) for v in (noisy, t, words, noise))
        # there it takes twice as long
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE != "cpu"):
            eps = unet(noisy.contiguous(memory_format=torch.channels_last), t, text(words))
        loss = (weights[t] * (eps.float() - noise).square().mean(dim=(1, 2, 3))).mean()
        descend(loss, optimizer, learning_rate(step, args.unet_steps, PEAK_RATE))
        with torch.no_grad():
            torch._foreach_lerp_(means, values, 1 - min(0.999, (1 + step) / (10 + step)))


def main(args):
    if args.out.exists():
        raise SystemExit(f"{args.out}: exists already; remove it or give another --out")
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    images, captions = make_scenes(args.work, args.scenes, args.seed)

    # what is gone on from, or fresh weights in its place
    model = load(args.start or MINI)
    if not args.start:
        model.vae, model.unet = AutoencoderKL(model.vae.config), UNet(model.unet.config)
        model.text_encoder = make_text_encoder(model.text_encoder.config)

    # the autoencoder, then the scale that gives its latents unit variance
    vae = model.vae.requires_grad_(True).to(DEVICE, memory_format=torch.channels_last)
    if args.vae_steps:
        train_vae(vae, images, args)
    posterior, scale = encode_all(vae.eval(), images), vae.config.scaling_factor
    if not args.start:
        scale = 1 / posterior.sample(torch.randn(posterior.mean.shape)).std().item()
        vae.config = replace(vae.config, scaling_factor=scale)
    scaled = Posterior(posterior.mean * scale, posterior.logvar + 2 * math.log(scale))

    # the U-Net and the text encoder together
    networks = {
        "unet": model.unet.requires_grad_(True).to(DEVICE, memory_format=torch.channels_last),
        "text": model.text_encoder.requires_grad_(True).to(DEVICE),
    }
    networks["ema"] = copy.deepcopy(nn.ModuleList(networks.values())).eval().requires_grad_(False)
    model.unet, model.text_encoder = networks["ema"]
    text = partial(tokenize, model.tokenizer, config=model.text_encoder.config)
    train_unet(networks, scaled, text(captions), text([""])[0], args)
    widen_unseen(model.text_encoder, model.tokenizer, captions)
    save_folder(model, args.out, torch.float16)


if __name__ == "__main__":
    main(parse_args())

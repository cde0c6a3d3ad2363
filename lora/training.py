"""Around the training loop: what a step sees, the optimizer, and a checkpoint that the same run
goes on from."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.resume import read_state, write_state
from lora.layer import LoRAError

PRESETS: dict[str, dict[str, object]] = {
    "paper": {},
    "kohya": {
        "target": "transformer",
        "rank": 128,
        "init": "kaiming",
        "train_text_encoder": True,
        "lr": 1e-4,
        "text_encoder_lr": 5e-5,
        "weight_decay": 0.01,
        "optimizer": "adamw8bit",
        "clip_skip": 2,
        "bucket": True,
        "batch_size": 1,
        "accumulate": 1,
        "epochs": 1,
        "seed": 1234,
    },
}
"""Defaults of train_lora.py by --preset: the script's own are the paper's; "kohya" is the
configuration of kohya's script that the authors published, complete even where it equals ours. It
names no repeats."""


def batches_of_step(
    step: int, repeats: Tensor, buckets: Tensor, batch_size: int, accumulate: int, seed: int
) -> list[Tensor]:
    """Indices of the images of an optimizer step, in `accumulate` batches (fewer at an epoch's
    end): a function of (seed, step) alone.

    repeats: (N,) integers, how often an epoch sees each image
    buckets: (N,) integers, the same for images of the same shape; a batch is of one bucket

    As kohya does it, an epoch's passes are shuffled, each bucket's are cut into batches, and where
    there are several buckets their batches are shuffled.
    """
    epoch, within = divmod(
        step, math.ceil(batches_per_epoch(repeats, buckets, batch_size) / accumulate)
    )
    # primes keep seeds and uses apart
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    # every image once, and again, ..
    passes = (torch.arange(int(repeats.max()))[:, None] < repeats).nonzero()[:, 1]
    batches = cut(passes[torch.randperm(len(passes), generator=generator)], buckets, batch_size)
    if len(buckets.unique()) > 1:
        batches = [batches[n] for n in torch.randperm(len(batches), generator=generator)]
    return batches[within * accumulate :][:accumulate]


def batches_per_epoch(repeats: Tensor, buckets: Tensor, batch_size: int) -> int:
    """The sum over buckets of their image passes divided by the batch size, each rounded up."""
    return sum(
        math.ceil(int(repeats[buckets == bucket].sum()) / batch_size) for bucket in buckets.unique()
    )


def describe_passes(
    repeats: Tensor, epochs: int, batch_size: int, accumulate: int, steps: int
) -> str:
    """How image passes make optimizer steps, in a line."""
    each = " or ".join(map(str, repeats.unique().tolist()))
    return (
        f"{len(repeats)} images x {each} repeats x {epochs} epochs ="
        f" {epochs * int(repeats.sum()):,} image passes; batch {batch_size} x {accumulate}"
        f" accumulated -> {steps:,} optimizer steps"
    )


def describe_buckets(shapes: Sequence[torch.Size], buckets: Tensor, downsampling: int) -> str:
    """A line for each bucket: how many images of which size in px."""
    sides = [(width * downsampling, height * downsampling) for _, height, width in shapes]
    counts = torch.bincount(buckets).tolist()
    return "\n".join(
        f"{n} images in the bucket of {width} x {height} px"
        for n, (width, height) in zip(counts, sides)
    )


def cut(images: Tensor, buckets: Tensor, batch_size: int) -> list[Tensor]:
    """Indices (M,) of images cut into batches of one bucket each, in their order within a
    bucket."""
    bucket_of = buckets[images]
    return [
        batch
        for bucket in bucket_of.unique()
        for batch in images[bucket_of == bucket].split(batch_size)
    ]


def draws_of_step(
    step: int,
    batches: list[Tensor],
    seed: int,
    batch_size: int,
    num_train_timesteps: int,
    *,
    latents: Sequence[Tensor],
    buckets: Tensor,
    held: Tensor,
    mine: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
    """(indices (B,), noise (B, 4, H, W), t (B,), is it `held`) for each batch of a step: a function
    of (seed, step).

    batches: those of `batches_of_step`
    num_train_timesteps: T, of which t is drawn
    latents: (4, H, W) of every image, by index; buckets: the number of each one's shape
    held: indices of the base model's own images; as many of them are drawn as `batches` hold, so
        that both losses weigh alike (DreamBooth, Ruiz et al. 2023, eq. 2). None are where it is
        empty
    mine: which images of each batch are this process's, where several share a step
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + 500_009 + step)
    count = sum(len(batch) for batch in batches)
    for is_held in (False, True)[: 2 if len(held) else 1]:
        if is_held:
            batches = cut(
                held[torch.randint(len(held), (count,), generator=generator)], buckets, batch_size
            )
        noises = [
            torch.stack([torch.randn(latents[n].shape, generator=generator) for n in b])
            for b in batches
        ]
        times = torch.randint(num_train_timesteps, (count,), generator=generator).split(
            [len(b) for b in batches]
        )
        for batch, noise, t in zip(batches, noises, times):
            if len(batch[mine]):
                yield batch[mine], noise[mine], t[mine], is_held


def loss_weights(alphas_cumprod: Tensor, prediction_type: str, debiased: bool) -> Tensor:
    """(T,) what the squared error at each time counts: 1 (Ho et al. 2020, eq. 14).

    alphas_cumprod: (T,), of which SNR = alphas_cumprod / (1 - alphas_cumprod)
    debiased: instead 1 / sqrt(SNR) with an SNR of at most 1000 (Yu et al. 2023, arXiv 2310.08442),
        or 1 / (SNR + 1) where the network predicts v, as kohya's --debiased_estimation_loss has it

    Unweighted, nearly all of the loss lies where little noise is to be taken off: in the grain, not
    in the anatomy.
    """
    if not debiased:
        return torch.ones(len(alphas_cumprod))
    snr = (alphas_cumprod / (1 - alphas_cumprod)).clamp(max=1000)
    return (snr.rsqrt() if prediction_type == "epsilon" else 1 / (snr + 1)).float()


def make_optimizer(
    groups: list[dict], weight_decay: float, eight_bit: bool
) -> tuple[torch.optim.Optimizer, str]:
    """AdamW (Loshchilov & Hutter 2019) over groups of {"params", "lr"}: 8-bit where that runs, else
    torch's.

    Also returns why it is not 8-bit though `eight_bit` asked for it; "" where there is nothing to
    say.
    """
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
    reason = ""
    if eight_bit:
        reason = "no CUDA device"
        if groups[0]["params"][0].is_cuda:
            try:
                from bitsandbytes.optim import AdamW8bit

                return AdamW8bit(groups, **settings), ""
            except (ImportError, OSError, RuntimeError) as error:
                reason = f"bitsandbytes does not load: {str(error).splitlines()[0]}"
    # one kernel, which heeds GradScaler's verdict without asking for it
    fused = groups[0]["params"][0].is_cuda
    return torch.optim.AdamW(groups, **settings, fused=fused), reason


def run_identity(settings: Mapping[str, Any]) -> dict[str, str]:
    """What a run that goes on must have as it was, of the arguments of train_lora.py and the `size`
    in px."""
    same = [
        "rank",
        "alpha",
        "target",
        "init",
        "lr",
        "weight_decay",
        "clip_skip",
        "size",
        "bucket",
        "resize",
    ]
    same += ["repeats", "batch_size", "accumulate", "seed"]
    for flag, more in {
        "train_text_encoder": ["text_encoder_lr"],
        "learn_token": ["init_word", "token_lr"],
        "rare_token": [],
        "style_words": [],
        "prior": ["prior_weight"],
    }.items():
        same += [flag, *more] if settings[flag] else []
    same += ["debiased_estimation_loss"] * settings["debiased_estimation_loss"]
    # whose rates the length decides
    same += ["schedule", "epochs"] if settings["schedule"] != "constant" else []
    return {key: str(settings[key]) for key in same}


def save_checkpoint(
    path: Path,
    identity: Mapping[str, str],
    step: int,
    rows: list[tuple],
    lora: list[Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Write all that a run goes on from; replaced in one go, so that a run killed meanwhile keeps
    the one before.

    identity: the settings that a run which goes on must share
    step, rows: how many steps are done, and the table of their losses
    lora: what is trained
    """
    state = {
        "identity": dict(identity),
        "step": step,
        "rows": rows,
        "lora": [tensor.detach().cpu() for tensor in lora],
    }
    state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    write_state(path, state)


def load_checkpoint(
    path: Path,
    identity: Mapping[str, str],
    lora: list[Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[int, list[tuple]]:
    """Put what save_checkpoint wrote into its places; returns step and rows.

    Raises LoRAError, which names them, where settings of `identity` were others, or the file is
    damaged.
    """

    def restore(state: dict[str, Any]) -> tuple[int, list[tuple]]:
        for tensor, saved in zip(lora, state["lora"], strict=True):
            tensor.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        return int(state["step"]), [tuple(row) for row in state["rows"]]

    return read_state(path, identity, "train_lora.py", LoRAError, restore, lora[0].device)

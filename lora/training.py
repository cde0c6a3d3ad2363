"""Around the training loop: what a step sees, what errors count, held-out loss, the optimizer."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000  # T, of which t is drawn
HELD_OUT_DRAWS = 8  # of noise and time for each held-out image, a batch


@dataclass(frozen=True)
class Batch:
    """latents: (B, 4, H, W) x0; captions: B texts; noise: (B, 4, H, W) eps; t: (B,) integers.

    of: how many images the whole step has
    """

    latents: Tensor
    captions: list[str]
    noise: Tensor
    t: Tensor
    of: int


class Draws:
    """What each optimizer step sees: images, noise and times, a function of (seed, step) alone, so
    that a run that goes on sees what it would have seen.

    latents: (4, H, W) of each image, on the training's device; a batch holds images of one shape
    captions: one of each; repeats: how often an epoch shows each
    accumulate: batches per optimizer step
    share: which images of each batch are this process's, where several share a step

    As kohya does it, an epoch's passes are shuffled, cut into batches shape by shape, and where
    there are several shapes their batches are shuffled.
    """

    def __init__(
        self,
        latents: Sequence[Tensor],
        captions: Sequence[str],
        repeats: Sequence[int],
        batch_size: int,
        accumulate: int,
        seed: int,
        share: slice = slice(None),
    ):
        self.latents, self.captions, self.repeats = latents, captions, torch.tensor(repeats)
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self.share = share
        self.shapes = sorted({latent.shape for latent in latents})
        self.bucket = torch.tensor([self.shapes.index(latent.shape) for latent in latents])
        self.shuffled = -1, []  # an epoch and its batches

    @property
    def batches_per_epoch(self) -> int:
        """The sum over shapes of their image passes divided by the batch size, each rounded up."""
        passes = [self.repeats[self.bucket == n].sum().item() for n in range(len(self.shapes))]
        return sum(math.ceil(count / self.batch_size) for count in passes)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps, the last of which may have fewer batches."""
        return math.ceil(self.batches_per_epoch / self.accumulate)

    def indices(self, step: int) -> list[Tensor]:
        """The images (B,) of each batch of a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self.shuffled[0] != epoch:
            self.shuffled = epoch, self._shuffle(epoch)
        return self.shuffled[1][within * self.accumulate :][: self.accumulate]

    def _shuffle(self, epoch: int) -> list[Tensor]:
        # a prime, so that no epoch of one seed is an epoch of the next
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        # every image once, and again, ..
        passes = (torch.arange(int(self.repeats.max()))[:, None] < self.repeats).nonzero()[:, 1]
        passes = passes[torch.randperm(len(passes), generator=generator)]
        batches = []
        for n in range(len(self.shapes)):
            batches += passes[self.bucket[passes] == n].split(self.batch_size)
        if len(self.shapes) > 1:
            order = torch.randperm(len(batches), generator=generator)
            batches = [batches[n] for n in order]
        return batches

    def __call__(self, step: int) -> Iterator[Batch]:
        """The batches of a step, each the share of this process, none where that is empty."""
        batches, shape = self.indices(step), [latent.shape for latent in self.latents]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 500_009 + step)
        noises = [
            torch.stack([torch.randn(shape[n], generator=generator) for n in batch])
            for batch in batches
        ]
        sizes = [len(batch) for batch in batches]
        t = torch.randint(NUM_TRAIN_TIMESTEPS, (sum(sizes),), generator=generator)
        for batch, noise, times in zip(batches, noises, t.split(sizes)):
            mine, device = batch[self.share].tolist(), self.latents[0].device
            if mine:
                yield Batch(
                    torch.stack([self.latents[n] for n in mine]),
                    [self.captions[n] for n in mine],
                    noise[self.share].to(device),
                    times[self.share].to(device),
                    sum(sizes),
                )


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


@torch.no_grad()
def held_out_loss(
    predict: Callable[[Tensor, Tensor, list[str]], Tensor],
    latents: Sequence[Tensor],
    captions: Sequence[str],
    schedule: Any,
    prediction_type: str,
    seed: int,
) -> float:
    """Is it learning, or learning by heart? E |eps - eps_theta(x_t, t, c)|^2 (Ho et al. 2020, eq.
    14) over images that are not trained on, unweighted, whatever the training's loss is.

    predict: (x_t (B, 4, H, W), t (B,), captions) -> (B, 4, H, W)
    latents: (4, H, W) of each image; captions: one of each
    schedule: with `add_noise`, `target` and a length, as samplers.NoiseSchedule
    seed: of noise and times, one in each eighth of the schedule: the same at every look, so that
        losses can be compared

    No generator but its own is touched, so that training goes on as if nobody had looked.
    """
    errors = []
    for n, (x0, caption) in enumerate(zip(latents, captions, strict=True)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + 700_001 + n)
        x0, eighths = x0.expand(HELD_OUT_DRAWS, *x0.shape), torch.arange(HELD_OUT_DRAWS)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        within = torch.rand(HELD_OUT_DRAWS, generator=generator)
        t = ((eighths + within) * len(schedule) / HELD_OUT_DRAWS).long().to(x0.device)
        prediction = predict(schedule.add_noise(x0, noise, t), t, [caption] * HELD_OUT_DRAWS)
        target = schedule.target(x0, noise, t, prediction_type)
        errors.append(F.mse_loss(prediction.float(), target).item())
    return sum(errors) / len(errors)


def make_optimizer(
    groups: list[dict], weight_decay: float, eight_bit: bool
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over groups of {"params", "lr"}: 8-bit where that runs, else
    torch's, with a warning that says why."""
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
    on_gpu, reason = groups[0]["params"][0].is_cuda, "no CUDA device"
    if eight_bit and on_gpu:
        try:
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, **settings)
        except (ImportError, OSError, RuntimeError) as error:
            reason = f"bitsandbytes does not load: {str(error).splitlines()[0]}"
    if eight_bit:
        warnings.warn(f"torch's AdamW in place of 8-bit AdamW ({reason})", stacklevel=2)
    # fused: one kernel, which heeds GradScaler's verdict without asking for it
    return torch.optim.AdamW(groups, **settings, fused=on_gpu)

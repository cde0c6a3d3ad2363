"""Is it learning, or learning by heart? The denoising loss of images that are not trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.losses import upload

DRAWS = 8  # of noise and time for each image, a batch


@dataclass(frozen=True)
class HeldOut:
    """E |eps - eps_theta(x_t, t, c)|^2 (Ho et al. 2020, eq. 14) over held-out images, each at DRAWS
    times, one in each part of the schedule; unweighted, whatever the training's loss is.

    latents: (4, H, W) of each image, on the training's device; captions: one of each
    schedule: with `add_noise`, `velocity` and a length, as samplers.NoiseSchedule
    seed: of noise and times, which are the same at every look, so that losses can be compared
    every, steps: looked at after each `every` steps, and after the last of `steps`
    """

    latents: Sequence[Tensor]
    captions: Sequence[str]
    schedule: Any
    prediction_type: str
    seed: int
    every: int
    steps: int

    @torch.no_grad()
    def look(
        self, step: int, predict: Callable[[Tensor, Tensor, list[str]], Tensor]
    ) -> Tensor | None:
        """The loss after step number `step`, a single number on the latents' device; None where
        none is due.

        predict: (noisy (B, 4, H, W) float32, t (B,), captions) -> (B, 4, H, W)
        No generator but its own is touched, so that training goes on as if nobody had looked.
        """
        if not self.latents or (step % self.every and step != self.steps):
            return None
        errors = []
        for n, (x0, caption) in enumerate(zip(self.latents, self.captions, strict=True)):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 700_001 + n)
            noise = torch.randn(DRAWS, *x0.shape, generator=generator)
            t = (
                (torch.arange(DRAWS) + torch.rand(DRAWS, generator=generator))
                * len(self.schedule)
                / DRAWS
            ).long()
            noise, t, x0 = (
                upload(noise, x0.device),
                upload(t, x0.device),
                x0.expand(DRAWS, *x0.shape),
            )
            target = (
                noise if self.prediction_type == "epsilon" else self.schedule.velocity(x0, noise, t)
            )
            prediction = predict(self.schedule.add_noise(x0, noise, t), t, [caption] * DRAWS)
            errors.append(F.mse_loss(prediction.float(), target))
        return torch.stack(errors).mean()

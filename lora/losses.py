"""What a training loop says of its steps, without making a GPU and its host wait for each other.

A number that is read off a GPU holds the host until all that was launched before is done; the GPU then stands still
until the host has launched more. So numbers are sent over as they come up, and read a step later.
"""

import math
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from lora.layer import LoRAError


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on the device; from the CPU to a GPU without either waiting for the other."""
    if tensor.is_cuda or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Losses:
    """The table of losses, a row of texts for each step.

    rows: of the steps that were done before
    patience: how many steps in a row may have a loss or gradient that is not finite: GradScaler skips single ones by
        design, as it looks for its scale; without it a single one is a run gone wrong
    checkpoint: of the run, which the error speaks of
    """

    def __init__(self, rows: list[tuple], patience: int, checkpoint: Path):
        self.rows, self.patience, self.checkpoint = rows, patience, checkpoint
        self.latest, self.asked, self.bad = math.nan, 0.0, 0
        self.coming: deque[tuple] = deque()

    def add(self, step: int, images: int, rate: float, loss: Tensor, norm: Tensor, asked: Tensor) -> None:
        """Of step number `step`: its loss, the norm of its gradient, and how many processes were asked to stop, each a
        single number on the training's device. Raises LoRAError as `read`."""
        numbers = torch.stack([number.detach().double() for number in (loss, norm, asked)])
        come = None
        if numbers.is_cuda:
            numbers, come = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            come.record()
        self.coming.append((step, images, rate, numbers, come))
        self.read(keep=0 if come is None else 1)

    def read(self, keep: int = 0) -> None:
        """Wait for all steps but the last `keep`. Raises LoRAError where too many in a row were not finite."""
        while len(self.coming) > keep:
            step, images, rate, numbers, come = self.coming.popleft()
            if come is not None:
                come.synchronize()
            self.latest, norm, self.asked = numbers.tolist()
            self.bad = 0 if math.isfinite(self.latest) and math.isfinite(norm) else self.bad + 1
            if self.bad > self.patience:
                kept = f"{self.checkpoint} holds the last good state: " * self.checkpoint.exists()
                advice = f"{kept}try a lower --lr, or --dtype bf16 or fp32"
                raise LoRAError(f"step {step}: the loss or its gradient is not finite; {advice}")
            self.rows.append((step, images, f"{self.latest:.6f}", f"{norm:.6f}", rate))

    def text(self) -> str:
        """The table as CSV."""
        lines = ["step,images,loss,grad_norm,lr", *(",".join(map(str, row)) for row in self.rows)]
        return "\n".join(lines) + "\n"

"""What a training loop says of its steps, without making a GPU and its host wait for each other.

A number that is read off a GPU holds the host until all that was launched before is done; the GPU
then stands still until the host has launched more. So numbers are sent over as they come up, and
read a step later.
"""

import itertools
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


def nothing(device: torch.device | str) -> Tensor:
    """A zero to sum losses in: float64, or float32 on Apple's GPUs, which have no other."""
    kind = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return torch.zeros((), dtype=kind, device=device)


class Losses:
    """The table of losses, a row of texts for each step; with a column more where some are
    validated.

    rows: of the steps that were done before
    patience: how many steps in a row may have a loss or gradient that is not finite: GradScaler
        skips single ones by design, as it looks for its scale; without it a single one is a run
        gone wrong
    checkpoint: of the run, which the error speaks of
    validated: is the loss of held-out images taken at some steps?
    """

    def __init__(self, rows: list[tuple], patience: int, checkpoint: Path, validated: bool = False):
        self.rows, self.patience, self.checkpoint, self.validated = (
            rows,
            patience,
            checkpoint,
            validated,
        )
        self.said: dict[str, str] = {}  # for the progress bar
        self.latest, self.asked, self.bad = math.nan, 0.0, 0
        self.coming: deque[tuple] = deque()

    def add(
        self,
        step: int,
        images: int,
        rate: float,
        loss: Tensor,
        norm: Tensor,
        asked: Tensor,
        held_out: Tensor | None = None,
    ) -> None:
        """Of step number `step`: its loss, the norm of its gradient, how many processes were asked
        to stop, and the loss of held-out images, if it was taken; each a single number on the
        training's device, the first a sum that began as `nothing`. Raises LoRAError as `read`."""
        looked, held_out = held_out is not None, loss if held_out is None else held_out
        numbers = torch.stack(
            [number.detach().to(loss.dtype) for number in (loss, norm, asked, held_out)]
        )
        come = None
        if numbers.is_cuda:
            numbers, come = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            come.record()
        self.coming.append((step, images, rate, looked, numbers, come))
        self.read(keep=0 if come is None else 1)

    def read(self, keep: int = 0) -> None:
        """Wait for all steps but the last `keep`. Raises LoRAError where too many in a row were not
        finite."""
        while len(self.coming) > keep:
            step, images, rate, looked, numbers, come = self.coming.popleft()
            if come is not None:
                come.synchronize()
            self.latest, norm, self.asked, held_out = numbers.tolist()
            self.bad = 0 if math.isfinite(self.latest) and math.isfinite(norm) else self.bad + 1
            if self.bad > self.patience:
                kept = f"{self.checkpoint} holds the last good state: " * self.checkpoint.exists()
                advice = f"{kept}try a lower --lr, or --dtype bf16 or fp32"
                raise LoRAError(f"step {step}: the loss or its gradient is not finite; {advice}")
            taken = f"{held_out:.6f}" if looked else ""
            self.rows.append(
                (step, images, f"{self.latest:.6f}", f"{norm:.6f}", rate, *[taken] * self.validated)
            )
            self.said["loss"] = f"{self.latest:.4f}"
            self.said |= {"held_out": taken} if taken else {}

    def text(self) -> str:
        """The table as CSV."""
        head = "step,images,loss,grad_norm,lr" + ",held_out" * self.validated
        return "\n".join([head, *(",".join(map(str, row)) for row in self.rows)]) + "\n"

    def curves(self, window: int = 50) -> dict[str, list[tuple[int, float]]]:
        """(step, loss) of the training, as running means over a window, and of the held-out
        images."""
        steps, losses = [row[0] for row in self.rows], [float(row[2]) for row in self.rows]
        sums = [0.0, *itertools.accumulate(losses)]
        means = [
            (step, (sums[n] - sums[max(n - window, 0)]) / min(n, window))
            for n, step in enumerate(steps, start=1)
        ]
        held_out = [(row[0], float(row[5])) for row in self.rows if self.validated and row[5]]
        return {f"training, mean of {min(window, len(steps))} steps": means, "held out": held_out}

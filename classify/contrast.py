"""Brightness, contrast and gamma varied at random: what plain augmentation does where sites differ in them."""

import numpy as np
import torch
from torch import Tensor

CONTRAST_GAMMA, CONTRAST_GAIN, CONTRAST_OFFSET = 0.7, (0.7, 1.4), 0.12
"""Ranges of `draw_contrast`: gamma from e^-0.7 to e^0.7, evenly in its logarithm; gain; offset to either side."""


def draw_contrast(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Random gamma, gain and offset of each image, (B, 3), a function of (seed, epoch, index) alone.

    indices: (B,) as `data.PlaneImages` gives them
    """
    rows = []
    for index in indices.tolist():
        rng = np.random.default_rng((seed, epoch, index, 1))  # 1: other numbers than `data.draw_augmentation`'s
        gamma = np.exp(rng.uniform(-CONTRAST_GAMMA, CONTRAST_GAMMA))
        rows.append((gamma, rng.uniform(*CONTRAST_GAIN), rng.uniform(-CONTRAST_OFFSET, CONTRAST_OFFSET)))
    return torch.tensor(rows, dtype=torch.float32)

"""Images for the classifiers: decoded and resized once, augmented anew in every epoch, scaled to an input range."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from classify import ClassifyError
from planes import PLANES
from planes.datasets import Record

# name -> (mean, std) over [0, 1] images; a grey image is three equal channels
INPUT_RANGES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "minus-one-one": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # the paper
    "zero-one": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # the authors' notebook
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # what ImageNet weights were trained on
}

# The paper's augmentation
MAX_ROTATION = 25.0  # degrees, to either side
HORIZONTAL_FLIP = 0.5
VERTICAL_FLIP = 0.1

MEMORY = 4 << 30  # bytes of decoded images that a run keeps: 16,384 grey images of 512 x 512


class PlaneImages(Dataset):
    """Records as (image, target, index): uint8 (3, size, size), class index, own index.

    `preload` keeps decoded images in memory; whatever it has not loaded is decoded at each access. Items carry no
    randomness: the index is what augmentation derives its own from.
    """

    def __init__(self, records: Sequence[Record], size: int):
        self.paths = [record.path for record in records]
        self.targets = [PLANES.index(record.plane) for record in records]
        self.size = size
        self.kept: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image = self.kept[index] if index < len(self.kept) else decode(self.paths[index], self.size)
        return image.expand(3, -1, -1), self.targets[index], index

    def preload(self, memory: int = MEMORY, threads: int = 1) -> Iterator[Tensor]:
        """Decode images in order until they fill `memory` bytes, yielding each; the rest stays on disk.

        A fixed budget rather than the machine's free memory, so that a run does not depend on its neighbours.
        """
        with ThreadPoolExecutor(max(threads, 1)) as pool:
            chunk = 64  # decoded at a time, so that no more than a chunk is ever decoded in vain
            for start in range(len(self.kept), len(self.paths), chunk):
                for image in pool.map(lambda path: decode(path, self.size), self.paths[start : start + chunk]):
                    memory -= image.numel()
                    if memory < 0:
                        return
                    self.kept.append(image)
                    yield image


def decode(path: Path, size: int) -> Tensor:
    """An image file as uint8 (1 or 3, size, size): one channel if it is stored grey. Aspect ratio is not kept.

    Raises ClassifyError for a file that is missing, broken, or has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ClassifyError(f"{path}: has more than 8 bits per channel ({image.mode}); convert it to 8 bits")
            grey = image.mode in {"1", "L", "LA"}
            pixels = np.array(image.convert("L" if grey else "RGB").resize((size, size), Image.Resampling.BILINEAR))
    except ClassifyError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ClassifyError(f"{path}: cannot be read as an image ({error})") from None
    return torch.from_numpy(pixels)[None] if grey else torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def batches(images: PlaneImages, batch_size: int, workers: int = 0, shuffle_seed: int | None = None) -> DataLoader:
    """Loader of (images (B, 3, H, W) uint8, targets (B,), indices (B,)), in order or reshuffled at every pass."""
    return DataLoader(
        images,
        batch_size,
        shuffle=shuffle_seed is not None,
        generator=torch.Generator().manual_seed(shuffle_seed or 0),
        num_workers=0 if len(images.kept) == len(images) else workers,
    )


def draw_augmentation(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Random rotation and flips as affine matrices, a function of (seed, epoch, index) alone.

    indices: (B,) positions in the data set
    Returns (B, 2, 3), from output to input coordinates as F.affine_grid reads them.
    """
    dice = np.stack([np.random.default_rng((seed, epoch, index)).random(3) for index in indices.tolist()])
    angle = np.deg2rad(MAX_ROTATION) * (2 * dice[:, 0] - 1)
    flip_x = np.where(dice[:, 1] < HORIZONTAL_FLIP, -1, 1)
    flip_y = np.where(dice[:, 2] < VERTICAL_FLIP, -1, 1)
    cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros_like(angle)
    rows = [[cos * flip_x, -sin * flip_y, zero], [sin * flip_x, cos * flip_y, zero]]
    return torch.from_numpy(np.array(rows)).permute(2, 0, 1).float()


def prepare(images: Tensor, input_range: str, affine: Tensor | None = None) -> Tensor:
    """Images as a network takes them: float, moved by the augmentation, scaled to the input range.

    images: (B, 3, H, W) uint8
    affine: (B, 2, 3) from `draw_augmentation`, or None; what it brings in from outside the image is black
    """
    x = images.float() / 255
    if affine is not None:
        grid = F.affine_grid(affine.to(x.device), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    mean, std = (torch.tensor(value, device=x.device)[:, None, None] for value in INPUT_RANGES[input_range])
    return (x - mean) / std


Augmentation = Callable[[Tensor], Tensor]
"""indices (B,) -> affine (B, 2, 3): `draw_augmentation` with its seed and epoch filled in."""

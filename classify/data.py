"""Images for the classifiers: decoded and resized once, augmented anew in every epoch, scaled to an
input range."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from planes import PLANES
from planes.datasets import Record
from planes.pictures import open_image

# name -> (mean, std) over [0, 1] images; a grey image is three equal channels
INPUT_RANGES = {
    "minus-one-one": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # the paper
    "zero-one": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # the authors' notebook
    # what ImageNet weights were trained on
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Recipe:
    """How images are prepared and augmented: the paper's words, or what the authors' published
    notebook does."""

    size: int  # square side, px; the aspect ratio is not kept
    input_range: str
    rotation: float  # degrees, to either side
    horizontal_flip: float  # probability
    vertical_flip: float
    # share of the area that a random crop keeps, then stretched to the whole
    crop: tuple[float, float] | None


RECIPES = {
    "paper": Recipe(
        512, "minus-one-one", rotation=25, horizontal_flip=0.5, vertical_flip=0.1, crop=None
    ),
    "notebook": Recipe(
        224, "zero-one", rotation=15, horizontal_flip=0.5, vertical_flip=0.0, crop=(0.08, 1.0)
    ),
}
# of a random crop, in units of the image's own aspect (Szegedy et al. 2015)
CROP_ASPECT = (3 / 4, 4 / 3)

MEMORY = 4 << 30  # bytes of decoded images that a run keeps: 16,384 grey images of 512 x 512


class PlaneImages(Dataset):
    """Records as (image, target, index): uint8 (1 or 3, size, size), class index, the index that
    was asked for.

    `preload` keeps decoded images in memory; whatever it has not loaded is decoded at each access.
    Items carry no randomness: the index is what augmentation derives its
    own from. It counts on beyond the last record, so that one record has many: record n of N is at
    n, N + n, 2 N + n, ..
    """

    def __init__(self, records: Sequence[Record], size: int, classes: Sequence[str] = PLANES):
        self.records = list(records)
        self.targets = [classes.index(record.plane) for record in records]
        self.size = size
        self.kept: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        n = index % len(self)
        image = self.kept[n] if n < len(self.kept) else decode(self.records[n], self.size)
        return image, self.targets[n], index

    def preload(self, memory: int = MEMORY, threads: int = 1) -> Iterator[Tensor]:
        """Decode images in order until they fill `memory` bytes, yielding each; the rest stays on
        disk.

        A fixed budget rather than the machine's free memory, so that a run does not depend on its
        neighbours.
        """
        with ThreadPoolExecutor(max(threads, 1)) as pool:
            for image in pool.map(decode, self.records, repeat(self.size)):
                memory -= image.numel()
                if memory < 0:
                    return
                self.kept.append(image)
                yield image


def decode(record: Record, size: int) -> Tensor:
    """A record's image as uint8 (1 or 3, size, size): one channel if it is stored grey. Aspect
    ratio is not kept.

    Raises ImageError as `planes.pictures.open_image`.
    """
    image = open_image(record.path, record.levels)
    pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.reshape(size, size, -1)).permute(2, 0, 1).contiguous()


class BalancedSampler(Sampler[int]):
    """Indices of PlaneImages, as many a pass as it has images, every class equally often (a
    remainder aside).

    Images of a class are drawn with replacement, a function of (seed, pass). One that is drawn
    again has another of its indices, and so is augmented anew: else a rare class would be seen in
    fewer forms than a common one.
    """

    def __init__(self, targets: Sequence[int], seed: int):
        self.targets, self.seed, self.passes = np.array(targets), seed, 0

    def __len__(self) -> int:
        return len(self.targets)

    def __iter__(self) -> Iterator[int]:
        rng, count = np.random.default_rng((self.seed, self.passes, 2)), len(self)  # 2: of its own
        self.passes += 1
        classes = rng.permutation(np.unique(self.targets))
        drawn = np.empty(count, dtype=np.int64)
        for n, target in enumerate(classes):
            places = drawn[n :: len(classes)]
            places[:] = rng.choice(np.flatnonzero(self.targets == target), len(places))
        return iter(rng.permutation(drawn + count * np.arange(count)).tolist())


def _batch(items: Sequence[tuple[Tensor, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Items of PlaneImages in one: images (B, C, H, W), grey where all of them are, targets and
    indices (B,) on the CPU."""
    images, targets, indices = zip(*items)
    channels = max(map(len, images))
    stacked = torch.stack([image.expand(channels, -1, -1) for image in images])
    return stacked, torch.tensor(targets), torch.tensor(indices)


def batches(
    images: PlaneImages,
    batch_size: int,
    workers: int = 0,
    shuffle_seed: int | None = None,
    balanced: bool = False,
) -> DataLoader:
    """Loader of (images (B, 1 or 3, H, W) uint8, targets (B,), indices (B,)), in order or
    reshuffled at every pass.

    balanced: as BalancedSampler draws them, from `shuffle_seed`
    """
    generator = torch.Generator().manual_seed(shuffle_seed or 0)
    return DataLoader(
        images,
        batch_size,
        shuffle=shuffle_seed is not None and not balanced,
        sampler=BalancedSampler(images.targets, shuffle_seed or 0) if balanced else None,
        generator=generator,
        collate_fn=_batch,
        # so that a GPU need not be waited for
        pin_memory=torch.cuda.is_available(),
        num_workers=0 if len(images.kept) == len(images) else workers,
    )


def draw_augmentation(recipe: Recipe, seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Random rotation, crop and flips as one affine matrix, a function of (seed, epoch, index)
    alone.

    indices: (B,) as PlaneImages gives them
    Returns (B, 2, 3), from output to input coordinates as F.affine_grid reads them: one
    interpolation does it all.
    """
    rngs = (np.random.default_rng((seed, epoch, index)) for index in indices.tolist())
    return torch.tensor(np.stack([_affine(recipe, rng) for rng in rngs]), dtype=torch.float32)


def _affine(recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """(2, 3): input = rotation (crop (flip (output))); coordinates run from -1 to 1 over the
    image."""
    turn, flip_x, flip_y = rng.random(3)
    angle = np.deg2rad(recipe.rotation) * (2 * turn - 1)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    flip = np.where([flip_x < recipe.horizontal_flip, flip_y < recipe.vertical_flip], -1, 1)
    scale, center = np.ones(2), np.zeros(2)
    if recipe.crop:
        scale = _crop_sides(recipe.crop, rng)
        center = (1 - scale) * rng.uniform(-1, 1, 2)
    return np.column_stack([rotation * (scale * flip), rotation @ center])


def _crop_sides(share: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Width and height of a random crop in units of the image's: an area from `share`, a
    logarithmic aspect ratio."""
    # an aspect that does not fit is drawn anew, as torchvision's RandomResizedCrop does
    for _ in range(10):
        area, aspect = rng.uniform(*share), np.exp(rng.uniform(*np.log(CROP_ASPECT)))
        sides = np.sqrt([area * aspect, area / aspect])
        if sides.max() <= 1:
            return sides
    return np.ones(2)


CONTRAST = (-0.7, 0.7, -0.12), (0.7, 1.4, 0.12)
"""Ends of what `draw_contrast` draws evenly: gamma's logarithm, gain, offset."""


def draw_contrast(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Random gamma, gain and offset of each image, (B, 3), a function of (seed, epoch, index)
    alone.

    indices: (B,) as PlaneImages gives them
    """
    # 1: other numbers than `draw_augmentation`'s
    rngs = (np.random.default_rng((seed, epoch, index, 1)) for index in indices.tolist())
    drawn = np.stack([rng.uniform(*CONTRAST) for rng in rngs])
    drawn[:, 0] = np.exp(drawn[:, 0])
    return torch.tensor(drawn, dtype=torch.float32)


def prepare(
    images: Tensor, input_range: str, affine: Tensor | None = None, contrast: Tensor | None = None
) -> Tensor:
    """Images as a network takes them: float, altered by the augmentations, scaled to the input
    range.

    images: (B, 1 or 3, H, W) uint8; of a grey one come three equal channels
    affine: (B, 2, 3) from `draw_augmentation`, or None; what it brings in from outside the image is
        black
    contrast: (B, 3) from `draw_contrast`, or None: gain x^gamma + offset of x in [0, 1],
        clipped to [0, 1]
    """
    x = images.float() / 255
    if contrast is not None:
        gamma, gain, offset = contrast.to(x.device)[:, :, None, None, None].unbind(dim=1)
        x = (gain * x**gamma + offset).clamp(0, 1)
    if affine is not None:
        grid = F.affine_grid(affine.to(x.device), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
    return normalise(x, input_range)


def normalise(images: Tensor, input_range: str) -> Tensor:
    """(B, 1 or 3, H, W) in [0, 1] -> (B, 3, H, W) in the input range."""
    mean, std = torch.tensor(INPUT_RANGES[input_range], device=images.device)[..., None, None]
    return (images - mean) / std


Augmentation = Callable[[Tensor], Tensor]
"""indices (B,) -> affine (B, 2, 3) or contrast (B, 3): a drawing function with all else filled
in."""

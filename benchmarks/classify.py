"""An epoch of a classifier's training: this package beside an ImageFolder, a DataLoader and a plain
loop.

    python benchmarks/classify.py                                           # on a GPU: 512 px, batch 24, 1,200 images
    python benchmarks/classify.py --device cpu --size 96 --images 60 --model mobilenet_v2 --rounds 3

Both rotate and flip as the paper does, on the same grey PNGs, from the same random weights. Ours
are decoded once, on all cores, before the first epoch; the seconds of that stand beside the table.
The rival is torchvision's reference loop without its logging: decoded and augmented anew in every
epoch by worker processes.
"""

import argparse
import copy
import os
import sys
import tempfile
import time
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

# before this folder: classify is the package, not this
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Rival, add_flags, bytes_of, report, side_by_side

from classify.data import RECIPES, PlaneImages, batches, draw_augmentation, gpu_room
from classify.models import MODELS, build
from classify.train import MOMENTUM, train_epoch
from planes import PLANES
from planes.datasets import Record

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RIVALS = ("ours", "ours-compiled", "imagefolder")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, on_gpu = parser.add_argument, torch.cuda.is_available()
    add_flags(parser, RIVALS, DTYPES, rounds=3, half="bf16")
    parser.set_defaults(rivals=["ours", "imagefolder"])
    add("--model", choices=MODELS, default="resnet18")
    add("--stored", type=int, default=800, help="px of the files (800)")
    add("--images", type=int, default=1200, help="(1200)")
    add("--batch-size", type=int, default=24, help="(24)")
    add(
        "--workers",
        type=int,
        default=16 if on_gpu else min(2, os.cpu_count() or 1),
        help="of the rival",
    )
    return parser.parse_args(argv)


def write_images(args, folder: Path) -> None:
    """Grey PNGs of soft noise, as hard to decode as a scan, in a folder for each plane."""
    rng = np.random.default_rng(args.seed)
    for n in range(args.images):
        path = folder / str(PLANES[n % len(PLANES)]) / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 255, (args.stored // 8,) * 2, dtype=np.uint8))
        image = np.array(coarse.resize((args.stored,) * 2, Image.Resampling.BICUBIC)).astype(
            np.int16
        )
        image += rng.integers(-6, 7, image.shape, dtype=np.int16)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)


def ours(args, name: str, model: nn.Module, folder: Path) -> Rival:
    records = [
        Record(path, PLANES[PLANES.index(path.parent.name)], "", True, "images", "")
        for path in sorted(folder.glob("*/*.png"))
    ]
    images, start = PlaneImages(records, args.size), time.perf_counter()
    for _ in images.preload(threads=os.cpu_count() or 1):
        pass
    device = torch.device(args.device)
    images.move(device, gpu_room(device))
    print(f"{name}: {len(records)} images decoded once in {time.perf_counter() - start:.1f} s")
    model = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
    if name == "ours-compiled":
        model.compile(fullgraph=True, dynamic=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=MOMENTUM)
    loader, epochs = batches(images, args.batch_size, 0, args.seed), count()

    def work() -> torch.Tensor:
        augmentation = partial(draw_augmentation, RECIPES["paper"], args.seed, next(epochs))
        loss = train_epoch(
            model, loader, optimizer, "minus-one-one", augmentation, DTYPES[args.dtype]
        )
        return torch.tensor([loss])

    kept = images.moved[0].numel() if images.moved else 0
    return Rival(name, work, bytes_of(model) + kept)


def theirs(args, name: str, model: nn.Module, folder: Path) -> Rival:
    recipe, device = RECIPES["paper"], torch.device(args.device)
    model = copy.deepcopy(model).to(device)
    dataset = ImageFolder(
        str(folder),
        transforms.Compose(
            [
                transforms.Resize((args.size, args.size)),
                transforms.RandomRotation(recipe.rotation, transforms.InterpolationMode.BILINEAR),
                transforms.RandomHorizontalFlip(recipe.horizontal_flip),
                transforms.RandomVerticalFlip(recipe.vertical_flip),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.5,) * 3),
            ]
        ),
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=args.workers > 0,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=MOMENTUM)
    dtype = DTYPES[args.dtype]

    def work() -> torch.Tensor:
        model.train()
        total = 0.0
        for images, targets in loader:
            images, targets = (
                images.to(device, non_blocking=True),
                targets.to(device, non_blocking=True),
            )
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = nn.functional.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(targets)
        return torch.tensor([total / len(dataset)])

    return Rival(f"{name}, {args.workers} workers", work, bytes_of(model))


def main(args):
    torch.manual_seed(args.seed)
    model = build(args.model, "none", args.size)
    with tempfile.TemporaryDirectory(prefix="classify-") as folder:
        write_images(args, Path(folder))
        rivals = [
            (ours if name.startswith("ours") else theirs)(args, name, model, Path(folder))
            for name in args.rivals
        ]
        side_by_side(rivals, args.rounds, args.device)
    title = (
        f"{args.model}, an epoch of {args.images} images, {args.size} px, batch {args.batch_size},"
        f" {args.dtype}"
    )
    report(args, title, rivals, args.images, "image")


if __name__ == "__main__":
    main(parse_args())

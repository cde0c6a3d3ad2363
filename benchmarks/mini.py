r"""What the embedded model can do, measured by a judge: a ResNet18 that has seen phantoms from
every kind of probe.

    python benchmarks/mini.py judge             # minutes; once, for all others, in runs/judge
    python benchmarks/mini.py recognise runs/synthetic/manifest.csv
    python benchmarks/mini.py style runs/synthetic_styles/manifest.csv  # do the style words act?

The judge's probes are drawn from wider ranges than any site's, so that what it knows is the
anatomy. No choice is made by what it says of site B.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

# a script sees its own folder, not the repository
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classify import ClassifyError
from classify.data import PlaneImages, batches
from classify.models import build, load, save
from classify.train import MOMENTUM, predict, train_epoch
from harness.flags import HelpFormatter
from harness.script import run
from ldm.mini.scenes import scene
from planes import PLANES
from planes.datasets import DatasetError, Record, read_spanish, read_synthetic
from planes.phantoms.phantom import write_spanish_layout
from planes.phantoms.sites import Site
from planes.style import BRIGHTNESS, CONTRAST, middle

SIDE = 64  # px, as the classifiers of the phantoms see images
WEIGHTS = "judge.safetensors"
TESTED, SCENES = 100, 1500  # phantoms of each plane for the judge; scenes
BROAD = Site(  # every kind of probe, as in the generic scenes
    sizes=((240, 166), (200, 170), (150, 129), (120, 135), (180, 150), (192, 118)),
    half_angle=(0.38, 0.72),
    radius=(0.1, 0.8),
    axial=(0.003, 0.009),
    lateral=(0.009, 0.025),
    dynamic_range=(36, 68),
    gain=(-5, 9),
    tgc=(-8, 8),
    noise=(-62, -42),
    looks=(1, 5),
    letters=(0, 14),
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("task", choices=TASKS)
    add("manifests", type=Path, nargs="*", help="manifest.csv of sample.py")
    add("--judge", type=Path, default=Path("runs/judge"), help="its folder")
    add("--per-plane", type=int, default=1000, help="phantoms that the judge learns from")
    add("--epochs", type=int, default=10, help="of the judge")
    return parser.parse_intermixed_args(argv)  # flags before manifests too


def train_judge(args) -> None:
    """A ResNet18 of 64 px on `per_plane` broad phantoms, SGD with a cosine to zero; says how it
    does on new ones."""
    if not (args.judge / "FETAL_PLANES_DB_data.csv").exists():
        write_spanish_layout(args.judge, args.per_plane, TESTED, 77, BROAD)
    records = read_spanish(args.judge)
    train = PlaneImages([record for record in records if record.train], SIDE)
    list(train.preload())
    torch.manual_seed(0)
    model = build("resnet18", "none", SIDE).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=MOMENTUM, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in tqdm(range(args.epochs), "judge", unit="epoch"):
        train_epoch(model, batches(train, 32, shuffle_seed=epoch), optimizer, "minus-one-one")
        schedule.step()
    description = {"model": "resnet18", "size": SIDE, "input_range": "minus-one-one"}
    save(args.judge / WEIGHTS, model, description)
    print_recognised("new broad phantoms", args, [r for r in records if not r.train])


def print_recognised(label: str, args, records: list[Record]) -> None:
    """The share that the judge takes for their plane, of all and of each plane."""
    model, description = load(args.judge / WEIGHTS)
    images = PlaneImages(records, description["size"])
    found = predict(model, batches(images, 64), description["input_range"]).argmax(1)
    hits, planes = found.numpy() == images.targets, np.array(images.targets)
    shares = (f"{PLANES[n]} {100 * hits[planes == n].mean():.1f}" for n in np.unique(planes))
    said = f"{100 * hits.mean():.1f} % of {len(hits)} recognised  ({'  '.join(shares)})"
    print(f"{label}: {said}", flush=True)


def recognise(args) -> None:
    """The share that the judge takes for the plane of their prompt, of each manifest and
    sampler."""
    for manifest in args.manifests:
        records = read_synthetic(manifest)
        for sampler in dict.fromkeys(record.center for record in records):
            label = f"{manifest.parent.name}, {sampler}"
            print_recognised(label, args, [r for r in records if r.center == sampler])


def style(args) -> None:
    """How far grey and contrast move from the first to the last word, in the scenes and in each
    plane's images."""
    scenes = [scene(np.random.default_rng((99, n)), 2 * SIDE) for n in range(SCENES)]
    moves = print_moves("scenes", [(text, middle(image)) for image, text in scenes])
    for manifest in args.manifests:
        with open(manifest, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for plane in dict.fromkeys(row["plane"] for row in rows):
            images = [
                (row["prompt"], middle(Image.open(manifest.parent / row["image"])))
                for row in rows
                if row["plane"] == plane
            ]
            grey, contrast = print_moves(plane, images) / moves
            print(f"    share of the scenes': grey {grey:.2f}, contrast {contrast:.2f}")


def print_moves(label: str, images: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """Mean grey for each word of brightness and standard deviation for each of contrast, means over
    the images whose text has the word; returns how far the last word is from the first, (2,)."""
    moves, said = [], []
    for words, measure in ((BRIGHTNESS, np.mean), (CONTRAST, np.std)):
        means = [
            np.mean([measure(levels) for text, levels in images if f", {word}" in text])
            for word in words
        ]
        said += [f"{word} {mean:.1f}" for word, mean in zip(words, means)]
        moves.append(means[-1] - means[0])
    print(f"{label}: {'  '.join(said)}", flush=True)
    return np.array(moves)


TASKS = {"judge": train_judge, "recognise": recognise, "style": style}


def main(args) -> None:
    TASKS[args.task](args)


if __name__ == "__main__":
    run(parse_args, main, ClassifyError, DatasetError)

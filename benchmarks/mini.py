r"""What the embedded model can do, measured by a judge: a ResNet18 that has seen phantoms from
every kind of probe.

    python benchmarks/mini.py judge             # minutes; once, for all others, in runs/judge
    python benchmarks/mini.py round-trip        # what the autoencoder keeps
    python benchmarks/mini.py recognise runs/synthetic/manifest.csv
    python benchmarks/mini.py quality --spanish runs/phantoms/spanish runs/synthetic/manifest.csv
    python benchmarks/mini.py copyist --spanish runs/phantoms/spanish
    python benchmarks/mini.py style runs/synthetic_styles/manifest.csv  # do the style words act?

The judge's probes are drawn from wider ranges than any site's, so that what it knows is the
anatomy. No choice is made by what it says of site B.
"""

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

# a script sees its own folder, not the repository
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classify.data import PlaneImages, batches
from classify.features import classifier, features
from classify.models import build, load, save
from classify.train import MOMENTUM, predict, train_epoch
from eval.quality import memorisation, pixel_features, prdc, two_sample
from harness.flags import HelpFormatter
from ldm import MINI
from ldm.checkpoints import load as load_model
from ldm.images import decode_images, read_image
from ldm.mini.scenes import scene
from planes import PLANES
from planes.datasets import Record, balanced, read_spanish, read_synthetic
from planes.phantoms.phantom import write_spanish_layout
from planes.phantoms.sites import Site
from planes.style import BRIGHTNESS, CONTRAST, middle

SIDE = 64  # px, as the classifiers of the phantoms see images
WEIGHTS = "judge.safetensors"
TESTED, NEW, SCENES = 100, 50, 1500  # phantoms of each plane for the judge and for LoRAs; scenes
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
    add("--model", type=Path, default=MINI, help="whose autoencoder is tried")
    add("--spanish", type=Path, help="phantoms of site A, of which LoRA took 100")
    add("--seed", type=int, default=0, help="of the LoRA's training, which drew them")
    return parser.parse_intermixed_args(argv)  # flags before manifests too


def phantoms(folder: Path, *how: object) -> list[Record]:
    """Phantoms in the Spanish layout, drawn once; how: as of `write_spanish_layout`."""
    if not (folder / "FETAL_PLANES_DB_data.csv").exists():
        write_spanish_layout(folder, *how)
    return read_spanish(folder)


def train_judge(args) -> None:
    """A ResNet18 of 64 px on `per_plane` broad phantoms, SGD with a cosine to zero; says how it
    does on new ones."""
    records = phantoms(args.judge, args.per_plane, TESTED, 77, BROAD)
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


def round_trip(args) -> None:
    """Recognition of broad phantoms as they are and behind the autoencoder, and the error it
    makes."""
    records = [record for record in read_spanish(args.judge) if not record.train]
    behind, errors = behind_autoencoder(args, records)
    print_recognised("before", args, records)
    print_recognised("behind the autoencoder", args, behind)
    print(f"PSNR {np.mean(-10 * np.log10(errors)):.2f} dB")


def behind_autoencoder(args, records: list[Record]) -> tuple[list[Record], list[float]]:
    """The images encoded and decoded, written beside the judge; the mean squared error of each in
    [0, 1]."""
    model, out = load_model(args.model), args.judge / args.task
    size = model.sample_size * model.vae.config.downsampling
    out.mkdir(exist_ok=True)
    errors, behind = [], []
    for n, record in enumerate(tqdm(records, "autoencoder", unit="image")):
        image = read_image(record.path, size)[None]
        with torch.no_grad():
            pixels = decode_images(model.vae, model.vae.to_latents(image))[0].numpy()
        Image.fromarray(pixels).convert("L").save(out / f"{n}.png")
        errors.append(np.square((image[0].permute(1, 2, 0).numpy() + 1) / 2 - pixels / 255).mean())
        behind.append(replace(record, path=out / f"{n}.png"))
    return behind, errors


def recognise(args) -> None:
    """The share that the judge takes for the plane of their prompt, of each manifest and
    sampler."""
    for manifest in args.manifests:
        records = read_synthetic(manifest)
        for sampler in dict.fromkeys(record.center for record in records):
            label = f"{manifest.parent.name}, {sampler}"
            print_recognised(label, args, [r for r in records if r.center == sampler])


def quality(args) -> None:
    """How far the images are from phantoms of site A that no LoRA has seen, by the judge's
    features."""
    extract, trained_on = classifier(args.judge / WEIGHTS), pixel_features(taken(args))
    new = phantoms(args.judge / "site_a", NEW, 0, 501)
    real = features(extract, new)
    print(f"new phantoms: {nearest_of(trained_on, new)}")
    for manifest in args.manifests:
        records = read_synthetic(manifest)
        found = likeness(real, features(extract, records)), nearest_of(trained_on, records)
        print(f"{manifest.parent.name}: {'  '.join(found)}", flush=True)


def copyist(args) -> None:
    """The same measures for one who knows LoRA's 100 images by heart and no other: as many of those
    as there are new ones, three draws, as they are and behind the autoencoder."""
    extract, records = classifier(args.judge / WEIGHTS), taken(args)
    real = features(extract, phantoms(args.judge / "site_a", NEW, 0, 501))
    behind, _ = behind_autoencoder(args, records)
    for label, copies in (("the training images", records), ("behind the autoencoder", behind)):
        known = features(extract, copies)
        for seed in range(3):
            order = np.random.default_rng(seed).permutation(len(known))
            print(f"{label}: {likeness(real, known[np.resize(order, len(real))])}", flush=True)


def taken(args) -> list[Record]:
    """The images that train_lora.py --spanish draws with this seed."""
    records = [record for record in read_spanish(args.spanish) if record.train]
    return balanced(records, 20, args.seed)


def likeness(real: np.ndarray, made: np.ndarray) -> str:
    """Two-sample test, density and coverage of (N, D) and (M, D) features, in words."""
    near, (told, _) = prdc(real, made), two_sample(real, made)
    return (
        f"two-sample {100 * told:.1f} % of {len(made)}  density {near['density']:.2f}  coverage"
        f" {near['coverage']:.2f}"
    )


def nearest_of(trained_on: np.ndarray, records: list[Record]) -> str:
    """How near images come to those of LoRA's training, of which (N, D) are the pixel features."""
    found = memorisation(trained_on, pixel_features(records))
    return (
        f"nearest training image at {np.median(found.ratio):.2f} of the usual distance,"
        f" {found.copied.sum()} copies"
    )


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


TASKS = {
    "judge": train_judge,
    "round-trip": round_trip,
    "recognise": recognise,
    "quality": quality,
    "copyist": copyist,
    "style": style,
}


def main(args) -> None:
    TASKS[args.task](args)


if __name__ == "__main__":
    main(parse_args())

r"""What the embedded model can do, measured by a judge: a ResNet18 that has seen phantoms from
every kind of probe.

    python benchmarks/mini.py judge --out runs/judge                                     # minutes; once
    python benchmarks/mini.py round-trip --judge runs/judge/judge.safetensors            # what the autoencoder keeps
    python benchmarks/mini.py recognise --judge runs/judge/judge.safetensors runs/synthetic/manifest.csv
    python benchmarks/mini.py quality --judge runs/judge/judge.safetensors --spanish runs/phantoms/spanish \
        runs/synthetic/manifest.csv
    python benchmarks/mini.py copyist --judge runs/judge/judge.safetensors --spanish runs/phantoms/spanish
    python benchmarks/mini.py style runs/synthetic_styles/manifest.csv                   # do the style words act?

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

from classify.data import PlaneImages, batches
from classify.features import classifier, features
from classify.models import build, load, save
from classify.train import MOMENTUM, predict, train_epoch
from eval.quality import memorisation, pixel_features, prdc, two_sample
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    judge = tasks.add_parser("judge", help="draw broad phantoms and train the judge")
    judge.add_argument("--out", type=Path, required=True)
    judge.add_argument(
        "--per-plane", type=int, default=1000, help="phantoms of each plane to train on (1000)"
    )
    judge.add_argument("--epochs", type=int, default=10)
    trip = tasks.add_parser("round-trip", help="broad phantoms through the autoencoder")
    trip.add_argument("--model", type=Path, default=MINI)
    trip.add_argument("--count", type=int, default=60, help="phantoms of each plane (60)")
    known = tasks.add_parser("recognise", help="synthetic images, by plane and sampler")
    near = tasks.add_parser(
        "quality", help="two-sample test, density and coverage against 250 new phantoms of site A"
    )
    copy = tasks.add_parser(
        "copyist",
        help="the same measures for LoRA's own training images, as they are and behind the VAE",
    )
    for task in (near, copy):
        task.add_argument(
            "--spanish", type=Path, required=True, help="phantoms of site A, of which LoRA took 100"
        )
        task.add_argument(
            "--seed", type=int, default=0, help="of the LoRA's training, which drew them (0)"
        )
    for task in (trip, known, near, copy):
        task.add_argument("--judge", type=Path, required=True)
    style = tasks.add_parser(
        "style", help="mean grey and contrast of the images of each word, beside the scenes'"
    )
    for task in (known, near, style):
        task.add_argument("manifests", type=Path, nargs="+", help="manifest.csv of sample.py")
    return parser.parse_args(argv)


def train_judge(args) -> None:
    """A ResNet18 of 64 px on `per_plane` broad phantoms, SGD with a cosine to zero; says how it
    does on new ones."""
    if not (args.out / "FETAL_PLANES_DB_data.csv").exists():
        write_spanish_layout(args.out, train=args.per_plane, test=100, seed=77, site=BROAD)
    records = read_spanish(args.out)
    train, test = (
        PlaneImages([r for r in records if r.train is flag], SIDE) for flag in (True, False)
    )
    for images in (train, test):
        list(images.preload())
    torch.manual_seed(0)
    model = build("resnet18", "none", SIDE).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=MOMENTUM, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in tqdm(range(args.epochs), "judge", unit="epoch"):
        train_epoch(model, batches(train, 32, shuffle_seed=epoch), optimizer, "minus-one-one")
        schedule.step()
    hits = predict(model, batches(test, 100), "minus-one-one").argmax(1) == torch.tensor(
        test.targets
    )
    print_shares("new broad phantoms", hits, test.targets)
    save(
        args.out / "judge.safetensors",
        model,
        {"model": "resnet18", "size": SIDE, "input_range": "minus-one-one"},
    )


def print_shares(label: str, hits: torch.Tensor, targets: list[int]) -> None:
    """The share recognised, of all and of each plane."""
    of = {plane: hits[torch.tensor(targets) == n] for n, plane in enumerate(PLANES)}
    shares = "  ".join(f"{plane} {100 * h.float().mean():.1f}" for plane, h in of.items() if len(h))
    print(
        f"{label}: {100 * hits.float().mean():.1f} % of {len(hits)} recognised  ({shares})",
        flush=True,
    )


def recognised(judge: Path, records: list[Record]) -> torch.Tensor:
    """Which of the images the judge takes for their plane: (N,) bool."""
    model, description = load(judge)
    images = PlaneImages(records, description["size"])
    return predict(model, batches(images, 64), description["input_range"]).argmax(
        1
    ) == torch.tensor(images.targets)


def round_trip(args) -> None:
    """Recognition of broad phantoms as they are and behind the autoencoder, and the error it
    makes."""
    records = [record for record in read_spanish(args.judge.parent) if not record.train]
    records = [
        r for plane in PLANES for r in [x for x in records if x.plane is plane][: args.count]
    ]
    behind, errors, size = behind_autoencoder(records, args.model, args.judge.parent / "round_trip")
    targets = [PLANES.index(record.plane) for record in records]
    print_shares("before", recognised(args.judge, records), targets)
    print_shares("behind the autoencoder", recognised(args.judge, behind), targets)
    print(f"PSNR {np.mean(-10 * np.log10(errors)):.2f} dB at {size} px")


def behind_autoencoder(
    records: list[Record], folder_of_model: Path, out: Path
) -> tuple[list[Record], list, int]:
    """The images encoded and decoded, written to `out`; the mean squared error of each in [0, 1];
    their side in px."""
    vae, size = (
        (model := load_model(folder_of_model)).vae,
        model.sample_size * model.vae.config.downsampling,
    )
    out.mkdir(exist_ok=True)
    errors, behind = [], []
    for n, record in enumerate(tqdm(records, "round trip", unit="image")):
        image = read_image(record.path, size)[None]
        with torch.no_grad():
            pixels = decode_images(vae, vae.to_latents(image))[0].numpy()
        Image.fromarray(pixels).convert("L").save(out / f"{n}.png")
        errors.append(np.square((image[0].permute(1, 2, 0).numpy() + 1) / 2 - pixels / 255).mean())
        behind.append(
            Record(out / f"{n}.png", record.plane, record.patient, False, "synthetic", "vae")
        )
    return behind, errors, size


def recognise(args) -> None:
    """The share that the judge takes for the plane of their prompt, of each manifest and
    sampler."""
    for manifest in args.manifests:
        records = read_synthetic(manifest)
        for sampler in dict.fromkeys(record.center for record in records):
            chosen = [record for record in records if record.center == sampler]
            targets = [PLANES.index(record.plane) for record in chosen]
            print_shares(
                f"{manifest.parent.name}, {sampler}", recognised(args.judge, chosen), targets
            )


def quality(args) -> None:
    """How far the images are from 250 phantoms of site A that no LoRA has seen, by the judge's
    features."""
    new, trained_on, extract = (
        new_phantoms(args.judge),
        pixel_features(taken(args)),
        classifier(args.judge),
    )
    real = features(extract, new)
    print(f"new phantoms: {nearest_of(trained_on, new)}")
    for manifest in args.manifests:
        records = read_synthetic(manifest)
        print(f"{manifest.parent.name}: {likeness(real, features(extract, records))}", end="  ")
        print(nearest_of(trained_on, records), flush=True)


def copyist(args) -> None:
    """The same measures for one who knows LoRA's 100 images by heart and no other: 250 of those,
    three draws."""
    records, extract = taken(args), classifier(args.judge)
    real = features(extract, new_phantoms(args.judge))
    behind, _, _ = behind_autoencoder(records, MINI, args.judge.parent / "copyist")
    for label, copies in (("the training images", records), ("behind the autoencoder", behind)):
        known = features(extract, copies)
        for seed in range(3):
            order = np.random.default_rng(seed).permutation(len(known))
            print(f"{label}: {likeness(real, known[np.resize(order, len(real))])}", flush=True)


def new_phantoms(judge: Path) -> list[Record]:
    """250 phantoms of site A that no LoRA has seen, drawn once."""
    folder = judge.parent / "site_a"
    if not (folder / "FETAL_PLANES_DB_data.csv").exists():
        write_spanish_layout(folder, train=50, test=0, seed=501)
    return read_spanish(folder)


def taken(args) -> list[Record]:
    """The images that train_lora.py --spanish draws with this seed."""
    return balanced(
        [record for record in read_spanish(args.spanish) if record.train], 20, args.seed
    )


def likeness(real: np.ndarray, made: np.ndarray) -> str:
    """Two-sample test, density and coverage of (N, D) and (M, D) features, in words."""
    near, told = prdc(real, made), two_sample(real, made).accuracy
    return (
        f"two-sample {100 * told:.1f} % of {len(made)}  density {near.density:.2f}  coverage"
        f" {near.coverage:.2f}"
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
    scenes = [scene(np.random.default_rng((99, n)), 2 * SIDE) for n in range(1500)]
    moves = print_moves("scenes", [(text, middle(image)) for image, text in scenes])
    for manifest in args.manifests:
        with open(manifest, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for plane in dict.fromkeys(row["plane"] for row in rows):
            images = [
                (r["prompt"], Image.open(manifest.parent / r["image"]))
                for r in rows
                if r["plane"] == plane
            ]
            own = print_moves(plane, [(text, middle(image)) for text, image in images])
            print(
                f"    share of the scenes': grey {own[0] / moves[0]:.2f}, contrast"
                f" {own[1] / moves[1]:.2f}"
            )


def print_moves(label: str, images: list[tuple[str, np.ndarray]]) -> tuple[float, float]:
    """Mean grey for each word of brightness and standard deviation for each of contrast, means over
    the images whose text has the word; returns how far the last word is from the first."""
    moves, parts = [], []
    for words, measure in ((BRIGHTNESS, np.mean), (CONTRAST, np.std)):
        of = {
            word: [measure(levels) for text, levels in images if f", {word}" in text]
            for word in words
        }
        means = [float(np.mean(of[word])) for word in words]
        parts.append("  ".join(f"{word} {mean:.1f}" for word, mean in zip(words, means)))
        moves.append(means[-1] - means[0])
    print(f"{label}: {'   '.join(parts)}", flush=True)
    return moves[0], moves[1]


if __name__ == "__main__":
    options = parse_args()
    tasks = {
        "judge": train_judge,
        "round-trip": round_trip,
        "recognise": recognise,
        "quality": quality,
    }
    tasks |= {"copyist": copyist, "style": style}
    tasks[options.task](options)

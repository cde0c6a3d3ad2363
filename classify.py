"""Stages 3 and 4 of FU-LoRA: train a classifier on real and synthetic images, test it at a site it
has never seen.

    python classify.py --spanish FETAL_PLANES_ZENODO --synthetic runs/synthetic/manifest.csv \\
        --african Zenodo_dataset --augment --model resnet18 --out runs/classify

Writes model.safetensors, predictions.csv, metrics.json, confusion.png, train.csv and args.json. The
model of the last epoch is the one that is tested: nothing is selected on any image.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch

from classify import ClassifyError
from classify.data import (
    INPUT_RANGES,
    MEMORY,
    RECIPES,
    PlaneImages,
    batches,
    draw_augmentation,
    draw_contrast,
)
from classify.images import choose_records
from classify.models import MODELS, PROBE, build
from classify.predict import use, write_run
from classify.probe import run_probe
from classify.train import MOMENTUM, predict, restore, train_epoch, training_state
from harness.files import sha256
from harness.flags import (
    DEVICE,
    HELD_OUT,
    OVERWRITE,
    HelpFormatter,
    require_at_least,
    seed_number,
)
from harness.record import ELSEWHERE, refuse_to_replace
from harness.resume import SaveTimes, rate_share, read_state, write_state
from harness.script import alone, progress, run
from planes.datasets import DatasetError

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
# flags that stand in the trained model's file
SETTINGS = ("model", "recipe", "size", "input_range", "augment", "contrast", "balanced_sampling")
SETTINGS += ("batch_size", "lr", "schedule", "seed", "dtype")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.usage = "%(prog)s [flags] --out OUT"

    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--spanish", type=Path, help="the Spanish dataset (or phantoms): its training images")
    add("--source", type=Path, help="or any site: a folder for each class, or an images.csv")
    choose = data.add_mutually_exclusive_group().add_argument
    choose("--manifest", type=Path, help="the list of images to take from --spanish, not all")
    choose("--per-plane", type=int, help="draw so many images of each class, instead of all")
    add(
        "--synthetic",
        type=Path,
        action="append",
        default=[],
        help="a manifest.csv of sample.py; may be repeated",
    )
    add("--african", type=Path, help="the African dataset (or phantoms), to be tested on")
    add("--target", type=Path, help="or any site, as --source, of its classes or some of them")
    add(
        "--african-train",
        "--target-train",
        action="store_true",
        help="train on the second site's training images too: no longer zero-shot",
    )
    add(
        "--validation",
        type=int,
        default=0,
        help="images of the first site held out with all of their patients'",
    )
    add("--held-out", **HELD_OUT)
    add("--recipe", choices=RECIPES, default="paper", help="of size, input range, --augment")
    add("--size", type=int, help="square side in px, aspect ignored, instead of the recipe's")
    add("--input-range", choices=INPUT_RANGES, help="of pixels, instead of the recipe's")
    add("--augment", action="store_true", help="rotate, flip, and by the notebook crop at random")
    add("--contrast", action="store_true", help="random brightness, contrast and gamma")
    add("--balanced-sampling", action="store_true", help="draw every class equally often")
    add("--workers", type=int, default=min(4, os.cpu_count() or 1), help="that decode images")

    add = parser.add_argument_group("model").add_argument
    names = f"{', '.join(MODELS)}; or probe:ID, logistic regression on a frozen model's features"
    add("--model", default="resnet18", help=names)
    add("--weights", default="imagenet", help="imagenet (torchvision's), none, or a file")
    add("--features", type=Path, help="where a frozen model's are kept, instead of in --out")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=20, help="passes over the training images")
    add("--passes", type=int, help="instead: images shown in all, rounded to whole epochs")
    add("--batch-size", type=int, default=24, help="images of a step")
    add("--lr", type=float, default=1e-3, help=f"learning rate of SGD, momentum {MOMENTUM}")
    add("--schedule", choices=("constant", "cosine"), default="constant", help="of --lr, to 0")
    add("--seed", type=seed_number, default=0, help="of whatever is drawn")
    add("--device", **DEVICE)
    add("--dtype", choices=DTYPES, help="of products; if not given, bf16 on CUDA, else fp32")
    add("--compile", action="store_true", help="the network, which takes a minute on CUDA")

    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, required=True, help="folder of what is written")
    add("--resume", action="store_true", help="go on from the last epoch of a stopped run in --out")
    add("--overwrite", **OVERWRITE)

    add = parser.add_argument_group("a trained classifier at work").add_argument
    add("--classifier", type=Path, help="the model.safetensors of a run, instead of training")
    add(
        "--predict",
        type=Path,
        metavar="FOLDER",
        help="a class for each image in it: predictions.csv, least_sure.png",
    )
    add("--export", action="store_true", help="write model.onnx, which needs no torch to run")

    args = parser.parse_args(argv)
    recipe = RECIPES[args.recipe]
    require_at_least(parser, args, 1, "epochs", "passes", "batch_size", "per_plane", "size")
    args.size = args.size or recipe.size
    args.input_range = args.input_range or recipe.input_range
    args.dtype = args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")
    require_at_least(parser, args, 0, "validation", "workers")
    require_at_least(parser, args, 1e-12, "lr")
    if args.model not in MODELS and not args.model.startswith(PROBE):
        parser.error(f"--model {args.model}: choose from {', '.join(MODELS)}, or probe:ID")
    if bool(args.classifier) != bool(args.predict or args.export):
        parser.error("--classifier FILE and --predict FOLDER or --export: give both, or neither")
    if not (args.african or args.target or args.classifier):
        parser.error("give --african DIR or --target DIR to be tested on")
    if (args.spanish or args.african) and (args.source or args.target):
        parser.error("--spanish belongs to --african, and --source to --target")
    if args.held_out and not args.source:
        parser.error("--held-out: a share of the patients of --source, which is not given")
    return args


def decode(args, chosen):
    """Training, validation and test images: in memory as far as they fit."""
    memory, sets = MEMORY, []
    for records in (chosen.training, chosen.validation, chosen.test):
        images = PlaneImages(records, args.size, chosen.classes)
        kept = images.preload(memory, args.workers)
        bar = progress(kept, desc="decoding", total=len(records), leave=False)
        memory -= sum(image.numel() for image in bar)
        sets.append(images)
    return sets


@alone
def main(args):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.dtype == "tf32"
    refuse_to_replace(args)
    if args.classifier:
        return use(args, print)
    if args.model.startswith(PROBE):
        return run_probe(args, print)

    # data and model: whatever can be refused is refused before any work
    chosen = choose_records(args, print)
    torch.manual_seed(args.seed)
    model = build(args.model, args.weights, args.size, len(chosen.classes))
    # up to twice as fast, on the CPU too
    model.to(args.device, memory_format=torch.channels_last)
    training, validation, test = decode(args, chosen)
    print(f"{len(training)} training, {len(validation)} validation, {len(test)} test images")

    # what is optimised: all of its parameters, by SGD
    dtype = DTYPES[args.dtype]
    if args.compile:
        model.compile(fullgraph=True, dynamic=False)
    loader = batches(training, args.batch_size, args.workers, args.seed, args.balanced_sampling)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=MOMENTUM)
    epochs = max(1, round(args.passes / len(training))) if args.passes else args.epochs

    def probabilities(images):
        return predict(
            model, batches(images, args.batch_size, args.workers), args.input_range, dtype
        )

    # resume: go on from the checkpoint of the same run
    hashes = chosen.hashes()
    identity = {key: str(value) for key, value in vars(args).items() if key not in ELSEWHERE}
    identity |= hashes
    history, checkpoint = [], args.out / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        history = read_state(
            checkpoint,
            identity,
            "classify.py",
            ClassifyError,
            lambda state: restore(state, model, optimizer, loader),
        )

    # the loop: the rate is constant, or falls by half a cosine to 0
    saves, steps = SaveTimes(None), epochs * len(loader)
    rates = (
        args.lr * rate_share(args.schedule, step, steps)
        for step in range(len(history) * len(loader), steps)
    )
    for epoch in range(len(history), epochs):
        turn = partial(draw_augmentation, RECIPES[args.recipe], args.seed, epoch)
        loss = train_epoch(
            model,
            progress(loader, desc=f"epoch {epoch + 1}/{epochs}", leave=False),
            optimizer,
            args.input_range,
            turn if args.augment else None,
            dtype,
            partial(draw_contrast, args.seed, epoch) if args.contrast else None,
            rates,
        )
        history.append({"epoch": epoch + 1, "loss": loss})
        if validation:
            hits = probabilities(validation).argmax(dim=1) == torch.tensor(validation.targets)
            history[-1]["validation_accuracy"] = hits.float().mean().item()
        print("  ".join(f"{key} {value:.4g}" for key, value in history[-1].items()), flush=True)
        if saves.due(epoch + 1):
            write_state(
                checkpoint,
                {"identity": identity} | training_state(history, model, optimizer, loader),
            )
            saves.leave_if_asked(f"{checkpoint} has {epoch + 1} epochs")
    saves.restore()

    # the test, at the unseen site, and what is written
    description = {key: getattr(args, key) for key in SETTINGS} | {"epochs": epochs}
    hashes |= {
        str(file): sha256(file)
        for file in (args.manifest, *args.synthetic, Path(args.weights))
        if file and file.is_file()
    }
    found = [probabilities(images) for images in (test, validation) if images]
    result = write_run(args, chosen, model, description, found, hashes, print, history)
    checkpoint.unlink(missing_ok=True)
    return result


if __name__ == "__main__":
    run(parse_args, main, ClassifyError, DatasetError)

"""Stages 3 and 4 of FU-LoRA: train a classifier on real and synthetic images, test it at a site it
has never seen.

    python classify.py --spanish FETAL_PLANES_ZENODO --synthetic runs/synthetic/manifest.csv --augment \\
        --african Zenodo_dataset --model resnet18 --out runs/classify

Writes model.safetensors, predictions.csv, metrics.json, confusion.png, train.csv and args.json. The
model of the last epoch is the one that is tested: nothing is selected on any image.
"""

import argparse
import itertools
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
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
    gpu_room,
)
from classify.images import choose_records, find_copies
from classify.models import MODELS, build, save
from classify.predict import outcome, temperature, use
from classify.probe import parts, run_probe
from classify.train import MOMENTUM, predict, restore, train_epoch, training_state
from eval.figures import confusion_figure
from eval.figures import save as save_figure
from harness.files import json_text, sha256, sha256_of_all, whole_files, write_table
from harness.flags import device_name, require_at_least, seed_number
from harness.record import record_run
from harness.resume import SaveTimes, rate_share, read_state, write_state
from harness.script import alone, progress, run
from ldm.fast import cannot_compile
from planes.datasets import DatasetError, count

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
# flags that a run which goes on may have otherwise
ELSEWHERE = ("out", "device", "workers", "compile", "resume")
BAR = {"leave": False}  # gone when done: a line for each epoch stays


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.usage = "%(prog)s [flags] --out OUT"
    add = parser.add_argument
    add(
        "--spanish",
        type=Path,
        help="the Spanish dataset (or phantoms in its layout): its training images",
    )
    add(
        "--source",
        type=Path,
        help="instead: any site, a folder of images for each class, or with an images.csv",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--manifest", type=Path, help="the list of images to take from --spanish, instead of all"
    )
    choice.add_argument(
        "--per-plane", type=int, help="how many images of a class to draw from the first site (all)"
    )
    add(
        "--synthetic",
        type=Path,
        action="append",
        default=[],
        help="a manifest.csv of sample.py; may be repeated",
    )
    add(
        "--african",
        type=Path,
        help="the African dataset (or phantoms): its test images are the test",
    )
    add(
        "--target",
        type=Path,
        help="instead: any site, as --source, of the same classes or some of them",
    )
    train = "train on the second site's training images too: no longer zero-shot"
    add("--african-train", "--target-train", action="store_true", help=train)
    add(
        "--validation",
        type=int,
        default=0,
        help="images of the first site held out with all of their patients' (0)",
    )
    names = (
        f"{', '.join(MODELS)}; or a frozen model, probe:ID, knn:ID, prompts:ID (classify/probe.py)"
        " (resnet18)"
    )
    add("--model", default="resnet18", help=names)
    add(
        "--features", type=Path, help="where a frozen model's features are kept (default: in --out)"
    )
    add(
        "--prompt-template",
        default="an ultrasound image of {class}",
        help="of --target's classes, for prompts:ID",
    )
    add(
        "--weights",
        default="imagenet",
        help="imagenet (torchvision's, downloaded), none, or a file (imagenet)",
    )
    recipe = "size, range, augmentation: the paper's or its notebook's (paper)"
    add("--recipe", choices=RECIPES, default="paper", help=recipe)
    add("--size", type=int, help="square side in px, aspect ignored (the recipe's: 512 or 224)")
    add(
        "--input-range",
        choices=INPUT_RANGES,
        help="of pixels (the recipe's: minus-one-one or zero-one)",
    )
    add(
        "--augment",
        action="store_true",
        help="rotate, flip and (notebook) crop at random, as the recipe says",
    )
    add(
        "--contrast",
        action="store_true",
        help="random brightness, contrast and gamma, with or without --augment",
    )
    add(
        "--balanced-sampling",
        action="store_true",
        help="an epoch draws every class equally often, with replacement",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, default=20, help="(20)")
    length.add_argument(
        "--passes", type=int, help="instead: images shown in all, rounded to whole epochs"
    )
    add("--batch-size", type=int, default=24, help="(24)")
    add("--lr", type=float, default=1e-3, help="learning rate of SGD with momentum 0.9 (1e-3)")
    add(
        "--schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="of --lr; cosine: to 0 (constant)",
    )
    add(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="that decode images (4 at most)",
    )
    add("--seed", type=seed_number, default=0)
    add("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--dtype",
        choices=DTYPES,
        help="of autocast, or of float32's products on CUDA (bf16 on CUDA, else fp32)",
    )
    add(
        "--compile",
        action="store_true",
        help="the network: faster, but for a start of a minute on CUDA",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the last whole epoch of a run in --out that was stopped",
    )
    add(
        "--classifier",
        type=Path,
        help="instead of training: the model.safetensors of a run, for what follows",
    )
    add(
        "--predict",
        type=Path,
        metavar="FOLDER",
        help="what it takes the images there for: predictions.csv, least_sure.png",
    )
    add("--export", action="store_true", help="it as model.onnx, which needs no torch to run")
    add("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    recipe = RECIPES[args.recipe]
    args.size = recipe.size if args.size is None else args.size
    args.input_range = args.input_range or recipe.input_range
    args.dtype = args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")
    require_at_least(parser, args, 1, "epochs", "passes", "batch_size", "per_plane")
    require_at_least(parser, args, 0, "validation", "workers")
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr {args.lr}: must be positive")
    if args.model not in MODELS and not parts(args.model)[0]:
        parser.error(
            f"--model {args.model}: choose from {', '.join(MODELS)}, or a frozen model, such as"
            " probe:ID"
        )
    if args.classifier is not None:
        if args.predict is None and not args.export:
            parser.error(
                "--classifier FILE: for --predict FOLDER or --export, of which neither is given"
            )
        return args
    if args.predict is not None or args.export:
        parser.error("--predict and --export: of a trained --classifier FILE, which is not given")
    if (args.african is None) == (args.target is None) or (args.spanish and args.source):
        parser.error(
            "give --african DIR or --target DIR to be tested on, and --spanish or --source, not"
            " both of a pair"
        )
    if (args.spanish and args.target) or (args.source and args.african):
        parser.error("--spanish belongs to --african, and --source to --target: give two of a kind")
    if args.spanish is None and (
        args.manifest or (args.source is None and (args.per_plane or args.validation))
    ):
        parser.error(
            "--manifest chooses from --spanish, --per-plane and --validation from it or --source:"
            " give it too"
        )
    return args


@alone
def main(args):
    if args.classifier:
        return use(args, print)
    if parts(args.model)[0]:
        return run_probe(args, print)

    # everything that can be refused is refused before any work
    device = torch.device(args.device)
    chosen = choose_records(args, print)
    training, validation, test, classes = (
        chosen.training,
        chosen.validation,
        chosen.test,
        chosen.classes,
    )
    copies = find_copies(training, test, print)
    if args.compile and (reason := cannot_compile(args.device)):
        raise ClassifyError(f"--compile: {reason}; leave it out")
    torch.manual_seed(args.seed)
    model = build(args.model, args.weights, args.size, len(classes)).to(device)
    model.to(memory_format=torch.channels_last)  # up to twice as fast, on the CPU too
    memory, room, sets = MEMORY, gpu_room(device), []
    for records in (training, validation, test):
        sets.append(PlaneImages(records, args.size, classes))
        decoded = sets[-1].preload(memory, args.workers)
        memory -= sum(
            image.numel() for image in progress(decoded, desc="decoding", total=len(records), **BAR)
        )
        sets[-1].move(device, room)
        room -= sets[-1].moved[0].numel() if sets[-1].moved else 0
    train_set, validation_set, test_set = sets

    counts = count(training, classes)
    print(
        f"{len(training)} training images {dict(counts['sources'])}, {len(validation)} validation,"
        f" {len(test)} test"
    )
    print(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {args.size} px,"
        f" on {device}"
    )

    # SGD at a constant rate, or one that falls by half a cosine to 0
    dtype, products = DTYPES[args.dtype], args.dtype == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = products
    if args.compile:
        model.compile(fullgraph=True, dynamic=False)
    loader = batches(train_set, args.batch_size, args.workers, args.seed, args.balanced_sampling)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=MOMENTUM)
    epochs = max(1, round(args.passes / len(training))) if args.passes else args.epochs

    # go on from a checkpoint of the same run
    groups = {"training images": training, "validation images": validation, "test images": test}
    hashes = {
        name: sha256_of_all(record.path for record in records) for name, records in groups.items()
    }
    identity = {
        name: str(value) for name, value in vars(args).items() if name not in ELSEWHERE
    } | hashes
    checkpoint, state, history = args.out / "checkpoint.pt", (model, optimizer, loader), []
    if args.resume and checkpoint.exists():
        history = read_state(
            checkpoint, identity, "classify.py", ClassifyError, lambda kept: restore(kept, *state)
        )
    steps, saves = itertools.count(len(history) * len(loader)), SaveTimes(None)

    def rate() -> float:
        return args.lr * rate_share(args.schedule, next(steps), epochs * len(loader))

    for epoch in range(len(history), epochs):
        contrast = partial(draw_contrast, args.seed, epoch) if args.contrast else None
        augmentation = (
            partial(draw_augmentation, RECIPES[args.recipe], args.seed, epoch)
            if args.augment
            else None
        )
        bar = progress(loader, desc=f"epoch {epoch + 1}/{epochs}", **BAR)
        loss = train_epoch(
            model, bar, optimizer, args.input_range, augmentation, dtype, contrast, rate
        )
        row = {"epoch": epoch + 1, "loss": loss}
        if validation:
            held_out = predict(
                model,
                batches(validation_set, args.batch_size, args.workers),
                args.input_range,
                dtype,
            )
            hits = held_out.argmax(1) == torch.tensor(validation_set.targets)
            row["validation_accuracy"] = hits.float().mean().item()
        history.append(row)
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
        if saves.due(epoch + 1):
            write_state(checkpoint, {"identity": identity} | training_state(history, *state))
            saves.leave_if_asked(
                f"{checkpoint} has the {epoch + 1} epochs that are done; --resume goes on from"
                " there"
            )
    saves.restore()

    # the unseen site
    probabilities = predict(
        model, batches(test_set, args.batch_size, args.workers), args.input_range, dtype
    ).numpy()
    result, predictions = outcome(chosen, copies, test_set.targets, probabilities, counts)

    # all files are whole before the first appears in --out
    with whole_files(args.out) as part:
        settings = (
            "model",
            "recipe",
            "size",
            "input_range",
            "augment",
            "contrast",
            "balanced_sampling",
        )
        settings += ("batch_size", "lr", "schedule", "seed", "dtype")
        description = {key: getattr(args, key) for key in settings} | {
            "epochs": epochs,
            "training": counts,
        }
        if validation:  # how sure it is, set right on images that it was not trained on
            held_out = predict(
                model,
                batches(validation_set, args.batch_size, args.workers),
                args.input_range,
                dtype,
            )
            description["temperature"] = temperature(held_out, torch.tensor(validation_set.targets))
        save(part / "model.safetensors", model, description, classes)
        write_table(part / "predictions.csv", predictions)
        write_table(part / "train.csv", history)
        (part / "metrics.json").write_text(json_text(result), encoding="utf-8")
        figure = confusion_figure(
            np.array(result["confusion"]), classes, f"{len(test)} test images, {args.model}"
        )
        save_figure(figure, part / "confusion.png")
    files = (args.manifest, *args.synthetic, Path(args.weights))
    record_run(
        args.out,
        args,
        {str(path): sha256(path) for path in files if path and path.is_file()} | hashes,
    )
    checkpoint.unlink(missing_ok=True)

    if len(set(test_set.targets)) == 1:
        print(f"AUC: none, since the test images are all {test[0].plane}")
    notebook = "  ".join(
        f"{metric} {100 * value:.2f}" for metric, value in result["scores"]["notebook"].items()
    )
    print(f"{len(test)} images of {args.target or args.african}: {notebook}")
    return result


if __name__ == "__main__":
    run(parse_args, main, ClassifyError, DatasetError)

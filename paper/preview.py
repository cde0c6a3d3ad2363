"""What a reproduction would run, what that needs and takes, and what is missing on this machine."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torchvision.models import get_model_weights

from classify.data import RECIPES
from classify.models import MODELS
from harness.files import write_text
from paper.material import Selections
from paper.plan import RANKS
from planes import PLANES
from planes.datasets import DatasetError, Record, read_synthetic
from planes.record import SYNTHETIC

# Seconds on two CPU cores, measured: one image of a classifier's training at 64 px; of a LoRA's,
# and sampled, at 96.
CPU_PASS = {
    "densenet169": 0.014,
    "mobilenet_v2": 0.0034,
    "efficientnet_b0": 0.0067,
    "resnet18": 0.0059,
    "vit_b_16": 0.060,
}
CPU_LORA, CPU_SAMPLE = 0.03, 0.28
# Multiply-adds per image, forward: classifiers at 224 pixels, the U-Net of SD 1.5 at 512.
GMACS = {
    "densenet169": 3.4,
    "mobilenet_v2": 0.3,
    "efficientnet_b0": 0.4,
    "resnet18": 1.8,
    "vit_b_16": 17.6,
}
UNET_GMACS = 400.0
GPU_FLOPS = 2e13  # assumed to be sustained
# what to reckon with where the table is not there
PAPER_COUNTS = {"all": 6148, "balanced": 1150, "": 0}
PUBLISHED = 5000  # synthetic images of the authors
SHOWN = 5  # names of missing images that are printed


def missing_images(records: Iterable[Record]) -> list[Record]:
    return [record for record in dict.fromkeys(records) if not record.path.is_file()]


def missing_weights(names: Iterable[str]) -> list[str]:
    """A line for each network whose ImageNet weights are not in torch's cache: what, from where, to
    where."""
    lines = []
    for name in names:
        url = get_model_weights(name).IMAGENET1K_V1.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        if not path.is_file():
            lines.append(
                f"ImageNet weights of {name}: downloaded when needed, or put {url} at {path}"
            )
    return lines


def needed_datasets(selections: Selections, kinds: Iterable[str], out: Path) -> list[str]:
    """A line for each dataset: is it whole? The names of all missing images go to missing_*.txt in
    `out`."""
    lines = []
    names = ("first site", "second site") if selections.own else ("Spanish", "African")
    sources = {
        names[0]: lambda: [record for kind in kinds for record in selections.spanish(kind)],
        names[1]: lambda: selections.african(train=True) + selections.african(train=False),
    }
    for name, images in sources.items():
        fetch = (
            f"python -m planes.download --only {name.lower()} --to DIR, then --{name.lower()}"
            " DIR/<its folder>"
        )
        fetch = "put them where they are said to be" if selections.own else fetch
        try:
            records = list(dict.fromkeys(images()))
        except DatasetError as error:
            lines.append(f"{name} dataset: {error}; get it: {fetch}")
            continue
        if lost := missing_images(records):
            path = out / f"missing_{name.lower().replace(' ', '_')}.txt"
            out.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(f"{record.path}\n" for record in lost))
            first = ", ".join(record.path.name for record in lost[:SHOWN])
            lines.append(
                f"{name} images: {len(lost):,} of {len(records):,} are missing:"
                f" {first}{', ...' * (len(lost) > SHOWN)} (all names: {path}); get them: {fetch}"
            )
        else:
            lines.append(f"{name} images: all {len(records):,} are there")
    return lines


def describe_time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"


def classifier_seconds(classifier: str, passes: int, size: int, full: bool) -> float:
    if full:
        return passes * 6e9 * GMACS[classifier] * (size / 224) ** 2 / GPU_FLOPS
    return passes * CPU_PASS[classifier] * (size / 64) ** 2


def synthesis(args, scale, kinds: set[str], full: bool, classes: int) -> tuple[float, int, str]:
    """Seconds, bytes and a line of the plan for LoRAs and images of these kinds
    (paper.plan.DataModel)."""
    shared = kinds & {"lora", "prompts"}  # by the paper's LoRA; each of the others has its own
    figure_3 = not (args.quick or args.only or args.synthetic)
    ranks = RANKS if figure_3 else (scale.rank,) if shared else ()
    others = len(kinds - shared)
    images, panels = (
        2 * classes * scale.count * len(kinds),
        2 * classes * 36 * figure_3 * (len(RANKS) - 1),
    )
    lora, sample = (6e9 * UNET_GMACS, 4e9 * UNET_GMACS * 20) if full else (CPU_LORA, CPU_SAMPLE)
    passes = 100 * scale.repeats * (len(ranks) + others)
    seconds = (passes * lora + (images + panels) * sample) / (GPU_FLOPS if full else 1)
    wanted = [f"rank {', '.join(map(str, ranks))}"] * bool(ranks)
    wanted += [f"{others} of rank {scale.rank} with captions of their own"] * bool(others)
    line = f"LoRAs to train: {' and '.join(wanted)}; synthetic images to make: {images:,}"
    return seconds, images * (512 if full else 96) ** 2 * 3, line


def preview(
    args, scale, selections: Selections | None, models: Iterable[str] = (), *, full: bool, done
) -> str:
    """The plan as text.

    args, scale: reproduce.py's
    selections: None for phantoms
    models: a line for each base model that is named: is it here?
    full: at the paper's scale, on a GPU, and not the embedded one
    done: (row, seed) -> whether that run's outcome is there
    """
    size, classes = (
        RECIPES[args.recipe].size if full else 64,
        len(selections.classes) if selections else len(PLANES),
    )
    remote = str(args.synthetic) == "zenodo" and not args.synthetic.exists()
    known = selections.classes if selections else PLANES
    listed = read_synthetic(args.synthetic, known) if args.synthetic and not remote else []
    lines, seconds, disk = [], 0.0, 0
    for n, row in enumerate(args.rows):
        taken = args.synthetic and row.data.synthetic == "lora"
        synthetic = (
            (len(listed) or PUBLISHED)
            if taken
            else 2 * classes * scale.count * bool(row.data.synthetic)
        )
        spanish, african = selections.counts(row) if selections else scale.phantoms(row.data)
        guess = PAPER_COUNTS[row.data.spanish] if spanish is None else spanish
        guess += synthetic + (217 * row.data.african if african is None else african)
        passes = (scale.passes.get(row.classifier) or 20 * guess) if row.classifier in MODELS else 0
        twin = any(
            (row.data, row.classifier) == (other.data, other.classifier) for other in args.rows[:n]
        )
        left = 0 if twin else sum(not done(row, seed) for seed in args.seeds)
        if row.classifier in MODELS:  # what a frozen model takes is not known before it is here
            seconds += left * classifier_seconds(row.classifier, passes, size, full)
            with torch.device("meta"):
                disk += left * 4 * sum(p.numel() for p in MODELS[row.classifier]().parameters())
        cells = ["?" if count is None else f"{count:,}" for count in (spanish, synthetic, african)]
        lines.append(
            [
                f"{row.name} (table {row.table})",
                *cells,
                f"{passes:,}",
                "as above" if twin else left or "done",
            ]
        )

    state = ["phantoms of two sites stand in for the datasets"]
    if selections:
        kinds = dict.fromkeys(
            [row.data.spanish for row in args.rows if row.data.spanish] + ["lora"]
        )
        state = needed_datasets(selections, kinds, args.out)
    if remote:
        state.append(
            f"the authors' synthetic images: fetched from Zenodo, record {SYNTHETIC}, when needed"
        )
    elif args.synthetic:
        lost = missing_images(listed)
        state.append(
            f"{args.synthetic}:"
            f" {f'{len(lost):,} images are missing' if lost else 'all images are there'}"
        )
    if made := {row.data.synthetic for row in args.rows} - (
        {"", "lora"} if args.synthetic else {""}
    ):
        time, space, line = synthesis(args, scale, made, full, classes)
        seconds, disk, state = seconds + time, disk + space, [*state, line]
    state += models
    if args.weights == "imagenet":
        state += missing_weights(
            dict.fromkeys(r.classifier for r in args.rows if r.classifier in MODELS)
        )
    elif args.weights != "none":
        state.append(f"{args.weights}: {'there' if Path(args.weights).is_file() else 'missing'}")
    state += [
        f"{line} (without it, features of our own classifier)"
        for line in missing_weights(["inception_v3"])
    ]

    machine = (
        f"one GPU that sustains {GPU_FLOPS / 1e12:.0f} TFLOP/s (assumed)"
        if full
        else "two CPU cores"
    )
    sites = (
        ("# source", "# target") if selections and selections.own else ("# Spanish", "# African")
    )
    header = ["Row", sites[0], "# synthetic", sites[1], "image passes", "runs left"]
    return "\n".join(
        [
            f"{len(args.rows)} rows x {len(args.seeds)} seeds, recipe {args.recipe}",
            "",
            table(header, lines),
            "",
            *(f"- {line}" for line in state),
            "",
            f"about {describe_time(seconds)} on {machine}; at most {disk / 1e9:.1f} GB of disk",
        ]
    )


def table(header: list[str], rows: list[list[object]]) -> str:
    """Columns as wide as their widest cell; the first is text, the others are numbers."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])),
            ]
        )
        for row in cells
    )

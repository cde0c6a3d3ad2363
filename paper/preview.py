"""What a reproduction would run, and what is missing for it on this machine."""

from collections.abc import Iterable, Mapping
from itertools import product

from classify.models import MODELS, imagenet_file
from ldm.cli import describe_models
from paper.material import PHANTOMS, Selections
from paper.plan import PAPER, Row, Scale, image_kinds
from paper.results import row_folder
from planes import PLANES
from planes.datasets import DatasetError, require_images

# Seconds on two CPU cores, measured: an image in a classifier's training at 64 px; in a LoRA's, and
# sampled, at 96.
CPU_PASS = {
    "densenet169": 0.014,
    "mobilenet_v2": 0.0034,
    "efficientnet_b0": 0.0067,
    "resnet18": 0.0059,
    "vit_b_16": 0.060,
}
CPU_LORA, CPU_SAMPLE = 0.03, 0.28


def missing_weights(names: Iterable[str]) -> list[str]:
    """A line for each network whose ImageNet weights are not in torch's cache: what, from where, to
    where."""
    lines = []
    for name in names:
        entry, path = imagenet_file(name)
        if not path.is_file():
            lines.append(f"weights of {name}: downloaded when needed, or put {entry.url} at {path}")
    return lines


def missing_images(selections: Selections, kind: str) -> str:
    """Are all images of a kind there?"""
    try:
        require_images(selections.images(kind))
    except DatasetError as error:
        return f"{kind}: {error}"
    return f"{kind}: all images are there"


def real_counts(row: Row, scale: Scale, selections: Selections | None) -> tuple[object, object]:
    """Training images of a row from either site; "?" where a table is not there."""
    kind, target = row.data.source, row.data.target
    if selections is None:  # phantoms, as planes.phantoms writes them; two countries lack thorax
        each = scale.per_plane[kind] if kind else 0
        source = sum(PHANTOMS["train"].values()) if each is None else len(PLANES) * each
        return source, (PHANTOMS["patients"] + 1) // 2 * (3 * 4 + 2 * 3) * target
    try:
        source = selections.images(kind) if kind else []
        return len(source), len(selections.target(train=True)) if target else 0
    except DatasetError:
        return "?", "?"


def cpu_minutes(args, scale: Scale, left: Mapping[Row, int], drawn: int) -> float:
    """Of the trainings and the drawing that are left, on two cores, but for the ranks that
    figure 3 alone shows. drawn: images of a kind."""
    given = {"", "lora"} if args.synthetic else {""}
    kinds = {row.data.synthetic for row, runs in left.items() if runs} - given
    loras = 0 if args.lora else len(kinds)
    seconds = 100 * scale.repeats * loras * CPU_LORA + drawn * len(kinds) * CPU_SAMPLE
    for row, runs in left.items():
        if row.classifier in scale.passes:
            seconds += runs * scale.passes[row.classifier] * CPU_PASS[row.classifier]
    return seconds / 60


def preview(args, scale: Scale, selections: Selections | None) -> str:
    """The plan as text.

    args, scale: reproduce.py's
    selections: None for phantoms
    """
    rows = {(row.data, row.classifier): row for row in args.rows}.values()  # some in two tables
    left = dict.fromkeys(rows, 0)
    for row, seed in product(rows, args.seeds):
        folder = row_folder(args.out, row.data.name, row.classifier, seed)
        left[row] += not (folder / "args.json").exists()
    drawn = 2 * len(selections.classes if selections else PLANES) * scale.count
    lines = [("Row", "# source", "# synthetic", "# target", "runs left")]
    for row in rows:
        source, target = real_counts(row, scale, selections)
        given = args.synthetic and row.data.synthetic == "lora"
        synthetic = "given" if given else drawn if row.data.synthetic else 0
        able = target == "?" or not selections or selections.can_train(row)
        runs = left[row] or "done" if able else "left out"
        lines.append((row.name, source, synthetic, target, runs))

    state = describe_models(args)
    if selections and not selections.own:
        state += (missing_images(selections, kind) for kind in image_kinds(rows))
    if args.weights == "imagenet":
        classifiers = dict.fromkeys(row.classifier for row in rows)
        state += missing_weights(name for name in classifiers if name in MODELS)
    state += missing_weights(["inception_v3"])
    if scale is not PAPER:  # of which nobody has measured a GPU
        minutes = cpu_minutes(args, scale, left, drawn)
        state.append(f"training and drawing: {minutes:.0f} minutes on two CPU cores")
    wide = max(len(row.name) for row in rows)
    table = [f"{name:{wide}}" + "".join(f"{cell:>13}" for cell in line) for name, *line in lines]
    title = f"{len(rows)} rows x {len(args.seeds)} seeds, recipe {args.recipe}"
    return "\n".join([title, "", *table, "", *(f"- {line}" for line in state)])

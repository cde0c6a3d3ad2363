"""What a reproduction would run, and what is missing for it on this machine."""

import os
from collections import Counter
from collections.abc import Iterable
from itertools import product

import torch

from classify.models import MODELS, imagenet_file
from harness.processes import cores
from ldm.cli import describe_models
from paper.document import plural
from paper.material import PHANTOMS, Selections
from paper.plan import RANKS, Row, Scale, image_kinds
from paper.results import row_folder
from planes import PLANES
from planes.datasets import DatasetError, require_images

LEARN, DRAW = "a LoRA", "images"
"""What a stage is that trains no classifier."""


def worth_starting(args) -> tuple[int, int, str]:
    """How many processes shall share the work, with how many threads each (0: as it comes), and
    why.

    One to a GPU; on a CPU one to a core, each with one thread, a single one too: the last bits
    depend on that number. Not of a large model, whose weights each would hold.
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    asked = args.processes
    runs, place, threads, each = len(args.rows) * len(args.seeds), "GPU", 0, ""
    places, large = torch.cuda.device_count() if device == "cuda" else 1, False
    if device == "cpu":
        large = bool(args.model and not asked)
        given = large or "OMP_NUM_THREADS" in os.environ
        threads, place = torch.get_num_threads() if given else 1, "core"
        each = f", each with {plural(threads, 'thread')}"
        if hasattr(os, "getloadavg"):  # not on Windows
            each += f"; load of the last minute: {os.getloadavg()[0]:.1f}"
        places = 1 if large else max(1, cores() // threads)
    why = f"one to a {place if places <= runs else 'row'}"
    why = "as --processes says" if asked else "as the model is large" if large else why
    return asked or min(places, runs), threads, why + each


def figure_ranks(args, scale: Scale) -> tuple[int, ...]:
    """The LoRAs that figure 3 shows; none where rows were chosen or the images are given."""
    if args.only or args.synthetic:
        return ()
    return (scale.rank,) if args.quick or args.lora else RANKS


def count_stages(args, scale: Scale, rows: Iterable[Row]) -> Counter[str]:
    """How many stages there are of what kind: LEARN, DRAW, or a classifier's name."""
    ranks = figure_ranks(args, scale)
    drawn = {row.data.synthetic for row in rows} - {"", "lora" if args.synthetic else ""}
    learned = drawn - {"prompts"} | ({"lora"} if drawn & {"prompts", "token"} else set())
    learned |= {"lora", "styles"} if ranks else set()
    learned -= {"lora", "styles"} if args.lora else set()
    plain = bool(ranks) or "dreambooth" in drawn
    stages = {(row.data.name, row.classifier) for row in rows}
    counts = Counter(classifier for _, classifier in stages for _ in args.seeds)
    counts[LEARN] = len(learned) + len(ranks[1:])
    counts[DRAW] = len(drawn | ({"lora"} if ranks else set())) + len(ranks[1:]) + plain
    return counts


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
    lines = [("Row", "# source", "# synthetic", "# target", "runs missing")]
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
    count, _, why = worth_starting(args)
    state.append(f"processes: {count}, {why}")
    wide = max(len(row.name) for row in rows)
    table = [f"{name:{wide}}" + "".join(f"{cell:>13}" for cell in line) for name, *line in lines]
    title = f"{len(rows)} rows x {len(args.seeds)} seeds, recipe {args.recipe}"
    return "\n".join([title, "", *table, "", *(f"- {line}" for line in state)])

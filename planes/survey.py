"""What there is at one or two sites, before hours of work: a table, what is odd, and what a later
stage would refuse.

    python -m planes.sites clinic_a clinic_b

The scripts that train on sites ask the same before their first step.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont, ImageOps

from harness.files import left_out, some, walk, whole_file
from harness.flags import TEMPLATE, HelpFormatter
from planes.datasets import Record, balanced, require_images
from planes.leaks import same_bytes
from planes.pictures import ImageError, bits_of, open_image
from planes.sites import TABLE, classes_of, has_patients, prompts_of, read_site
from planes.tables import DatasetError

FEW = 8
SHOWN, SIDE = 8, 96  # thumbnails of a class and site, and their side in px

Sites = Sequence[tuple[Path, list[Record]]]

_told: set[str] = set()  # lines that this process has said


def survey(
    sites: Sites,
    *,
    template: str | None = None,
    per_class: int = 0,
    fewer: bool = False,
    say: Callable[[str], object] | None = None,
) -> str:
    """What there is at a source, a target, or both: a table, and a line for each warning.

    sites: the folder and the records (`planes.sites.read_site`) of each
    template: of prompts, where such are made
    per_class: images of each class that a LoRA is trained on; 0: there is none
    fewer: then take as many as the rarest class has
    say: is told each warning once a process

    Raises DatasetError for a template without {class}, a class that the target has and the source
    has not, a class that no training image is left of, too few images for the LoRA, and images that
    are missing or cannot be opened: all are opened.
    """
    records, warnings = [record for _, site in sites for record in site], []
    train = [record for record in records if record.source == "source" and record.train]
    classes = classes_of(records)
    prompts_of(classes, template or "{class}")
    if records[0].source == "source":
        if lost := {*classes} - {*classes_of(train)}:
            raise DatasetError(
                f"{sites[0][0]}: nobody can learn {', '.join(sorted(lost))}, as no images are"
                " there to train on; add some, or take these classes out"
            )
        least = min(Counter(record.plane for record in train).values())
        if fewer and least < per_class:
            told = f"a LoRA takes as many images of each class as the rarest has: {least}"
            warnings.append(f"{told}, not {per_class}")
        else:
            balanced(train, per_class, 0, classes)
    require_images(records)
    tables = [_table(*site) for site in sites]
    warnings += [line for site in sites for line in _remarks(*site)]
    warnings += _copies(records)
    named = [
        {r.patient.partition("/")[2] for r in site if not r.patient.endswith(r.path.name)}
        for _, site in sites
    ]
    if same := sorted(named[0] & named[-1]) * (len(sites) - 1):
        warnings.append(
            f"patients of the same name at both sites: {some(same)} ({len(same)}); if they are the"
            " same people, leave them out of one"
        )
    for line in warnings:
        if say and line not in _told:
            say(line)
            _told.add(line)
    return "\n- ".join(["\n\n".join(tables) + "\n", *warnings])


def _table(root: Path, site: list[Record]) -> str:
    """The site in a line, each class in one. Raises ImageError for what cannot be opened."""
    with ThreadPoolExecutor() as threads:
        changed = [record.path.stat().st_mtime_ns for record in site]
        looks = [*threads.map(_look, site, changed)]
    if bad := [look for look in looks if isinstance(look, ImageError)]:
        raise ImageError(f"{bad[0]} (unreadable in {root}: {len(bad)} of {len(site)})")
    bits, sizes = (sorted({*values}) for values in zip(*looks))
    px = " to ".join(dict.fromkeys(f"{w}x{h}" for w, h in (sizes[0], sizes[-1])))
    lines = [f"{root}: {len(site)} images of {' and '.join(map(str, bits))} bits, {px} px"]
    row = "  {:24}" + "{:>10}" * 4
    lines.append(row.format("class", "images", "train", "test", "patients"))
    for name in classes_of(site):
        own = [record for record in site if record.plane == name]
        patients = len({record.patient for record in own}) if has_patients(site) else "-"
        train = sum(record.train for record in own)
        lines.append(row.format(name, len(own), train, len(own) - train, patients))
    return "\n".join(lines)


@cache
def _look(record: Record, changed: int) -> tuple[int, tuple[int, int]] | ImageError:
    """An image's bits, its width and height, or why it cannot be opened.

    changed: when its file was
    """
    try:
        size = open_image(record.path, record.levels).size
        return bits_of(record.path), size
    except ImageError as error:
        return error


def _remarks(root: Path, site: list[Record]) -> list[str]:
    """Lines on one site: few images, patients, what is left out."""
    (images, others), lines = walk(root), []
    if few := [f"{name} ({n})" for name, n in Counter(r.plane for r in site).items() if n < FEW]:
        lines.append(f"fewer than {FEW} images of {', '.join(few)}: scores will say little")
    if not has_patients(site):
        lines.append("names no patients, so each image counts as one of its own")
    elif len({record.patient for record in site}) == 1:
        lines.append("all images are of one patient, so scores get no intervals")
    if (root / TABLE).is_file():
        if rest := sorted({*images} - {record.path for record in site}):
            lines.append(f"not in {TABLE}: {some(p.name for p in rest)} ({len(rest)})")
    elif inner := {r.patient.partition("/")[2] for r in site if r.path.parent.parent != root}:
        lines.append(f"folders below a class are taken for patients: {some(sorted(inner))}")
    return [f"{root}: {line}" for line in lines] + [left_out(root, others)] * bool(others)


def _copies(records: list[Record]) -> list[str]:
    """Lines on files that are byte for byte the same, one for each way in which they are."""
    ways = defaultdict(list)
    for first, *others in same_bytes(records):
        for copy in others:
            near = "others of their site" if copy.source == first.source else "the other site's"
            way = near if copy.plane == first.plane else "images with another label"
            ways[way].append(f"{copy.path} is {first.path}")
    return [f"copies of {way} ({len(such)}): {such[0]}" for way, such in ways.items()]


def sheet(sites: Sites) -> Image.Image:
    """Up to SHOWN images of each class, a numbered line each, the sites side by side."""
    classes = classes_of(record for _, site in sites for record in site)
    width, height = SHOWN * SIDE + 16, SIDE + 24
    font = ImageFont.truetype(findfont("DejaVu Sans"), 14)  # which has more letters than Pillow's
    picture = Image.new("RGB", (width * len(sites), height * len(classes)), "white")
    for row, column in np.ndindex(len(classes), len(sites)):
        site, x, y = sites[column][1], width * column, height * row
        of = [record for record in site if record.plane == classes[row]]
        words = f"{row + 1} {classes[row]}, {site[0].source} {site[0].center}: {len(of)}"
        ImageDraw.Draw(picture).text((x, y), words, "black", font)
        shown = range(min(SHOWN, len(of)))
        for n, record in ((n, of[n * len(of) // len(shown)]) for n in shown):
            small = ImageOps.contain(open_image(record.path, record.levels), (SIDE - 2, SIDE - 2))
            picture.paste(small, (x + SIDE * n, y + 20))
    return picture


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m planes.sites", description=__doc__, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("source", type=Path, help="a folder of images for each class, or an images.csv")
    add("target", type=Path, nargs="?", help="another, if there is one")
    add("--prompt-template", **TEMPLATE)
    add("--per-plane", type=int, default=0, help="images of each class that a LoRA trains on")
    add("--out", type=Path, default=Path("runs/sites"), help="folder for sites.png")
    return parser.parse_args(argv)


def main(args):
    """Prints the survey, and writes sites.png."""
    sites = [(args.source, read_site(args.source, "source", True))]
    if args.target:
        sites.append((args.target, read_site(args.target, "target", False)))
    found = survey(sites, template=args.prompt_template, per_class=args.per_plane)
    with whole_file(args.out / "sites.png") as part:
        sheet(sites).save(part, format="PNG")
    sys.stdout.write(f"{found}\n\n{args.out / 'sites.png'}\n")

"""What there is at one or two sites, before hours of work: a table, what is odd, and what a later
stage would refuse. At work in `python -m planes.sites`, and before every script's first step."""

import argparse
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from harness.files import left_out, sha256, some, walk, whole_file
from harness.flags import HELD_OUT, HelpFormatter, require_at_least
from planes.datasets import Record, balanced, require_images
from planes.leaks import same_names
from planes.pictures import ImageError, bits_of, open_image
from planes.sites import TABLE, classes_of, has_patients, prompts_of, read_site
from planes.tables import DatasetError

FEW = 8
SHOWN, SIDE = 8, 96  # thumbnails of a class and site, and their side in px

Sites = Sequence[tuple[Path, list[Record]]]

_told: set[str] = set()  # lines that this process has said


@dataclass(frozen=True)
class Survey:
    """table: of classes, images, patients, sizes and bits; warnings: a line each."""

    table: str
    warnings: list[str]

    def __str__(self) -> str:
        return "\n".join([self.table, "", *(f"- {line}" for line in self.warnings)])


def survey(
    sites: Sites,
    *,
    template: str | None = None,
    per_class: int | None = None,
    fewer: bool = False,
    say: Callable[[str], object] | None = None,
) -> Survey:
    """What there is at a source, a target, or both.

    sites: the folder and the records (`planes.sites.read_site`) of each
    template: of prompts, where such are made
    per_class: images of each class that a LoRA is trained on
    fewer: then take as many as the rarest class has
    say: is told each warning once a process

    Raises DatasetError for a template without {class}, a class that the target has and the source
    has not, a class that no training image is left of, too few images for the LoRA, and images that
    are missing or cannot be opened: all are opened.
    """
    records = [record for _, site in sites for record in site]
    source = [record for record in records if record.source == "source"]
    train, classes, warnings = [r for r in source if r.train], classes_of(source), []
    if template is not None:
        prompts_of(classes, template)
    for root, site in sites:
        if source and (unknown := [name for name in classes_of(site) if name not in classes]):
            raise DatasetError(
                f"{root}: nobody can learn {', '.join(unknown)}, as {sites[0][0]} has images of"
                f" {', '.join(classes)} alone; take these images out"
            )
    if untrained := [name for name in classes if name not in classes_of(train)]:
        raise DatasetError(
            f"{sites[0][0]}: nobody can learn {', '.join(untrained)}: all of its images are for the"
            " test or held out; give it training images, or take these out"
        )
    if per_class and source:
        least = min(Counter(record.plane for record in train).values())
        if least < per_class and fewer:
            warnings.append(
                f"a LoRA is trained on {least} images of each class, as many as the rarest has, not"
                f" on {per_class}"
            )
        else:
            balanced(train, per_class, 0, classes)
    require_images(records)
    tables = [_table(root, site) for root, site in sites]
    warnings += [line for root, site in sites for line in _remarks(root, site)]
    warnings += _copies(records)
    if len(sites) == 2 and (same := same_names(*(site for _, site in sites))):
        warnings.append(
            f"{len(same)} patients of the same names at both sites ({some(same)}): if they are the"
            " same people, leave them out of one"
        )
    for line in warnings:
        if say and line not in _told:
            _told.add(line)
            say(line)
    return Survey("\n\n".join(tables), warnings)


def _table(root: Path, site: list[Record]) -> str:
    """The site in a line, each class in one. Raises ImageError for what cannot be opened."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        looks = threads.map(lambda r: _look(r.path, r.levels, r.path.stat().st_mtime_ns), site)
        looks = dict(zip(site, looks))
    if bad := [look for look in looks.values() if isinstance(look, ImageError)]:
        more = f"; {len(bad)} pictures of {root} are so" * (len(bad) > 1)
        raise ImageError(f"{bad[0]}{more}")
    lines = [("class", "images", "train", "test", "patients", "bits", "px")]
    named = has_patients(site)
    for name in classes_of(site):
        of = [record for record in site if record.plane == name]
        train = sum(record.train for record in of)
        patients = len({record.patient for record in of}) if named else "-"
        bits = ", ".join(map(str, sorted({looks[record][1] for record in of})))
        sizes = sorted({looks[record][0] for record in of}, key=math.prod)
        px = " to ".join(dict.fromkeys(f"{w}x{h}" for w, h in (sizes[0], sizes[-1])))
        lines.append((name, len(of), train, len(of) - train, patients, bits, px))
    wide = max(len(line[0]) for line in lines)
    rows = [f"  {name:{wide}}" + "".join(f"  {cell:>8}" for cell in line) for name, *line in lines]
    return "\n".join([f"{root}: {len(site)} images", *rows])


@cache
def _look(path: Path, levels: tuple, changed: int) -> tuple[tuple[int, int], int] | ImageError:
    """Width and height of an image, and its bits, or why it cannot be opened.

    changed: when its file was
    """
    try:
        return open_image(path, levels).size, bits_of(path)
    except ImageError as error:
        return error


def _remarks(root: Path, site: list[Record]) -> list[str]:
    """Lines on one site: few images, patients, what is left out."""
    lines, found = [], walk(root)
    if few := [f"{name} ({n})" for name, n in Counter(r.plane for r in site).items() if n < FEW]:
        lines.append(f"{root}: fewer than {FEW} images of {', '.join(few)}: scores will say little")
    if not has_patients(site):
        lines.append(f"{root}: names no patients, so each image counts as one of its own")
    if (root / TABLE).is_file():
        listed = {record.path for record in site}
        if rest := [path for path in found.images if path not in listed]:
            lines.append(f"{root}: {len(rest)} pictures are not in its {TABLE}: {some(rest)}")
    elif folders := sorted({r.path.parent for r in site if r.path.parent.parent != root}):
        lines.append(f"{root}: subfolders of the classes are taken for patients: {some(folders)}")
    return [*lines, *filter(None, [left_out(root, found.others)])]


def _copies(records: list[Record]) -> list[str]:
    """Lines on files that are byte for byte the same, one for each way in which they are."""
    sizes = Counter(record.path.stat().st_size for record in records)
    groups = defaultdict(list)
    for record in records:
        if sizes[record.path.stat().st_size] > 1:  # files of different sizes differ
            groups[sha256(record.path)].append(record)
    pairs = [(a, b) for a, *others in groups.values() for b in others]
    ways = {
        "copies of others of their site": [p for p in pairs if p[0].source == p[1].source],
        "copies of the other site's": [p for p in pairs if p[0].source != p[1].source],
        "copies with another label": [p for p in pairs if p[0].plane != p[1].plane],
    }
    return [
        f"{len(some)} images are {way}: {some[0][1].path} is {some[0][0].path}"
        for way, some in ways.items()
        if some
    ]


def sheet(sites: Sites) -> Image.Image:
    """Up to SHOWN images of each class, a numbered line each, the sites side by side."""
    classes = classes_of(record for _, site in sites for record in site)
    wide, high, font = SHOWN * SIDE + 16, SIDE + 24, ImageFont.load_default(14)
    picture = Image.new("RGB", (wide * len(sites), high * len(classes)), "white")
    draw = ImageDraw.Draw(picture)
    for column, (_, site) in enumerate(sites):
        for row, name in enumerate(classes):
            of = [record for record in site if record.plane == name]
            words = f"{row + 1} {name}, {site[0].source} {site[0].center}: {len(of)}"
            draw.text((wide * column, high * row + 3), words, "black", font)
            for n in range(min(SHOWN, len(of))):
                record = of[n * len(of) // min(SHOWN, len(of))]
                small = ImageOps.contain(
                    open_image(record.path, record.levels), (SIDE - 2, SIDE - 2)
                )
                picture.paste(small, (wide * column + n * SIDE, high * row + 22))
    return picture


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m planes.sites", description=__doc__, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("sites", type=Path, nargs="+", help="the source, and the target if there is one")
    add("--prompt-template", help='of a LoRA\'s captions, as "an X-ray of {class}"')
    add("--per-plane", type=int, help="images of each class that a LoRA is to be trained on")
    add("--held-out", **HELD_OUT)
    add("--out", type=Path, default=Path("runs/sites"), help="folder for sites.png")
    args = parser.parse_args(argv)
    require_at_least(parser, args, 1, "per_plane")
    if len(args.sites) > 2:
        parser.error(f"{len(args.sites)} sites: give a source, and a target if there is one")
    return args


def main(args):
    """Prints the survey, and writes sites.png."""
    sites = [(args.sites[0], read_site(args.sites[0], "source", True, args.held_out))]
    sites += [(root, read_site(root, "target", False)) for root in args.sites[1:]]
    found = survey(sites, template=args.prompt_template, per_class=args.per_plane)
    with whole_file(args.out / "sites.png") as part:
        sheet(sites).save(part, format="PNG")
    sys.stdout.write(f"{found}\n\n{args.out / 'sites.png'}\n")

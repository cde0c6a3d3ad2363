"""The words of images: the prompts they are sampled with, the captions that LoRA is trained with, a
token in either."""

import json
import random
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import numpy as np

from harness.files import file_below, write_text
from planes import PLANES, PROMPT_LISTS, PROMPTS
from planes.datasets import DatasetError, balanced, read_manifest, read_spanish, require_images
from planes.folders import Captioned, read_captioned_folder
from planes.leaks import same_bytes
from planes.pictures import open_image, with_levels
from planes.sites import classes_of, prompts_of, read_site, require_class_name
from planes.style import STYLES, style_words, with_style
from planes.survey import survey
from planes.tables import from_json, read_table, read_text

PROMPTS_FILE = "prompts.json"
"""Beside a LoRA that was trained on another site than the paper's, or in a model that it was merged
into: the captions of its classes, as `read_prompts` takes them from a file."""


def write_prompts(folder: Path, prompts: Mapping[str, str]) -> Path:
    """PROMPTS_FILE in a folder, of captions that are sampled as they were trained, to the letter:
    what weighs words there, brackets, backslashes and BREAK, is escaped by a backslash."""
    marks = re.compile(r"[()\[\]\\]|(?<=\bB)(?=REAK\b)")
    lists = {name: [marks.sub(r"\\\g<0>", text)] for name, text in prompts.items()}
    write_text(folder / PROMPTS_FILE, json.dumps(lists, indent=2, ensure_ascii=False) + "\n")
    return folder / PROMPTS_FILE


def prompts_file(loras: Sequence[Path], *models: str) -> Path | None:
    """The PROMPTS_FILE beside the first of the LoRAs that has one, or in a model's folder."""
    places = [*(path.parent for path in loras), *models]
    return next(filter(Path.is_file, (Path(place, PROMPTS_FILE) for place in places)), None)


def prompts_beside(loras: Sequence[Path], *models: str) -> dict[str, str]:
    """The prompt of each class of the run that a LoRA comes from, or the model that it was merged
    into: PROMPTS, or those of `prompts_file`. Raises DatasetError for a file of them that is
    none."""
    if not (file := prompts_file(loras, *models)):
        return dict(PROMPTS)
    return {name: prompts[0] for name, prompts in _read_lists(file, None).items()}


def read_prompts(source: str, base: Mapping[str, str] = PROMPTS) -> dict[str, tuple[str, ...]]:
    """The prompts of each class: "paper" (one each), "styles" (with every pair of words for
    brightness and contrast), "detailed" (PROMPT_LISTS), or a JSON file of such lists.

    base: the one prompt of each class, which the first two are made of

    Raises DatasetError unless the file is an object that has a list of at least one prompt for each
    class, and no more; it may have classes of its own, none of which is a plane.
    """
    if source == "paper":
        return {name: (prompt,) for name, prompt in base.items()}
    if source == "styles":
        return {n: tuple(with_style(prompt, s) for s in STYLES) for n, prompt in base.items()}
    if source != "detailed":
        return _read_lists(Path(source), base)
    if {*base} != {*PLANES}:
        raise DatasetError(
            f"--prompts detailed: of the paper's planes, not of {', '.join(base)}: give a file of"
            " them"
        )
    return PROMPT_LISTS


def _read_lists(source: Path, classes: Iterable[str] | None) -> dict[str, tuple[str, ...]]:
    """The lists of a file, of these classes; of classes of its own where they are none, or the
    planes and it has none of those."""
    text = read_text(source)
    try:
        lists = from_json(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{source}: cannot be read as JSON in UTF-8 ({error})") from None
    if not isinstance(lists, dict) or not lists:
        raise DatasetError(f"{source}: no object with a list of prompts for each class")
    lists = {normalize("NFC", name).strip(): prompts for name, prompts in lists.items()}
    if classes is None or ({*classes} == {*PLANES} and not {*lists} & {*PLANES}):
        for name in lists:
            require_class_name(name, source)
        classes = lists
    if {*lists} != {*classes}:
        raise DatasetError(
            f"{source}: needs a list of prompts for each of {', '.join(classes)}; it has"
            f" {', '.join(lists)}"
        )
    for name, prompts in lists.items():
        texts = isinstance(prompts, list) and all(isinstance(p, str) and p.strip() for p in prompts)
        if not prompts or not texts:
            raise DatasetError(
                f"{source}: {name} needs a list of one or more prompts, in quotation marks"
            )
    return {name: tuple(" ".join(p.splitlines()) for p in lists[name]) for name in classes}


def choose_prompt(prompts: tuple[str, ...], seed: int) -> str:
    """One of the prompts at random: a function of the image's seed alone."""
    return random.Random(seed).choice(prompts)


def prompt_in_turn(prompts: tuple[str, ...], seed: int) -> str:
    """One of the prompts, each as often as the others over consecutive seeds: a function of the
    image's seed alone."""
    return prompts[seed % len(prompts)]


def say_style(image: Captioned) -> Captioned:
    """The image with the words for its brightness and contrast behind its caption (`planes.style`).

    Raises ImageError as `planes.pictures.open_image`.
    """
    words = style_words(open_image(image.path, image.levels))
    return replace(image, caption=with_style(image.caption, words))


def with_token(text: str, token: str | None) -> str:
    """A prompt or caption that names a token: "a photo of fetal femur" becomes "a photo of sks
    fetal femur".

    Another beginning gets it in front; a text that has it already, and every text where it is None,
    stays as it is.
    """
    if token is None or re.search(rf"(?<!\w){re.escape(token)}(?!\w)", text):
        return text
    return re.sub("^(a photo of )?", lambda start: f"{start[0]}{token} ", text)


def training_images(
    args: Namespace, say: Callable[[str], object] = str
) -> tuple[list[Captioned], list[Captioned]]:
    """The images to train on, each file there: those of the folder `args.images`, images of
    `args.spanish` with PROMPTS, or of any site `args.source` with prompts by `args.prompt_template`
    (`planes.sites`); and the images that are held out.

    args: train_lora.py's. Without a `manifest` `per_plane` of each class are drawn by `seed`.
        `validation` images are held out: of a dataset or site training images of other patients, so
        that those that are trained on stay the same; of `images` some of them, which are then not
        trained on. `held_out` is as for `read_site`.
    say: is told what `planes.survey` warns of, and which held-out images are copies of others
    An image's repeats are its folder's, 1 where that names none. A run's own --repeats multiplies
    them, so its default must be 1 where folders name theirs: in kohya, which has no such flag, they
    say all.
    """
    rng = np.random.default_rng([args.seed, 700_001])  # of its own
    prompts, count = PROMPTS, args.validation
    if args.images:
        chosen = pool = with_levels(read_captioned_folder(args.images), args.images)
    else:
        if args.source:
            every = read_site(args.source, "source", True, args.held_out)
            prompts = prompts_of(classes_of(every), args.prompt_template)
            survey([(args.source, every)], per_class=args.per_plane, say=say)
        else:
            every = read_spanish(args.spanish)
        pool = [record for record in every if record.train]
        if args.manifest:
            chosen = read_manifest(args.manifest, every)
        else:
            chosen = balanced(pool, args.per_plane, args.seed, [*prompts])
        patients = {record.patient for record in chosen}
        pool = [record for record in pool if record.patient not in patients]
    if count > len(pool) - bool(args.images):
        raise DatasetError(f"--validation {count}: images left to hold out: {len(pool)}")
    unseen = [pool[n] for n in sorted(rng.permutation(len(pool))[:count])]
    chosen = [image for image in chosen if image not in unseen]
    require_images(chosen + unseen)
    groups = [group for group in same_bytes(chosen + unseen) if group[0] in chosen]
    if copies := [image for group in groups for image in group if image in unseen]:
        say(f"warning: held out but in training too: {copies[0].path} ({len(copies)} of {count})")
    if args.images:
        return chosen, unseen
    return tuple(
        [Captioned(r.path, prompts[r.plane], levels=r.levels) for r in group]
        for group in (chosen, unseen)
    )


def prior_images(manifest: Path) -> list[Captioned]:
    """The images and prompts of a manifest.csv of sample.py, what DreamBooth holds on to (Ruiz et
    al. 2023).

    A caption is the prompt without the backslashes of `write_prompts`. Raises DatasetError where
    there are none.
    """
    return [
        Captioned(file_below(manifest.parent, image), re.sub(r"\\(.)", r"\1", prompt))
        for _, image, prompt in read_table(manifest, "image", "prompt")
    ]

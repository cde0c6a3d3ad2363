"""The words of images: the prompts they are sampled with, the captions that LoRA is trained with, a token in either."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from planes import PLANES, PROMPT_LISTS, PROMPTS, Plane
from planes.datasets import DatasetError, balanced, read_manifest, read_spanish, require_images
from planes.folders import Captioned, read_captioned_folder
from planes.pictures import open_image
from planes.style import STYLES, style_words, with_style
from planes.tables import read_table


def read_prompts(source: str) -> dict[Plane, tuple[str, ...]]:
    """The prompts of each plane: "paper" (PROMPTS, one each), "styles" (PROMPTS with every pair of words for brightness
    and contrast), "detailed" (PROMPT_LISTS), or a JSON file of such lists.

    Raises DatasetError unless the file is an object that has a list of at least one prompt for each plane, and no more.
    """
    if source == "paper":
        return {plane: (prompt,) for plane, prompt in PROMPTS.items()}
    if source == "styles":
        return {plane: tuple(with_style(prompt, words) for words in STYLES) for plane, prompt in PROMPTS.items()}
    if source == "detailed":
        return PROMPT_LISTS
    try:
        lists = json.loads(Path(source).read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{source}: cannot be read as JSON in UTF-8 ({error})") from None
    if not isinstance(lists, dict) or set(lists) != {*PLANES}:
        had = ", ".join(lists) or "none" if isinstance(lists, dict) else "no object"
        raise DatasetError(f"{source}: needs a list of prompts for each of {', '.join(PLANES)}; it has {had}")
    for plane, prompts in lists.items():
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise DatasetError(f"{source}: {plane} needs a list of one or more prompts, in quotation marks")
        if bad := next((prompt for prompt in prompts if not is_text(prompt)), None):
            raise DatasetError(f"{source}: {plane} has {bad!r}, in which half a character stands alone; write it whole")
    return {plane: tuple(lists[plane]) for plane in PLANES}


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; ValueError for a key that is there twice, of which json would take the last."""
    keys = [key for key, _ in pairs]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ValueError(f"{twice!r} is there twice")
    return dict(pairs)


def is_text(text: str) -> bool:
    """Can it be written in UTF-8? A lone surrogate, half of a character, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def choose_prompt(prompts: tuple[str, ...], seed: int) -> str:
    """One of the prompts at random: a function of the image's seed alone."""
    return random.Random(seed).choice(prompts)


def prompt_in_turn(prompts: tuple[str, ...], seed: int) -> str:
    """One of the prompts, each as often as the others over consecutive seeds: a function of the image's seed alone."""
    return prompts[seed % len(prompts)]


def say_style(image: Captioned) -> Captioned:
    """The image with the words for its brightness and contrast behind its caption (`planes.style`).

    Raises ImageError as `planes.pictures.open_image`.
    """
    words = style_words(open_image(image.path))
    return replace(image, caption=with_style(image.caption, words))


def with_token(text: str, token: str | None) -> str:
    """A prompt or caption that names a token: "a photo of fetal femur" becomes "a photo of sks fetal femur".

    Another beginning gets it in front; a text that has it already, and every text where it is None, stays as it is.
    """
    if token is None or re.search(rf"(?<!\w){re.escape(token)}(?!\w)", text):
        return text
    start = "a photo of "
    return f"{start}{token} {text[len(start) :]}" if text.startswith(start) else f"{token} {text}"


def training_images(
    spanish: Path | None, images: Path | None, manifest: Path | None, per_plane: int, seed: int, held_out: int = 0
) -> tuple[list[Captioned], list[Captioned]]:
    """The images to train on, each file there: those of the folder `images`, or images of `spanish` with PROMPTS; and
    the images that are held out.

    manifest: the list of images to take from `spanish`; None: `per_plane` of each plane, drawn by `seed`
    held_out: how many; of `spanish` training images of other patients, so that those that are trained on stay the same;
        of `images` some of them, which are then not trained on
    An image's repeats are its folder's, 1 where that names none. A run's own --repeats multiplies them, so its default
    must be 1 where folders name theirs: in kohya, which has no such flag, they say all.
    """
    rng = np.random.default_rng([seed, 700_001])  # of its own
    if images:
        found = read_captioned_folder(images)
        if held_out >= len(found):
            raise DatasetError(f"{images}: {len(found)} images, of which {held_out} cannot be held out; ask for fewer")
        unseen = {*rng.permutation(len(found))[:held_out].tolist()}
        return [i for n, i in enumerate(found) if n not in unseen], [found[n] for n in sorted(unseen)]
    every = read_spanish(spanish)
    records = read_manifest(manifest, every) if manifest else balanced([r for r in every if r.train], per_plane, seed)
    patients = {record.patient for record in records}
    others = [record for record in every if record.train and record.patient not in patients]
    if held_out > len(others):
        raise DatasetError(f"{len(others)} training images of other patients are left, not {held_out} to hold out")
    unseen = [others[n] for n in sorted(rng.permutation(len(others))[:held_out])]
    require_images(records + unseen)
    chosen, spared = ([Captioned(r.path, PROMPTS[r.plane], 1) for r in group] for group in (records, unseen))
    return chosen, spared


def prior_pairs(manifest: Path) -> list[tuple[Path, str]]:
    """(image, prompt) pairs of a manifest.csv of sample.py, what DreamBooth holds on to (Ruiz et al. 2023).

    Raises DatasetError where there are none, or their files are missing.
    """
    pairs = [(manifest.parent / image, prompt) for _, image, prompt in read_table(manifest, "image", "prompt")]
    if missing := [path for path, _ in pairs if not path.is_file()]:
        raise DatasetError(f"{manifest}: {len(missing)} of {len(pairs)} images are missing, such as {missing[0]}")
    return pairs

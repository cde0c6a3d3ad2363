"""How bright an image is and how much contrast it has, measured, and said in plain words.

The words are a function of the pixels alone, the same for phantoms, real images and the generic
scenes that the embedded model is pre-trained on. A caption that says how a site's images look
leaves the LoRA the anatomy to learn, and a prompt that says it otherwise asks for the same anatomy
as another scanner shows it.
"""

from collections.abc import Iterable
from itertools import product

import numpy as np
from PIL import Image

# px to which an image is reduced before it is measured, so that its own size does not matter
SIDE = 64
BRIGHTNESS = ("very dark", "dark", "bright", "very bright")
CONTRAST = ("low contrast", "normal contrast", "high contrast")
LEVELS, SPREADS = (65.0, 105.0, 150.0), (30.0, 42.0)  # grey levels at which the next word begins

STYLES: tuple[tuple[str, str], ...] = tuple(product(BRIGHTNESS, CONTRAST))
"""Every combination of a word for brightness and one for contrast."""


def middle(image: Image.Image) -> np.ndarray:
    """The grey levels (0 to 255) of the middle of an image, half as wide and high as it is: (32,
    32).

    The middle lies within the sector of whatever probe; the black around it, and what is written
    there, say nothing.
    """
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64)[SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4]


def measure_style(image: Image.Image) -> tuple[float, float]:
    """Upper quartile and standard deviation of the grey levels in the middle of an image.

    The quartile is that of tissue: fluid, which no scanner shows but black, makes an image darker
    by its anatomy.
    """
    levels = middle(image)
    return float(np.quantile(levels, 0.75)), float(levels.std())


def style_words(image: Image.Image) -> tuple[str, str]:
    """The words for an image's brightness and contrast: one of STYLES."""
    level, spread = measure_style(image)
    return BRIGHTNESS[np.searchsorted(LEVELS, level)], CONTRAST[np.searchsorted(SPREADS, spread)]


def with_style(text: str, words: Iterable[str]) -> str:
    """A prompt or caption that says how the image looks: "a photo of fetal brain, dark, high
    contrast"."""
    return ", ".join((text, *words))

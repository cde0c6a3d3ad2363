"""Words for brightness and contrast: a function of the pixels, whatever the image's size and
kind."""

import numpy as np
import pytest
from PIL import Image

from planes.captions import say_style
from planes.folders import Captioned
from planes.style import BRIGHTNESS, CONTRAST, STYLES, measure_style, style_words


def picture(mean, spread, side=128):
    """Vertical stripes eight pixels wide, of two grey levels."""
    stripes = np.where(np.arange(side) // 8 % 2, mean + spread, mean - spread).clip(0, 255)
    return Image.fromarray(np.tile(stripes.astype(np.uint8), (side, 1)))


def test_upper_quartile_and_spread_are_those_of_the_middle_whatever_the_size_and_mode():
    image = np.array(picture(100, 20))
    # outside, and so of no account
    image[:20], image[-20:], image[:, :20], image[:, -20:] = 255, 0, 255, 0
    image = Image.fromarray(image)
    for same in (image, image.convert("RGB"), image.resize((256, 512))):
        assert measure_style(same) == pytest.approx((120, 20), abs=1)


@pytest.mark.parametrize(
    "mean, spread, words",
    [
        *((mean, 0, (n, 0)) for mean, n in ((65, 0), (66, 1), (105, 1), (106, 2), (151, 3))),
        *((99, spread, (2, n)) for spread, n in ((30, 0), (31, 1), (42, 1), (43, 2))),
    ],
)
def test_darker_images_and_flatter_ones_get_the_words_for_it(mean, spread, words):
    assert style_words(picture(mean, spread)) == (BRIGHTNESS[words[0]], CONTRAST[words[1]])
    assert style_words(picture(mean, spread)) in STYLES and len({*STYLES}) == 12


def test_a_black_half_makes_no_image_darker():
    image = np.full((128, 128), 120, np.uint8)
    image[:, :64] = 0
    assert style_words(Image.fromarray(image))[0] == "bright"


def test_an_images_caption_is_told_its_words(tmp_path):
    picture(30, 10).save(tmp_path / "a.png")
    said = say_style(Captioned(tmp_path / "a.png", "a photo", 3))
    assert said == Captioned(tmp_path / "a.png", "a photo, very dark, low contrast", 3)

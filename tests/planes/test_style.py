"""Words for brightness and contrast: a function of the pixels, whatever the image's size and
kind."""

import numpy as np
import pytest
from PIL import Image

from planes import PLANES, PROMPTS, Plane
from planes.captions import prompt_in_turn, read_prompts, say_style
from planes.datasets import DatasetError
from planes.folders import Captioned
from planes.phantoms.phantom import phantom
from planes.phantoms.sites import SITE_A
from planes.style import BRIGHTNESS, CONTRAST, STYLES, measure_style, style_words, with_style


def picture(mean, spread, side=128):
    """Vertical stripes eight pixels wide, of two grey levels."""
    stripes = np.where(np.arange(side) // 8 % 2, mean + spread, mean - spread).clip(0, 255)
    return Image.fromarray(np.tile(stripes.astype(np.uint8), (side, 1)))


def test_upper_quartile_and_spread_are_those_of_the_middle():
    image = np.array(picture(100, 20))
    # outside, and so of no account
    image[:20], image[-20:], image[:, :20], image[:, -20:] = 255, 0, 255, 0
    assert measure_style(Image.fromarray(image)) == pytest.approx((120, 20))


def test_a_black_half_makes_no_image_darker():
    image = np.full((128, 128), 120, np.uint8)
    image[:, :64] = 0
    assert style_words(Image.fromarray(image))[0] == style_words(picture(120, 0))[0] == "bright"


@pytest.mark.parametrize(
    ("mean", "spread", "words"),
    [(30, 10, (0, 0)), (50, 35, (1, 1)), (70, 60, (2, 2)), (180, 5, (3, 0))],
)
def test_darker_images_and_flatter_ones_get_the_words_for_it(mean, spread, words):
    assert style_words(picture(mean, spread)) == (BRIGHTNESS[words[0]], CONTRAST[words[1]])


def test_size_and_colour_mode_change_the_measures_by_less_than_two_grey_levels():
    image = Image.fromarray(
        phantom(Plane.BRAIN, SITE_A, np.random.default_rng(1), np.random.default_rng(2))
    )
    for other in (image.resize((400, 300)), image.convert("RGB"), image.resize((128, 128))):
        assert measure_style(other) == pytest.approx(measure_style(image), abs=2)


def test_there_is_one_style_for_every_pair_of_words():
    assert len(set(STYLES)) == len(STYLES) == len(BRIGHTNESS) * len(CONTRAST)
    assert (
        with_style("a photo of fetal brain", STYLES[0])
        == "a photo of fetal brain, very dark, low contrast"
    )


def test_the_prompts_of_styles_are_the_papers_with_every_pair_of_words_and_taken_in_turn():
    prompts = read_prompts("styles")
    assert {*prompts} == {*PLANES} and all(
        len(set(prompts[plane])) == len(STYLES) for plane in PLANES
    )
    assert all(
        prompt.startswith(f"{PROMPTS[plane]}, ") for plane in PLANES for prompt in prompts[plane]
    )
    for first in (0, 50_000, 7):
        drawn = [prompt_in_turn(prompts["femur"], seed) for seed in range(first, first + 50)]
        assert sorted(map(drawn.count, prompts["femur"])) == [4] * 10 + [5] * 2


def test_an_images_caption_is_told_its_words_and_a_file_that_is_none_is_named(tmp_path):
    picture(30, 10).save(tmp_path / "a.png")
    said = say_style(Captioned(tmp_path / "a.png", "a photo of fetal brain", 3))
    assert said == Captioned(
        tmp_path / "a.png", "a photo of fetal brain, very dark, low contrast", 3
    )
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"b\.png: not a readable image"):
        say_style(Captioned(tmp_path / "b.png", "a photo", 1))

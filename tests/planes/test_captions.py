"""Prompts from files and lists, tokens in them, and which images are trained on with which."""

import json
from argparse import Namespace

import pytest
from shorthand import refused

from planes import PLANES, PROMPT_LISTS, PROMPTS
from planes.captions import (
    choose_prompt,
    prior_images,
    prompt_in_turn,
    prompts_beside,
    read_prompts,
    training_images,
    with_token,
)
from planes.datasets import DatasetError, read_spanish
from planes.folders import Captioned
from planes.phantoms.phantom import write_spanish_layout
from planes.style import STYLES

OWN = {"bolt": ["a bolt", "one bolt"], "nut": ["a nut"]}


def test_prompts_are_the_papers_with_styles_in_detail_or_of_a_file(tmp_path):
    assert read_prompts("paper")["brain"] == (PROMPTS["brain"],)
    styles, detailed = read_prompts("styles")["brain"], read_prompts("detailed")
    assert len({*styles}) == len(STYLES)
    assert styles[0] == "a photo of fetal brain, very dark, low contrast"
    assert detailed == PROMPT_LISTS and [*detailed] == [*PLANES]
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(OWN))
    assert read_prompts(str(path)) == {name: tuple(texts) for name, texts in OWN.items()}
    assert prompts_beside([tmp_path / "a.safetensors"]) == {"bolt": "a bolt", "nut": "a nut"}
    assert prompts_beside([], tmp_path)["nut"] == "a nut"  # in the folder of a merged model
    assert prompts_beside([tmp_path / "x" / "a.safetensors"]) == PROMPTS
    with refused(DatasetError, "of the paper's planes, not of bolt, nut"):
        read_prompts("detailed", OWN)
    (tmp_path / "lines.json").write_text(json.dumps(OWN | {"bolt": ["a bolt,\nsharp"]}))
    assert read_prompts(str(tmp_path / "lines.json"), OWN)["bolt"] == ("a bolt, sharp",)


@pytest.mark.parametrize(
    "content, words",
    {
        "{": "cannot be read as JSON",
        "[" * 100_000: "cannot be read as JSON",
        "[]": "no object",
        json.dumps(PROMPTS | {"cervix": ["a"]}): "thorax, other; it has abdomen",
        json.dumps(OWN | {"bolt": []}): "bolt needs a list of one or more",
        json.dumps(OWN | {"bolt": "a"}): "bolt needs a list of one or more",
        json.dumps(OWN | {"bolt": ["a", " "]}): "bolt needs a list of one or more",
        json.dumps(OWN | {"a/b": ["a"]}): "'a/b' is no name for a class",
        json.dumps(OWN | {"bolt": ["half \ud83d"]}): "surrogates not allowed",
    }.items(),
)
def test_a_file_of_prompts_that_cannot_be_used_is_refused_in_one_line(content, words, tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with refused(DatasetError, words, path):
        read_prompts(str(path))


def test_a_prompt_is_chosen_by_the_seed_alone_at_random_or_in_turn():
    assert [choose_prompt(tuple("abcde"), seed) for seed in range(8)] == [*"dbabbeec"]
    assert [prompt_in_turn(tuple("abc"), seed) for seed in range(5, 9)] == [*"cabc"]


def test_a_token_comes_behind_a_photo_of_or_in_front_and_only_once():
    assert with_token("a photo of fetal femur", "sks") == "a photo of sks fetal femur"
    assert with_token("fetal femur on desks", "sks") == "sks fetal femur on desks"
    for text, token in (("a photo of sks fetal femur", "sks"), ("a photo", None)):
        assert with_token(text, token) == text


def images_of(say=str, **given):
    """`training_images`, by the flags that are not train_lora.py's defaults."""
    flags = dict.fromkeys(("spanish", "images", "manifest", "source"))
    numbers = {"per_plane": 1, "seed": 0, "validation": 0, "held_out": 0.0}
    return training_images(Namespace(**flags | numbers | given), say)


def test_training_images_are_a_folders_with_its_repeats_or_the_datasets_with_one(
    tmp_path, four_pixels
):
    write_spanish_layout(tmp_path / "spanish", train=3, test=1, seed=0)
    of = {record.path: record for record in read_spanish(tmp_path / "spanish")}
    drawn, none = images_of(spanish=tmp_path / "spanish")
    assert [(i.caption, i.repeats) for i in drawn] == [(text, 1) for text in PROMPTS.values()]
    (tmp_path / "list.csv").write_text(f"Image_name,Plane\n{drawn[2].path.stem},femur\n")
    listed, _ = images_of(spanish=tmp_path / "spanish", manifest=tmp_path / "list.csv")
    assert listed == [drawn[2]] and none == []

    # held out: of other patients
    again, held_out = images_of(spanish=tmp_path / "spanish", validation=3)
    assert again == drawn and len(held_out) == 3 and all(of[i.path].train for i in held_out)
    assert not {of[i.path].patient for i in held_out} & {of[i.path].patient for i in drawn}
    with refused(DatasetError, "validation 99: images left to hold out: "):
        images_of(spanish=tmp_path / "spanish", validation=99)

    own = tmp_path / "own" / "20_fetal brain"  # of a folder: no longer trained on
    own.mkdir(parents=True)
    for name in "abc":
        (own / f"{name}.png").touch()
    every, _ = images_of(images=own.parent)
    rest, held_out = images_of(images=own.parent, validation=1)
    assert [(i.caption, i.repeats) for i in every] == [("fetal brain", 20)] * 3
    assert len(held_out) == 1 and sorted([*rest, *held_out], key=lambda i: i.path) == every
    with refused(DatasetError, "validation 3: images left to hold out: 3"):
        images_of(images=own.parent, validation=3)
    said = []
    images_of(said.append, images=own.parent, validation=1)
    assert "held out but in training too: " in said[0]  # all three are empty files


def test_prior_images_are_those_of_a_manifest(tmp_path):
    (tmp_path / "a.png").touch()
    path = tmp_path / "manifest.csv"
    path.write_text('image,prompt\na.png,"a photo, of a brain"\n')
    assert prior_images(path) == [Captioned(tmp_path / "a.png", "a photo, of a brain")]
    path.write_text("image,prompt\na.png,a \\(b\\)\n")
    assert prior_images(path)[0].caption == "a (b)"

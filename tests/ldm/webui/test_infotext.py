"""The webui's `parameters` text, written here and read by a parser of webui's grammar of its own,
and the other way."""

import json

import pytest

from ldm.webui.infotext import format_parameters, lora_tags, parse_parameters

SETTINGS = {
    "Steps": 20,
    "Sampler": "Euler",
    "Schedule type": "Automatic",
    "CFG scale": 7,
    "Seed": 3,
    "Size": "512x384",
    "Model hash": "6ce0161689",
    "Model": "v1-5-pruned",
}
KEY = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_ -/")


def pairs_of(line):
    """The settings of a line, character by character: a key of two characters or more, a colon, a
    value that ends at the next comma or, where it is a JSON string, behind it."""
    pairs, at = [], 0
    while at < len(line):
        start, colon = at, line.find(":", at)
        key = line[start:colon].strip()
        if colon < 0 or len(key) < 2 or not set(key) <= KEY:
            at += 1
            continue
        value = line[colon + 1 :].lstrip()
        at = len(line) - len(value)
        try:
            quoted, end = (
                json.JSONDecoder().raw_decode(value) if value.startswith('"') else (None, 0)
            )
        except ValueError:
            quoted, end = None, 0
        if isinstance(quoted, str) and value[end : end + 1] in ("", ","):
            pairs.append((key, quoted))
        else:
            end = value.find(",") if "," in value else len(value)
            pairs.append((key, value[:end]))
        at += end + 1
    return pairs


def read_as_webui(text):
    lines = text.strip().split("\n")
    settings = pairs_of(lines[-1])
    lines, settings = (lines[:-1], dict(settings)) if len(settings) >= 3 else (lines, {})
    parts, part = {"prompt": "", "negative": ""}, "prompt"
    for line in lines:
        line = line.strip()
        if line[:16] == "Negative prompt:":
            part, line = "negative", line[16:].strip()
        parts[part] += ("\n" if parts[part] else "") + line
    return parts["prompt"], parts["negative"], settings


PROMPTS = [
    "a photo of fetal femur",
    "a, photo: of (fetal femur:1.2), [head], (((abdomen)))",
    'the "standard" plane, 20% \\(of\\) it',
    "one line\nanother line",
    "one line\n\na third",
    "fémur fœtal 胎儿 股骨 🩻",
    "Steps: 3, Sampler: none, CFG scale: 1, Seed: 0",
    "Steps: 3",
    "first\nSteps: 3, Sampler: none, CFG scale: 1, Seed: 0",
    "a femur <lora:fetal:0.8> <lora:b_2:-1>",
    "BREAK, BREAK\nBREAK",
    "",
]


@pytest.mark.parametrize("negative", ["", "text, caliper: 3 cm", "one\ntwo, Steps: 1"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_awkward_prompts_come_back_as_webui_reads_them_and_as_we_do(prompt, negative):
    text = format_parameters(prompt, negative, SETTINGS)
    expected = prompt, negative, {name: str(value) for name, value in SETTINGS.items()}
    assert read_as_webui(text) == expected
    ours = parse_parameters(text)
    assert (ours.prompt, ours.negative_prompt, ours.settings) == expected


VALUES = [
    "a, b",
    "a: b",
    "two\nlines",
    'fetal: 0123456789ab, "b": ba9876543210',
    'he said "x", twice',
    "back\\slash, x",
]


@pytest.mark.parametrize("value", [*VALUES, "plain", "fémur, 胎儿", 'an inch 1"', "-0.5", "None"])
def test_a_value_with_a_comma_a_colon_or_a_newline_is_quoted_and_comes_back(value):
    text = format_parameters("a photo", "", SETTINGS | {"Lora hashes": value, "Version": "x"})
    assert (f"Lora hashes: {value}," in text) == (not set(",:\n") & set(value))  # else as it is
    assert "\n" not in text.removeprefix("a photo\n")
    assert not {*value} & {*"éœ胎儿"} or value in text  # as it is, not escaped
    for settings in (read_as_webui(text)[2], parse_parameters(text).settings):
        assert settings["Lora hashes"] == value and settings["Version"] == "x"


def test_the_text_of_an_image_is_webuis_to_the_letter():
    text = format_parameters(
        "a photo of fetal femur <lora:fetal:0.8>",
        "text, caliper",
        {
            "Steps": 20,
            "Sampler": "UniPC",
            "CFG scale": 7.5,
            "Clip skip": None,
            "Lora hashes": "fetal: 0123456789ab",
        },
    )
    assert (
        text == "a photo of fetal femur <lora:fetal:0.8>\n"
        "Negative prompt: text, caliper\n"
        'Steps: 20, Sampler: UniPC, CFG scale: 7.5, Lora hashes: "fetal: 0123456789ab"'
    )


def test_a_text_that_webui_wrote_is_read():
    read = parse_parameters(
        "masterpiece, (ultrasound:1.2)\nof a femur\nNegative prompt: blurry,\n  low quality\nSteps:"
        " 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size:"
        ' 512x512, Model hash: 6ce0161689, Model: v1-5-pruned, Clip skip: 2, TI hashes: "a: 1, b:'
        ' 2", Version: v1.9.4'
    )
    assert read.prompt == "masterpiece, (ultrasound:1.2)\nof a femur"
    assert read.negative_prompt == "blurry,\nlow quality"
    assert read.settings["Sampler"] == "DPM++ 2M" and read.settings["TI hashes"] == "a: 1, b: 2"
    assert list(read.settings)[-1] == "Version" and len(read.settings) == 11


@pytest.mark.parametrize(
    "text", ["a femur", "a femur\nSteps: 20, Sampler: Euler", "two\nlines: x, y: z", ""]
)
def test_a_last_line_of_fewer_than_three_settings_is_the_prompts(text):
    assert read_as_webui(text) == (text, "", {})
    assert parse_parameters(text).prompt == text and parse_parameters(text).settings == {}


def test_a_prompt_loses_its_lora_tags_and_they_tell_names_and_weights():
    prompt, tags = lora_tags("a femur <lora:fetal:0.8>, sharp <lora:b:-1><lora:c>")
    assert tags == [("fetal", 0.8), ("b", -1.0), ("c", 1.0)]
    assert "lora" not in prompt and prompt.split() == ["a", "femur", ",", "sharp"]
    assert lora_tags("a < b, <fetal-us>") == ("a < b, <fetal-us>", [])


@pytest.mark.parametrize("tag", ["<lora:fetal:strong>", "<lora:fetal:1,5>", "<lora:fetal:0.5:0.7>"])
def test_a_weight_that_is_no_number_is_refused(tag):
    with pytest.raises(ValueError, match="float"):
        lora_tags(f"a femur {tag}")

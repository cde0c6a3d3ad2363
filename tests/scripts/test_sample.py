"""sample.py, images of two steps: files and table, seeds, what is made again, what flags do."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from shorthand import read_json, refused, table

import sample
from harness.files import sha256
from ldm.checkpoints import load
from ldm.generate import generate
from ldm.images import decode_images
from ldm.webui.prompts import encode_weighted
from ldm.webui.shots import lora_hash
from lora.files import load_loras
from planes.datasets import DatasetError
from planes.style import STYLES, with_style
from samplers.schedule import SamplerError

FEMUR = ["--prompt", "a photo of (fetal femur:1.2)", "--samplers", "euler"]


def draw(tiny_model, out, *flags):
    words = ["--model", tiny_model, "--device", "cpu", "--out", out, "--steps", 2, *flags]
    sample.main(sample.parse_args([str(word) for word in words]))
    return out


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def flags(loras):
    """What a user of the webui may ask for; three images in batches of two."""
    line = "--planes femur brain --count 3 --batch-size 2 --clip-skip 2 --guidance-scale 4.5"
    line += f" --lora {loras[0]} {loras[1]} --lora-weight 0.8 -0.5 --seed 7"
    return [*line.split(), "--negative-prompt", "head, abdomen"]


@pytest.fixture(scope="module")
def drawn(tiny_model, flags, tmp_path_factory):
    return draw(tiny_model, tmp_path_factory.mktemp("drawn") / "out", *flags)


def test_every_plane_and_sampler_has_seeds_of_its_own_which_name_the_images(drawn, flags):
    firsts = {"femur/euler": 400_007, "femur/unipc": 500_007}
    firsts |= {"brain/euler": 200_007, "brain/unipc": 300_007}
    names = [f"{name}_{first + n}.png" for name, first in firsts.items() for n in range(3)]
    assert [row["image"] for row in table(drawn / "manifest.csv")] == names
    found = {str(path.relative_to(drawn)) for path in drawn.rglob("*") if path.is_file()}
    assert found == {*names, "manifest.csv", "contact_sheet.png", "args.json"}
    record = read_json(drawn / "args.json")
    lora = flags[flags.index("--lora") + 1]
    assert record["inputs"][str(lora)] == sha256(lora)


def test_a_png_tells_its_settings_to_the_webui_and_exactly(drawn, loras):
    for row in table(drawn / "manifest.csv"):
        text = Image.open(drawn / row["image"]).text
        own = json.loads(text["fu-lora"])
        assert {name: "" if own[name] is None else str(own[name]) for name in row} == row
    prompt, negative, settings = text["parameters"].split("\n")
    assert prompt == "a photo of fetal brain <lora:fetal:0.8> <lora:sharp:-0.5>"
    assert negative == "Negative prompt: head, abdomen"
    start, rest = settings.split(", Model hash: ")
    start += f" {rest[10:]}"
    hashes = ", ".join(f"{path.stem}: {lora_hash(path)}" for path in loras)
    assert start == (
        "Steps: 2, Sampler: UniPC, Schedule type: Automatic, CFG scale: 4.5, Seed: 300009, Size:"
        " 64x64 , Model: tiny_model, Clip skip: 2, RNG: CPU, Lora hashes:"
        f' "{hashes}", Version: fu-lora'
    )


def test_a_run_that_goes_on_makes_what_is_missing_cut_or_made_otherwise_to_the_same_bits(
    tiny_model, drawn, flags, capsys
):
    kept, lost, cut, other, *_ = paths = sorted(drawn.glob("*/*_*.png"))
    before, time = {path: path.read_bytes() for path in paths}, kept.stat().st_mtime_ns
    lost.unlink()
    cut.write_bytes(before[cut][:-300])
    text = PngImagePlugin.PngInfo()
    for name, content in Image.open(other).text.items():
        text.add_text(name, content.replace("4.5", "4.25"))
    Image.fromarray(pixels(other) // 2).save(other, pnginfo=text)
    draw(tiny_model, drawn, *flags)
    assert "12 images: 9 are there, 3 to make" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in paths} == before
    assert kept.stat().st_mtime_ns == time


@pytest.mark.parametrize(
    "sampler, more",
    [
        pytest.param("euler", [], marks=pytest.mark.slow),
        ("unipc", ["--order", 2, "--spacing", "karras"]),
    ],
)
def test_an_image_is_what_the_flags_say(tiny_model, loras, tmp_path, sampler, more):
    negative = "head " * 80  # of two chunks
    flags = ["--prompt", "a (femur:1.5)", "--negative-prompt", negative, "--samplers", sampler]
    flags += [
        "--lora-weight",
        "0.5",
        "--seeds",
        "9",
        "--size",
        "64x48",
        "--steps",
        "4",
        "--guidance-scale",
        "2.5",
    ]
    flags += ["--lora", *loras, *more]
    path = draw(tiny_model, tmp_path, *flags) / "prompt" / f"{sampler}_9.png"

    model = load(tiny_model)
    networks = {"lora_unet": model.unet, "lora_te": model.text_encoder}
    load_loras([(lora, 0.5) for lora in loras], networks)
    with torch.no_grad():
        contexts = [
            encode_weighted(model.tokenizer, model.text_encoder, text)
            for text in ("a (femur:1.5)", negative)
        ]
    settings = {"order": 2, "spacing": "karras"} if more else {}
    settings |= {"sampler": sampler, "steps": 4, "guidance_scale": 2.5}
    latents = generate(model.unet, *contexts, [9], (6, 8), **settings)
    assert np.array_equal(pixels(path), decode_images(model.vae, latents)[0])
    assert pixels(path).std() > 10


@pytest.mark.slow
def test_whatever_changes_pixels_makes_an_image_again(tiny_model, other_model, tmp_path, capsys):
    path, seen = tmp_path / "prompt" / "euler_1.png", []
    for flags in (
        "",
        "--negative-prompt head",
        "--spacing leading",
        "--clip-skip 2",
        "--guidance-scale 2",
        "--prediction-type v_prediction",
        "--dtype bf16",
        f"--model {other_model}",
        "--size 48",
    ):
        draw(tiny_model, tmp_path, *FEMUR, "--seeds", 1, *flags.split())
        assert "1 images: 0 are there, 1 to make" in capsys.readouterr().out, flags
        seen.append(pixels(path).tobytes())
    assert len({*seen}) == len(seen)


@pytest.mark.slow
def test_words_in_brackets_weigh_more_and_a_weight_of_one_changes_nothing(tiny_model, tmp_path):
    prompts = ["a femur", "a (femur:1.0)", "a (femur:1.6)"]
    plain, one, more = (
        draw(tiny_model, tmp_path / str(n), "--prompt", prompt, "--seeds", 1) / "prompt/euler_1.png"
        for n, prompt in enumerate(prompts)
    )
    assert np.array_equal(pixels(plain), pixels(one))
    assert not np.array_equal(pixels(plain), pixels(more))


def test_a_lora_is_drawn_by_the_prompts_of_its_own_classes_and_told_where_it_was_trained_otherwise(
    tiny_model, loras, tmp_path, capsys
):
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(loras[0].read_bytes())
    own = {"normal": ["a normal chest"], "nodule": ["a nodule"]}
    (tmp_path / "prompts.json").write_text(json.dumps(own))
    out, few = tmp_path / "out", ["--samplers", "euler", "--count", "1"]
    draw(tiny_model, out, "--lora", lora, *few)
    rows = [(row["image"], row["prompt"]) for row in table(out / "manifest.csv")]
    assert rows == [
        ("normal/euler_0.png", "a normal chest"),
        ("nodule/euler_200000.png", "a nodule"),
    ]
    said = f"{lora}: was trained with clip skip 2: sample.py --clip-skip 2 does so\n"
    assert capsys.readouterr().out.count(said) == 1
    with refused(DatasetError, "--planes brain: choose from normal, nodule"):
        draw(tiny_model, out, "--lora", lora, "--planes", "brain")


@pytest.mark.slow
def test_prompts_of_a_plane_take_turns_or_are_drawn_and_stand_in_the_table(tiny_model, tmp_path):
    few = "--planes brain --samplers euler --steps 1 --batch-size 5"
    draw(
        tiny_model,
        tmp_path / "styles",
        *few.split(),
        "--prompts",
        "styles",
        "--count",
        2 * len(STYLES),
    )
    brain = "a photo of fetal brain"
    drawn = [row["prompt"] for row in table(tmp_path / "styles" / "manifest.csv")]
    assert Counter(drawn) == dict.fromkeys((with_style(brain, words) for words in STYLES), 2)
    draw(tiny_model, tmp_path / "detailed", *f"{few} --prompts detailed --count 4".split())
    drawn = [row["prompt"] for row in table(tmp_path / "detailed" / "manifest.csv")]
    assert len({*drawn}) > 1 and all(prompt.startswith(brain) for prompt in drawn)


@pytest.mark.slow
def test_a_run_of_another_plane_leaves_the_rows_of_images_that_are_there(tiny_model, tmp_path):
    few = ["--samplers", "euler", "--count", "1", "--planes"]
    draw(tiny_model, tmp_path, *few, "brain", "femur")
    (tmp_path / "femur" / "euler_400000.png").unlink()
    draw(tiny_model, tmp_path, *few, "thorax")
    names = [row["image"] for row in table(tmp_path / "manifest.csv")]
    assert names == ["brain/euler_200000.png", "thorax/euler_600000.png"]
    draw(tiny_model, tmp_path, *few, "thorax", "thorax")  # told twice, listed once
    assert [row["image"] for row in table(tmp_path / "manifest.csv")] == names
    (tmp_path / "args.json").write_text('{"arguments": {"rank": 8}}')  # of train_lora.py
    with refused(FileExistsError, "holds a run, whose record would go; give another"):
        draw(tiny_model, tmp_path, *few, "thorax")


@pytest.mark.slow
def test_the_contact_sheet_shows_four_images_of_each_prompt_and_sampler(
    tiny_model, tmp_path, monkeypatch
):
    figures = []
    monkeypatch.setattr(sample, "save", lambda figure, path: figures.append(figure))
    draw(tiny_model, tmp_path, *["--planes", "brain", "femur", "--count", "5", "--steps", "1"])
    axes = figures[0].axes
    assert [a.get_title() for a in axes[:2]] == ["brain", "femur"]
    assert [a.get_ylabel() for a in axes[::2]] == ["euler", "", "", "", "unipc", "", "", ""]
    assert {len(a.images) for a in axes} == {1}


@pytest.mark.slow
def test_what_is_not_finite_is_told_and_no_picture_of_it_is_left(tiny_model, tmp_path):
    with refused(SamplerError, "what the model predicts at t = 999 is not finite in float32: take"):
        draw(tiny_model, tmp_path / "out", *FEMUR, "--count", 1, "--guidance-scale", 1e39)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_loras_of_one_name_are_told_apart_by_their_folders(tiny_model, loras, tmp_path):
    files = [tmp_path / name / "lora.safetensors" for name in ("kohya", "paper")]
    for file, lora in zip(files, loras):
        file.parent.mkdir()
        file.write_bytes(lora.read_bytes())
    path = draw(tiny_model, tmp_path / "out", "--lora", *files, *FEMUR, "--seeds", 1)
    said = Image.open(path / "prompt" / "euler_1.png").text["parameters"]
    assert "<lora:kohya-lora:1> <lora:paper-lora:1>" in said

"""sample.py as people of the webui and of diffusers use it: LoRAs with weights, negative prompts,
image-to-image, PNGs that say how they were made, and --like, which makes them again; in this
process, on an untrained tiny model where the embedded one is not needed."""

import csv
import hashlib
import json
import runpy
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from ldm import MINI
from ldm.checkpoints import Model, load, save_folder
from ldm.checkpoints.tokenizer import load_tokenizer
from ldm.text import TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from ldm.vae import AutoencoderKL, VAEConfig
from ldm.webui.infotext import parse_parameters
from lora.files import save_lora
from lora.files.metadata import trained_otherwise
from lora.model import inject, lora_layers
from planes.pictures import ImageError
from planes.style import STYLES, with_style

SCRIPT = str(Path(__file__).resolve().parents[2] / "sample.py")
SAMPLE = runpy.run_path(SCRIPT, run_name="sample")
PROMPT = "a photo of (fetal femur:1.2)"


TINY = {
    "unet": UNetConfig(
        block_out_channels=(16, 32),
        attention=(True, True),
        layers_per_block=1,
        num_heads=(2, 2),
        cross_attention_dim=16,
        norm_num_groups=8,
    ),
    "vae": VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4),
    "text_encoder": TextConfig(
        vocab_size=len(load_tokenizer(MINI / "tokenizer", TextConfig())),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    ),
}


def sample(out, *flags):
    """Runs the script with two steps, and Euler unless the flags say otherwise."""
    flags = [
        *([] if "--samplers" in flags or "--like" in flags else ["--samplers", "euler"]),
        *flags,
    ]
    steps = [] if "--like" in flags else ["--steps", 2]
    SAMPLE["main"](
        SAMPLE["parse_args"]([str(f) for f in ["--out", out, "--device", "cpu", *steps, *flags]])
    )
    return out


def pixels(path):
    return np.asarray(Image.open(path))


def text(path):
    return Image.open(path).text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with an untrained model of a few kilobytes, whose every weight counts."""
    networks = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": TextEncoder}
    draw, made = torch.Generator().manual_seed(0), {}
    for name, build in networks.items():
        made[name] = build(TINY[name])
        for parameter in made[name].parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=draw)
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(Model(**made, tokenizer=load(MINI).tokenizer, sample_size=8), path)
    return path


@pytest.fixture(scope="module")
def loras(tiny, tmp_path_factory):
    """Two LoRAs that change images a good deal; the first was trained at clip skip 2."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(["fetal", "sharp"]):
        unet = load(tiny).unet
        inject(unet, rank=2, alpha=2, generator=torch.Generator().manual_seed(seed))
        for layer in lora_layers(unet).values():
            torch.nn.init.normal_(layer.B, std=0.5, generator=torch.Generator().manual_seed(seed))
        save_lora(folder / f"{name}.safetensors", {"lora_unet": unet}, {"ss_clip_skip": 2 - seed})
    return [folder / "fetal.safetensors", folder / "sharp.safetensors"]


@pytest.fixture(scope="module")
def asked(tiny, loras):
    """Three images in batches of two, with all that a user of the webui would ask for."""
    flags = [
        "--lora",
        *loras,
        "--lora-weight",
        0.8,
        -0.5,
        "--negative-prompt",
        "head, abdomen",
        "--clip-skip",
        2,
    ]
    flags += ["--prompt", PROMPT, "--seeds", 7, 5, 6, "--batch-size", 2, "--guidance-scale", 4.5]
    return ["--model", tiny, *flags]


@pytest.fixture(scope="module")
def run(asked, tmp_path_factory):
    return sample(tmp_path_factory.mktemp("run"), *asked)


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """An image to vary: 50 x 40 px, with a structure of its own."""
    path = tmp_path_factory.mktemp("real") / "real.png"
    ramp = np.add.outer(np.arange(40) * 3, np.arange(50) * 2).astype(np.uint8)
    Image.fromarray(ramp).save(path)
    return path


def data_sha256(path):
    """Of a safetensors file behind its header, whose length its first eight bytes tell."""
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def test_a_png_says_in_webuis_words_how_it_was_made(run, loras):
    assert sorted(path.name for path in run.glob("prompt/*.png")) == [
        f"euler_{seed}.png" for seed in (5, 6, 7)
    ]
    prompt, negative, settings = text(run / "prompt" / "euler_5.png")["parameters"].split("\n")
    assert prompt == f"{PROMPT} <lora:fetal:0.8> <lora:sharp:-0.5>"
    assert negative == "Negative prompt: head, abdomen"
    hashes = ", ".join(f"{path.stem}: {data_sha256(path)[:12]}" for path in loras)
    start, rest = settings.split(", Model hash: ")
    assert (
        start
        == "Steps: 2, Sampler: Euler, Schedule type: Automatic, CFG scale: 4.5, Seed: 5, Size:"
        " 64x64"
    )
    assert rest[10:].startswith(
        ", Model: tiny, Batch size: 2, Batch pos: 1, Clip skip: 2, RNG: CPU"
    )
    assert f'Lora hashes: "{hashes}"' in rest


def test_webuis_defaults_are_left_out_of_the_text(tiny, tmp_path):
    sample(tmp_path, "--model", tiny, "--prompt", "a femur", "--count", 1)
    (path,) = tmp_path.glob("*/*.png")
    said = parse_parameters(text(path)["parameters"])
    assert said.prompt == "a femur" and said.negative_prompt == ""
    left_out = (
        "Clip skip",
        "Batch size",
        "Batch pos",
        "Denoising strength",
        "Lora hashes",
        "Init image hash",
    )
    assert not {*left_out} & said.settings.keys()


def test_the_manifest_tells_what_the_pngs_tell(run):
    rows = list(csv.DictReader((run / "manifest.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == [f"prompt/euler_{seed}.png" for seed in (7, 5, 6)]
    for row in rows:
        own = json.loads(text(run / row["image"])["fu-lora"])
        assert {name: "" if own[name] is None else str(own[name]) for name in row} == row
        assert row["prompt"] == PROMPT and row["negative_prompt"] == "head, abdomen"


@pytest.mark.parametrize(
    "seed", [5, pytest.param(6, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)]
)
def test_like_makes_an_image_again_to_the_bit(run, tmp_path, seed):
    """5 was row 1 of a batch of two, 7 row 0, and 6 alone; the files are found by the run's own
    record."""
    path = run / "prompt" / f"euler_{seed}.png"
    again = sample(tmp_path, "--like", path) / "prompt" / path.name
    assert np.array_equal(pixels(again), pixels(path))
    assert text(again)["parameters"] == text(path)["parameters"]
    assert (tmp_path / "args.json").exists()


@pytest.mark.slow
def test_like_makes_an_image_of_the_embedded_model_again_to_the_bit(tmp_path):
    run = sample(
        tmp_path / "run",
        "--planes",
        "brain",
        "--count",
        3,
        "--batch-size",
        3,
        "--samplers",
        "euler",
        "unipc",
    )
    for path in run.glob("brain/*_*.png"):
        (again,) = sample(tmp_path / path.stem, "--like", path).glob("*/*.png")
        assert np.array_equal(pixels(again), pixels(path)), path.name


def test_like_does_not_write_over_the_run_it_reads(run, capsys):
    manifest = (run / "manifest.csv").read_text()
    with pytest.raises(SystemExit):
        sample(run, "--like", run / "prompt" / "euler_5.png")
    assert (
        "another folder" in capsys.readouterr().err
        and (run / "manifest.csv").read_text() == manifest
    )


def test_like_takes_a_png_of_the_webui_that_names_no_model(tiny, tmp_path):
    write_png(tmp_path / "webui.png", parameters=WEBUI.format("Euler", ""))
    again = sample(tmp_path / "again", "--like", tmp_path / "webui.png", "--model", tiny)
    assert (again / "prompt" / "euler_9.png").exists()


def test_like_needs_the_files_of_an_image_that_lies_elsewhere_by_flags(run, tiny, loras, tmp_path):
    path = tmp_path / "moved.png"
    path.write_bytes((run / "prompt" / "euler_5.png").read_bytes())
    again = sample(tmp_path / "again", "--like", path, "--model", tiny, "--lora", *loras)
    assert np.array_equal(pixels(again / "prompt" / "euler_5.png"), pixels(path))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--samplers", "unipc", "--order", 2], ["--spacing", "karras"]])
def test_like_keeps_sampler_order_spacing_size_and_the_varied_image(
    tiny, photograph, tmp_path, flags
):
    varied = [
        "--model",
        tiny,
        "--init-image",
        photograph,
        "--strength",
        0.9,
        "--steps",
        3,
        "--size",
        "64x48",
    ]
    run = sample(tmp_path / "run", *flags, *varied, "--prompt", "a femur", "--seeds", 1, 2)
    for path in run.glob("prompt/*.png"):
        again = sample(tmp_path / path.stem, "--like", path) / "prompt" / path.name
        assert np.array_equal(pixels(again), pixels(path)) and pixels(path).shape == (48, 64, 3)


def test_like_beside_a_record_that_is_none_takes_the_files_from_the_flags(
    run, tiny, loras, tmp_path
):
    path = tmp_path / "run" / "prompt" / "euler_5.png"
    path.parent.mkdir(parents=True)
    path.write_bytes((run / "prompt" / "euler_5.png").read_bytes())
    (tmp_path / "run" / "args.json").write_text("{")
    again = sample(tmp_path / "out", "--like", path, "--model", tiny, "--lora", *loras)
    assert np.array_equal(pixels(again / "prompt" / "euler_5.png"), pixels(path))


def test_a_run_that_goes_on_makes_the_same_bits(run, asked):
    """Also where one of two images of a batch is there: its neighbour is made in a batch of two as
    before."""
    lost, kept = (run / "prompt" / f"euler_{seed}.png" for seed in (5, 7))
    before, time = pixels(lost), kept.stat().st_mtime_ns
    lost.unlink()
    sample(run, *asked)
    assert np.array_equal(pixels(lost), before) and kept.stat().st_mtime_ns == time


def test_batches_are_consecutive_images_with_prompts_of_equal_length():
    lengths = {"short": 77, "long": 154}
    contexts = {prompt: torch.zeros(1, tokens, 1) for prompt, tokens in lengths.items()}
    prompts = ["short", "short", "short", "long", "long", "short"]

    class Image:
        def __init__(self, prompt):
            self.prompt = prompt

    shots = [Image(prompt) for prompt in prompts]
    rows = [
        [shots.index(shot) for shot in batch] for batch in SAMPLE["batches"](shots, 2, contexts)
    ]
    assert rows == [[0, 1], [2], [3, 4], [5]]


@pytest.mark.slow
def test_every_style_is_drawn_equally_often_and_stands_in_the_manifest(tiny, tmp_path):
    flags = [
        "--model",
        tiny,
        "--prompts",
        "styles",
        "--planes",
        "brain",
        "--steps",
        1,
        "--batch-size",
        8,
    ]
    sample(tmp_path / "few", *flags, "--count", 5)
    sample(tmp_path / "all", *flags, "--count", 2 * len(STYLES))
    few, drawn = (
        [
            row["prompt"]
            for row in csv.DictReader((tmp_path / name / "manifest.csv").read_text().splitlines())
        ]
        for name in ("few", "all")
    )
    assert Counter(drawn) == dict.fromkeys(
        (with_style("a photo of fetal brain", words) for words in STYLES), 2
    )
    assert drawn[:5] == few


@pytest.mark.slow
def test_long_prompts_and_negative_prompts_of_another_length_are_sampled(tiny, tmp_path):
    long, femur = (
        " ".join(["a photo of fetal femur"] * 20),
        ["--model", tiny, "--prompt", "a femur"],
    )
    sample(tmp_path / "long", "--model", tiny, "--prompt", long, "--seeds", 1, 2)
    sample(tmp_path / "negative", *femur, "--negative-prompt", long, "--seeds", 1)
    sample(tmp_path / "plain", *femur, "--seeds", 1)
    one, other = (
        pixels(tmp_path / name / "prompt" / "euler_1.png") for name in ("negative", "plain")
    )
    assert not np.array_equal(one, other)


@pytest.mark.slow
def test_loras_add_up_in_any_order_and_each_has_its_weight(tiny, loras, tmp_path):
    def image(name, files, weights):
        flags = [
            "--model",
            tiny,
            "--lora",
            *files,
            "--lora-weight",
            *weights,
            "--prompt",
            "a femur",
            "--seeds",
            1,
        ]
        return pixels(sample(tmp_path / name, *flags) / "prompt" / "euler_1.png")

    both = image("both", loras, [0.8, 0.3])
    assert np.array_equal(both, image("reversed", loras[::-1], [0.3, 0.8]))
    assert not np.array_equal(both, image("swapped", loras, [0.3, 0.8]))
    assert np.array_equal(
        image("first", loras[:1], [0.8]), image("second at zero", loras, [0.8, 0])
    )
    assert np.array_equal(image("one for all", loras, [0.5]), image("one each", loras, [0.5, 0.5]))


def test_loras_of_one_name_are_told_apart_by_their_folders(tiny, loras, tmp_path, capsys):
    files = [tmp_path / folder / "lora.safetensors" for folder in ("kohya", "paper")]
    for file, lora in zip(files, loras):
        file.parent.mkdir()
        file.write_bytes(lora.read_bytes())
    run = sample(
        tmp_path / "run", "--model", tiny, "--lora", *files, "--prompt", "a femur", "--seeds", 1
    )
    said = parse_parameters(text(run / "prompt" / "euler_1.png")["parameters"])
    assert said.prompt == "a femur <lora:kohya-lora:1> <lora:paper-lora:1>"
    assert said.settings["Lora hashes"].startswith(
        f"kohya-lora: {data_sha256(files[0])[:12]}, paper-lora: "
    )
    with pytest.raises(SystemExit):
        sample(
            tmp_path / "out", "--model", tiny, "--lora", files[0], files[0], "--prompt", "a femur"
        )
    assert "two files of one name" in capsys.readouterr().err


@pytest.mark.slow
def test_brackets_weigh_words_and_a_weight_of_one_changes_nothing(tiny, tmp_path):
    plain, one, more = (
        pixels(
            sample(tmp_path / str(n), "--model", tiny, "--prompt", prompt, "--seeds", 1)
            / "prompt/euler_1.png"
        )
        for n, prompt in enumerate(
            ["a photo of femur", "a photo of (femur:1.0)", "a photo of (femur:1.6)"]
        )
    )
    assert np.array_equal(plain, one) and not np.array_equal(plain, more)


@pytest.mark.slow
def test_a_weak_variation_is_nearer_to_the_image_than_a_strong_one(photograph, tmp_path):
    image, away = Image.open(photograph).convert("RGB"), []
    for strength in (0.1, 0.5, 1.0):
        flags = [
            "--init-image",
            photograph,
            "--strength",
            strength,
            "--steps",
            10,
            "--prompt",
            "a femur",
            "--seeds",
            1,
        ]
        varied = pixels(sample(tmp_path / str(strength), *flags) / "prompt" / "euler_1.png")
        resized = np.asarray(image.resize(varied.shape[1::-1], Image.Resampling.BICUBIC)).astype(
            float
        )
        away.append(np.abs(varied - resized).mean())
    assert away[0] < away[1] < away[2]


def test_a_lora_of_another_clip_skip_is_told_in_one_line(tiny, loras, tmp_path, capsys):
    sample(tmp_path, "--model", tiny, "--lora", loras[0], "--prompt", "a femur", "--seeds", 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "clip skip" in line]
    assert (
        len(lines) == 1
        and "fetal.safetensors" in lines[0]
        and "2" in lines[0]
        and "--clip-skip 1" in lines[0]
    )


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            {"ss_v_parameterization": "True"},
            "was trained on a model that predicts v, this one predicts epsilon",
        ),
        (
            {"modelspec.prediction_type": "v"},
            "was trained on a model that predicts v, this one predicts epsilon",
        ),
        ({"ss_v_parameterization": "False"}, None),
        ({"modelspec.prediction_type": "epsilon"}, None),
        ({}, None),
    ],
)
def test_a_lora_of_another_prediction_is_told_in_one_line(said, told):
    assert trained_otherwise(said, 1, "epsilon") == ([told] if told else [])
    other = trained_otherwise(said, 1, "v_prediction")
    assert len(other) == bool(said and not told) and all(
        "predicts epsilon, this one predicts v" in line for line in other
    )


def write_png(path, **chunks):
    info = PngImagePlugin.PngInfo()
    for name, content in chunks.items():
        info.add_text(name, content)
    Image.new("RGB", (64, 64)).save(path, pnginfo=info)


WEBUI = "a femur\nSteps: 2, Sampler: {}, CFG scale: 4, Seed: 9, Size: 64x64{}, Version: v1.9.4"


@pytest.mark.parametrize("sampler", ["Euler", pytest.param("UniPC", marks=pytest.mark.slow)])
def test_like_takes_a_png_of_the_webui(tiny, tmp_path, sampler):
    flags = [
        "--prompt",
        "a femur",
        "--seeds",
        9,
        "--guidance-scale",
        4,
        "--samplers",
        sampler.lower(),
    ]
    name = f"prompt/{sampler.lower()}_9.png"
    path = sample(tmp_path / "flags", "--model", tiny, *flags) / name
    model = parse_parameters(text(path)["parameters"]).settings["Model hash"]
    more = (
        f", Model hash: {model}, Schedule type: {'Karras' if sampler == 'UniPC' else 'Automatic'},"
        " RNG: CPU"
    )
    write_png(tmp_path / "webui.png", parameters=WEBUI.format(sampler, more))
    sample(tmp_path / "again", "--like", tmp_path / "webui.png", "--model", tiny)
    assert np.array_equal(pixels(tmp_path / "again" / name), pixels(tmp_path / "flags" / name))


@pytest.fixture
def places(run, tiny, loras, photograph, tmp_path):
    """What the flags below name."""
    write_png(tmp_path / "bare.png")
    write_png(tmp_path / "prompt.png", parameters="a femur")
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.jpg")
    (tmp_path / "cut.png").write_bytes((run / "prompt" / "euler_7.png").read_bytes()[:500])
    (tmp_path / "moved.png").write_bytes((run / "prompt" / "euler_7.png").read_bytes())
    webui = {
        "dpm": WEBUI.format("DPM++ 2M", ""),
        "exponential": WEBUI.format("Euler", ", Schedule type: Exponential"),
        "hires": WEBUI.format("Euler", ", Hires upscale: 2"),
        "vae": WEBUI.format("Euler", ", VAE hash: 0123456789, VAE: other"),
        "model": WEBUI.format("Euler", ", Model hash: 0123456789"),
        "seedless": "a femur\nSteps: 2, Sampler: Euler, CFG scale: 4, Size: 64x64",
    }
    for name, parameters in webui.items():
        write_png(tmp_path / f"{name}.png", parameters=parameters)
    return {
        "here": tmp_path,
        "tiny": tiny,
        "fetal": loras[0],
        "sharp": loras[1],
        "photograph": photograph,
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--spacing even", "unknown spacing 'even'"),
        ("--samplers euler --spacing time_uniform", "unknown spacing 'time_uniform'"),
        ("--samplers euler --order 2", "order 2"),
        ("--samplers unipc --order 4", "order 4"),
        ("--strength 0.5", "--init-image"),
        ("--init-image {here}/nowhere.png", "nowhere.png"),
        ("--init-image {fetal}", "fetal.safetensors"),
        ("--init-image {photograph} --strength 0", "strength 0"),
        ("--init-image {photograph} --strength 1.5", "strength 1.5"),
        ("--init-image {photograph} --strength -0.5", "strength -0.5"),
        ("--init-image {photograph} --strength 0.01", "no step is left"),
        ("--lora {fetal} {sharp} --lora-weight 1 2 3", "3 weights for 2"),
        ("--lora {fetal} {here}/nowhere.safetensors", "nowhere.safetensors"),
        ("--lora {fetal} --lora-weight nan", "strength nan"),
        ("--lora-weight 0.5", "--lora-weight 0.5"),
        ("--seeds 1 2 --count 3", "--seeds"),
        ("--seeds 1 2 1", "--seeds"),
        ("--prompt <lora:fetal:1>", "--lora-weight"),
        ("--prompt femur --planes brain", "--prompt"),
        ("--size 64y64", "64y64"),
        ("--size 64x100", "64x100"),
        ("--size 0", "0"),
        ("--like {here}/nowhere.png", "nowhere.png"),
        ("--like {here}/bare.png", "bare.png"),
        ("--like {here}/prompt.png", "prompt.png"),
        ("--like {here}/photo.jpg", "photo.jpg"),
        ("--like {here}/cut.png", "cut.png"),
        ("--like {here}/dpm.png", "DPM++ 2M"),
        ("--like {here}/exponential.png", "Exponential"),
        ("--like {here}/hires.png", "Hires upscale"),
        ("--like {here}/vae.png", "VAE hash, VAE: not done here"),
        ("--like {here}/seedless.png", "Seed"),
        ("--like {here}/model.png", "0123456789"),
        ("--like {here}/moved.png --lora {sharp} {fetal}", "moved.png"),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2_and_leaves_nothing(
    flags, words, places, monkeypatch, capsys
):
    out = places["here"] / "out"
    flags = [flag.format(**places) for flag in ["{tiny}", *flags.split()]]
    monkeypatch.setattr(
        sys, "argv", ["sample.py", "--out", str(out), "--device", "cpu", "--model", *flags]
    )
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(SCRIPT, run_name="__main__")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sample.py:")]
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not out.exists()


def test_a_lora_that_differs_from_the_images_is_named_with_both_hashes(run, tiny, loras, tmp_path):
    path, other = tmp_path / "moved.png", tmp_path / "fetal.safetensors"
    path.write_bytes((run / "prompt" / "euler_7.png").read_bytes())
    content = bytearray(loras[0].read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    with pytest.raises(ValueError) as error:
        sample(tmp_path / "out", "--like", path, "--model", tiny, "--lora", other, loras[1])
    assert data_sha256(loras[0])[:12] in str(error.value) and data_sha256(other)[:12] in str(
        error.value
    )
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# --- images that are kept ---


@pytest.mark.parametrize(
    "other",
    [
        {"--dtype": "bf16"},
        {"--prediction-type": "v_prediction"},
        {"--tokenizer": "other"},
        {"--negative-prompt": "head"},
        {"--spacing": "leading"},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_an_image_made_with_another_flag_that_changes_pixels_is_made_again(
    tiny, tmp_path, capsys, other
):
    flags = ["--model", tiny, "--prompt", "a photo of fetal femur", "--seeds", 1]
    before = pixels(sample(tmp_path / "out", *flags) / "prompt" / "euler_1.png")
    sample(tmp_path / "out", *flags)
    assert "1 images: 1 are there, 0 to make" in capsys.readouterr().out
    if "--tokenizer" in other:  # two words of the prompt change their numbers
        shutil.copytree(tiny / "tokenizer", tmp_path / "other")
        vocabulary = json.loads((tmp_path / "other" / "vocab.json").read_text())
        vocabulary["photo</w>"], vocabulary["fetal</w>"] = (
            vocabulary["fetal</w>"],
            vocabulary["photo</w>"],
        )
        (tmp_path / "other" / "vocab.json").write_text(json.dumps(vocabulary))
        other = {"--tokenizer": tmp_path / "other"}
    sample(tmp_path / "out", *flags, *[part for flag in other.items() for part in flag])
    assert "1 images: 0 are there, 1 to make" in capsys.readouterr().out
    assert (pixels(tmp_path / "out" / "prompt" / "euler_1.png") != before).any()


def rows_of(out):
    return [row["image"] for row in csv.DictReader((out / "manifest.csv").read_text().splitlines())]


def test_a_run_over_other_planes_leaves_the_rows_of_images_that_are_there(tiny, tmp_path):
    flags = ["--model", tiny, "--count", 2]
    sample(tmp_path, *flags, "--planes", "brain", "femur")
    (tmp_path / "femur" / "euler_400001.png").unlink()
    sample(tmp_path, *flags, "--planes", "thorax")
    brain = [f"brain/euler_{seed}.png" for seed in (200_000, 200_001)]
    thorax = [f"thorax/euler_{seed}.png" for seed in (600_000, 600_001)]
    assert rows_of(tmp_path) == [*brain, "femur/euler_400000.png", *thorax]
    # of its own plane a run says all there is
    sample(tmp_path, "--model", tiny, "--count", 1, "--planes", "brain")
    assert rows_of(tmp_path) == ["femur/euler_400000.png", *thorax, brain[0]]


def test_an_image_again_by_like_takes_its_precision_and_refuses_another(tiny, tmp_path, capsys):
    run = sample(
        tmp_path / "out", "--model", tiny, "--prompt", PROMPT, "--seeds", 1, "--dtype", "bf16"
    )
    moved = tmp_path / "moved.png"  # away from the record of its run
    shutil.copy(run / "prompt" / "euler_1.png", moved)
    sample(tmp_path / "again", "--model", tiny, "--like", moved)
    assert "the very pixels" in capsys.readouterr().out
    with pytest.raises(ImageError, match=r"was made with --dtype bf16, not fp32; give its --dtype"):
        sample(tmp_path / "fp32", "--model", tiny, "--like", moved, "--dtype", "fp32")

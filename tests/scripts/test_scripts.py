"""train_lora.py and sample.py on the embedded model: determinism, resuming, what they write, what
they refuse."""

import csv
import hashlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file

from ldm import MINI
from planes import PLANES, PROMPTS
from planes.phantoms.phantom import write_spanish_layout

ROOT = Path(__file__).resolve().parents[2]
CONFIG = json.loads((MINI / "unet" / "config.json").read_text())
SIDE, WIDTH = (
    8 * CONFIG["sample_size"],
    CONFIG["cross_attention_dim"],
)  # px of the model's images; of its text embedding


def run(script, *flags):
    module = runpy.run_path(str(ROOT / f"{script}.py"), run_name=script)
    module["main"](module["parse_args"]([str(flag) for flag in flags]))


def digests(folder, *names):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def spanish(tmp_path_factory):
    root = tmp_path_factory.mktemp("spanish")
    write_spanish_layout(root, train=2, test=0, seed=0)
    return root


def lora_flags(spanish, out, *more):
    size = ["--per-plane", 2, "--repeats", 2, "--batch-size", 4, "--rank", 4, "--save-every", 2]
    return ["--spanish", spanish, "--out", out, "--device", "cpu", "--lr", 1e-3, *size, *more]


@pytest.fixture(scope="module")
def trained(spanish, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora")
    run("train_lora", *lora_flags(spanish, out))
    return out


def sample_flags(out, *more):
    return [
        "--out",
        out,
        "--device",
        "cpu",
        "--count",
        2,
        "--steps",
        3,
        "--planes",
        "brain",
        "femur",
        *more,
    ]


@pytest.fixture(scope="module")
def sampled(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic")
    run("sample", *sample_flags(out, "--lora", trained / "lora.safetensors"))
    return out


@pytest.mark.slow
def test_training_writes_a_kohya_file_the_losses_and_a_record(trained):
    with safe_open(trained / "lora.safetensors", "pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
    assert all(key.startswith("lora_unet_") and "attn2" in key for key in keys)
    # 2 repeats
    assert metadata["ss_network_dim"] == "4" and metadata["ss_num_train_images"] == "20"
    rows = list(csv.DictReader((trained / "loss.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5]  # 10 images x 2 repeats / 4
    assert all(0 < float(row["loss"]) < 10 for row in rows)
    record = json.loads((trained / "args.json").read_text())
    assert record["arguments"]["rank"] == 4 and torch.__version__.startswith(
        record["versions"]["torch"]
    )
    assert (trained / "samples" / "step000005.png").exists()


@pytest.mark.slow
def test_training_moves_b_away_from_zero(trained):
    weights = load_file(trained / "lora.safetensors")
    assert all(w.abs().max() > 0 for key, w in weights.items() if "lora_up" in key)


@pytest.mark.slow
def test_the_same_seed_trains_the_same_files(trained, spanish, tmp_path):
    run("train_lora", *lora_flags(spanish, tmp_path))
    names = ("lora.safetensors", "loss.csv", "samples/step000005.png")
    assert digests(tmp_path, *names) == digests(trained, *names)


@pytest.mark.slow
def test_another_seed_trains_other_files(trained, spanish, tmp_path):
    run("train_lora", *lora_flags(spanish, tmp_path, "--seed", 1))
    assert digests(tmp_path, "lora.safetensors") != digests(trained, "lora.safetensors")


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one(trained, spanish, tmp_path, monkeypatch):
    module = runpy.run_path(str(ROOT / "train_lora.py"), run_name="train_lora")
    calls = iter(range(100))

    def stop_in_the_fourth_step(*args, **kwargs):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return norm(*args, **kwargs)

    norm = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stop_in_the_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        module["main"](module["parse_args"]([str(f) for f in lora_flags(spanish, tmp_path)]))
    monkeypatch.undo()
    assert not (tmp_path / "lora.safetensors").exists()

    run("train_lora", *lora_flags(spanish, tmp_path, "--resume"))
    names = ("lora.safetensors", "loss.csv", "samples/step000005.png")
    assert digests(tmp_path, *names) == digests(trained, *names)


@pytest.mark.slow
def test_accumulated_batches_train_as_one_large_batch(spanish, tmp_path):
    flags = ["--per-plane", 2, "--repeats", 2, "--rank", 4, "--spanish", spanish, "--device", "cpu"]
    run("train_lora", *flags, "--out", tmp_path / "large", "--batch-size", 10)
    run("train_lora", *flags, "--out", tmp_path / "small", "--batch-size", 5, "--accumulate", 2)
    large, small = (
        np.loadtxt(tmp_path / d / "loss.csv", delimiter=",", skiprows=1)[:, 2]
        for d in ("large", "small")
    )
    assert len(large) == 2
    np.testing.assert_allclose(large, small, rtol=1e-3)


@pytest.mark.slow
def test_a_folder_of_captioned_images_trains_too(spanish, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for n, path in enumerate(sorted((spanish / "Images").iterdir())[:3]):
        Image.open(path).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(PROMPTS[PLANES[n]] + "\n")
    run(
        "train_lora",
        "--images",
        folder,
        "--out",
        tmp_path / "out",
        "--repeats",
        1,
        "--rank",
        2,
        "--device",
        "cpu",
    )
    assert (tmp_path / "out" / "lora.safetensors").exists()


@pytest.mark.slow
def test_sampling_writes_images_a_manifest_and_a_contact_sheet(sampled):
    rows = list(csv.DictReader((sampled / "manifest.csv").read_text().splitlines()))
    assert len(rows) == 2 * 2 * 2 and {row["sampler"] for row in rows} == {"euler", "unipc"}
    assert len({row["seed"] for row in rows}) == len(rows)
    for row in rows:
        with Image.open(sampled / row["image"]) as image:
            assert image.size == (SIDE, SIDE)
            assert (
                json.loads(image.text["fu-lora"])["prompt"]
                == row["prompt"]
                == PROMPTS[row["plane"]]
            )
    assert (sampled / "contact_sheet.png").exists() and (sampled / "args.json").exists()


@pytest.mark.slow
def test_the_same_seed_samples_the_same_files_and_batches_do_not_matter(sampled, trained, tmp_path):
    lora = ["--lora", trained / "lora.safetensors"]
    run("sample", *sample_flags(tmp_path / "again", *lora))
    names = [str(path.relative_to(sampled)) for path in sampled.rglob("*.png")] + ["manifest.csv"]
    assert digests(tmp_path / "again", *names) == digests(sampled, *names)

    run("sample", *sample_flags(tmp_path / "single", *lora, "--batch-size", 1))
    for path in sampled.glob("*/*.png"):
        one, two = (
            np.asarray(Image.open(p)).astype(int)
            for p in (path, tmp_path / "single" / path.relative_to(sampled))
        )
        # a batch of another size may round the last bit otherwise
        assert np.abs(one - two).max() <= 1


@pytest.mark.slow
def test_what_is_there_and_whole_is_not_made_again(sampled, trained):
    kept, cut, gone = sorted((sampled / "brain").glob("*.png"))[:3]
    before, time = {path: pixels(path) for path in (cut, gone)}, kept.stat().st_mtime_ns
    cut.write_bytes(cut.read_bytes()[:300])
    gone.unlink()
    run("sample", *sample_flags(sampled, "--lora", trained / "lora.safetensors"))
    assert kept.stat().st_mtime_ns == time
    for path, image in before.items():  # in a batch of another size, as above
        assert np.abs(pixels(path) - image).max() <= 1


@pytest.mark.slow
def test_other_settings_make_the_images_again(sampled, trained, tmp_path):
    run("sample", *sample_flags(tmp_path, "--planes", "brain", "--samplers", "euler"))
    first = next((tmp_path / "brain").glob("*.png"))
    before = first.read_bytes()
    run(
        "sample",
        *sample_flags(tmp_path, "--planes", "brain", "--samplers", "euler", "--guidance-scale", 2),
    )
    assert first.read_bytes() != before
    before = first.read_bytes()
    run(
        "sample",
        *sample_flags(tmp_path, "--planes", "brain", "--samplers", "euler", "--clip-skip", 2),
    )
    assert first.read_bytes() != before


@pytest.mark.slow
def test_lora_weight_zero_is_the_model_without_lora(trained, tmp_path):
    few = ["--planes", "brain", "--samplers", "euler"]
    run(
        "sample",
        *sample_flags(
            tmp_path / "zero", "--lora", trained / "lora.safetensors", "--lora-weight", 0, *few
        ),
    )
    run("sample", *sample_flags(tmp_path / "none", *few))
    for path in (tmp_path / "zero").glob("*/*.png"):
        other = tmp_path / "none" / path.relative_to(tmp_path / "zero")
        assert np.array_equal(pixels(path), pixels(other))


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("train_lora", ["--spanish", "{nowhere}"], "nowhere"),
        ("train_lora", ["--spanish", "{spanish}", "--per-plane", "3"], "3"),
        (
            "train_lora",
            ["--spanish", "{spanish}", "--per-plane", "2", "--target", "nothing_like_it"],
            "nothing_like_it",
        ),
        (
            "train_lora",
            ["--spanish", "{spanish}", "--per-plane", "2", "--model", "{nowhere}"],
            "nowhere",
        ),
        ("train_lora", ["--spanish", "{spanish}", "--per-plane", "2", "--size", "60"], "60"),
        ("train_lora", [], "--spanish"),
        ("sample", ["--lora", "{nowhere}"], "nowhere"),
        ("sample", ["--lora", "{weights}"], "safetensors"),
        ("sample", ["--model", "{nowhere}"], "nowhere"),
        ("sample", ["--size", "100"], "100"),
        ("sample", ["--count", "0"], "--count"),
        ("sample", ["--clip-skip", "9"], "clip skip 9"),
        (
            "train_lora",
            ["--spanish", "{spanish}", "--per-plane", "2", "--clip-skip", "9"],
            "clip skip 9",
        ),
        ("train_lora", ["--spanish", "{spanish}", "--rank", "0"], "--learn-token"),
        (
            "train_lora",
            ["--spanish", "{spanish}", "--per-plane", "1", "--learn-token", "ultrasound"],
            "has it already",
        ),
        (
            "train_lora",
            ["--spanish", "{spanish}", "--per-plane", "1", "--learn-token", "two words"],
            "one word",
        ),
        (
            "train_lora",
            [
                "--spanish",
                "{spanish}",
                "--per-plane",
                "1",
                "--learn-token",
                "<x>",
                "--init-word",
                "vein",
            ],
            "'vein'",
        ),
        (
            "train_lora",
            ["--spanish", "{spanish}", "--learn-token", "<x>", "--rare-token", "sks"],
            "not both",
        ),
        (
            "train_lora",
            ["--spanish", "{spanish}", "--per-plane", "1", "--prior", "{empty}"],
            "no images",
        ),
        (
            "train_lora",
            ["--spanish", "{spanish}", "--per-plane", "1", "--prior", "{lost}"],
            "1 of 1 images are missing",
        ),
        (
            "train_lora",
            ["--spanish", "{spanish}", "--per-plane", "1", "--prior", "{nowhere}"],
            "nowhere",
        ),
        ("train_lora", ["--spanish", "{spanish}", "--prior-weight", "-1"], "--prior-weight -1.0"),
        ("sample", ["--embedding", "{wide}"], "1024 wide"),
        ("sample", ["--embedding", "{several}"], f"[3, {WIDTH}]"),
        ("sample", ["--embedding", "{empty}"], "safetensors"),
        ("sample", ["--embedding", "{known}"], "has it already"),
        ("sample", ["--token", "<x>"], "--embedding"),
        ("sample", ["--prompts", "{nowhere}"], "nowhere"),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2_and_leaves_nothing(
    script, flags, words, spanish, tmp_path, monkeypatch, capsys
):
    weights = MINI / "vae" / "diffusion_pytorch_model.safetensors"
    places = {"nowhere": tmp_path / "nowhere", "spanish": spanish, "weights": weights}
    for name, content in {
        "empty": "image,prompt\n",
        "lost": "image,prompt\nlost.png,a photo\n",
    }.items():
        places[name] = tmp_path / name
        places[name].write_text(content)
    for name, token, shape in [
        ("wide", "<x>", (1, 1024)),
        ("several", "<x>", (3, WIDTH)),
        ("known", "ultrasound", (WIDTH,)),
    ]:
        places[name] = tmp_path / name
        save_file({token: torch.zeros(shape)}, places[name])
    flags = [
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        *(flag.format(**places) for flag in flags),
    ]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith(f"{script}.py:") and words in message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_that_differs_in_any_file_makes_the_images_again(tmp_path):
    few = ["--planes", "brain", "--samplers", "euler"]
    other = tmp_path / "model"
    shutil.copytree(MINI, other)
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"] = weights["conv_out.bias"] + 0.1
    save_file(weights, path)
    hashes = []
    for model in (MINI, other):
        run("sample", *sample_flags(tmp_path / "out", *few, "--model", model))
        rows = csv.DictReader((tmp_path / "out" / "manifest.csv").read_text().splitlines())
        hashes.append({row["model_hash"] for row in rows})
    assert hashes[0] != hashes[1]

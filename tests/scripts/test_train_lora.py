"""train_lora.py, runs of a few steps: what it writes, what a step is, resuming, refusals."""

import json
import re
import shutil
import signal

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from shorthand import agree, read_json, refused, table

import train_lora
from ldm.buckets import read_bucketed
from ldm.checkpoints import load
from ldm.images import encode_images
from ldm.text import encode_prompts
from lora.layer import LoRAError
from lora.training import Draws
from planes.folders import read_captioned_folder
from samplers.schedule import NoiseSchedule
from train_lora import main, parse_args

KOHYA = (
    "--train-text-encoder --text-encoder-lr 2e-3 --clip-skip 2 --bucket --batch-size 2"
    " --accumulate 2 --schedule cosine --validation 1 --validation-every 3 --epochs 2 --lr 1e-3"
    " --rank 2 --alpha 3 --style-words --sample-every 3 --seed 3"
)
ROWS = [  # step, images, loss, norm of the gradient, learning rate, held-out loss or 0
    [1, 3, 1.472953, 0.994908, 1e-3, 0],
    [2, 2, 1.488505, 1.400212, 1e-3 * (2 + 2**0.5) / 4, 0],
    [3, 3, 1.422749, 0.971787, 5e-4, 1.348051],
    [4, 2, 1.473138, 1.651817, 1e-3 * (2 - 2**0.5) / 4, 1.345486],
]


def line_of(tiny_model, images, out, flags):
    return f"--model {tiny_model} --images {images} --device cpu --out {out} {flags}"


def train(*flags):
    main(parse_args(line_of(*flags).split()))


def files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def rows(out):
    losses = table(out / "loss.csv")
    assert [*losses[0]][:5] == ["step", "images", "loss", "grad_norm", "lr"]
    return [[float(cell or 0) for cell in row.values()] for row in losses]


def header(out):
    with safe_open(out / "lora.safetensors", "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def trained(tiny_model, folder, tmp_path_factory):
    """A run with nearly everything: two epochs of three batches, which make two steps."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train(tiny_model, folder, out, KOHYA)
    return out


def test_a_run_writes_its_losses_its_weights_and_what_it_was(trained):
    expected = {"lora.safetensors", "loss.csv", "loss.png", "args.json", "checkpoint.pt"}
    expected |= {"samples/step000003.png"}
    assert files(trained).keys() == expected
    for row, right in zip(rows(trained), ROWS, strict=True):
        assert row == pytest.approx(right, rel=1e-3)
    # four samples of each of four captions
    assert Image.open(trained / "samples" / "step000003.png").size == (256, 256)
    weights = load_file(trained / "lora.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    for key, weight in weights.items():
        if "lora_up" in key:  # with clip skip 2 the last layer of CLIP has no part in the loss
            assert weight.any() != ("encoder_layers_2_" in key), key
    record = read_json(trained / "args.json")
    assert record["arguments"]["rank"] == 2
    assert any(name.endswith("1_fetal femur/0.png") for name in record["inputs"])


def test_the_file_says_how_it_was_trained_in_kohyas_words(trained, tiny_model):
    said = header(trained)
    expected = {
        "ss_sd_model_name": tiny_model.name,
        "ss_network_dim": "2",
        "ss_network_alpha": "3.0",
        "ss_unet_lr": "0.001",
        "ss_text_encoder_lr": "0.002",
        "ss_lr_scheduler": "cosine",
        "ss_clip_skip": "2",
        "ss_seed": "3",
        "ss_resolution": "(64, 64)",
        "ss_num_train_images": "5",
        "ss_num_batches_per_epoch": "3",
        "ss_num_epochs": "2",
        "ss_max_train_steps": "4",
        "modelspec.prediction_type": "epsilon",
    }
    assert {key: said[key] for key in expected} == expected
    femur, brain = json.loads(said["ss_tag_frequency"]).values()
    assert femur["fetal femur"] == 3 and femur["low contrast"] == 2 and femur["very bright"] == 1
    assert brain == {"fetal brain": 1, "very bright": 1, "normal contrast": 1}  # one is held out
    assert not any(str(tiny_model.parent) in value for value in said.values())


def test_a_run_that_is_stopped_twice_and_goes_on_ends_with_the_same_bits(
    trained, tiny_model, folder, tmp_path, monkeypatch, capsys
):
    draw, out = Draws.__call__, tmp_path / "out"
    for number, at in ((signal.SIGTERM, 0), (signal.SIGINT, 2)):

        def stopped(draws, step, number=number, at=at):
            if step == at:
                signal.raise_signal(number)
            return draw(draws, step)

        monkeypatch.setattr(Draws, "__call__", stopped)
        before = signal.getsignal(number)
        with pytest.raises(SystemExit) as stop:
            train(tiny_model, folder, out, f"{KOHYA} --resume")
        assert stop.value.code == 128 + number and signal.getsignal(number) is before
        said = capsys.readouterr()
        assert "4 images, 10 image passes, 4 optimizer steps" in said.out
        assert f"{at + 1} steps are saved in {out}\n" in said.err
        assert not (out / "lora.safetensors").exists()
    monkeypatch.setattr(Draws, "__call__", draw)
    train(tiny_model, folder, out, f"{KOHYA} --resume")
    whole, resumed = files(trained), files(out)
    assert resumed.keys() == whole.keys()
    differs = {path for path in whole if resumed[path] != whole[path]}
    assert differs <= {"args.json", "checkpoint.pt"}  # the first names --out and --resume
    one, other = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (trained, out))
    assert one["identity"] == other["identity"] and one["rows"] == other["rows"]
    agree(other["lora"], one["lora"], 0)
    agree(other["optimizer"]["state"], one["optimizer"]["state"], 0)


CHANGES = {
    "--rank 4": "--rank was 2, is 4",
    "--epochs 3": "--epochs was 2, is 3",  # the cosine's length
    "--no-bucket": "--bucket was True, is False",
    "--dtype bf16": "--dtype was fp32, is bf16",
    "--prediction-type v_prediction": "--prediction-type was epsilon, is v_prediction",
    "an image": "images and captions was",
    "a caption": "images and captions was",
    "a weight": "unet/diffusion_pytorch_model.safetensors was",
    "a word": "--tokenizer was",
}
QUICK_CHANGES = ("--rank 4", "--epochs 3", "an image", "a weight")


@pytest.mark.parametrize(
    "change",
    [pytest.param(c, marks=[pytest.mark.slow] * (c not in QUICK_CHANGES)) for c in CHANGES],
)
def test_a_run_goes_on_with_what_it_was_made_of_alone(
    trained, tiny_model, folder, other_model, tmp_path, change
):
    images, model, before = tmp_path / "images", tmp_path / "model", files(trained)
    shutil.copytree(folder, images)
    shutil.copytree(tiny_model, model)
    flags = change if change.startswith("--") else ""
    if change == "an image":
        Image.new("RGB", (96, 40)).save(images / "2_fetal brain" / "0.png")
    elif change == "a caption":
        (images / "2_fetal brain" / "0.txt").write_text("a brain")
    elif change == "a weight":
        model = other_model
    elif change == "a word":
        path = model / "tokenizer" / "vocab.json"
        words = read_json(path)
        words["fetal</w>"], words["photo</w>"] = words["photo</w>"], words["fetal</w>"]
        path.write_text(json.dumps(words))
    with refused(LoRAError, re.escape(f"other settings ({CHANGES[change]}")):
        train(model, images, trained, f"{KOHYA} --resume {flags}")
    assert files(trained) == before


@pytest.mark.slow
def test_fewer_epochs_than_are_done_are_refused(tiny_model, folder, tmp_path):
    train(tiny_model, folder, tmp_path, "--rank 2 --epochs 2")
    with refused(LoRAError, "8 steps are done, these would be 4: give another --out"):
        train(tiny_model, folder, tmp_path, "--rank 2 --epochs 1 --resume")


@pytest.mark.parametrize(
    "kind, debiased",
    [pytest.param("epsilon", False, marks=pytest.mark.slow), ("v_prediction", True)],
)
def test_the_first_step_is_the_base_models_error_over_all_images_of_both_shapes(
    tiny_model, folder, tmp_path, kind, debiased
):
    flags = f"--prediction-type {kind} --bucket --repeats 2 --batch-size 16 --accumulate 2"
    flags += " --rank 2 --train-text-encoder --lr 1e-2 --text-encoder-lr 1e-3 --weight-decay 0"
    train(tiny_model, folder, tmp_path, flags + " --debiased-estimation-loss" * debiased)
    base, schedule, images = load(tiny_model), NoiseSchedule(), read_captioned_folder(folder)
    latents = encode_images(base.vae, (read_bucketed(i.path, 64, 16) for i in images), 0)
    captions, repeats = [i.caption for i in images], [2 * i.repeats for i in images]
    errors = []
    for batch in Draws(latents, captions, repeats, 16, 2, 0)(0):
        signal, noise = (
            share.sqrt().view(-1, 1, 1, 1).float()
            for share in (schedule.alphas_cumprod[batch.t], 1 - schedule.alphas_cumprod[batch.t])
        )
        context = encode_prompts(base.tokenizer, base.text_encoder, batch.captions)
        with torch.no_grad():
            predicted = base.unet(signal * batch.latents + noise * batch.noise, batch.t, context)
        v = signal * batch.noise - noise * batch.latents
        error = (predicted - (v if kind == "v_prediction" else batch.noise)).square()
        if debiased:  # 1 / (SNR + 1)
            error *= noise**2
        errors += error.mean(dim=(1, 2, 3)).tolist()
    ((step, count, loss, _, rate),) = rows(tmp_path)
    assert (step, count, rate) == (1, 14, 1e-2) and len(errors) == 14
    assert loss == pytest.approx(sum(errors) / 14, abs=2e-6)  # the table has six decimals
    assert header(tmp_path)["ss_debiased_estimation"] == str(debiased)
    # Adam's first step is as large as the learning rate
    for key, weight in load_file(tmp_path / "lora.safetensors").items():
        if "lora_up" in key:
            expected = 1e-2 if key.startswith("lora_unet") else 1e-3
            assert weight.abs().max().item() == pytest.approx(expected, rel=1e-2), key


def test_nothing_but_a_and_b_moves(tiny_model, folder, tmp_path, changed_by):
    flags = "--batch-size 8 --rank 2 --train-text-encoder"
    names = changed_by(train_lora, line_of(tiny_model, folder, tmp_path, flags))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in names} == {"A", "B"}
    assert len(names) == 2 * (28 + 18)  # layers of cross-attention, and six of each layer of CLIP


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, tolerance",
    [("--gradient-checkpointing", 1e-4), ("--dtype bf16", 0.03), ("--validation-every 1", 1e-6)],
)
def test_what_takes_other_memory_or_looks_more_often_trains_alike(
    trained, tiny_model, folder, tmp_path, flags, tolerance
):
    train(tiny_model, folder, tmp_path, f"{KOHYA} {flags}")
    for row, right in zip(rows(tmp_path), rows(trained), strict=True):
        assert row[:3] == pytest.approx(right[:3], rel=tolerance)
        assert row[5] or "every" not in flags
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert {tensor.dtype for tensor in state["lora"]} == {torch.float32}


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(tiny_model, folder, tmp_path):
    flags = "--rank 2 --lr 1e30 --epochs 9"
    line = r"^step \d: the loss or its gradient is not finite; try a lower --lr, or --dtype bf16"
    with refused(LoRAError, line):
        train(tiny_model, folder, tmp_path / "a", flags)
    assert not (tmp_path / "a").exists()
    with refused(LoRAError, "try a lower --lr, .* the last checkpoint, if any, is good"):
        train(tiny_model, folder, tmp_path / "b", f"{flags} --save-every 1")
    # GradScaler, which looks for its scale, is given some steps
    nans = [(n, 1, "nan", "1", 1e-4) for n in range(3)]
    train_lora.require_finite([(0, 1, "1", "1", 1e-4), *nans], patience=3)
    with refused(LoRAError, r"^step 1: the loss or its gradient is not finite"):
        train_lora.require_finite([(1, 1, "1", "inf", 1e-4)], patience=0)


@pytest.mark.slow
def test_a_sheet_shows_eight_captions_at_most_and_long_ones_are_said(
    tiny_model, folder, tmp_path, monkeypatch, capsys
):
    long = "ultrasound " * 76
    (tmp_path / "images").mkdir()
    for n, caption in enumerate([*"abcdefghijklmnopqr", long, f"{long} again"]):
        shutil.copy(folder / "1_fetal femur" / "0.png", tmp_path / "images" / f"{n}.png")
        (tmp_path / "images" / f"{n}.txt").write_text(caption)
    calls = []

    def generate(unet, context, negative, seeds, size, **settings):
        calls.append((seeds, size, settings["guidance_scale"]))
        return torch.zeros(len(seeds), 4, *size)

    monkeypatch.setattr(train_lora, "generate", generate)
    flags = "--repeats 1 --batch-size 20 --rank 2 --seed 5 --guidance-scale 3"
    train(tiny_model, tmp_path / "images", tmp_path / "out", flags)
    assert calls == [([5, 6, 7, 8], (8, 8), 3.0)] * 7  # of 20 captions every third
    assert (tmp_path / "out" / "samples" / "step000001.png").exists()
    cut = f"2 captions are cut behind 75 tokens, such as {long[:40]!r}.."
    assert cut in capsys.readouterr().out


@pytest.mark.slow
def test_another_sites_classes_leave_their_prompts_beside_the_lora(
    tiny_model, folder, tmp_path, capsys
):
    flags = (
        f"--source {folder} --prompt-template an_x_of_{{class}} --per-plane 2 --repeats 1 --rank 2"
    )
    main(parse_args(f"--model {tiny_model} --device cpu --out {tmp_path} {flags}".split()))
    said = read_json(tmp_path / "prompts.json")
    assert said["1_fetal femur"] == ["an_x_of_1_fetal femur"] and len(said) == 2
    # a later run on other images leaves none, and what cannot be sampled is a line
    train(tiny_model, folder, tmp_path, "--overwrite --repeats 1 --rank 2 --guidance-scale inf")
    assert not (tmp_path / "prompts.json").exists() and (tmp_path / "lora.safetensors").exists()
    assert "no samples of step" in capsys.readouterr().out


PAPER = {
    "layers": "cross-attention",
    "rank": 128,
    "alpha": 128,
    "init": "gaussian",
    "train_text_encoder": False,
    "lr": 1e-4,
    "batch_size": 2,
    "epochs": 1,
    "clip_skip": 1,
    "bucket": False,
    "repeats": 100,
    "seed": 0,
    "dtype": "fp32",
}
AUTHORS = {
    "layers": "transformer",
    "rank": 128,
    "alpha": 128,
    "init": "kaiming",
    "train_text_encoder": True,
    "lr": 1e-4,
    "text_encoder_lr": 5e-5,
    "weight_decay": 0.01,
    "optimizer": "adamw8bit",
    "clip_skip": 2,
    "bucket": True,
    "batch_size": 1,
    "accumulate": 1,
    "epochs": 1,
    "seed": 1234,
}


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", PAPER),
        ("--preset kohya", AUTHORS),
        ("--preset kohya --rank 8", AUTHORS | {"rank": 8, "alpha": 8}),
        ("--no-bucket --preset kohya", AUTHORS | {"bucket": False}),
    ],
)
def test_a_preset_is_the_default_of_what_is_not_given(flags, expected):
    args = vars(parse_args(f"--spanish x --out y --device cpu {flags}".split()))
    assert {name: args[name] for name in expected} == expected


def test_folders_that_name_repeats_say_all(folder):
    assert parse_args(f"--images {folder} --out y".split()).repeats == 1
    assert parse_args(f"--images {folder / '1_fetal'} --out y".split()).repeats == 100

"""train_lora.py as kohya's users know it: the text encoder trained too, the authors' preset,
buckets and repeats.

Runs are of a few steps, of a random model with the embedded one's tokenizer, on images of 64 px and
less.
"""

import json
import math
import os
import runpy
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, safe_open

from harness.resume import SaveTimes
from ldm import MINI
from ldm.checkpoints import Model, load, save_folder
from ldm.checkpoints.tokenizer import load_tokenizer
from ldm.images import encode_images
from ldm.text import TextConfig, TextEncoder, encode_prompts
from ldm.unet import UNet, UNetConfig
from ldm.vae import AutoencoderKL, VAEConfig
from lora import LoRAError, lora_layers, remove, training
from lora.training import PRESETS, batches_of_step, batches_per_epoch, cut, loss_weights
from planes.phantoms.phantom import write_spanish_layout
from planes.style import style_words
from samplers.schedule import NoiseSchedule

ROOT = Path(__file__).resolve().parents[2]
WORDS = len(load_tokenizer(MINI / "tokenizer", TextConfig()))
TEXT = TextConfig(
    WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
)
SCRIPT = runpy.run_path(str(ROOT / "train_lora.py"), run_name="train_lora")
WIDE, SQUARE = (96, 40), (48, 48)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Stable Diffusion of random weights in a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(
            UNetConfig(
                4, 4, (8, 16), (True, True), 1, (2, 2), cross_attention_dim=16, norm_num_groups=4
            )
        )
        vae = AutoencoderKL(
            VAEConfig(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2)
        )
        text_encoder = TextEncoder(TEXT)
    tokenizer = load_tokenizer(MINI / "tokenizer", TEXT)
    path = tmp_path_factory.mktemp("tiny") / "model"
    save_folder(Model(unet, vae, text_encoder, tokenizer, sample_size=8), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """kohya's folders: two wide images of 2 repeats, three square ones of 1."""
    root = tmp_path_factory.mktemp("folders")
    generator = torch.Generator().manual_seed(0)
    for name, size, count in (("2_fetal brain", WIDE, 2), ("1_fetal femur", SQUARE, 3)):
        (root / name).mkdir()
        for n in range(count):
            pixels = torch.randint(
                256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8
            )
            Image.fromarray(pixels.numpy()).save(root / name / f"{n}.png")
    return root


def parse(*flags):
    return SCRIPT["parse_args"]([str(flag) for flag in flags])


def train(tiny, folder, out, *more):
    """Runs the script; the model as it left it."""
    flags = ["--model", tiny, "--out", out, "--device", "cpu", "--rank", 2, "--lr", 1e-3]
    flags += ["--images", folder] if folder else []
    loaded, load_model = [], SCRIPT["parse_args"].__globals__["load_model"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            SCRIPT["parse_args"].__globals__,
            "load_model",
            lambda *a, **k: loaded.append(load_model(*a, **k)) or loaded[0],
        )
        SCRIPT["main"](parse(*flags, "--sample-every", 99, *more))
    return loaded[0]


def lora_of(out):
    return load_file(out / "lora.safetensors")


def header(out):
    with safe_open(out / "lora.safetensors", "pt") as file:
        return file.metadata()


KOHYA = (
    "--train-text-encoder",
    "--text-encoder-lr",
    1e-3,
    "--bucket",
    "--batch-size",
    2,
    "--accumulate",
    2,
)


@pytest.fixture(scope="module")
def trained(tiny, folder, tmp_path_factory):
    """Two epochs of four batches, two of square images and two of wide ones: two steps each."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return out, train(tiny, folder, out, *KOHYA, "--epochs", 2)


def test_captions_say_how_bright_the_images_are_and_resuming_holds_to_it(tiny, folder, tmp_path):
    out = tmp_path / "out"
    train(tiny, folder, out, "--style-words")
    tags = json.loads(header(out)["ss_tag_frequency"])
    for name, (_, count) in {"2_fetal brain": (WIDE, 2), "1_fetal femur": (SQUARE, 3)}.items():
        words = [
            word for path in (folder / name).iterdir() for word in style_words(Image.open(path))
        ]
        assert tags[name] == {name[2:]: count} | Counter(words)
    with pytest.raises(LoRAError, match="style-words was True, is None"):
        train(tiny, folder, out, "--resume")


# the order of images


def epoch_of(repeats, buckets, batch_size, accumulate, seed, epoch=0):
    count = math.ceil(batches_per_epoch(repeats, buckets, batch_size) / accumulate)
    return [
        batches_of_step(epoch * count + n, repeats, buckets, batch_size, accumulate, seed)
        for n in range(count)
    ]


def test_an_epoch_shows_every_image_as_often_as_it_repeats_in_batches_of_one_bucket():
    repeats, buckets = torch.tensor([3, 1, 2, 5, 1, 1, 4]), torch.tensor([1, 0, 1, 0, 2, 0, 0])
    for epoch in (0, 1):
        steps = epoch_of(repeats, buckets, 3, 2, seed=7, epoch=epoch)
        batches = [batch for step in steps for batch in step]
        assert Counter(torch.cat(batches).tolist()) == Counter(dict(enumerate(repeats.tolist())))
        assert all(len(buckets[batch].unique()) == 1 and len(batch) <= 3 for batch in batches)
        # 11 passes of bucket 0, 5 of bucket 1 and 1 of bucket 2, each cut by itself
        assert len(batches) == batches_per_epoch(repeats, buckets, 3) == 4 + 2 + 1
        assert [len(step) for step in steps] == [2, 2, 2, 1]


def test_a_step_depends_on_its_number_and_the_seed_alone():
    repeats, buckets = torch.tensor([3, 1, 2, 5]), torch.tensor([1, 0, 1, 0])

    def order(step, seed):
        return [batch.tolist() for batch in batches_of_step(step, repeats, buckets, 2, 1, seed)]

    forwards = [order(step, 0) for step in range(12)]
    torch.manual_seed(123)
    assert [order(step, 0) for step in reversed(range(12))] == forwards[::-1]
    assert [order(step, 1) for step in range(12)] != forwards
    assert forwards[:6] != forwards[6:]


def test_batches_of_several_buckets_come_in_a_random_order():
    repeats, buckets = torch.full((8,), 10), torch.tensor([0, 1] * 4)
    firsts = [int(buckets[step[0][0]]) for step in epoch_of(repeats, buckets, 4, 1, seed=0)]
    assert sorted(firsts) == [0] * 10 + [1] * 10 and firsts not in (
        sorted(firsts),
        sorted(firsts)[::-1],
    )


def test_one_bucket_and_equal_repeats_are_one_shuffle_cut_into_steps():
    repeats, buckets = torch.full((5,), 3), torch.zeros(5, dtype=torch.long)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(3 * 1_000_003 + 1)) % 5
    for n, images in enumerate(order.split(2 * 2)):
        batches = batches_of_step(4 + n, repeats, buckets, 2, 2, seed=3)
        assert torch.equal(torch.cat(batches), images) and [len(b) for b in batches] == [
            len(b) for b in images.split(2)
        ]


def test_images_are_cut_into_batches_of_one_bucket_in_their_order():
    batches = cut(torch.tensor([4, 0, 3, 1, 4]), torch.tensor([1, 1, 0, 0, 1]), 2)
    assert [batch.tolist() for batch in batches] == [[3], [4, 0], [1, 4]]


# the preset


def test_the_preset_of_kohya_has_the_authors_values(monkeypatch):
    # as where there is a GPU
    monkeypatch.setitem(SCRIPT["parse_args"].__globals__, "device_name", str)
    args = vars(parse("--preset", "kohya", "--spanish", "x", "--out", "y", "--device", "cuda"))
    authors = {
        "rank": 128,
        "alpha": 128,
        "lr": 1e-4,
        "text_encoder_lr": 5e-5,
        "train_text_encoder": True,
    }
    authors |= {
        "batch_size": 1,
        "epochs": 1,
        "clip_skip": 2,
        "dtype": "fp16",
        "optimizer": "adamw8bit",
        "seed": 1234,
    }
    authors |= {
        "bucket": True,
        "resize": None,
        "target": "transformer",
        "init": "kaiming",
        "accumulate": 1,
    }
    assert {key: args[key] for key in authors} == authors
    assert args["repeats"] is None  # they did not publish theirs
    assert {key: args[key] for key in PRESETS["kohya"]} == PRESETS["kohya"]


@pytest.mark.parametrize("flag", PRESETS["kohya"])
def test_an_explicit_flag_wins_over_the_preset(flag):
    value = PRESETS["kohya"][flag]
    other = {"target": "attention", "init": "gaussian", "optimizer": "adamw"}.get(flag)
    option = f"--{flag.replace('_', '-')}"
    given = [f"--no-{option[2:]}"] if value is True else [option, other or value * 2]
    for order in (["--preset", "kohya", *given], [*given, "--preset", "kohya"]):
        args = vars(parse("--spanish", "x", "--out", "y", *order))
        assert args[flag] == (False if value is True else other or value * 2)
        assert all(args[key] == PRESETS["kohya"][key] for key in PRESETS["kohya"] if key != flag)


def test_without_a_preset_the_paper_holds():
    args = vars(parse("--spanish", "x", "--out", "y", "--device", "cpu"))
    assert args == vars(
        parse("--spanish", "x", "--out", "y", "--device", "cpu", "--preset", "paper")
    )
    paper = {
        "target": "cross-attention",
        "train_text_encoder": False,
        "init": "gaussian",
        "bucket": False,
    }
    paper |= {
        "resize": "squash",
        "clip_skip": 1,
        "batch_size": 2,
        "rank": 128,
        "alpha": 128,
        "seed": 0,
    }
    assert {key: args[key] for key in paper} == paper


def test_alpha_follows_the_rank_under_the_preset_too():
    assert parse("--preset", "kohya", "--rank", 8, "--spanish", "x", "--out", "y").alpha == 8


# the text encoder


def test_a_trained_text_encoder_is_in_the_file_and_its_b_has_moved(trained):
    weights = lora_of(trained[0])
    ups = {
        key: weight
        for key, weight in weights.items()
        if key.startswith("lora_te_") and "lora_up" in key
    }
    assert len(ups) == 6 * TEXT.num_hidden_layers and all(weight.any() for weight in ups.values())
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in ups
    assert any(key.startswith("lora_unet_") for key in weights)


def test_training_leaves_the_base_weights_as_they_were(trained, tiny):
    _, model = trained
    base = load(tiny)
    for name in ("unet", "text_encoder"):
        network, before = getattr(model, name), getattr(base, name).state_dict()
        trained_ones = [parameter for parameter in network.parameters() if parameter.requires_grad]
        assert len(trained_ones) == 2 * len(lora_layers(network)) > 0
        assert all(parameter.dtype == torch.float32 for parameter in trained_ones)
        remove(network)
        after = network.state_dict()
        assert after.keys() == before.keys() and all(
            torch.equal(after[key], before[key]) for key in before
        )


def test_the_text_encoder_is_asked_once_unless_it_is_trained(tiny, folder, tmp_path, monkeypatch):
    calls, forward = [], TextEncoder.forward
    monkeypatch.setattr(
        TextEncoder,
        "forward",
        lambda *args: calls.append(torch.is_grad_enabled()) or forward(*args),
    )
    train(tiny, folder, tmp_path / "without", "--batch-size", 4)  # 7 passes: 2 steps
    assert calls == [False]
    assert not any(key.startswith("lora_te") for key in lora_of(tmp_path / "without"))
    calls.clear()
    train(tiny, folder, tmp_path / "with", "--batch-size", 4, "--train-text-encoder")
    assert calls == [False, True, True]


def test_clip_skip_2_leaves_the_last_layer_of_the_text_encoder_where_it_began(
    tiny, folder, tmp_path
):
    train(tiny, folder, tmp_path, "--train-text-encoder", "--clip-skip", 2, "--batch-size", 4)
    for key, weight in lora_of(tmp_path).items():
        if key.startswith("lora_te_") and "lora_up" in key:
            assert weight.any() != ("layers_2_" in key), key


@pytest.mark.slow
def test_gradient_checkpointing_trains_the_text_encoder_alike(trained, tiny, folder, tmp_path):
    train(tiny, folder, tmp_path, *KOHYA, "--epochs", 2, "--gradient-checkpointing")
    weights = lora_of(trained[0])
    for key, weight in lora_of(tmp_path).items():
        torch.testing.assert_close(weight, weights[key], atol=1e-6, rtol=1e-3)


def test_each_network_has_its_own_learning_rate(tiny, folder, tmp_path):
    few = [
        "--batch-size",
        8,
        "--train-text-encoder",
        "--lr",
        1e-2,
        "--text-encoder-lr",
        1e-3,
        "--weight-decay",
        0,
    ]
    train(tiny, folder, tmp_path, *few)
    for key, weight in lora_of(tmp_path).items():
        # Adam's first step has the size of the learning rate; fp16 rounds it by 5e-4
        if "lora_up" in key:
            expected = 1e-2 if key.startswith("lora_unet") else 1e-3
            assert weight.abs().max().item() == pytest.approx(expected, rel=1e-2), key


@pytest.mark.slow
def test_a_half_precision_base_keeps_the_text_encoders_lora_in_float32(tiny, folder, tmp_path):
    model = train(
        tiny, folder, tmp_path, "--train-text-encoder", "--dtype", "bf16", "--batch-size", 8
    )
    layer = lora_layers(model.text_encoder)["text_model.encoder.layers.0.mlp.fc1"]
    assert (layer.root.weight.dtype, layer.B.dtype) == (
        torch.bfloat16,
        torch.float32,
    ) and layer.B.any()


def test_a_token_is_learned_beside_the_text_encoder_and_a_resumed_run_ends_alike(
    tiny, folder, tmp_path, monkeypatch
):
    # four steps
    flags = (
        *KOHYA,
        "--learn-token",
        "<x>",
        "--schedule",
        "cosine",
        "--save-every",
        1,
        "--epochs",
        2,
    )
    train(tiny, folder, tmp_path / "whole", *flags)
    norm, calls = torch.nn.utils.clip_grad_norm_, iter(range(9))
    with monkeypatch.context() as patch:

        def stop_in_the_third_step(*args):
            if next(calls) == 2:
                raise KeyboardInterrupt
            return norm(*args)

        patch.setattr(torch.nn.utils, "clip_grad_norm_", stop_in_the_third_step)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, folder, tmp_path / "cut", *flags)
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 2
    with pytest.raises(ValueError, match=r"text-encoder-lr was 0\.001, is 0\.002"):
        train(tiny, folder, tmp_path / "cut", *flags, "--resume", "--text-encoder-lr", 2e-3)
    with pytest.raises(ValueError, match="bucket was True, is False"):
        train(tiny, folder, tmp_path / "cut", *flags, "--resume", "--no-bucket")
    with pytest.raises(ValueError, match="epochs was 2, is 3"):  # which another rate belongs to
        train(tiny, folder, tmp_path / "cut", *flags, "--resume", "--epochs", 3)
    train(tiny, folder, tmp_path / "cut", *flags, "--resume")
    for name in ("lora.safetensors", "embedding.safetensors", "loss.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rates = [
        float(line.split(",")[-1])
        for line in (tmp_path / "whole" / "loss.csv").read_text().splitlines()[1:]
    ]
    assert rates == pytest.approx([1e-3, 1e-3 * (2 + 2**0.5) / 4, 5e-4, 1e-3 * (2 - 2**0.5) / 4])
    ((_, vector),) = load_file(tmp_path / "whole" / "embedding.safetensors").items()
    assert vector.isfinite().all()


@pytest.mark.slow
def test_held_out_images_leave_the_training_as_it_is_and_their_loss_is_that_of_a_run_without_a_stop(
    tiny, tmp_path
):
    write_spanish_layout(tmp_path / "spanish", 3, test=0, seed=0)
    data = ["--spanish", tmp_path / "spanish", "--per-plane", 1, "--repeats", 2]
    out = [tmp_path / name for name in ("plain", "whole", "cut")]
    looks, every = ["--validation", 2, "--validation-every", 2], ["--save-every", 1]
    train(tiny, None, out[0], *data)
    train(tiny, None, out[1], *data, *looks)
    assert (out[0] / "lora.safetensors").read_bytes() == (out[1] / "lora.safetensors").read_bytes()
    rows = [line.split(",") for line in (out[1] / "loss.csv").read_text().splitlines()]
    assert rows[0][-1] == "held_out" and [bool(row[-1]) for row in rows[1:]] == [
        False,
        True,
        False,
        True,
        True,
    ]
    assert [row[:-1] for row in rows] == [
        line.split(",") for line in (out[0] / "loss.csv").read_text().splitlines()
    ]
    assert len({row[-1] for row in rows[2::2]}) > 1  # it moves as the network does
    assert Image.open(out[1] / "loss.png").width > 500

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        rate_share = training.rate_share

        def stop_in_the_fourth_step(schedule, step, steps):
            if step == 3:
                raise KeyboardInterrupt
            return rate_share(schedule, step, steps)

        patch.setattr(training, "rate_share", stop_in_the_fourth_step)
        train(tiny, None, out[2], *data, *looks, *every)
    train(tiny, None, out[2], *data, *looks, *every, "--resume")
    for name in ("lora.safetensors", "loss.csv", "loss.png"):
        assert (out[2] / name).read_bytes() == (out[1] / name).read_bytes()
    with pytest.raises(ValueError, match="images and captions was"):
        train(tiny, None, out[2], *data, "--resume")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits(
    tiny, folder, tmp_path, number, capsys
):
    flags = ["--epochs", 2, "--seed", 3]  # eight steps
    train(tiny, folder, tmp_path / "whole", *flags)
    before, rate_share = signal.getsignal(number), training.rate_share

    def asked_in_the_third_step(schedule, step, steps):
        if step == 2:
            os.kill(os.getpid(), number)
        return rate_share(schedule, step, steps)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(training, "rate_share", asked_in_the_third_step)
        train(tiny, folder, tmp_path / "cut", *flags)
    assert stop.value.code == 128 + number and signal.getsignal(number) is before
    assert (
        "checkpoint.pt has the 3 steps that are done; --resume goes on from there"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "cut" / "lora.safetensors").exists()
    train(tiny, folder, tmp_path / "cut", *flags, "--resume")
    for name in ("lora.safetensors", "loss.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_saves_every_five_minutes_or_by_steps(monkeypatch):
    clock = iter([0.0, 299.0, 300.0, 301.0, 599.0, 600.0])
    monkeypatch.setattr("harness.resume.time.monotonic", lambda: next(clock))
    saves = SaveTimes(None)
    assert [saves.due(step) for step in range(1, 6)] == [False, True, False, False, True]
    saves.restore()
    monkeypatch.undo()
    saves = SaveTimes(3)
    assert [step for step in range(1, 10) if saves.due(step)] == [3, 6, 9]
    saves.restore()


def test_the_echo_of_a_signal_is_the_first_again_and_a_later_one_ends_the_run(monkeypatch):
    clock = iter([0.0, 10.0, 12.9, 13.0])
    monkeypatch.setattr("harness.resume.time.monotonic", lambda: next(clock))
    before, ended = signal.signal(signal.SIGTERM, lambda *_: ended.append(1)), []
    try:
        saves = SaveTimes(3)
        for still_to_be_saved in (True, True, False):
            signal.raise_signal(signal.SIGTERM)
            assert ended == ([] if still_to_be_saved else [1]) and saves.asked == signal.SIGTERM
    finally:
        saves.restore()
        signal.signal(signal.SIGTERM, before)


def test_where_no_checkpoint_is_yet_a_run_gone_wrong_names_none(tiny, folder, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(
        LoRAError, match=r"^step \d+: the loss or its gradient is not finite; try a lower --lr"
    ):
        train(tiny, folder, tmp_path / "a", "--lr", 1e30, "--epochs", 9)
    with pytest.raises(
        LoRAError, match=r"not finite; .*checkpoint\.pt holds the last good state: try a lower --lr"
    ):
        train(tiny, folder, tmp_path / "b", "--lr", 1e30, "--epochs", 9, "--save-every", 1)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "change", ["image", "caption", "--dtype", "--prediction-type", "--tokenizer"]
)
def test_a_run_goes_on_with_what_it_was_made_of_alone(tiny, folder, tmp_path, change):
    shutil.copytree(folder, tmp_path / "images")
    shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")
    flags = ["--epochs", 1, "--tokenizer", tmp_path / "tokenizer"]
    train(tiny, tmp_path / "images", tmp_path / "out", *flags)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    named, more = "images and captions", []
    if change == "image":
        Image.new("RGB", WIDE).save(tmp_path / "images" / "2_fetal brain" / "0.png")
    elif change == "caption":
        (tmp_path / "images" / "2_fetal brain" / "0.txt").write_text("a photo of fetal brain")
    elif change == "--tokenizer":
        vocabulary = json.loads((tmp_path / "tokenizer" / "vocab.json").read_text())
        vocabulary["photo</w>"], vocabulary["fetal</w>"] = (
            vocabulary["fetal</w>"],
            vocabulary["photo</w>"],
        )
        (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
        named = change
    else:
        named, more = (
            change,
            [change, {"--dtype": "bf16", "--prediction-type": "v_prediction"}[change]],
        )
    with pytest.raises(
        LoRAError, match=rf"other settings \({named} was \w+, is \w+\): use its own"
    ):
        train(tiny, tmp_path / "images", tmp_path / "out", *flags, "--epochs", 2, "--resume", *more)
    assert {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == before


def test_fewer_epochs_than_are_done_are_refused_and_nothing_is_overwritten(tiny, folder, tmp_path):
    train(tiny, folder, tmp_path, "--epochs", 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(LoRAError, match=r"8 steps are done, these would be 4: give another --out"):
        train(tiny, folder, tmp_path, "--epochs", 1, "--resume")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_sample_sheets_show_the_text_encoder_as_it_is_trained(tiny, folder, tmp_path, monkeypatch):
    contexts = []

    def generate(unet, context, negative_context, seeds, size, **settings):
        contexts.append((context[0], negative_context[0]))
        return torch.zeros(len(seeds), 4, *size)

    monkeypatch.setattr("paper.adapt.generate", generate)
    model = train(
        tiny, folder, tmp_path, "--train-text-encoder", "--batch-size", 8, "--sample-every", 0
    )
    base = load(tiny)
    for shown, text in zip((*contexts[0], contexts[1][0]), ("fetal brain", "", "fetal femur")):
        now = encode_prompts(model.tokenizer, model.text_encoder, [text])[0]
        torch.testing.assert_close(shown, now, atol=1e-6, rtol=0)
        assert (
            shown - encode_prompts(base.tokenizer, base.text_encoder, [text])[0]
        ).abs().max() > 1e-3


def test_of_many_captions_a_sample_sheet_shows_eight_from_first_to_last(
    tiny, folder, tmp_path, monkeypatch
):
    for n in range(20):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{n}.png").symlink_to(folder / "1_fetal femur" / "0.png")
        (tmp_path / "images" / f"{n}.txt").write_text(chr(ord("a") + n))
    prompts = []
    monkeypatch.setattr(
        "paper.adapt.encode_prompts", lambda *args: prompts.append(args[2]) or encode_prompts(*args)
    )
    drawn = torch.zeros(4, 4, 8, 8)
    monkeypatch.setattr("paper.adapt.generate", lambda *args, **settings: drawn)
    few = ["--train-text-encoder", "--batch-size", 20, "--repeats", 1, "--sample-every", 0]
    train(tiny, tmp_path / "images", tmp_path / "out", *few)
    assert [asked[0] for asked in prompts if len(asked) == 1 and asked[0]] == [
        "a",
        "d",
        "g",
        "j",
        "m",
        "p",
        "s",
    ]


# buckets and repeats


def test_kohyas_folders_say_their_repeats(trained):
    out, _ = trained
    rows = [line.split(",") for line in (out / "loss.csv").read_text().splitlines()[1:]]
    # an epoch has 3 passes of squares and 4 of wide ones
    assert len(rows) == 4 and [sum(int(row[1]) for row in rows[n : n + 2]) for n in (0, 2)] == [
        7,
        7,
    ]
    assert json.loads((out / "args.json").read_text())["arguments"]["repeats"] == 1


def test_kohyas_folders_of_one_repeat_are_seen_once(tiny, folder, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1_fetal femur").symlink_to(folder / "1_fetal femur")
    train(tiny, tmp_path / "images", tmp_path / "out", "--batch-size", 8)
    assert "3 images x 1 repeats" in capsys.readouterr().out


def test_repeats_multiply_those_of_the_folders(tiny, folder, tmp_path, capsys):
    train(tiny, folder, tmp_path, "--repeats", 2, "--batch-size", 8, "--bucket")
    printed = capsys.readouterr().out
    assert (
        "5 images x 2 or 4 repeats x 1 epochs = 14 image passes; batch 8 x 1 accumulated -> 2"
        " optimizer steps" in (printed)
    )
    assert (
        "2 images in the bucket of 96 x 32 px" in printed
        and "3 images in the bucket of 48 x 48 px" in printed
    )
    assert json.loads(header(tmp_path)["ss_dataset_dirs"]) == {
        "2_fetal brain": {"n_repeats": 4, "img_count": 2},
        "1_fetal femur": {"n_repeats": 2, "img_count": 3},
    }


@pytest.mark.parametrize("debiased", (False, True))
def test_in_a_step_over_two_buckets_all_images_weigh_alike_but_for_their_times(
    tiny, folder, tmp_path, debiased
):
    flags = ["--batch-size", 8, "--accumulate", 2, "--bucket", "--train-text-encoder"]
    train(tiny, folder, tmp_path, *flags, *["--debiased-estimation-loss"] * debiased)
    ((_, images, loss, _, _),) = (
        r.split(",") for r in (tmp_path / "loss.csv").read_text().splitlines()[1:]
    )
    # the only step, B = 0: the base model's error
    base, schedule = load(tiny), NoiseSchedule()
    read = SCRIPT["parse_args"].__globals__["read_bucketed"]
    paths = [
        path
        for name in ("1_fetal femur", "2_fetal brain")
        for path in sorted((folder / name).iterdir())
    ]
    latents = encode_images(base.vae, (read(path, 64, 16) for path in paths), 0)
    captions = ["fetal femur"] * 3 + ["fetal brain"] * 2
    repeats, buckets = torch.tensor([1, 1, 1, 2, 2]), torch.tensor([1, 1, 1, 0, 0])
    seen = torch.cat(batches_of_step(0, repeats, buckets, 8, 2, 0)).tolist()
    draw = torch.Generator().manual_seed(500_009)
    noises = [torch.randn(latents[n].shape, generator=draw) for n in seen]
    times = torch.randint(1000, (len(seen),), generator=draw)
    errors, snr = [], schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    for n, noise, t in zip(seen, noises, times):
        context = encode_prompts(base.tokenizer, base.text_encoder, [captions[n]])
        noisy = schedule.add_noise(latents[n][None], noise[None], t[None])
        with torch.no_grad():
            error = F.mse_loss(base.unet(noisy, t[None], context), noise[None]).item()
        errors.append(error / min(snr[t].item(), 1000) ** 0.5 if debiased else error)
    assert int(images) == len(errors) == 7
    assert float(loss) == pytest.approx(sum(errors) / 7, abs=2e-6)  # the table has six decimals
    assert header(tmp_path)["ss_debiased_estimation"] == str(debiased)


def test_the_debiased_loss_of_a_network_that_predicts_v_weighs_by_1_over_snr_plus_1():
    weights = loss_weights(torch.tensor([0.9, 0.5, 0.2]), "v_prediction", debiased=True)
    torch.testing.assert_close(weights, torch.tensor([0.1, 0.5, 0.8]))


# the file's metadata


def test_the_file_says_how_it_was_trained_in_kohyas_words(trained, tiny):
    said = header(trained[0])
    expected = {
        "ss_output_name": "lora",
        "ss_sd_model_name": "model",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "2.0",
        "ss_learning_rate": "0.001",
        "ss_unet_lr": "0.001",
        "ss_text_encoder_lr": "0.001",
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_lr_scheduler": "constant",
        "ss_mixed_precision": "no",
        "ss_clip_skip": "1",
        "ss_seed": "0",
        "ss_resolution": "(64, 64)",
        "ss_enable_bucket": "True",
        "ss_num_train_images": "7",
        "ss_num_batches_per_epoch": "4",
        "ss_gradient_accumulation_steps": "2",
        "ss_num_epochs": "2",
        "ss_epoch": "2",
        "ss_max_train_steps": "4",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "64x64",
    }
    assert {key: said.get(key) for key in expected} == expected
    assert json.loads(said["ss_tag_frequency"]) == {
        "1_fetal femur": {"fetal femur": 3},
        "2_fetal brain": {"fetal brain": 2},
    }
    assert not any(str(tiny.parent) in value or "_at" in key for key, value in said.items())


# mistakes


def test_a_list_of_the_spanish_images_is_refused_beside_a_folder_of_images(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--images", "x", "--manifest", "list.csv", "--out", "y")
    assert (
        stop.value.code == 2 and "--manifest lists images of --spanish" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--rank", "0", "--learn-token", "<x>", "--train-text-encoder"],
            "--no-train-text-encoder",
        ),
        (["--bucket", "--resize", "crop"], "--resize crop"),
        (["--text-encoder-lr", "0"], "--text-encoder-lr 0.0"),
        (["--lr", "nan"], "--lr nan"),
        (["--size", "-64"], "--size -64"),
        (["--preset", "papers"], "papers"),
        (["--images", "z"], "--images: not allowed with argument --spanish"),
        (["--bucket", "--compile"], "give --no-bucket, or no --compile"),
        (["--validation", "-1"], "--validation -1: at least 0"),
    ],
)
def test_flags_that_cannot_go_together_are_refused_in_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--spanish", "x", "--out", "y", *flags)
    assert stop.value.code == 2 and words in capsys.readouterr().err.strip().splitlines()[-1]


def test_captions_that_are_longer_than_the_text_encoder_reads_are_counted_and_said_once(
    tiny, folder, tmp_path, capsys
):
    long = "ultrasound " * 76
    for name, caption in (("0", long), ("1", long + "again"), ("2", "ultrasound " * 75)):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.png").symlink_to(folder / "1_fetal femur" / "0.png")
        (tmp_path / "images" / f"{name}.txt").write_text(caption)
    train(tiny, tmp_path / "images", tmp_path / "out", "--repeats", 1)
    said = [line for line in capsys.readouterr().out.splitlines() if "captions are cut" in line]
    assert said == [
        "2 captions are cut behind 75 tokens, such as the one that begins " + repr(long[:40])
    ]

"""Pre-training of the embedded model, a few steps of it: scenes, resuming, the folder it leaves."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm.checkpoints import load
from ldm.generate import generate
from ldm.mini.bpe import write_tokenizer
from ldm.mini.pretrain import (
    PLAIN_WORDS,
    POSITIONS,
    UNET,
    grow,
    main,
    make_text_encoder,
    parse_args,
    widen_unseen,
)
from ldm.mini.scenes import scene
from ldm.text import encode_prompts
from ldm.unet import UNet
from planes import PLANES, PROMPTS
from planes.style import BRIGHTNESS, CONTRAST, style_words


def test_scenes_are_grey_squares_with_generic_captions():
    for n in range(20):
        image, caption = scene(np.random.default_rng(n), 64)
        assert image.size == (64, 64) and image.mode == "L"
        assert caption.startswith("a photo of ")
        assert not set(re.findall(r"\w+", caption)) & {"fetal", *PLANES}


def test_a_scene_says_how_bright_and_how_rich_in_contrast_it_is_or_says_nothing_of_it():
    said = {BRIGHTNESS: 0, CONTRAST: 0}
    for n in range(60):
        image, caption = scene(np.random.default_rng(n), 64)
        parts = caption.split(", ")
        for words, right in zip((BRIGHTNESS, CONTRAST), style_words(image)):
            assert [part for part in parts if part in words] in ([], [right])
            said[words] += right in parts
    # dropped now and then, so that a prompt may do without
    assert all(25 < count < 58 for count in said.values())


def test_shapes_are_not_called_by_the_words_for_style():
    parts = {part for n in range(60) for part in scene(np.random.default_rng(n), 64)[1].split(", ")}
    styles = {*BRIGHTNESS, *CONTRAST}
    words = {word for part in parts - styles for word in re.findall(r"\w+", part)}
    assert styles <= parts and words.isdisjoint(word for style in styles for word in style.split())


def test_a_network_that_got_more_transformers_computes_what_it_did_until_they_learn():
    torch.manual_seed(0)
    less = UNet(replace(UNET, attention=(False, True, True)))
    more = grow(less)
    x, context, t = (
        torch.randn(2, 4, 8, 8),
        torch.randn(2, 5, UNET.cross_attention_dim),
        torch.tensor([3, 900]),
    )
    assert len(more.state_dict()) > len(less.state_dict())
    torch.testing.assert_close(more(x, t, context), less(x, t, context), rtol=0, atol=1e-6)
    more(x, t, context).square().mean().backward()
    assert more.down_blocks[0].attentions[0].proj_out.weight.grad.abs().max() > 0


def test_words_that_were_never_read_are_told_apart_by_an_encoder_that_adds_much_of_its_own(
    tmp_path,
):
    torch.manual_seed(0)
    # "ultrasound" is as good as unseen
    captions = ["a photo of ultrasound", *["a photo of large ring"] * 199]
    tokenizer = write_tokenizer(tmp_path, captions, PLAIN_WORDS, POSITIONS)
    encoder = make_text_encoder(len(tokenizer))
    with torch.no_grad():  # as training leaves it: the same long vector for every word
        encoder.text_model.encoder.layers[-1].mlp.fc2.bias.copy_(
            40 * torch.randn(UNET.cross_attention_dim)
        )

    def nearest():
        with torch.no_grad():
            # the plane's word
            context = encode_prompts(tokenizer, encoder, [*PROMPTS.values()])[:, 5]
        return (
            torch.cdist(context, context) + 9 * context.norm() * torch.eye(5)
        ).min() / context.norm(dim=1).mean()

    assert nearest() < 0.02
    known = encoder.text_model.embeddings.token_embedding.weight[
        tokenizer.get_vocab()["ring</w>"]
    ].clone()
    for _ in range(2):  # once more changes little: a model that is trained on is widened again
        widen_unseen(encoder, tokenizer, captions)
        assert 0.3 < nearest() < 1.5
    assert encoder.text_model.embeddings.token_embedding.weight[
        tokenizer.get_vocab()["ring</w>"]
    ].equal(known)


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one_and_the_folder_loads(tmp_path, monkeypatch):
    # of the sheets, to look at alone
    monkeypatch.setattr("ldm.mini.pretrain.generate", partial(generate, steps=1))
    monkeypatch.setattr("ldm.mini.pretrain.BATCH", 8)
    monkeypatch.setattr("ldm.mini.pretrain_vae.BATCH", 8)
    tiny = [
        "--scenes",
        "64",
        "--vae-steps",
        "2",
        "--decoder-steps",
        "2",
        "--unet-decay",
        "2",
        "--save-every",
        "1",
    ]
    tiny += ["--device", "cpu"]

    def run(work, steps, out):
        flags = [
            "--work",
            str(tmp_path / work),
            "--out",
            str(tmp_path / out),
            "--unet-steps",
            str(steps),
        ]
        main(parse_args([*tiny, *flags]))

    run("whole", 2, "one")
    run("parts", 1, "half")
    run("parts", 2, "two")
    files = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
    for name in files:
        one, two = (load_file(tmp_path / out / f"{name}.safetensors") for out in ("one", "two"))
        assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)
    half = load_file(tmp_path / "half/unet/diffusion_pytorch_model.safetensors")
    assert not half["conv_in.weight"].equal(
        load_file(tmp_path / "one/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    )
    assert load(tmp_path / "one").sample_size == 12
    with pytest.raises(SystemExit, match="exists already"):
        run("whole", 2, "one")

    # on from a finished folder: its autoencoder as it is, its networks and its words trained
    # further
    flags = [
        "--start",
        str(tmp_path / "one"),
        "--vae-steps",
        "0",
        "--unet-steps",
        "1",
        "--device",
        "cpu",
    ]
    main(
        parse_args(
            [
                *flags,
                "--scenes",
                "64",
                "--work",
                str(tmp_path / "on"),
                "--out",
                str(tmp_path / "three"),
            ]
        )
    )
    one, three = (
        {name: load_file(tmp_path / out / f"{name}.safetensors") for name in files}
        for out in ("one", "three")
    )
    vae, unet = "vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model"
    assert all(one[vae][key].equal(three[vae][key]) for key in one[vae])
    assert not all(one[unet][key].equal(three[unet][key]) for key in one[unet])
    assert (tmp_path / "one/tokenizer/vocab.json").read_bytes() == (
        tmp_path / "three/tokenizer/vocab.json"
    ).read_bytes()

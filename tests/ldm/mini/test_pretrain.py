"""Pre-training of the embedded model, a few steps of it: scenes, resuming, the folder it leaves."""

import hashlib
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm import MINI
from ldm.checkpoints import load
from ldm.mini import pretrain
from ldm.mini.pretrain import (
    learning_rate,
    main,
    make_text_encoder,
    parse_args,
    widen_unseen,
)
from ldm.mini.scenes import scene
from ldm.text import encode_prompts
from planes import PLANES, PROMPTS
from planes.style import BRIGHTNESS, CONTRAST, style_words

FILES = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


def test_scenes_are_grey_squares_with_generic_captions_that_may_say_how_they_look():
    said, names = {BRIGHTNESS: 0, CONTRAST: 0}, set()
    for n in range(60):
        image, caption = scene(np.random.default_rng(n), 64)
        assert image.size == (64, 64) and image.mode == "L" and caption.startswith("a photo of ")
        parts = caption.split(", ")
        for words, right in zip((BRIGHTNESS, CONTRAST), style_words(image)):
            assert [part for part in parts if part in words] in ([], [right])
            said[words] += right in parts
        names |= {*parts}
    # dropped now and then, so that a prompt may do without
    assert all(25 < count < 58 for count in said.values())
    styles = {*BRIGHTNESS, *CONTRAST}
    words = {word for part in names - styles for word in re.findall(r"\w+", part)}
    assert styles <= names and words.isdisjoint({"fetal", *PLANES, *" ".join(styles).split()})


def test_the_scenes_are_those_that_the_shipped_weights_learned_from():
    """Captions exactly; pixels by their means, since numpy's sines may differ in the last bit."""
    pairs = [scene(np.random.default_rng(n), 96) for n in range(40)]
    captions = "\n".join(caption for _, caption in pairs)
    assert hashlib.sha256(captions.encode()).hexdigest()[:16] == "e175d0543c6174b0"
    means = [np.asarray(image).mean() for image, _ in pairs]
    np.testing.assert_allclose(
        means[:8], [140.69, 79.53, 11.90, 23.05, 105.58, 45.63, 83.47, 53.77], atol=0.05
    )
    assert np.mean(means) == pytest.approx(69.618, abs=0.05)


def test_words_that_were_never_read_are_told_apart_by_an_encoder_that_adds_much_of_its_own():
    torch.manual_seed(0)
    # "ultrasound" is as good as unseen
    captions = ["a photo of ultrasound", *["a photo of large ring"] * 199]
    mini = load(MINI)
    tokenizer, encoder = mini.tokenizer, make_text_encoder(mini.text_encoder.config)
    for prompt in (*captions[:2], *PROMPTS.values()):
        assert tokenizer.tokenize(prompt) == [f"{word}</w>" for word in prompt.split()]
    with torch.no_grad():  # as training leaves it: the same long vector for every word
        bias = 40 * torch.randn(encoder.config.hidden_size)
        encoder.text_model.encoder.layers[-1].mlp.fc2.bias.copy_(bias)
    table = encoder.text_model.embeddings.token_embedding.weight

    @torch.no_grad()
    def nearest():
        # the plane's word
        context = encode_prompts(tokenizer, encoder, [*PROMPTS.values()])[:, 5]
        distances = torch.cdist(context, context) + 9 * context.norm() * torch.eye(5)
        return distances.min() / context.norm(dim=1).mean()

    ring = tokenizer.get_vocab()["ring</w>"]
    assert nearest() < 0.02
    known = table[ring].clone()
    for _ in range(2):  # once more changes little: a model that is trained on is widened again
        widen_unseen(encoder, tokenizer, captions)
        assert 0.3 < nearest() < 1.5
    assert table[ring].equal(known)


def test_the_rate_warms_up_over_100_steps_and_falls_by_half_a_cosine():
    rates = [learning_rate(step, 1000, 2e-3) for step in (0, 49, 500, 1000)]
    assert rates == pytest.approx([2e-5, 1e-3 * (1 + np.cos(0.049 * np.pi)) / 2, 1e-3, 0])


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_an_uninterrupted_one_and_the_folder_can_be_gone_on_from(
    tmp_path, monkeypatch
):
    for name, value in {"BATCH": 2, "VAE_BATCH": 2, "SAVE_EVERY": 1, "DEVICE": "cpu"}.items():
        monkeypatch.setattr(pretrain, name, value)

    def run(work, out, *flags):
        places = ["--work", str(tmp_path / work), "--out", str(tmp_path / out)]
        main(parse_args([*places, "--scenes", "8", *flags]))
        return {name: load_file(tmp_path / out / f"{name}.safetensors") for name in FILES}

    two = ("--vae-steps", "2", "--unet-steps", "2")
    whole = run("whole", "one", *two)
    saved, write = [], pretrain.write_state

    def stop(path, state):
        write(path, state)
        if path.stem == "unet":
            saved.append(state["step"])
            raise KeyboardInterrupt

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(pretrain, "write_state", stop)
        run("parts", "two", *two)
    assert saved == [1] and not (tmp_path / "two").exists()
    parts = run("parts", "two", *two)
    assert all(whole[n][key].equal(parts[n][key]) for n in FILES for key in whole[n])
    assert load(tmp_path / "one").sample_size == 12
    with pytest.raises(SystemExit, match="exists already"):
        run("whole", "one", *two)
    with pytest.raises(SystemExit, match="--vae-steps was 2, is 3"):
        run("whole", "other", "--vae-steps", "3")

    # on from a finished folder: its autoencoder and its words as they are
    on = run(
        "more", "on", "--start", str(tmp_path / "one"), "--vae-steps", "0", "--unet-steps", "1"
    )
    unet, vae, _ = FILES
    assert all(whole[vae][key].equal(on[vae][key]) for key in whole[vae])
    assert not whole[unet]["conv_in.weight"].equal(on[unet]["conv_in.weight"])
    words = [(tmp_path / out / "tokenizer/vocab.json").read_bytes() for out in ("one", "on")]
    assert words[0] == words[1]

"""beyond.py: Textual Inversion moves one embedding, DreamBooth weighs prior images in; sample.py
names the token; embeddings as files."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from shorthand import agree, read_json, refused, table

import beyond
import sample
from ldm import MINI
from ldm.checkpoints import load
from ldm.embedding import add_token, load_embedding, save_embedding, word_embedding
from ldm.images import encode_images, read_image
from ldm.text import encode_prompts
from lora.layer import LoRAError
from lora.training import Draws
from planes.captions import prior_images
from planes.folders import read_captioned_folder
from samplers.schedule import NoiseSchedule

TOKEN = "<fetal-us>"


def line_of(tiny_model, method, out, flags):
    return f"{method} --model {tiny_model} --device cpu --out {out} --steps 3 {flags}"


def train(*words):
    beyond.main(beyond.parse_args(line_of(*words).split()))


def losses(out):
    return [float(row["loss"]) for row in table(out / "loss.csv")]


def draw(tiny_model, out, *flags):
    line = f"--model {tiny_model} --device cpu --out {out} --planes brain --samplers euler"
    line += " --count 3 --steps 1"
    sample.main(sample.parse_args([*line.split(), *map(str, flags)]))
    return out / "manifest.csv"


@pytest.fixture(scope="module")
def prior(tiny_model, tmp_path_factory):
    """The manifest of what the base model draws."""
    return draw(tiny_model, tmp_path_factory.mktemp("prior"))


def first_loss(tiny_model, images, seed):
    """The base model's mean squared error on a first batch of two images."""
    base, paths, captions, repeats = load(tiny_model), *zip(*images)
    latents = encode_images(base.vae, (read_image(path, 64) for path in paths), seed)
    (batch,) = Draws(latents, captions, repeats, 2, 1, seed)(0)
    context = encode_prompts(base.tokenizer, base.text_encoder, batch.captions)
    x_t = NoiseSchedule().add_noise(batch.latents, batch.noise, batch.t)
    with torch.no_grad():
        return F.mse_loss(base.unet(x_t, batch.t, context), batch.noise).item()


@pytest.mark.slow
def test_inversion_moves_the_embedding_of_its_token_alone_and_sampling_names_it(
    tiny_model, folder, prior, tmp_path, changed_by
):
    flags = (
        f"--source {folder} --prompt-template a_{{class}} --per-plane 2 --token {TOKEN} --lr 1e-2"
    )
    names = changed_by(beyond, line_of(tiny_model, "inversion", tmp_path, flags))
    assert names == {"te.text_model.embeddings.token_embedding.vector"}
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"embedding.safetensors", "loss.csv", "args.json", "prompts.json"}
    ((token, vector),) = load_file(tmp_path / "embedding.safetensors").items()
    base = load(tiny_model)
    word = word_embedding(base.tokenizer, base.text_encoder, "ultrasound")
    moved = (vector[0] - word).abs()
    assert token == TOKEN and 0.02 < moved.max() < 0.0301  # Adam: at most about lr in each step
    prompt = "a_1_fetal femur"
    assert read_json(tmp_path / "prompts.json")["1_fetal femur"] == [prompt]
    # at first the token is the word that it begins at
    inputs = read_json(tmp_path / "args.json")["inputs"]
    images = [Path(name) for name in inputs if name.endswith(".png")]
    pairs = [(path, f"ultrasound a_{path.parent.name}", 1) for path in images]
    assert losses(tmp_path)[0] == pytest.approx(first_loss(tiny_model, pairs, 0), abs=2e-6)

    flags = ["--embedding", tmp_path / "embedding.safetensors"]
    row, plain = table(draw(tiny_model, tmp_path / "out", *flags))[0], table(prior)[0]
    assert row["prompt"] == f"a photo of {TOKEN} fetal brain"
    assert row["model_hash"] != plain["model_hash"]


@pytest.mark.slow
def test_dreambooth_moves_a_and_b_alone_and_prior_images_weigh_in(
    tiny_model, folder, prior, tmp_path, changed_by
):
    flags = f"--images {folder} --token sks --prior {prior} --prior-weight 0.5 --rank 2 --seed 4"
    names = changed_by(beyond, line_of(tiny_model, "dreambooth", tmp_path, flags))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in names} == {"A", "B"}
    pairs = [(i.path, f"sks {i.caption}", i.repeats) for i in read_captioned_folder(folder)]
    drawn = [(i.path, i.caption, 1) for i in prior_images(prior)]
    loss = first_loss(tiny_model, pairs, 4) + 0.5 * first_loss(tiny_model, drawn, 5)
    assert losses(tmp_path)[0] == pytest.approx(loss, abs=2e-6) and len(losses(tmp_path)) == 3
    lora = ["--lora", tmp_path / "lora.safetensors", "--rare-token", "sks"]
    row = table(draw(tiny_model, tmp_path / "out", *lora))[0]
    assert row["prompt"] == "a photo of sks fetal brain" and "<lora:lora:1>" in row["loras"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_one_line(tiny_model, folder, prior, tmp_path):
    for method, more in (("inversion", f"--token {TOKEN}"), ("dreambooth", "--token sks")):
        more += f" --images {folder} --lr 1e30 --steps 9" + f" --prior {prior}" * ("b" in method)
        with refused(LoRAError, r"^step \d: the loss is not finite: try a lower --lr"):
            train(tiny_model, method, tmp_path / "out", more)
        assert not (tmp_path / "out").exists()


def test_a_learned_token_begins_at_its_word_and_changes_no_other_prompt(tiny_model):
    base = load(tiny_model)
    text = base.tokenizer, base.text_encoder
    prompts = ["a photo of ultrasound fetal brain", "a photo of fetal brain"]
    before = encode_prompts(*text, prompts)
    learned = add_token(*text, TOKEN, word_embedding(*text, "ultrasound"))
    named = [f"a photo of {TOKEN} fetal brain", prompts[1]]
    assert torch.equal(encode_prompts(*text, named), before)
    learned.vector.data *= -1
    after = encode_prompts(*text, named)
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


def test_an_embedding_is_read_in_all_layouts_and_under_another_name(tiny_model, tmp_path):
    base, vector = load(tiny_model), torch.arange(16.0)
    save_embedding(tmp_path / "ours.safetensors", TOKEN, vector)
    assert load_file(tmp_path / "ours.safetensors")[TOKEN].shape == (1, 16)
    save_file({"emb_params": vector[None]}, tmp_path / "webuis.safetensors")
    save_file({"<flat>": vector}, tmp_path / "flat.safetensors")
    # diffusers' .bin and webui's .pt, under other names
    torch.save({"<x>": vector}, tmp_path / "learned_embeds.safetensors")
    webuis = {"string_to_token": {"*": 265}, "string_to_param": {"*": vector[None]}, "step": 9}
    torch.save(webuis, tmp_path / "fetal-us.safetensors")
    for name, token in [
        ("ours", TOKEN),
        ("webuis", "webuis"),
        ("flat", "<flat>"),
        ("learned_embeds", "<x>"),
        ("fetal-us", "fetal-us"),
    ]:
        text = copy.deepcopy((base.tokenizer, base.text_encoder))
        found, learned = load_embedding(tmp_path / f"{name}.safetensors", *text)
        assert found == token and torch.equal(learned.vector, vector)
        assert len(text[0].tokenize(f"a photo of {token} fetal femur")) == 6


@pytest.mark.slow
def test_diffusers_encodes_a_learned_token_as_we_do(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    base = load(MINI)
    vector = torch.randn(base.text_encoder.config.hidden_size)
    save_embedding(tmp_path / "ours.safetensors", TOKEN, vector)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(MINI, local_files_only=True)
    pipeline.load_textual_inversion(str(tmp_path / "ours.safetensors"))
    prompt = f"a photo of {TOKEN} fetal femur"
    theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    load_embedding(tmp_path / "ours.safetensors", base.tokenizer, base.text_encoder)
    ours = encode_prompts(base.tokenizer, base.text_encoder, [prompt])
    agree(ours, theirs, 1e-5)

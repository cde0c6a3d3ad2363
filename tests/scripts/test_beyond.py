"""Beyond the paper, on the embedded model: detailed prompts, Textual Inversion, DreamBooth."""

import copy
import csv
import json
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm import MINI
from ldm.checkpoints import load
from ldm.embedding import add_token, load_embedding, save_embedding, word_embedding
from ldm.generate import seeded_noise
from ldm.images import read_image
from ldm.text import encode_prompts
from planes import PLANES, PROMPT_LISTS, PROMPTS
from planes.captions import choose_prompt, read_prompts, training_images, with_token
from planes.datasets import DatasetError
from planes.phantoms.phantom import write_spanish_layout
from samplers.schedule import NoiseSchedule

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "<fetal-us>"
WIDTH = load(MINI).unet.config.cross_attention_dim  # of the text embedding


def run(script, *flags):
    module = runpy.run_path(str(ROOT / f"{script}.py"), run_name=script)
    module["main"](module["parse_args"]([str(flag) for flag in flags]))


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def base():
    return load(MINI)


@pytest.fixture
def text(base):
    return copy.deepcopy((base.tokenizer, base.text_encoder))


@pytest.fixture(scope="module")
def spanish(tmp_path_factory):
    root = tmp_path_factory.mktemp("spanish")
    write_spanish_layout(root, train=1, test=0, seed=0)
    return root


def train_flags(spanish, out, *more):
    size = [
        "--per-plane",
        1,
        "--repeats",
        1,
        "--batch-size",
        2,
        "--guidance-scale",
        1,
        "--sample-every",
        99,
    ]
    return ["--spanish", spanish, "--out", out, "--device", "cpu", *size, *more]


def sample_flags(out, *more):
    few = [
        "--count",
        3,
        "--steps",
        1,
        "--planes",
        "brain",
        "--samplers",
        "euler",
        "--guidance-scale",
        1,
    ]
    return ["--out", out, "--device", "cpu", *few, *more]


@pytest.fixture(scope="module")
def inverted(spanish, tmp_path_factory):
    """A run that learns a token and no LoRA; 5 images, batches of 2: 3 steps."""
    out = tmp_path_factory.mktemp("inverted")
    run(
        "train_lora",
        *train_flags(spanish, out, "--rank", 0, "--learn-token", TOKEN, "--sample-every", 0),
    )
    return out


@pytest.fixture(scope="module")
def detailed(tmp_path_factory):
    out = tmp_path_factory.mktemp("detailed")
    run("sample", *sample_flags(out, "--prompts", "detailed", "--rare-token", "sks"))
    return out


# detailed prompts


def test_the_detailed_prompts_begin_as_the_papers_and_differ():
    assert set(PROMPT_LISTS) == set(PLANES)
    for plane, prompts in PROMPT_LISTS.items():
        assert 4 <= len(set(prompts)) == len(prompts) <= 6
        assert all(
            prompt.startswith(PROMPTS[plane]) and prompt != PROMPTS[plane] for prompt in prompts
        )


def test_a_seed_chooses_the_same_prompt_every_time_and_seeds_choose_all_prompts():
    prompts = PROMPT_LISTS["brain"]
    chosen = [choose_prompt(prompts, seed) for seed in range(60)]
    assert chosen == [choose_prompt(prompts, seed) for seed in range(60)]
    assert set(chosen) == set(prompts)


def test_images_of_one_group_are_sampled_with_their_own_prompts_which_the_manifest_records(
    detailed, base, tmp_path
):
    rows = table(detailed / "manifest.csv")
    assert len({row["prompt"] for row in rows}) > 1
    for row in rows:
        expected = with_token(choose_prompt(PROMPT_LISTS["brain"], int(row["seed"])), "sks")
        with Image.open(detailed / row["image"]) as image:
            assert json.loads(image.text["fu-lora"])["prompt"] == row["prompt"] == expected
    # an image of a batch of several prompts is that of a file with its own prompt alone, but for
    # rounding
    row = rows[-1]
    assert row["prompt"] != rows[0]["prompt"]
    alone = {plane: ["a photo of fetal ultrasound"] for plane in PLANES} | {
        "brain": [row["prompt"]]
    }
    (tmp_path / "alone.json").write_text(json.dumps(alone))
    run("sample", *sample_flags(tmp_path / "out", "--prompts", tmp_path / "alone.json"))

    def pixels(folder, image):
        return torch.tensor(list(Image.open(folder / image).convert("RGB").tobytes())).int()

    def difference(image):
        return (pixels(detailed, image) - pixels(tmp_path / "out", image)).abs().max()

    assert difference(row["image"]) <= 1 < difference(rows[0]["image"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "JSON"),
        ("[]", "no object"),
        (json.dumps({plane: ["a"] for plane in PLANES if plane != "femur"}), "femur"),
        (json.dumps({plane: ["a"] for plane in PLANES} | {"cervix": ["a"]}), "cervix"),
        (json.dumps({plane: ["a"] for plane in PLANES} | {"femur": []}), "femur"),
        (json.dumps({plane: ["a"] for plane in PLANES} | {"femur": "a"}), "femur"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_refused_in_one_line(content, words, tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with pytest.raises(DatasetError) as stop:
        read_prompts(str(path))
    assert str(path) in str(stop.value) and words in str(stop.value) and "\n" not in str(stop.value)


def test_a_token_comes_behind_a_photo_of_or_in_front_and_only_once():
    assert with_token("a photo of fetal femur", "sks") == "a photo of sks fetal femur"
    assert with_token("fetal femur on desks", "sks") == "sks fetal femur on desks"
    assert with_token("a photo of sks fetal femur", "sks") == "a photo of sks fetal femur"
    assert with_token("a photo of fetal femur", None) == "a photo of fetal femur"


# Textual Inversion


def test_a_learned_token_begins_at_its_word_and_changes_no_other_prompt(text, base):
    tokenizer, encoder = text
    prompts = ["a photo of ultrasound fetal brain", "a photo of fetal brain"]
    before = encode_prompts(base.tokenizer, base.text_encoder, prompts)
    learned = add_token(tokenizer, encoder, TOKEN, word_embedding(tokenizer, encoder, "ultrasound"))
    torch.testing.assert_close(encode_prompts(tokenizer, encoder, prompts), before, atol=0, rtol=0)
    named = with_token(prompts[1], TOKEN)
    torch.testing.assert_close(
        encode_prompts(tokenizer, encoder, [named])[0], before[0], atol=0, rtol=0
    )
    with torch.no_grad():
        learned.vector *= -1
    assert (encode_prompts(tokenizer, encoder, [named])[0] - before[0]).abs().max() > 0.01
    torch.testing.assert_close(encode_prompts(tokenizer, encoder, prompts), before, atol=0, rtol=0)


def test_only_the_new_row_gets_a_gradient_and_moves(text, base):
    tokenizer, encoder = text
    learned = add_token(tokenizer, encoder, TOKEN, word_embedding(tokenizer, encoder, "ultrasound"))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert trained == ["text_model.embeddings.token_embedding.vector"]
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=5e-3)
    context = encode_prompts(tokenizer, encoder, [f"a photo of {TOKEN} fetal femur"])
    base.unet(torch.ones(1, 4, 8, 8), torch.tensor([500]), context).square().mean().backward()
    assert learned.vector.grad.norm() > 0
    optimizer.step()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name


def test_an_embedding_is_read_as_written_in_both_layouts_and_under_another_name(
    text, base, tmp_path
):
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    save_embedding(tmp_path / "ours.safetensors", TOKEN, vector)
    assert {
        key: value.shape for key, value in load_file(tmp_path / "ours.safetensors").items()
    } == {TOKEN: (1, WIDTH)}
    save_file({"emb_params": vector[None]}, tmp_path / "webuis.safetensors")
    save_file({"<flat>": vector}, tmp_path / "flat.safetensors")
    # diffusers' .bin, under another name
    torch.save({"<flat>": vector}, tmp_path / "learned_embeds.safetensors")
    webuis = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vector[None]},
        "name": "x",
        "step": 9,
    }
    torch.save(webuis, tmp_path / "fetal-us.safetensors")
    for name, given, token in [
        ("ours", None, TOKEN),
        ("webuis", None, "webuis"),
        ("flat", None, "<flat>"),
        ("learned_embeds", None, "<flat>"),
        ("fetal-us", None, "fetal-us"),
        ("ours", "<other>", "<other>"),
    ]:
        tokenizer, encoder = copy.deepcopy((base.tokenizer, base.text_encoder))
        found, learned = load_embedding(tmp_path / f"{name}.safetensors", tokenizer, encoder, given)
        assert found == token and torch.equal(learned.vector, vector)
        assert len(tokenizer.tokenize(f"a photo of {token} fetal femur")) == 6


def test_diffusers_encodes_a_learned_token_as_we_do(text, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    save_embedding(tmp_path / "ours.safetensors", TOKEN, vector)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(MINI, local_files_only=True)
    pipeline.load_textual_inversion(str(tmp_path / "ours.safetensors"))
    prompt = f"a photo of {TOKEN} fetal femur"
    theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    load_embedding(tmp_path / "ours.safetensors", *text)
    torch.testing.assert_close(encode_prompts(*text, [prompt]), theirs, atol=1e-5, rtol=0)


def test_training_moves_the_token_alone_and_sampling_names_it(inverted, base, tmp_path):
    assert (
        not (inverted / "lora.safetensors").exists()
        and (inverted / "samples" / "step000003.png").exists()
    )
    assert (
        len(table(inverted / "loss.csv")) == 3 and table(inverted / "loss.csv")[0]["lr"] == "0.005"
    )
    ((token, vector),) = load_file(inverted / "embedding.safetensors").items()
    word = word_embedding(base.tokenizer, base.text_encoder, "ultrasound")
    # beyond what weight decay takes in 3 steps
    moved = (vector[0] - word * (1 - 0.01 * 5e-3) ** 3).abs()
    assert token == TOKEN and 1e-4 < moved.max() <= 0.0151  # Adam: at most about lr in each
    state = torch.load(inverted / "checkpoint.pt", weights_only=True)
    assert [parameter.shape for parameter in state["lora"]] == [(WIDTH,)] and state["identity"][
        "learn_token"
    ] == TOKEN

    embedding = ["--embedding", inverted / "embedding.safetensors"]
    run("sample", *sample_flags(tmp_path / "with", *embedding))
    run("sample", *sample_flags(tmp_path / "without"))
    with_it, without = (table(tmp_path / name / "manifest.csv") for name in ("with", "without"))
    assert {row["prompt"] for row in with_it} == {f"a photo of {TOKEN} fetal brain"}
    assert {row["prompt"] for row in without} == {PROMPTS["brain"]}
    assert with_it[0]["model_hash"] != without[0]["model_hash"]


def test_a_resumed_run_goes_on_with_the_token_and_other_settings_are_refused(
    inverted, spanish, tmp_path, monkeypatch
):
    module = runpy.run_path(str(ROOT / "train_lora.py"), run_name="train_lora")
    flags = train_flags(
        spanish, tmp_path, "--rank", 0, "--learn-token", TOKEN, "--save-every", 1, "--resume"
    )
    norm, calls = torch.nn.utils.clip_grad_norm_, iter(range(100))

    def stop_in_the_third_step(*args, **kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return norm(*args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stop_in_the_third_step)
    with pytest.raises(KeyboardInterrupt):
        module["main"](module["parse_args"]([str(flag) for flag in flags]))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"token-lr was 0\.005, is 0\.1"):
        run("train_lora", *flags, "--token-lr", 0.1)
    with pytest.raises(ValueError, match=f"learn-token was {TOKEN}, is None"):
        run("train_lora", *flags[:-5], "--rank", 4, "--resume", "--device", "cpu")
    run("train_lora", *flags)
    for name in ("embedding.safetensors", "loss.csv"):
        assert (tmp_path / name).read_bytes() == (inverted / name).read_bytes()


# DreamBooth


def test_the_prior_adds_its_own_mean_squared_error_times_its_weight(
    detailed, base, spanish, tmp_path
):
    flags = ["--rank", 2, "--rare-token", "sks", "--save-every", 1]
    prior = detailed / "manifest.csv"
    run("train_lora", *train_flags(spanish, tmp_path / "none", *flags))
    run(
        "train_lora",
        *train_flags(spanish, tmp_path / "prior", *flags, "--prior", prior, "--prior-weight", 0.5),
    )
    added = float(table(tmp_path / "prior" / "loss.csv")[0]["loss"]) - float(
        table(tmp_path / "none" / "loss.csv")[0]["loss"]
    )

    # the first step, B = 0: the base model's error on two prior images, drawn behind the noise of
    # the first two
    draw, shape = torch.Generator().manual_seed(500_009), (4, base.sample_size, base.sample_size)
    torch.randn(2, *shape, generator=draw), torch.randint(1000, (2,), generator=draw)
    chosen = torch.randint(3, (2,), generator=draw)
    noise, t = torch.randn(2, *shape, generator=draw), torch.randint(1000, (2,), generator=draw)
    rows, side = [table(prior)[n] for n in chosen], 8 * base.sample_size
    x0 = torch.cat(
        [
            base.vae.to_latents(
                read_image(detailed / row["image"], side)[None], seeded_noise([5 + int(n)], shape)
            )
            for n, row in zip(chosen, rows)
        ]
    )
    context = encode_prompts(base.tokenizer, base.text_encoder, [row["prompt"] for row in rows])
    with torch.no_grad():
        error = F.mse_loss(base.unet(NoiseSchedule().add_noise(x0, noise, t), t, context), noise)
    assert added == pytest.approx(0.5 * error.item(), abs=5e-6)  # the table has six decimals


def test_captions_of_training_name_the_rare_token(spanish):
    captions = {
        with_token(image.caption, "sks") for image in training_images(spanish, None, None, 1, 0)[0]
    }
    assert captions == {prompt.replace("fetal", "sks fetal") for prompt in PROMPTS.values()}

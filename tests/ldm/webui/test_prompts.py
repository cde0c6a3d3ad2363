"""Webui's prompts: the grammar of weights, chunks and where they end, the weighted embeddings."""

import copy
import logging

import pytest
import torch
from shorthand import agree

from ldm import MINI
from ldm.checkpoints.tokenizer import load_tokenizer
from ldm.embedding import add_token, word_embedding
from ldm.text import TextConfig, TextEncoder, encode_prompts, padding_id
from ldm.webui.prompts import BREAK, encode_weighted, parse_prompt, split_chunks
from planes.captions import prompts_beside, write_prompts

MARKS = 2  # the begin and the end mark of every chunk


def random_encoder(positions, hidden_act="quick_gelu"):
    size = len(load_tokenizer(MINI / "tokenizer", TextConfig()))
    config = TextConfig(size, 16, 32, 3, 2, positions, hidden_act)
    encoder = TextEncoder(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    # also the norms', else the mean of what they put out is nothing but rounding
    for parameter in encoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    encoder.text_model.final_layer_norm.bias += 0.5
    return encoder


@pytest.fixture(scope="module")
def encoder():
    return random_encoder(77)


@pytest.fixture(scope="module")
def tokenizer(encoder):
    return load_tokenizer(MINI / "tokenizer", encoder.config)


# the grammar


@pytest.mark.parametrize(
    "text, pieces",
    [
        # plain text
        ("", [("", 1)]),
        # brackets
        ("a (b) c", [("a ", 1), ("b", 1.1), (" c", 1)]),
        ("((b:1.3))", [("b", 1.3 * 1.1)]),
        ("(a (b:1.5) c:2)", [("a ", 2), ("b", 3), (" c", 2)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 / 1.1), (" c", 1 / 1.1)]),
        # weights
        ("(b:.5)(c:2.)(d:+3)", [("b", 0.5), ("c", 2), ("d", 3)]),
        ("(b: 1.3 ) c", [("b", 1.3), (" c", 1)]),
        ("(:1.3)", [("", 1)]),
        # what is no weight is text
        ("(b:1,3)", [("b:1,3", 1.1)]),
        ("[b:1.3]", [("b:1.3", 1 / 1.1)]),
        ("b:1.3)", [("b:1.3)", 1)]),
        # never opened, never closed
        ("a) b]", [("a) b]", 1)]),
        ("a (b [c", [("a ", 1), ("b ", 1.1), ("c", 1.1 * (1 / 1.1))]),
        ("((a:1.3) b", [("a", 1.3 * 1.1), (" b", 1.1)]),
        # escapes
        (r"\(a\) \[b\] \\", [("(a) [b] \\", 1)]),
        (r"(a:1.3\)", [("a:1.3)", 1.1)]),
        (r"a\b\:\ ", [("ab: ", 1)]),
        ("(a)\\", [("a", 1.1), ("", 1)]),
        # one weight, one piece
        ("(a)((b:1))", [("ab", 1.1)]),
        # BREAK
        ("BREAKFAST break", [("BREAKFAST break", 1)]),
        ("BREAK", [("", 1), BREAK, ("", 1)]),
        ("(a) BREAK (b)", [("a", 1.1), ("", 1), BREAK, ("", 1), ("b", 1.1)]),
        ("(a BREAK b:1.5)", [("a", 1.5), ("BREAK", -1.5), ("b", 1.5)]),
        ("(BREAK:-1)", [("", -1), ("BREAK", 1), ("", -1)]),
    ],
)
def test_the_grammar_is_webuis(text, pieces):
    parsed = parse_prompt(text)
    assert [piece for piece, _ in parsed] == [piece for piece, _ in pieces]
    assert [weight for _, weight in parsed] == pytest.approx(
        [weight for _, weight in pieces], rel=1e-12
    )


# chunks


def chunks(tokenizer, prompt, length=75):
    """The text of each chunk's tokens."""
    return [
        tokenizer.convert_ids_to_tokens([t for t, _ in chunk])
        for chunk in split_chunks(tokenizer, prompt, length)
    ]


def words(number, word="fetal"):
    """A text of `number` tokens."""
    return " ".join(number * [word])


@pytest.mark.parametrize(
    "prompt, sizes",
    [
        ("", [0]),
        (words(75), [75]),
        (words(76), [75, 1]),
        ("fetal BREAK fetal fetal", [1, 2]),
        ("fetal BREAK BREAK fetal", [1, 0, 1]),
        ("BREAK fetal", [0, 1]),
        ("fetal BREAK", [1]),
        (f"{words(75)} BREAK fetal", [75, 1]),
    ],
)
def test_a_chunk_is_75_tokens_or_ends_at_a_break(tokenizer, encoder, prompt, sizes):
    assert [len(chunk) for chunk in chunks(tokenizer, prompt)] == sizes
    assert encode_weighted(tokenizer, encoder, prompt).shape == (1, 77 * len(sizes), 16)


@pytest.mark.parametrize(
    "before, behind, sizes",
    [
        (74, 1, [75, 1]),  # the comma is the last of the chunk
        (55, 20, [56, 20]),  # the comma is the 20th from the chunk's end: still near
        (54, 21, [75, 1]),  # the 21st: too far
        (75, 3, [75, 4]),  # the comma itself does not fit
        (60, 14, [75]),  # nothing is cut
    ],
)
def test_a_full_chunk_ends_behind_a_comma_in_its_last_20_tokens(tokenizer, before, behind, sizes):
    split = chunks(tokenizer, f"{words(before)}, {words(behind)}")
    assert [len(chunk) for chunk in split] == sizes


def test_it_is_the_last_comma_and_none_where_the_next_token_is_one(tokenizer):
    for prompt, sizes in (
        (f"{words(58)}, {words(5)}, {words(20)}", [58 + 1 + 5 + 1, 20]),
        (f"{words(60)}, {words(14)}, {words(20)}", [75, 21]),
    ):
        assert [len(chunk) for chunk in chunks(tokenizer, prompt)] == sizes


def test_weights_move_with_their_tokens_behind_the_comma(tokenizer):
    first, second = split_chunks(tokenizer, f"(({words(70)}:1.5), {words(2)} {words(10)}:2)", 75)
    assert [weight for _, weight in first] == 70 * [3.0] + [2.0]
    assert [weight for _, weight in second] == 12 * [2.0]


def test_break_within_brackets_is_a_word_as_in_webui(tokenizer):
    (chunk,) = split_chunks(tokenizer, "(fetal BREAK fetal:1.5)", 75)
    word = tokenizer("BREAK", add_special_tokens=False).input_ids
    assert [token for token, weight in chunk if weight == -1.5] == word


def test_a_bracket_within_a_word_cuts_it_in_two_tokens(tokenizer):
    assert chunks(tokenizer, "fet(al)") == [[*tokenizer.tokenize("fet"), *tokenizer.tokenize("al")]]
    assert chunks(tokenizer, r"fetal \(fetal\)") == [tokenizer.tokenize("fetal (fetal)")]


# embeddings


def by_hand(tokenizer, encoder, *chunks, clip_skip=1):
    """z' = w z mean(z) / mean(w z) of each chunk of (text, weight), in double precision."""
    rows = []
    for chunk in chunks:
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for text, weight in chunk:
            tokens = tokenizer(text).input_ids[1:-1]
            ids, weights = ids + tokens, weights + [weight] * len(tokens)
        ids.append(tokenizer.eos_token_id)
        length = encoder.config.max_position_embeddings
        ids += [padding_id(tokenizer, encoder.config)] * (length - len(ids))
        weights += [1.0] * (length - len(weights))
        z = encoder(torch.tensor([ids]), clip_skip)[0].double()
        weighted = torch.stack([weight * row for weight, row in zip(weights, z, strict=True)])
        rows.append(weighted * z.sum() / weighted.sum())
    return torch.cat(rows)[None].float()


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_the_embeddings_are_weighted_and_each_chunks_mean_is_restored(
    tokenizer, encoder, clip_skip
):
    """To 1e-5: the means are sums of a thousand float32 numbers."""
    prompt = "a (fetal:1.5) [brain] BREAK (femur:-0.5), (abdomen:0)"
    actual = encode_weighted(tokenizer, encoder, prompt, clip_skip)
    first = [("a", 1), ("fetal", 1.5), ("brain", 1 / 1.1)]
    second = [("femur", -0.5), (",", 1), ("abdomen", 0)]
    agree(actual, by_hand(tokenizer, encoder, first, second, clip_skip=clip_skip), 1e-5, 1e-5)
    plain = encode_weighted(tokenizer, encoder, "a fetal brain BREAK femur, abdomen", clip_skip)
    agree(actual[:, :77].mean(), plain[:, :77].mean(), 0, 1e-5)
    assert (actual - plain).abs().max() > 0.1


@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize(
    "prompt",
    ["", words(74), words(75), "(fetal:1) brain", r"fetal \(brain\)!"],
)
def test_without_weights_and_in_one_chunk_the_bits_are_those_of_encode_prompts(
    tokenizer, encoder, prompt, clip_skip
):
    plain = prompt.replace("(fetal:1)", "fetal").replace("\\", "")
    expected = encode_prompts(tokenizer, encoder, [plain], clip_skip)
    assert torch.equal(encode_weighted(tokenizer, encoder, prompt, clip_skip), expected)


def test_each_chunk_without_weights_has_the_bits_of_its_text_alone(tokenizer, encoder):
    parts = [words(75), words(75, "brain"), "femur"]
    alone = torch.cat([encode_prompts(tokenizer, encoder, [part]) for part in parts], dim=1)
    actual = encode_weighted(tokenizer, encoder, f"{' '.join(parts)} BREAK (brain:1.4)")
    assert torch.equal(actual[:, :231], alone)


def test_a_chunk_without_weights_needs_no_mean(tokenizer, encoder):
    zero = copy.deepcopy(encoder)
    zero.text_model.final_layer_norm.weight.zero_()
    zero.text_model.final_layer_norm.bias.zero_()
    assert torch.equal(encode_weighted(tokenizer, zero, "fetal brain"), torch.zeros(1, 77, 16))


def test_a_long_prompt_draws_no_warning(tokenizer, caplog, monkeypatch):
    """Transformers warns, once a process, of more tokens than the encoder has positions."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.deprecation_warnings = {}
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    split_chunks(tokenizer, words(200), 75)
    assert caplog.text == ""


def test_stable_diffusion_2s_padding_is_that_of_encode_prompts(tokenizer):
    encoder = random_encoder(77, hidden_act="gelu")
    expected = encode_prompts(tokenizer, encoder, ["fetal!"])
    assert torch.equal(encode_weighted(tokenizer, encoder, "fetal!"), expected)


def test_a_learned_token_takes_weights_and_starts_chunks_like_any_other(tokenizer, encoder):
    learner, learned = copy.deepcopy(tokenizer), copy.deepcopy(encoder)
    add_token(learner, learned, "<us>", word_embedding(tokenizer, encoder, "ultrasound"))
    for prompt in ("a photo of {}", "a (photo of {}:1.3)", f"{words(75)} ({{}}:0.8) brain"):
        expected = encode_weighted(tokenizer, encoder, prompt.format("ultrasound"))
        assert torch.equal(encode_weighted(learner, learned, prompt.format("<us>")), expected)


def test_a_half_precision_encoder_is_weighted_in_float32(tokenizer, encoder):
    half = copy.deepcopy(encoder).half()
    z, w = encode_prompts(tokenizer, half, ["fetal brain"]).float(), torch.ones(77, 1)
    size = len(tokenizer("brain").input_ids) - MARKS
    end = len(tokenizer("fetal brain").input_ids) - 1
    w[end - size : end] = 1.4
    expected = (w * z * (z.mean() / (w * z).mean())).half()
    assert torch.equal(encode_weighted(tokenizer, half, "fetal (brain:1.4)"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [40, 151])
def test_a_long_prompt_is_chunked_as_compel_does(tokenizer, encoder, number):
    """Without commas and weights, to 1e-5: compel ends chunks at other places and weights by
    another formula, away from the empty prompt's embeddings."""
    compel = pytest.importorskip("compel")
    brutal = compel.SplitLongTextMode.BRUTAL
    how = {"truncate_long_prompts": False, "split_long_text_mode": brutal, "model_max_length": 77}
    theirs = compel.Compel(tokenizer, encoder.text_model, **how)
    prompt = words(number // 2) + " " + words(number - number // 2, "brain")
    agree(encode_weighted(tokenizer, encoder, prompt), theirs(prompt), 0, 1e-5)


@pytest.mark.parametrize("text", ["a (b)", r"[x] (y:1.3) \\ \(", "an echo BREAK of it, :2)"])
def test_prompts_of_classes_are_sampled_as_they_were_trained(encoder, tokenizer, text, tmp_path):
    write_prompts(tmp_path, {"a": text})
    (prompt,) = prompts_beside([tmp_path / "lora.safetensors"]).values()
    weighted = encode_weighted(tokenizer, encoder, prompt)
    assert torch.equal(weighted, encode_prompts(tokenizer, encoder, [text]))

"""Prompts as AUTOMATIC1111's webui reads them: words weighted by brackets, of any length.

For sampling only: training captions are plain text, cut at the encoder's length, as in kohya's
trainer (`ldm/text.py`).
"""

import re
from itertools import groupby

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from ldm.text import TextEncoder, padding_id

BREAK = ("BREAK", -1.0)
"""The piece of parse_prompt's list at which a chunk ends; webui's own mark."""

FACTORS = {"(": 1.1, "[": 1 / 1.1}
OPENED_BY = {")": "(", "]": "["}
COMMA_BACKTRACK = 20  # tokens; webui's default "prompt word wrap length limit"

TOKEN = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"  # a backslash before anything else is dropped
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|[()\[\]:]"
    r"|[^()\[\]:\\]+"
)
BREAK_WORD = re.compile(r"\s*\bBREAK\b\s*")


def parse_prompt(text: str) -> list[tuple[str, float]]:
    r"""Pieces of a prompt with their weights, by webui's attention grammar; adjacent pieces of one
    weight are one.

    (x) weighs 1.1, [x] 1 / 1.1, (x:1.3) 1.3; nested weights multiply; a bracket never closed runs
    to the end. \( \) \[ \] \\ are the characters themselves. The word BREAK becomes the piece
    BREAK, ("BREAK", -1.0); within brackets its -1 is multiplied too, so that there it is a word
    with a negative weight, as it is in webui. What is no grammar is text: a closing bracket without
    its opening one, a weight that is no number, and webui's other notations: [from:to:when], [a|b],
    AND.
    """
    pieces: list[tuple[str, float]] = []
    # from which piece on each open bracket weighs
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, factor: float) -> None:
        pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]

    for match in TOKEN.finditer(text):
        token, escaped, weight = match[0], match["escaped"], match["weight"]
        closed = "(" if weight else OPENED_BY.get(token)
        if escaped is not None:
            pieces.append((escaped, 1.0))
        elif token in opened:
            opened[token].append(len(pieces))
        elif closed and opened[closed]:
            weigh(opened[closed].pop(), float(weight) if weight else FACTORS[closed])
        else:
            first, *others = BREAK_WORD.split(token)
            pieces.append((first, 1.0))
            for other in others:
                pieces += [BREAK, (other, 1.0)]
    for bracket, starts in opened.items():
        for start in starts:
            weigh(start, FACTORS[bracket])
    runs = groupby(pieces, key=lambda piece: piece[1])
    return [("".join(piece for piece, _ in run), weight) for weight, run in runs] or [("", 1.0)]


def split_chunks(
    tokenizer: CLIPTokenizer, prompt: str, length: int
) -> list[list[tuple[int, float]]]:
    """(token id, weight) of a prompt, in chunks of at most `length`, one at least; without marks
    and padding.

    A chunk that is full ends behind its last comma instead, if that is among its last
    COMMA_BACKTRACK tokens and the next token is no comma. Each piece is tokenized alone: a bracket
    within a word cuts it into two.
    """
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    chunks: list[list[tuple[int, float]]] = [[]]
    for piece in parse_prompt(prompt):
        if piece == BREAK:
            chunks.append([])
            continue
        text, weight = piece
        for token in tokenizer(text, add_special_tokens=False, verbose=False).input_ids:
            if len(chunks[-1]) == length:
                full = chunks.pop()
                commas = [n for n, (kept, _) in enumerate(full, 1) if kept == comma]
                near = commas and commas[-1] > length - COMMA_BACKTRACK and token != comma
                end = commas[-1] if near else length
                chunks += [full[:end], full[end:]]
            chunks[-1].append((token, weight))
    # a BREAK at the end opens no chunk
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def encode_weighted(
    tokenizer: CLIPTokenizer, text_encoder: TextEncoder, prompt: str, clip_skip: int = 1
) -> Tensor:
    """Text embeddings (1, k S, D) of a prompt of k chunks on the encoder's device, weighted as
    webui's "Original".

    Each chunk is encoded apart, with begin mark, end mark and padding around S - 2 tokens: z (1, S,
    D), behind the final layer norm. Then, with the weight w of each token (1 for marks and
    padding), z' = w z mean(z) / mean(w z), the means over the whole chunk. Without weights and
    within S - 2 tokens: the bits of encode_prompts. Raises CheckpointError where the text encoder
    has no such layer.
    """
    length = text_encoder.config.max_position_embeddings
    device = text_encoder.text_model.final_layer_norm.weight.device
    fill = padding_id(tokenizer, text_encoder.config)
    states = []
    for chunk in split_chunks(tokenizer, prompt, length - 2):
        tokens, weights = [token for token, _ in chunk], [weight for _, weight in chunk]
        padding = length - 2 - len(chunk)
        ids = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id, *padding * [fill]]
        z = text_encoder(torch.tensor([ids], device=device), clip_skip)
        if any(weight != 1 for weight in weights):  # else the bits stay, also where the mean is 0
            w = torch.tensor([1.0, *weights, 1.0, *padding * [1.0]], device=device)
            weighted = w[:, None] * z  # float32 also where the encoder is half precision
            z = (weighted * (z.mean(dtype=weighted.dtype) / weighted.mean())).to(z.dtype)
        states.append(z)
    return torch.cat(states, dim=1)

"""A small tokenizer in CLIP's format: byte-pair encoding (Sennrich et al. 2016) trained on a list
of captions."""

import re
from collections import Counter
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer


def train_tokenizer(captions: list[str], words: list[str], length: int) -> CLIPTokenizer:
    """Learn merges until every word of the captions, and every one of `words`, is a single token.

    length: tokens of a prompt, begin and end marks and padding included
    """
    counts = Counter(word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption))
    counts.update(words)
    # the symbols of a word, with blanks between them
    pieces = {word: " ".join([*word[:-1], word[-1] + "</w>"]) for word in counts}
    merges = []
    while pairs := Counter(
        {pair: counts[word] for word, text in pieces.items() for pair in pairwise(text.split())}
    ):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        both = re.compile(rf"(?<!\S){re.escape(' '.join(best))}(?!\S)")
        pieces = {word: both.sub("".join(best), text) for word, text in pieces.items()}
    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(c + "</w>" for c in symbols), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)

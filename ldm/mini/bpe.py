"""A small tokenizer in CLIP's format: byte-pair encoding (Sennrich et al. 2016) trained on a list
of captions."""

import re
from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: list[str], words: list[str], length: int) -> CLIPTokenizer:
    """Learn merges until every word of the captions, and every one of `words`, is a single token.

    length: tokens of a prompt, begin and end marks and padding included
    """
    counts = Counter(word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption))
    counts.update(words)
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    merges = []
    while pairs := Counter({pair: counts[w] for w, p in pieces.items() for pair in pairwise(p)}):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, p in pieces.items():
            k = 0
            while k < len(p) - 1:
                if (p[k], p[k + 1]) == best:
                    p[k : k + 2] = ["".join(best)]
                k += 1
            pieces[word] = p
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's byte alphabet
    symbols = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*symbols, *(c + "</w>" for c in symbols), *("".join(m) for m in merges), BOS, EOS]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)

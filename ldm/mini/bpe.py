"""A small tokenizer in CLIP's format: byte-pair encoding (Sennrich et al. 2016) trained on a list
of captions."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(
    folder: Path, captions: list[str], words: list[str], length: int
) -> CLIPTokenizer:
    """Learn merges until every word of the captions, and every one of `words`, is a single token;
    write them as CLIP's.

    length: tokens of a prompt, begin and end marks and padding included
    Writes vocab.json, merges.txt and the two small json files that name the marks.
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: n for n, token in enumerate(tokens)}), encoding="utf-8"
    )
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    config = special | {"model_max_length": length, "tokenizer_class": "CLIPTokenizer"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)

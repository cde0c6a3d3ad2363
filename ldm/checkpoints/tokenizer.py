"""CLIP's tokenizer from vocab.json and merges.txt, or from the tokenizer.json that holds both; and
back."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTokenizer

from harness.files import json_text, write_text
from ldm import CheckpointError
from ldm.text import TextConfig, padding_id

CLIP_REPOSITORY = "openai/clip-vit-large-patch14"  # its vocabulary is SD 1's, and SD 2's


def load_tokenizer(folder: Path | str | None, config: TextConfig) -> CLIPTokenizer:
    """The tokenizer in a folder; None: CLIP's from the local hub cache, never fetched.

    folder: with vocab.json and merges.txt or, as transformers 5 saves one, with tokenizer.json
        alone; or a diffusers folder that has it as its `tokenizer`
    Of the json files beside them only the tokens that were added are heeded. Which token pads is
    the text encoder's to say (`ldm.text.padding_id`): SD 2's tokenizer names "!", which would make
    a mark of every one that is typed.

    Raises CheckpointError where there is none, or where it knows more tokens than the text encoder
    has embeddings.
    """
    if folder is None:
        cached = try_to_load_from_cache(CLIP_REPOSITORY, "vocab.json")
        if not isinstance(cached, str):
            raise CheckpointError(
                f"no tokenizer: --tokenizer {CLIP_REPOSITORY} fetches it from the hub; without a"
                " network put its vocab.json and merges.txt into a folder and give that"
            )
        folder = Path(cached).parent
    folder = Path(folder)
    if (folder / "tokenizer").is_dir():
        folder = folder / "tokenizer"
    try:
        words, added = _words(folder)
        tokenizer = CLIPTokenizer(**words, model_max_length=config.max_position_embeddings)
        tokenizer.add_tokens([added[n] for n in sorted(added) if n >= len(tokenizer)])
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no vocab.json and merges.txt; put those of {CLIP_REPOSITORY} there, or give"
            " another --tokenizer"
        ) from None
    # whatever transformers and tokenizers make of files that are damaged
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder}: no tokenizer of CLIP's kind ({reason}); fetch it again"
        ) from None
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{folder}: {len(tokenizer)} tokens, the text encoder knows {config.vocab_size}; give"
            " the right --tokenizer"
        )
    return tokenizer


def _words(folder: Path) -> tuple[dict[str, object], dict[int, str]]:
    """What CLIPTokenizer is made of, and the tokens that were added, by their numbers: transformers
    4 writes vocab.json, merges.txt and added_tokens.json, transformers 5 tokenizer.json alone."""
    files = {"vocab": folder / "vocab.json", "merges": folder / "merges.txt"}
    added, whole = folder / "added_tokens.json", folder / "tokenizer.json"
    if all(path.is_file() for path in files.values()):
        words = json.loads(added.read_text(encoding="utf-8")) if added.is_file() else {}
        return {name: str(path) for name, path in files.items()}, {n: t for t, n in words.items()}
    stored = json.loads(whole.read_text(encoding="utf-8"))
    merges = [tuple(pair) for pair in stored["model"]["merges"]]
    return (
        {"vocab": stored["model"]["vocab"], "merges": merges},
        {token["id"]: token["content"] for token in stored["added_tokens"]},
    )


def tokenizer_hash(tokenizer: CLIPTokenizer) -> str:
    """The sha256 of its vocabulary and merges, without tokens that were added."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return hashlib.sha256(
        json.dumps([model["vocab"], model["merges"]], sort_keys=True).encode()
    ).hexdigest()


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path, config: TextConfig) -> None:
    """Write vocab.json, merges.txt and the small json files that name the marks, those that were
    added among them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.model.save(str(folder))
    marks = {
        name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "unk_token")
    }
    marks["pad_token"] = tokenizer.convert_ids_to_tokens(padding_id(tokenizer, config))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": config.max_position_embeddings,
    }
    contents = {"special_tokens_map.json": marks, "tokenizer_config.json": settings | marks}
    if added := {
        str(t): n for n, t in tokenizer.added_tokens_decoder.items() if n > tokenizer.eos_token_id
    }:
        contents["added_tokens.json"] = added
    for name, content in contents.items():
        write_text(folder / name, json_text(content))

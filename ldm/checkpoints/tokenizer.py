"""CLIP's tokenizer from vocab.json and merges.txt, or from the tokenizer.json that holds both; and
back."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTokenizer

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
    files = {"vocab": folder / "vocab.json", "merges": folder / "merges.txt"}
    absent = [path.name for path in files.values() if not path.is_file()]
    if absent and (folder / "tokenizer.json").is_file():
        words = _read_whole(folder / "tokenizer.json")
    elif absent:
        raise CheckpointError(
            f"{folder}: no {' and no '.join(absent)}; put those of {CLIP_REPOSITORY} there, or give"
            " another --tokenizer"
        )
    else:
        words = {name: str(path) for name, path in files.items()}
    try:
        tokenizer = CLIPTokenizer(**words, model_max_length=config.max_position_embeddings)
    # whatever transformers and tokenizers make of files that are damaged
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder}: no tokenizer of CLIP's kind ({reason}); fetch it again"
        ) from None
    tokenizer.add_tokens(_added_tokens(folder, len(tokenizer)))
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{folder}: {len(tokenizer)} tokens, the text encoder knows {config.vocab_size}; give"
            " the right --tokenizer"
        )
    return tokenizer


def _read_whole(path: Path) -> dict[str, object]:
    """Vocabulary and merges of a tokenizer.json."""
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        merges = [
            tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
            for pair in model["merges"]
        ]
        return {"vocab": model["vocab"], "merges": merges}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not as transformers writes it ({error}); fetch it again"
        ) from None


def _added_tokens(folder: Path, known: int) -> list[str]:
    """Tokens beyond the vocabulary, by their numbers, as learned ones are, however transformers
    stored them."""
    added: dict[int, str] = {}
    try:
        if (path := folder / "added_tokens.json").is_file():
            added |= {
                number: token
                for token, number in json.loads(path.read_text(encoding="utf-8")).items()
            }
        if (path := folder / "tokenizer.json").is_file():
            tokens = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
            added |= {int(token["id"]): token["content"] for token in tokens}
        if (path := folder / "tokenizer_config.json").is_file():
            tokens = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
            added |= {int(number): token["content"] for number, token in tokens.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not as transformers writes it ({error}); fetch it again"
        ) from None
    return [added[number] for number in sorted(added) if number >= known]


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
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

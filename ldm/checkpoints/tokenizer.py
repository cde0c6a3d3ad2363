"""CLIP's tokenizer from vocab.json and merges.txt, and back."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTokenizer

from ldm import CheckpointError
from ldm.text import TextConfig, padding_id

CLIP_REPOSITORY = "openai/clip-vit-large-patch14"  # its vocabulary is SD 1's, and SD 2's


def load_tokenizer(folder: Path | str | None, config: TextConfig) -> CLIPTokenizer:
    """The tokenizer in a folder with vocab.json and merges.txt; None: CLIP's from the local hub cache, never fetched.

    folder: that folder, or a diffusers folder that has it as its `tokenizer`
    Of the json files beside them only the tokens that were added are heeded. Which token pads is the text encoder's to
    say (`ldm.text.padding_id`): SD 2's tokenizer names "!", which would make a mark of every one that is typed.

    Raises CheckpointError where there is none, or where it knows more tokens than the text encoder has embeddings.
    """
    if folder is None:
        cached = try_to_load_from_cache(CLIP_REPOSITORY, "vocab.json")
        if not isinstance(cached, str):
            raise CheckpointError(
                f"no tokenizer: put vocab.json and merges.txt of {CLIP_REPOSITORY} into a folder and pass `tokenizer`; "
                f"the scripts fetch it by --tokenizer {CLIP_REPOSITORY}"
            )
        folder = Path(cached).parent
    folder = Path(folder)
    if (folder / "tokenizer").is_dir():
        folder = folder / "tokenizer"
    absent = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder}: no {' and no '.join(absent)}; put those of {CLIP_REPOSITORY} there, or pass `tokenizer`"
        )
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    tokenizer = CLIPTokenizer(**files, model_max_length=config.max_position_embeddings)
    tokenizer.add_tokens(_added_tokens(folder, len(tokenizer)))
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{folder}: {len(tokenizer)} tokens, the text encoder knows {config.vocab_size}; pass the right `tokenizer`"
        )
    return tokenizer


def _added_tokens(folder: Path, known: int) -> list[str]:
    """Tokens beyond the vocabulary, by their numbers, as learned ones are: of transformers' two ways to store them."""
    added: dict[int, str] = {}
    try:
        if (path := folder / "added_tokens.json").is_file():
            added |= {number: token for token, number in json.loads(path.read_text(encoding="utf-8")).items()}
        if (path := folder / "tokenizer_config.json").is_file():
            tokens = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
            added |= {int(number): token["content"] for number, token in tokens.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not as transformers writes it ({error}); fetch it again") from None
    return [added[number] for number in sorted(added) if number >= known]


def tokenizer_hash(tokenizer: CLIPTokenizer) -> str:
    """The sha256 of its vocabulary and merges, without tokens that were added."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return hashlib.sha256(json.dumps([model["vocab"], model["merges"]], sort_keys=True).encode()).hexdigest()


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path, config: TextConfig) -> None:
    """Write vocab.json, merges.txt and the small json files that name the marks, those that were added among them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.model.save(str(folder))
    marks = {name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "unk_token")}
    marks["pad_token"] = tokenizer.convert_ids_to_tokens(padding_id(tokenizer, config))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.max_position_embeddings}
    contents = {"special_tokens_map.json": marks, "tokenizer_config.json": settings | marks}
    if added := {str(t): n for n, t in tokenizer.added_tokens_decoder.items() if n > tokenizer.eos_token_id}:
        contents["added_tokens.json"] = added
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""The text encoder of Stable Diffusion and its tokenizer: CLIP's (Radford et al. 2021), through transformers."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm import CheckpointError

CLIP_REPOSITORY = "openai/clip-vit-large-patch14"  # its vocabulary is SD 1's


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a CLIP text tower; the defaults are SD 1.5's, CLIP ViT-L/14 (123,060,480 parameters).

    The fields bear transformers' names. SD 2's tower is hidden_size 1024, intermediate_size 4096, 23 layers, 16 heads,
    "gelu".
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77  # tokens of every prompt, begin and end marks and padding included
    hidden_act: str = "quick_gelu"


class TextEncoder(nn.Module):
    """CLIP's text tower; its tensors are named `text_model.*`, as in every published file and in kohya's LoRA keys.

    ids: (B, S) token ids, padded: the attention is causal and sees no padding mask, as SD was trained
    clip_skip: which layer's output, counted as kohya and webui do: 1 the last, 2 the penultimate, ..
    Returns (B, S, D), always behind the final layer norm, whichever the layer.
    Raises CheckpointError where the tower has no such layer.
    """

    def __init__(self, config: TextConfig = TextConfig()):
        super().__init__()
        self.config = config
        marks = {"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1}
        clip = CLIPTextModel(CLIPTextConfig(**asdict(config), **marks))
        self.text_model = getattr(clip, "text_model", clip)  # transformers < 5.6 keeps the tower one level deeper
        # no file stores the positions' numbers, so they must be real even where the weights are built on "meta"
        positions = torch.arange(config.max_position_embeddings, device="cpu")
        self.text_model.embeddings.position_ids = positions[None]

    def forward(self, ids: Tensor, clip_skip: int = 1) -> Tensor:
        if not 1 <= clip_skip <= self.config.num_hidden_layers:
            raise CheckpointError(
                f"clip_skip {clip_skip}: this text encoder has layers 1 to {self.config.num_hidden_layers}"
            )
        states = self.text_model(input_ids=ids, output_hidden_states=True).hidden_states
        return self.text_model.final_layer_norm(states[-clip_skip])


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str], length: int = 77) -> Tensor:
    """Token ids (B, length) of the prompts, each cut or padded to `length` with its begin and end marks."""
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids


def encode_prompts(
    tokenizer: CLIPTokenizer, text_encoder: TextEncoder, prompts: Sequence[str], clip_skip: int = 1
) -> Tensor:
    """Text embeddings (B, S, D) of the prompts on the encoder's device; S = 77 in Stable Diffusion.

    For training; sample.py takes `ldm.webui.prompts.encode_weighted`, the same for a prompt without weights.
    """
    ids = tokenize(tokenizer, prompts, text_encoder.config.max_position_embeddings)
    return text_encoder(ids.to(text_encoder.text_model.final_layer_norm.weight.device), clip_skip)


def load_tokenizer(folder: Path | str | None, config: TextConfig) -> CLIPTokenizer:
    """The tokenizer in a folder with vocab.json and merges.txt; None: CLIP's from the local hub cache, never fetched.

    folder: that folder, or a diffusers folder that has it as its `tokenizer`

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
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=config.max_position_embeddings)
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{folder}: {len(tokenizer)} tokens, the text encoder knows {config.vocab_size}; pass the right `tokenizer`"
        )
    return tokenizer


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path, length: int) -> None:
    """Write vocab.json, merges.txt and the two small json files that name the marks; `length` tokens per prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.model.save(str(folder))
    marks = {name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | marks, indent=2) + "\n", encoding="utf-8")

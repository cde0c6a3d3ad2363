"""The text encoder of Stable Diffusion and its tokenizer: CLIP's (Radford et al. 2021), through
transformers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm import CheckpointError


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a CLIP text tower; the defaults are SD 1.5's, CLIP ViT-L/14 (123,060,480
    parameters).

    The fields bear transformers' names. SD 2's tower is hidden_size 1024, intermediate_size 4096,
    23 layers, 16 heads, "gelu".
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    # tokens of every prompt, begin and end marks and padding included
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"


class TextEncoder(nn.Module):
    """CLIP's text tower; its tensors are named `text_model.*`, as in every published file and in
    kohya's LoRA keys.

    ids: (B, S) token ids, padded: the attention is causal and sees no padding mask, as SD was
        trained
    clip_skip: which layer's output, counted as kohya and webui do: 1 the last, 2 the penultimate

    Returns (B, S, D), always behind the final layer norm, whichever the layer. Raises
    CheckpointError where the tower has no such layer.
    """

    def __init__(self, config: TextConfig = TextConfig()):
        super().__init__()
        self.config = config
        marks = {"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1}
        clip = CLIPTextModel(CLIPTextConfig(**asdict(config), **marks))
        # transformers < 5.6 keeps the tower one level deeper
        self.text_model = getattr(clip, "text_model", clip)
        # no file stores the positions' numbers, so they must be real even where the weights are
        # built on "meta"
        positions = torch.arange(config.max_position_embeddings, device="cpu")
        self.text_model.embeddings.position_ids = positions[None]

    def forward(self, ids: Tensor, clip_skip: int = 1) -> Tensor:
        if not 1 <= clip_skip <= self.config.num_hidden_layers:
            raise CheckpointError(
                f"clip skip {clip_skip}: this text encoder has layers 1 to"
                f" {self.config.num_hidden_layers}"
            )
        states = self.text_model(input_ids=ids, output_hidden_states=True).hidden_states
        return self.text_model.final_layer_norm(states[-clip_skip])


def padding_id(tokenizer: CLIPTokenizer, config: TextConfig) -> int:
    """What fills a prompt behind its end mark: that mark again, or 0 in SD 2, whose tower is
    OpenCLIP's ("gelu")."""
    return 0 if config.hidden_act == "gelu" else tokenizer.eos_token_id


def tokenize(
    tokenizer: CLIPTokenizer, prompts: Sequence[str], config: TextConfig = TextConfig()
) -> Tensor:
    """Token ids (B, S) of the prompts, each cut or padded to what the text encoder reads, begin
    and end marks included."""
    length = config.max_position_embeddings
    rows = tokenizer(list(prompts), max_length=length, truncation=True).input_ids
    return torch.tensor(
        [row + [padding_id(tokenizer, config)] * (length - len(row)) for row in rows]
    )


def encode_prompts(
    tokenizer: CLIPTokenizer, text_encoder: TextEncoder, prompts: Sequence[str], clip_skip: int = 1
) -> Tensor:
    """Text embeddings (B, S, D) of the prompts on the encoder's device; S = 77 in Stable
    Diffusion."""
    ids = tokenize(tokenizer, prompts, text_encoder.config)
    return text_encoder(ids.to(text_encoder.text_model.final_layer_norm.weight.device), clip_skip)


class Contexts:
    """Text embeddings (B, S, D) of captions, for a training: computed once; or, where the text
    encoder is trained, anew each time, so that gradients reach it.

    captions: all that will be asked for; dtype: of the embeddings
    trained: is the text encoder, or a token of it?

    Raises CheckpointError where the text encoder is not as deep as clip_skip asks, also where it is
    trained: before hours of work.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: TextEncoder,
        captions: Sequence[str],
        clip_skip: int,
        dtype: torch.dtype,
        trained: bool,
    ):
        self.encode = partial(encode_prompts, tokenizer, text_encoder, clip_skip=clip_skip)
        self.dtype, self.kept = dtype, {}
        with torch.no_grad():
            kept = self(captions)
        if not trained:
            self.kept, self.encode = dict(zip(captions, kept)), None

    def __call__(self, captions: Sequence[str]) -> Tensor:
        if self.kept:
            return torch.stack([self.kept[caption] for caption in captions])
        return self.encode(captions).to(self.dtype)

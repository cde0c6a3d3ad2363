"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): one more token, whose embedding alone is
trained.

The file holds one tensor, {token: (1, D)}, as diffusers writes it; webui opens it too, and names
the token after the file. Webui's own files are read as well, and pickles of plain tensors.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import CLIPTokenizer

from harness.files import whole_file
from ldm import CheckpointError
from ldm.checkpoints.weights import open_weights
from ldm.text import TextEncoder

# of its safetensors and its pickles; either stands for the file's name
WEBUI_KEYS = ("emb_params", "*")


class LearnedToken(nn.Module):
    """A frozen table of token embeddings with one row v* beside it, float32 and the only parameter
    (Gal et al., eq. 2).

    table: (V, D) the frozen rows
    token_id: whose embedding v* is, within the table or beyond its end
    vector: (D,) where v* begins

    forward: ids (B, S) -> (B, S, D) in the table's dtype.
    """

    def __init__(self, table: nn.Embedding, token_id: int, vector: Tensor):
        super().__init__()
        self.table, self.token_id = table.requires_grad_(False), token_id
        self.vector = nn.Parameter(
            vector.detach().to(table.weight.device, torch.float32, copy=True)
        )

    def forward(self, ids: Tensor) -> Tensor:
        is_token = ids == self.token_id
        rows = self.table(ids.masked_fill(is_token, 0))  # any row that exists: it is replaced
        return torch.where(is_token[..., None], self.vector.to(rows.dtype), rows)


def add_token(
    tokenizer: CLIPTokenizer, text_encoder: TextEncoder, token: str, vector: Tensor
) -> LearnedToken:
    """Teach tokenizer and text encoder a new token with the embedding `vector` (D,); both are
    changed in place.

    Raises CheckpointError where the token is no single word, is one token already, or `vector` has
    another width.
    """
    if not token or re.search(r"\s", token):
        raise CheckpointError(f"token {token!r}: must be one word, such as <fetal-us>")
    if len(tokenizer.tokenize(token)) == 1:
        raise CheckpointError(
            f"token {token!r}: the tokenizer has it already; choose another name, such as <{token}>"
        )
    embeddings = text_encoder.text_model.embeddings
    width = text_encoder.config.hidden_size
    if vector.shape != (width,):
        raise CheckpointError(
            f"token {token!r}: its embedding is {vector.numel()} wide, the text encoder's are"
            f" {width}; it was made for another model"
        )
    tokenizer.add_tokens([AddedToken(token, single_word=True)])
    token_id = tokenizer.convert_tokens_to_ids(token)
    embeddings.token_embedding = LearnedToken(embeddings.token_embedding, token_id, vector)
    return embeddings.token_embedding


def word_embedding(tokenizer: CLIPTokenizer, text_encoder: TextEncoder, word: str) -> Tensor:
    """The embedding (D,) of a word, for a new token to begin at. Raises CheckpointError unless it
    is one token."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise CheckpointError(
            f"word {word!r}: is {len(ids)} tokens; a new token begins at the embedding of one"
        )
    return text_encoder.text_model.embeddings.token_embedding.weight[ids[0]]


def save_embedding(path: Path, token: str, vector: Tensor) -> None:
    """Write {token: (1, D)} in float32; the file appears whole or not at all."""
    with whole_file(path) as part:
        part.write_bytes(save({token: vector.detach()[None].to("cpu", torch.float32)}))


def load_embedding(
    path: Path, tokenizer: CLIPTokenizer, text_encoder: TextEncoder
) -> tuple[str, LearnedToken]:
    """Teach tokenizer and text encoder the token of a file, and return its name and embedding. Its
    name is the file's key, or the file's own name where the key is webui's.

    Raises CheckpointError, with the path, where the file is not one embedding or does not fit.
    """
    weights = open_weights(path)
    if len(weights.shapes) != 1:
        raise CheckpointError(
            f"{path}: holds {len(weights.shapes)} tensors; an embedding of one token is one"
        )
    ((key, shape),) = weights.shapes.items()
    vectors = weights.tensor(key)
    if shape[:-1] not in ((), (1,)):
        raise CheckpointError(
            f"{path}: {key} has shape {list(shape)}; one token's is (D,) or (1, D)"
        )
    if not vectors.isfinite().all():
        raise CheckpointError(
            f"{path}: {key} is not finite; train the token again, at a lower rate, or fetch it"
            " again"
        )
    token = path.stem if key in WEBUI_KEYS else key
    try:
        return token, add_token(tokenizer, text_encoder, token, vectors.flatten())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None

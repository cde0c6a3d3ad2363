"""Stable Diffusion to and from safetensors: SD 1 as a CompVis/webui single file, SD 1 and 2 as a diffusers folder."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from ldm.folder import WEIGHTS, Config, read_config, weight_files, write_config
from ldm.keys import FOLDER, SINGLE_FILE, Table, rename
from ldm.text import TextEncoder, load_tokenizer, save_tokenizer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL
from ldm.weights import CheckpointError, Header, read_header, refuse_other_families

NETWORKS = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": TextEncoder}
PREDICTION_TYPES = ("epsilon", "v_prediction")  # what a U-Net may return
_CHANNELS = {5: "a depth-to-image", 7: "an upscaling", 8: "an instruct-pix2pix", 9: "an inpainting"}


@dataclass
class Model:
    """A Stable Diffusion (Rombach et al. 2022): three networks and a tokenizer."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: TextEncoder
    tokenizer: CLIPTokenizer
    prediction_type: str = "epsilon"  # what the U-Net returns: "epsilon" or "v_prediction"
    sample_size: int = 64  # side of the latents that the U-Net was trained on
    files: dict[str, Path] = field(default_factory=dict)  # where the weights were read from

    @property
    def config(self) -> Config:
        """The sizes of the networks, and what no weight tells."""
        configs = (self.unet.config, self.vae.config, self.text_encoder.config)
        return Config(*configs, self.prediction_type, self.sample_size)

    def sha256(self) -> dict[str, str]:
        """The digest of each weight file, as model pages publish it; reads the files again, so call it once."""
        digests = {}
        for name, path in self.files.items():
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return digests


class _Stored(NamedTuple):
    """Where a parameter lies."""

    file: Path
    key: str
    shape: tuple[int, ...]


def load(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | str | None = None,
    config: Config | None = None,
) -> Model:
    """Read a checkpoint: a single .safetensors file or a diffusers folder. Networks come frozen, in eval mode.

    tokenizer: folder with CLIP's vocab.json and merges.txt; default: the checkpoint's own, then the local hub cache
    config: instead of the folder's json files; of a single file, what the shapes do not tell, such as SD 1.5's 8 heads

    Raises CheckpointError, one line, where the checkpoint is broken, incomplete, of another family or a pickle.
    An averaged U-Net beside the trained one (EMA) is ignored. Nothing is ever fetched from the network.
    """
    root = Path(path)
    is_folder = root.is_dir()
    files = list(weight_files(root)) if is_folder else [("", root)]
    headers = [read_header(file) for _, file in files]
    if is_folder:
        tensors = _locate(files, headers, FOLDER)
        config = config or read_config(root)
    else:
        refuse_other_families(root, list(headers[0].shapes))
        tensors = _locate(files, headers, SINGLE_FILE)
        stated = headers[0].metadata.get("modelspec.prediction_type", "epsilon")
        config = _fit(config or Config(prediction_type="v_prediction" if stated == "v" else stated), tensors)
    _check_config(root, config)

    # networks without storage first: whatever does not fit is found before any weight is read
    with torch.device("meta"):
        networks = {name: build(getattr(config, name)) for name, build in NETWORKS.items()}
    shapes = {f"{name}.{key}": v.shape for name, net in networks.items() for key, v in net.state_dict().items()}
    _check_tensors(root, shapes, tensors)
    tokens = load_tokenizer(root / "tokenizer" if tokenizer is None and is_folder else tokenizer, config.text_encoder)

    states: dict[str, dict[str, Tensor]] = {name: {} for name in NETWORKS}
    for _, file in files:
        with safe_open(file, "pt") as source:
            for name, stored in tensors.items():
                if stored.file == file:
                    network, _, key = name.partition(".")
                    # copied even where nothing is cast: a mapped file could be replaced under the model
                    weight = source.get_tensor(stored.key).to(device, dtype, copy=True)
                    states[network][key] = weight.reshape(shapes[name])
    for name, network in networks.items():
        network.load_state_dict(states.pop(name), strict=True, assign=True)
        network.to(device).eval().requires_grad_(False)
    paths = {str(file.relative_to(root)) if is_folder else root.name: file for _, file in files}
    return Model(
        **networks,
        tokenizer=tokens,
        prediction_type=config.prediction_type,
        sample_size=config.sample_size,
        files=paths,
    )


def save_folder(model: Model, path: Path | str, dtype: torch.dtype = torch.float32) -> None:
    """Write a model as a diffusers folder, all at once or not at all; StableDiffusionPipeline reads it too.

    Raises CheckpointError where the path exists already.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path}: exists already; remove it first or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        root = Path(scratch) / path.name
        write_config(root, model.config)
        for name, stem in WEIGHTS.items():
            state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in getattr(model, name).state_dict().items()}
            save_file(state, root / name / f"{stem}.safetensors", metadata={"format": "pt"})
        save_tokenizer(model.tokenizer, root / "tokenizer", model.text_encoder.config.max_position_embeddings)
        root.rename(path)


def _locate(files: list[tuple[str, Path]], headers: list[Header], table: Table) -> dict[str, _Stored]:
    """Parameter name, behind its network's -> where it lies; dropped tensors are left out."""
    tensors: dict[str, _Stored] = {}
    for (prefix, file), header in zip(files, headers):
        for key, shape in header.shapes.items():
            try:
                name = rename(f"{prefix}.{key}" if prefix else key, table)
            except KeyError:
                raise CheckpointError(f"{file}: unknown tensor {key}") from None
            if name in tensors:
                raise CheckpointError(f"{file}: {key} and {tensors[name].key} are both {name}")
            if name is not None:
                tensors[name] = _Stored(file, key, shape)
    return tensors


def _check_tensors(root: Path, shapes: dict[str, torch.Size], tensors: dict[str, _Stored]) -> None:
    """Every parameter there, nothing else, all of the right shape."""
    if missing := [name for name in shapes if name not in tensors]:
        counts = Counter(name.partition(".")[0] for name in missing)
        of = Counter(name.partition(".")[0] for name in shapes)
        lost = ", ".join(f"{counts[network]} of {of[network]} {network} tensors" for network in counts)
        more = ", .." if len(missing) > 5 else ""
        raise CheckpointError(f"{root}: {lost} missing: {', '.join(missing[:5])}{more}")
    for name, stored in tensors.items():
        if name not in shapes:
            raise CheckpointError(f"{stored.file}: unknown tensor {stored.key}")
        if stored.shape not in (shapes[name], (*shapes[name], 1, 1)):  # a linear layer may come as a 1x1 convolution
            raise CheckpointError(
                f"{stored.file}: {stored.key} has shape {list(stored.shape)}, the network wants {list(shapes[name])}"
            )


def _check_config(root: Path, config: Config) -> None:
    """A text-to-image model of a known prediction type, whose widths divide into heads and groups."""
    unet, vae, text = config.unet, config.vae, config.text_encoder
    if config.prediction_type not in PREDICTION_TYPES:
        raise CheckpointError(
            f"{root}: prediction_type {config.prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}"
        )
    if unet.in_channels != vae.latent_channels:
        kind = _CHANNELS.get(unet.in_channels, "another kind of")
        raise CheckpointError(
            f"{root}: {kind} U-Net ({unet.in_channels} input channels); only text-to-image models can be read"
        )
    splits = [(width, heads, "U-Net heads") for width, heads in zip(unet.block_out_channels, unet.num_heads)]
    splits += [(text.hidden_size, text.num_attention_heads, "text encoder heads")]
    splits += [(width, unet.norm_num_groups, "U-Net norm groups") for width in unet.block_out_channels]
    splits += [(width, vae.norm_num_groups, "VAE norm groups") for width in vae.block_out_channels]
    for width, parts, what in splits:
        if width % parts:
            raise CheckpointError(
                f"{root}: {width} channels do not divide into {parts} {what}; pass the right `config`"
            )


def _fit(config: Config, tensors: dict[str, _Stored]) -> Config:
    """The config with every size that the shapes tell; where a tensor is missing, its size stays as it was."""

    def size(name: str, axis: int, default: int) -> int:
        shape = tensors[name].shape if name in tensors else ()
        return shape[axis] if axis < len(shape) else default

    def widths(prefix: str, defaults: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size(f"{prefix}.{n}.resnets.0.conv2.bias", 0, default) for n, default in enumerate(defaults))

    unet, vae, text = config.unet, config.vae, config.text_encoder
    attention = "unet.down_blocks.0.attentions.0"
    tower = "text_encoder.text_model"
    layers = {name.split(".")[4] for name in tensors if name.startswith(f"{tower}.encoder.layers.")}
    return replace(
        config,
        unet=replace(
            unet,
            in_channels=size("unet.conv_in.weight", 1, unet.in_channels),
            out_channels=size("unet.conv_out.weight", 0, unet.out_channels),
            block_out_channels=widths("unet.down_blocks", unet.block_out_channels),
            cross_attention_dim=size(
                f"{attention}.transformer_blocks.0.attn2.to_k.weight", 1, unet.cross_attention_dim
            ),
        ),
        vae=replace(
            vae,
            latent_channels=size("vae.post_quant_conv.weight", 0, vae.latent_channels),
            block_out_channels=widths("vae.encoder.down_blocks", vae.block_out_channels),
        ),
        text_encoder=replace(
            text,
            vocab_size=size(f"{tower}.embeddings.token_embedding.weight", 0, text.vocab_size),
            hidden_size=size(f"{tower}.embeddings.token_embedding.weight", 1, text.hidden_size),
            intermediate_size=size(f"{tower}.encoder.layers.0.mlp.fc1.weight", 0, text.intermediate_size),
            num_hidden_layers=len(layers) or text.num_hidden_layers,
            max_position_embeddings=size(
                f"{tower}.embeddings.position_embedding.weight", 0, text.max_position_embeddings
            ),
        ),
    )

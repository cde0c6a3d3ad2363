"""Stable Diffusion 1 and 2 to and from weight files: a CompVis/webui single file, a diffusers
folder."""

import contextlib
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from harness.files import sha256
from ldm import CheckpointError
from ldm.checkpoints.folder import (
    WEIGHTS,
    Config,
    network_files,
    read_config,
    read_vae_config,
    weight_files,
    write_config,
)
from ldm.checkpoints.keys import FOLDER, VAE_FILE
from ldm.checkpoints.single_file import (
    config_of,
    fit,
    is_sd_2,
    locate_single_file,
    probe_prediction,
    refuse_other_families,
    single_file_tensors,
    stated_prediction,
    with_prediction,
)
from ldm.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from ldm.checkpoints.weights import OTHER_KIND, Stored, Weights, locate, named, open_weights
from ldm.text import TextEncoder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL, VAEConfig

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
        """The digest of each weight file, as model pages publish it; reads the files again, so call
        it once."""
        return {name: sha256(path) for name, path in self.files.items()}


def load(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | str | None = None,
    config: Config | None = None,
    prediction_type: str | None = None,
    ema: bool = False,
    vae: Path | str | None = None,
) -> Model:
    """Read a checkpoint: a single file or a diffusers folder. Networks come frozen, in eval mode.

    On the CPU a weight that keeps its type stays where it is, mapped from the file: it is read when
    it is first used, at no cost in memory of its own, and writing to it changes the model alone.
    While the model lives, such a file may be renamed, removed, or replaced by a rename, but not
    overwritten in place, which would change the weights, or end the program with a bus error.
    Whatever is cast or moved is copied, one tensor at a time.

    tokenizer: folder with CLIP's vocab.json and merges.txt; default: the checkpoint's own, then the
        local hub cache
    config: instead of the folder's json files; of a single file, what the shapes do not tell, such
        as SD 1.5's 8 heads
    prediction_type: what the U-Net returns; default: what the checkpoint says, or a probe of an SD
        2 file
    ema: take the U-Net's running average, which v1-5-pruned and training runs keep beside it in the
        single file
    vae: a VAE's file (CompVis's or diffusers' names) or folder, instead of the checkpoint's own

    Raises CheckpointError, one line, where the checkpoint is broken, incomplete, of another family
    or an unsafe pickle. Nothing is ever fetched from the network.
    """
    root = Path(path)
    is_folder = root.is_dir()
    probed = False
    if is_folder:
        if ema:
            raise CheckpointError(
                f"{root}: a folder holds one U-Net, mostly the averaged one; load it without --ema"
            )
        parts = list(weight_files(root, [name for name in WEIGHTS if name != "vae" or vae is None]))
        tensors = locate([(name, open_weights(file)) for name, file in parts], FOLDER)
        config = config or read_config(root)
    else:
        weights = open_weights(root)
        refuse_other_families(weights)
        tensors = locate_single_file(weights, ema)
        shapes = {name: stored.shape for name, stored in tensors.items()}
        if config is None:
            stated = prediction_type or stated_prediction(weights)
            probed = stated is None
            config = with_prediction(config_of(is_sd_2(weights), shapes), stated or "epsilon")
        else:
            config = fit(config, shapes)
    if vae is not None:
        own, others = _locate_vae(Path(vae), config.vae)
        config = replace(config, vae=own)
        tensors = {
            name: stored for name, stored in tensors.items() if not name.startswith("vae.")
        } | others
    config = replace(config, prediction_type=prediction_type or config.prediction_type)
    _check_config(root, config)

    # networks without storage first: whatever does not fit is found before any weight is read
    with torch.device("meta"):
        networks = {name: build(getattr(config, name)) for name, build in NETWORKS.items()}
    wanted = {
        f"{name}.{key}": v.shape
        for name, net in networks.items()
        for key, v in net.state_dict().items()
    }
    _check_tensors(
        dict.fromkeys(NETWORKS, root) | ({"vae": Path(vae)} if vae else {}), wanted, tensors
    )
    tokens = load_tokenizer(
        root / "tokenizer" if tokenizer is None and is_folder else tokenizer, config.text_encoder
    )

    states: dict[str, dict[str, Tensor]] = {name: {} for name in NETWORKS}
    for weights, names in _by_file(tensors):
        for key, tensor in weights.read(names):
            for name in names[key]:
                third = tensors[name].third
                part = tensor if third is None else tensor.chunk(3)[third]
                network, _, parameter = name.partition(".")
                misaligned = part.data_ptr() % part.element_size() != 0  # by a header of odd length
                states[network][parameter] = part.to(device, dtype, copy=misaligned).reshape(
                    wanted[name]
                )
    for name, network in networks.items():
        network.load_state_dict(states.pop(name), strict=True, assign=True)
        network.to(device).eval().requires_grad_(False)
    if probed:
        config = with_prediction(config, probe_prediction(networks["unet"], root))
    return Model(
        **networks,
        tokenizer=tokens,
        prediction_type=config.prediction_type,
        sample_size=config.sample_size,
        files={_name(weights.path, root): weights.path for weights, _ in _by_file(tensors)},
    )


def save_folder(model: Model, path: Path | str, dtype: torch.dtype = torch.float32) -> None:
    """Write a model as a diffusers folder, all at once or not at all; StableDiffusionPipeline reads
    it too.

    Raises CheckpointError where the path exists already.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path}: exists already; remove it first or choose another name")
    with _appearing(path) as root:
        write_config(root, model.config)
        for name, stem in WEIGHTS.items():
            state = {
                k: v.detach().to("cpu", dtype).contiguous()
                for k, v in getattr(model, name).state_dict().items()
            }
            save_file(state, root / name / f"{stem}.safetensors", metadata={"format": "pt"})
        save_tokenizer(model.tokenizer, root / "tokenizer", model.text_encoder.config)


def save_single(
    path: Path | str,
    model: Model,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model as one file in webui's CompVis layout, all at once or not at all.

    metadata: for the header, beside what the U-Net predicts; the tokenizer has no place in the file
    Raises CheckpointError where the path exists already, or the model has sizes that a single file
    does not tell.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path}: exists already; remove it first or choose another name")
    state = {
        f"{name}.{key}": value
        for name in NETWORKS
        for key, value in getattr(model, name).state_dict().items()
    }
    try:
        tensors = single_file_tensors(model.config, state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in tensors.items()}
    with _appearing(path) as whole:
        predicts = "v" if model.prediction_type == "v_prediction" else "epsilon"
        own = {"format": "pt", "modelspec.prediction_type": predicts}
        save_file(tensors, whole, metadata={**(metadata or {}), **own})


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Where to write what then appears at `path`, whole or not at all. CheckpointError where the
    disk is full."""
    scratch = path.with_name(f".{path.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir(parents=True)
    try:
        yield scratch / path.name
        (scratch / path.name).rename(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be written; is the disk full? ({error})") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _locate_vae(path: Path, config: VAEConfig) -> tuple[VAEConfig, dict[str, Stored]]:
    """The config of a VAE alone and where its parameters lie.

    config: the VAE's that it replaces; CheckpointError where its latents are scaled otherwise
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        own, files = read_vae_config(folder), list(network_files(folder, WEIGHTS["vae"]))
        if own.scaling_factor != config.scaling_factor:
            raise CheckpointError(
                f"{folder}: latents scaled by {own.scaling_factor}, the model's by"
                f" {config.scaling_factor}; this VAE is of another family"
            )
        return own, locate([("vae", open_weights(file)) for file in files], VAE_FILE)
    weights = open_weights(path)
    alone = not any(key.startswith("model.diffusion_model.") for key in weights.shapes)
    if not alone or not any(
        re.match(r"(first_stage_model\.)?encoder\.conv_in\.", key) for key in weights.shapes
    ):
        what = (
            "a VAE alone, a whole checkpoint" if not alone else "a VAE: no tensor encoder.conv_in.*"
        )
        raise CheckpointError(f"{path}: not {what}; give a VAE's own file or folder")
    tensors = locate([("vae", weights)], VAE_FILE)
    return (
        fit(Config(vae=config), {name: stored.shape for name, stored in tensors.items()}).vae,
        tensors,
    )


def _by_file(tensors: dict[str, Stored]) -> list[tuple[Weights, dict[str, list[str]]]]:
    """Each file with its tensors' keys -> the parameters that they hold."""
    files: dict[Path, tuple[Weights, dict[str, list[str]]]] = {}
    for name, stored in tensors.items():
        _, names = files.setdefault(stored.weights.path, (stored.weights, {}))
        names.setdefault(stored.key, []).append(name)
    return list(files.values())


def _name(file: Path, root: Path) -> str:
    """What a weight file is called among the model's files."""
    if file == root:
        return root.name
    return str(file.relative_to(root)) if file.is_relative_to(root) else f"vae/{file.name}"


def _check_tensors(
    places: dict[str, Path], shapes: dict[str, torch.Size], tensors: dict[str, Stored]
) -> None:
    """Every parameter there, nothing else, all of the right shape."""
    if missing := [name for name in shapes if name not in tensors]:
        counts = Counter(name.partition(".")[0] for name in missing)
        of = Counter(name.partition(".")[0] for name in shapes)
        lost = ", ".join(
            f"{counts[network]} of {of[network]} {network} tensors" for network in counts
        )
        more = ", .." if len(missing) > 5 else ""
        place = places[next(iter(counts))]
        if counts == {"vae": of["vae"]}:
            raise CheckpointError(f"{place}: no VAE inside; give one by --vae")
        raise CheckpointError(
            f"{place}: {lost} missing: {', '.join(missing[:5])}{more}; fetch it again, whole"
        )
    if unknown := [stored for name, stored in tensors.items() if name not in shapes]:
        keys = list(
            dict.fromkeys(
                stored.key for stored in unknown if stored.weights.path == unknown[0].weights.path
            )
        )
        raise CheckpointError(f"{unknown[0].weights.path}: {named(keys, 'unknown')}; {OTHER_KIND}")
    for name, stored in tensors.items():
        # a linear layer may come as a 1x1 convolution
        if stored.shape not in (shapes[name], (*shapes[name], 1, 1)):
            raise CheckpointError(
                f"{stored.weights.path}: {stored.key} has shape {list(stored.shape)}, "
                f"the network wants {list(shapes[name])}: {OTHER_KIND}"
            )


def _check_config(root: Path, config: Config) -> None:
    """A text-to-image model of a known prediction type, whose widths divide into heads and
    groups."""
    unet, vae, text = config.unet, config.vae, config.text_encoder
    if config.prediction_type not in PREDICTION_TYPES:
        raise CheckpointError(
            f"{root}: prediction_type {config.prediction_type!r} is not one of"
            f" {', '.join(PREDICTION_TYPES)}"
        )
    if unet.in_channels != vae.latent_channels:
        kind = _CHANNELS.get(unet.in_channels, "another kind of")
        raise CheckpointError(
            f"{root}: {kind} U-Net ({unet.in_channels} input channels); give a text-to-image model"
        )
    splits = [
        (width, heads, "U-Net heads")
        for width, heads in zip(unet.block_out_channels, unet.num_heads)
    ]
    splits += [(text.hidden_size, text.num_attention_heads, "text encoder heads")]
    splits += [
        (width, unet.norm_num_groups, "U-Net norm groups") for width in unet.block_out_channels
    ]
    splits += [(width, vae.norm_num_groups, "VAE norm groups") for width in vae.block_out_channels]
    for width, parts, what in splits:
        if width % parts:
            raise CheckpointError(
                f"{root}: {width} channels do not divide into {parts} {what}; {OTHER_KIND}"
            )

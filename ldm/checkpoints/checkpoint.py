"""Stable Diffusion 1 and 2 to and from weight files: a CompVis/webui single file, a diffusers
folder."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
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
    fit,
    locate_single_file,
    probe_prediction,
    single_file_tensors,
    with_prediction,
)
from ldm.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from ldm.checkpoints.weights import OTHER_KIND, Stored, locate, named, open_weights
from ldm.text import TextEncoder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

NETWORKS = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": TextEncoder}
PREDICTION_TYPES = ("epsilon", "v_prediction")  # what a U-Net may return


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
    def networks(self) -> nn.ModuleDict:
        """All three; the names of their weights begin with their own, as in unet.conv_in.weight."""
        return nn.ModuleDict({name: getattr(self, name) for name in NETWORKS})

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
    if root.is_dir():
        if ema:
            raise CheckpointError(
                f"{root}: a folder holds one U-Net, mostly the averaged one; load it without --ema"
            )
        parts = weight_files(root, [name for name in WEIGHTS if name != "vae" or vae is None])
        tensors = locate([(name, open_weights(file)) for name, file in parts], FOLDER)
        config = config or read_config(root)
        tokenizer = tokenizer or root / "tokenizer"
    else:
        config, tensors = locate_single_file(root, config, ema, prediction_type)
    if vae is not None:
        config, tensors = _with_vae(Path(vae), config, tensors)
    if prediction_type:
        config = replace(config, prediction_type=prediction_type)

    # networks without storage first: whatever does not fit is found before any weight is read
    networks = _empty_networks(root, config)
    shapes = {name: tuple(value.shape) for name, value in networks.state_dict().items()}
    _check_tensors(root, vae, shapes, tensors)
    tokens = load_tokenizer(tokenizer, config.text_encoder)

    state = {}
    for name, (weights, stored_as, _, third) in tensors.items():
        tensor = weights.tensor(stored_as)
        tensor = tensor if third is None else tensor.chunk(3)[third]
        misaligned = tensor.data_ptr() % tensor.element_size() != 0  # by a header of odd length
        state[name] = tensor.to(device, dtype, copy=misaligned).reshape(shapes[name])
    networks.load_state_dict(state, assign=True)
    networks.to(device).eval().requires_grad_(False)
    if config.prediction_type is None:
        config = with_prediction(config, probe_prediction(networks["unet"], root))
    return Model(
        **networks,
        tokenizer=tokens,
        prediction_type=config.prediction_type,
        sample_size=config.sample_size,
        files={_name(at.weights.path, root): at.weights.path for at in tensors.values()},
    )


def save_folder(model: Model, path: Path | str, dtype: torch.dtype = torch.float32) -> None:
    """Write a model as a diffusers folder, all at once or not at all; StableDiffusionPipeline reads
    it too.

    Raises CheckpointError where the path exists already.
    """
    with _appearing(Path(path)) as root:
        write_config(root, model.config)
        for name, stem in WEIGHTS.items():
            state = _as_stored(getattr(model, name).state_dict(), dtype)
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
    with _appearing(Path(path)) as whole:
        state = model.networks.state_dict()
        tensors = _as_stored(single_file_tensors(model.config, state), dtype)
        predicts = "v" if model.prediction_type == "v_prediction" else "epsilon"
        own = {"format": "pt", "modelspec.prediction_type": predicts}
        save_file(tensors, whole, metadata={**(metadata or {}), **own})


def _as_stored(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to("cpu", dtype).contiguous() for key, value in state.items()}


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Where to write what then appears at `path`, whole or not at all. CheckpointError where it is
    there already, or cannot be written."""
    if path.exists():
        raise CheckpointError(f"{path}: exists already; remove it first or choose another name")
    scratch = path.with_name(f".{path.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir(parents=True)
    try:
        yield scratch / path.name
        (scratch / path.name).rename(path)
    except (SafetensorError, CheckpointError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _with_vae(
    path: Path, config: Config, tensors: dict[str, Stored]
) -> tuple[Config, dict[str, Stored]]:
    """The same with the VAE of a file or folder; CheckpointError where its latents are scaled
    otherwise."""
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        vae, files = read_vae_config(folder), network_files(folder, WEIGHTS["vae"])
        others = locate([("vae", open_weights(file)) for file in files], VAE_FILE)
        if vae.scaling_factor != config.vae.scaling_factor:
            raise CheckpointError(
                f"{folder}: latents scaled by {vae.scaling_factor}, the model's by"
                f" {config.vae.scaling_factor}; this VAE is of another family"
            )
    else:
        weights = open_weights(path)
        names = {key.removeprefix("first_stage_model.") for key in weights.shapes}
        unet = any(key.startswith("model.diffusion_model.") for key in names)
        if unet or "encoder.conv_in.weight" not in names:
            raise CheckpointError(f"{path}: not a VAE alone; give a VAE's own file or folder")
        others = locate([("vae", weights)], VAE_FILE)
        vae = fit(config, others).vae
    rest = {name: at for name, at in tensors.items() if not name.startswith("vae.")}
    return replace(config, vae=vae), rest | others


def _name(file: Path, root: Path) -> str:
    """What a weight file is called among the model's files."""
    if file == root:
        return root.name
    return str(file.relative_to(root)) if file.is_relative_to(root) else f"vae/{file.name}"


def _check_tensors(
    root: Path,
    vae: Path | str | None,
    shapes: dict[str, tuple[int, ...]],
    tensors: dict[str, Stored],
) -> None:
    """Every parameter there, nothing else, all of the right shape."""
    if missing := [name for name in shapes if name not in tensors]:
        if missing == [name for name in shapes if name.startswith("vae.")]:
            raise CheckpointError(f"{root}: no VAE inside; give one by --vae")
        place = vae if vae and missing[0].startswith("vae.") else root
        raise CheckpointError(f"{place}: {named(missing, 'missing')}; fetch it again, whole")
    for name, (weights, key, shape, _) in tensors.items():
        if name not in shapes:
            unknown = [at.key for name, at in tensors.items() if name not in shapes]
            raise CheckpointError(f"{weights.path}: {named(unknown, 'unknown')}; {OTHER_KIND}")
        # a linear layer may come as a 1x1 convolution
        if shape not in (shapes[name], (*shapes[name], 1, 1)):
            raise CheckpointError(
                f"{weights.path}: {key} has shape {list(shape)}, the network wants"
                f" {list(shapes[name])}: {OTHER_KIND}"
            )


def _empty_networks(root: Path, config: Config) -> nn.ModuleDict:
    """The networks without storage; CheckpointError where the config is no text-to-image model of
    a known prediction type, or its sizes do not fit together."""
    if config.prediction_type not in (*PREDICTION_TYPES, None):
        raise CheckpointError(
            f"{root}: prediction_type {config.prediction_type!r} is not one of"
            f" {', '.join(PREDICTION_TYPES)}"
        )
    if config.unet.in_channels != config.vae.latent_channels:
        raise CheckpointError(
            f"{root}: a U-Net with {config.unet.in_channels} input channels (inpainting has 9,"
            " instruct-pix2pix 8, upscaling 7, depth-to-image 5); give a text-to-image model"
        )
    try:
        with torch.device("meta"):
            networks = {name: build(getattr(config, name)) for name, build in NETWORKS.items()}
            return nn.ModuleDict(networks)
    # whatever torch and transformers make of widths that do not divide into groups or heads
    except Exception as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{root}: {reason}; {OTHER_KIND}") from None

"""The five classifiers of the paper (torchvision's networks with a 5-way head), their weights, and
the trained file."""

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torchvision.models as tv
from torch import Tensor, nn

from classify import ClassifyError
from planes import PLANES

MODELS = {
    "densenet169": tv.densenet169,
    "resnet18": tv.resnet18,
    "efficientnet_b0": tv.efficientnet_b0,
    "mobilenet_v2": tv.mobilenet_v2,
    "vit_b_16": tv.vit_b_16,
}

PROBE = "probe:"
"""What stands before the name of a frozen model that a linear probe reads."""

# All five shrink an image 32-fold or cut it into 16 x 16 patches. Below 64 pixels the last batch
# norm would see a single value per image, and a last batch of one image could not be trained on.
SMALLEST = 64
PATCH = 16


def build(
    name: str, weights: str | Path = "imagenet", image_size: int = 512, classes: int = len(PLANES)
) -> nn.Module:
    """One of MODELS for square images of `image_size`, with a head of `classes` logits.

    weights: "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), "none" (random), or a state
      dict file of this network. A file with as many classes keeps its head; any other head is
      replaced.
    Position embeddings of ViT are interpolated to the image size.
    Raises ClassifyError for a size that the network cannot take and for weights that are missing or
    do not fit.
    """
    if image_size < SMALLEST:
        raise ClassifyError(
            f"{name}: image size {image_size} is too small; it must be at least {SMALLEST}"
        )
    size = {}
    if name == "vit_b_16":
        if image_size % PATCH:
            raise ClassifyError(f"{name}: image size {image_size} must be a multiple of {PATCH}")
        size = {"image_size": image_size}
    model = MODELS[name](**size)
    path, head = find_head(model)
    width, own = head.in_features, None

    if weights != "none":
        state, source = read_weights(name, weights)
        weight = state.get(f"{path}.weight")
        if weight is None or weight.shape[1:] != (width,):
            raise ClassifyError(f"{source}: not weights of {name}: no {path}.weight of its width")
        own = len(weight)
        if own != head.out_features:
            model.set_submodule(path, nn.Linear(width, own))
        if size:
            state = tv.vision_transformer.interpolate_embeddings(image_size, PATCH, state)
        load_strict(model, state, source)
    if own != classes:
        model.set_submodule(path, nn.Linear(width, classes))
    return model


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """The classifying layer and its path: the last Linear in each of the five networks, and in
    Inception v3."""
    *_, last = (item for item in model.named_modules() if isinstance(item[1], nn.Linear))
    return last


def read_weights(name: str, weights: str | Path) -> tuple[dict[str, Tensor], str]:
    """State dict of torchvision's network `name`, and where it came from in words.

    weights: "imagenet", or a file: safetensors, or anything that torch.load reads with
        weights_only=True. Raises ClassifyError for a failed download and for an unreadable file.
    """
    try:
        if weights == "imagenet":
            entry, cached = imagenet_file(name)
            source = f"ImageNet weights of {name}"
            advice = f"fetch {entry.url} to {cached}, or choose other weights (a file, or none)"
            state = entry.get_state_dict(
                progress=False, check_hash=True, weights_only=True, map_location="cpu"
            )
        else:
            source = str(weights)
            advice = "--weights takes imagenet, none or a state dict that can be read safely"
            state = _read_file(Path(weights))
    # no network, no space, a wrong hash; and on what is no pickle, an unpickler fails in any way
    except Exception as error:
        raise ClassifyError(f"{source}: {one_line(error)}; {advice}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ClassifyError(
            f"{source}: not a state dict of tensors; save model.state_dict() and nothing else"
        )
    # torchvision's DenseNet files are older than its module names: denselayer1.norm.1 is
    # denselayer1.norm1 today.
    old = r"(denselayer\d+\.(?:norm|conv))\.(\d)"
    return {re.sub(old, r"\1\2", key): value for key, value in state.items()}, source


def imagenet_file(name: str) -> tuple[object, Path]:
    """torchvision's weights of its network `name`, and the file in torch's cache that they are in
    once they were downloaded."""
    entry = tv.get_model_weights(name).IMAGENET1K_V1
    return entry, Path(torch.hub.get_dir(), "checkpoints", Path(entry.url).name)


def _read_file(path: Path) -> object:
    """What safetensors or torch.load read, by what is in the file, whatever its name."""
    with open(path, "rb") as file:
        if file.read(9)[8:] == b"{":
            return safetensors.torch.load_file(path)
        # by its sum, which torch does not look at
        if zipfile.is_zipfile(file) and (part := zipfile.ZipFile(file).testzip()):
            raise ValueError(f"{part} in it is damaged")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def load_strict(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load every key and no other; ClassifyError in one line where torch's own error has
    hundreds."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = f"does not fit {type(model).__name__}: {one_line(error)}"
        raise ClassifyError(f"{source}: {reason}") from None


def save(path: Path, model: nn.Module, description: dict, classes: Sequence[str] = PLANES) -> None:
    """Write a trained classifier as safetensors.

    description: what `load` needs (`model`, `size`, `input_range`) and whatever else is worth
      keeping. It is stored as one JSON text, because safetensors does not promise an order of
      several metadata entries and equal runs are to give equal bytes.
    classes: in the order of the logits
    """
    metadata = {"classifier": json.dumps({**description, "classes": list(classes)}, sort_keys=True)}
    state = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    # save_file would make it readable by its owner alone
    path.write_bytes(safetensors.torch.save(state, metadata))


def load(path: str | Path) -> tuple[nn.Module, dict]:
    """A classifier written by `save`, in eval mode, and its description, of which "classes" are in
    the logits' order. ClassifyError if it is none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})["classifier"])
        name, size, classes = (description[key] for key in ("model", "size", "classes"))
    except FileNotFoundError:
        raise ClassifyError(f"{path}: no such file") from None
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        raise ClassifyError(f"{path}: not a classifier written by classify.py") from None
    if name.startswith(PROBE):
        from classify.probe import reopen  # which is made of this module

        return reopen(path, description), description
    return build(name, path, size, len(classes)).eval(), description


def one_line(error: Exception) -> str:
    """What a library says of it, at most 200 characters."""
    return " ".join(str(error).split())[:200]

"""The five classifiers of the paper (torchvision's networks with a 5-way head), their weights, and
the trained file."""

import json
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torchvision.models as tv
from torch import Tensor, nn

from classify import ClassifyError
from planes import PLANES

MODELS: dict[str, Callable[..., nn.Module]] = {
    "densenet169": tv.densenet169,
    "resnet18": tv.resnet18,
    "efficientnet_b0": tv.efficientnet_b0,
    "mobilenet_v2": tv.mobilenet_v2,
    "vit_b_16": tv.vit_b_16,
}

# All five shrink an image 32-fold or cut it into 16 x 16 patches. Below 64 pixels the last batch
# norm would see a single value per image, and a last batch of one image could not be trained on.
SMALLEST = 64
PATCH = 16

# why the download of a network's weights failed, in this process
_failed: dict[str, Exception] = {}


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
    if name not in MODELS:
        raise ClassifyError(f"no model is called {name!r}; choose from {', '.join(MODELS)}")
    if image_size < SMALLEST:
        raise ClassifyError(
            f"{name}: image size {image_size} is too small; it must be at least {SMALLEST}"
        )
    size = {}
    if name == "vit_b_16":
        if image_size % PATCH:
            raise ClassifyError(f"{name}: image size {image_size} must be a multiple of {PATCH}")
        size = {"image_size": image_size}

    if weights == "none":
        model = MODELS[name](**size)
    else:
        state, source = read_weights(name, weights)
        model = MODELS[name](num_classes=_classes(name, state, source), **size)
        if "encoder.pos_embedding" in state:
            try:
                state = tv.vision_transformer.interpolate_embeddings(image_size, PATCH, state)
            except ValueError as error:
                raise ClassifyError(f"{source}: {error}") from None
        load_strict(model, state, source)

    path, head = find_head(model)
    if weights == "none" or head.out_features != classes:
        model.set_submodule(path, nn.Linear(head.in_features, classes))
    return model


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """The classifying layer and its path: the last Linear in each of the five networks, and in
    Inception v3."""
    return [
        (path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)
    ][-1]


def read_weights(name: str, weights: str | Path) -> tuple[dict[str, Tensor], str]:
    """State dict of torchvision's network `name`, and where it came from in words.

    weights: "imagenet", or a file: safetensors, or anything that torch.load reads with
    weights_only=True Raises ClassifyError for a failed download and for an unreadable file.
    """
    if weights == "imagenet":
        entry = tv.get_model_weights(name).IMAGENET1K_V1
        source = f"ImageNet weights of {name}"
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(entry.url).name)
        try:
            if name in _failed and not cached.exists():
                raise _failed[name]  # what took minutes to fail is not tried again
            state = entry.get_state_dict(
                progress=False, check_hash=True, weights_only=True, map_location="cpu"
            )
        # no network, no space, a wrong hash, or whatever a cut-off file leads to
        except Exception as error:
            _failed[name] = error
            advice = f"fetch {entry.url} to {cached}, or choose other weights (a file, or none)"
            raise ClassifyError(f"{source}: {_one_line(error)}; {advice}") from None
    else:
        source = str(weights)
        try:
            with open(weights, "rb") as file:
                is_safetensors = file.read(9)[8:] == b"{"
                file.seek(0)
                if is_safetensors:
                    state = safetensors.torch.load_file(weights)
                elif zipfile.is_zipfile(file) and (part := zipfile.ZipFile(file).testzip()):
                    # by its sum, which torch does not look at
                    raise ValueError(f"{part} in it is damaged")
                else:
                    file.seek(0)
                    state = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise ClassifyError(
                f"{source}: no such file; --weights takes imagenet, none or a file"
            ) from None
        except Exception as error:  # on what is no pickle, an unpickler fails in any way at all
            raise ClassifyError(
                f"{source}: not a state dict that can be read safely ({_one_line(error)})"
            ) from None
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ClassifyError(
            f"{source}: not a state dict of tensors; save model.state_dict() and nothing else"
        )
    # torchvision's DenseNet files are older than its module names: denselayer1.norm.1 is
    # denselayer1.norm1 today.
    renamed = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", key): value
        for key, value in state.items()
    }
    return renamed, source


def load_strict(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load every key and no other; ClassifyError in one line where torch's own error has
    hundreds."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ClassifyError(
            f"{source}: does not fit {type(model).__name__}: {_one_line(error)}"
        ) from None


def save(path: Path, model: nn.Module, description: dict, classes: Sequence[str] = PLANES) -> None:
    """Write a trained classifier as safetensors.

    description: what `load` needs (`model`, `size`, `input_range`) and whatever else is worth
      keeping. It is stored as one JSON text, because safetensors does not promise an order of
      several metadata entries and equal runs are to give equal bytes.
    classes: in the order of the logits
    """
    metadata = {"classifier": json.dumps({**description, "classes": list(classes)}, sort_keys=True)}
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    # save_file would make it readable by its owner alone
    path.write_bytes(safetensors.torch.save(state, metadata))


def load(path: str | Path, classes: Sequence[str] | None = None) -> tuple[nn.Module, dict]:
    """A classifier written by `save`, in eval mode, and its description, of which "classes" are in
    the logits' order.

    classes: those that it must have, if any must be. ClassifyError if it is none, or has others.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})["classifier"])
        name, size, own = description["model"], description["size"], description["classes"]
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        raise ClassifyError(f"{path}: not a classifier written by classify.py") from None
    if classes is not None and own != list(classes):
        raise ClassifyError(f"{path}: its classes are {', '.join(own)}, not {', '.join(classes)}")
    return build(name, Path(path), size, len(own)).eval(), description


def _classes(name: str, state: dict[str, Tensor], source: str) -> int:
    """How many classes the head in a state dict has."""
    with torch.device("meta"):
        path, head = find_head(MODELS[name]())
    weight = state.get(f"{path}.weight")
    if weight is None or weight.dim() != 2 or weight.shape[1] != head.in_features:
        raise ClassifyError(
            f"{source}: not weights of {name}: no {path}.weight of shape (classes,"
            f" {head.in_features})"
        )
    return len(weight)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."

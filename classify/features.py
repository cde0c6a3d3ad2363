"""Image features for the t-SNE figure: Inception v3 as the authors used it, or any classifier of
this project."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision.models as tv
from torch import Tensor, nn

from classify.data import PlaneImages, batches, prepare
from classify.models import find_head, load, load_strict, read_weights
from planes.datasets import Record
from planes.sites import classes_of


@dataclass(frozen=True)
class Extractor:
    """A network whose features are taken, and how it is fed.

    layer: "logits" (the output), or "penultimate" (what enters the last Linear: 2048 pooled
        features in Inception v3)
    name: words for a caption, such as "Inception v3, 1000 logits"
    """

    model: nn.Module
    size: int
    input_range: str
    layer: str
    name: str


def inception(
    weights: str | Path = "imagenet", layer: str = "logits", size: int = 224
) -> Extractor:
    """Inception v3 (Szegedy et al. 2015); the authors' figure takes the 1000 logits of 224-pixel
    images.

    weights: "imagenet" (torchvision's, downloaded once) or a state dict file of torchvision's
    inception_v3 Raises ClassifyError in one line where neither can be had.
    """
    state, source = read_weights("inception_v3", weights)
    # transform_input undoes ImageNet's normalisation: the network itself was trained on [-1, 1].
    model = tv.inception_v3(weights=None, transform_input=True, init_weights=False)
    load_strict(model, state, source)
    width = "1000 logits" if layer == "logits" else "2048 pooled features"
    return Extractor(model.eval(), size, "imagenet", layer, f"Inception v3, {width}")


def classifier(path: str | Path, layer: str = "penultimate") -> Extractor:
    """A classifier that classify.py wrote; needs no download. ClassifyError if `path` is not
    one."""
    model, description = load(path)
    name = f"{description['model']} trained on the planes, {layer} layer"
    return Extractor(model, description["size"], description["input_range"], layer, name)


@torch.no_grad()
def features(extractor: Extractor, records: list[Record], batch_size: int = 32) -> np.ndarray:
    """Features of the records' images, (N, D) float32, on the device where the extractor's model
    is."""
    inputs: list[Tensor] = []
    _, head = find_head(extractor.model)
    hook = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].float().cpu()))
    device = head.weight.device
    logits = []
    try:
        for images, _, _ in batches(
            PlaneImages(records, extractor.size, classes_of(records)), batch_size
        ):
            logits.append(
                extractor.model(prepare(images.to(device), extractor.input_range)).float().cpu()
            )
    finally:
        hook.remove()
    return torch.cat(logits if extractor.layer == "logits" else inputs).numpy()

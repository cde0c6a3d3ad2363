"""Image features: of Inception v3 as the authors used it, or of any classifier of this project."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision.models as tv
from torch import nn

from classify.data import PlaneImages, batches
from classify.models import find_head, load, load_strict, read_weights
from classify.train import outputs
from planes.datasets import Record
from planes.sites import classes_of

BATCH = 32


@dataclass(frozen=True)
class Extractor:
    """A frozen network whose features are taken.

    model: (B, 3, size, size) in the input range -> (B, D) features
    name: words for a caption, such as "Inception v3, 1000 logits"
    """

    model: nn.Module
    size: int
    input_range: str
    name: str


def without_head(model: nn.Module) -> nn.Module:
    """A network that ends in a Linear, up to what enters it."""
    model.set_submodule(find_head(model)[0], nn.Identity())
    return model.eval()


def inception(
    weights: str | Path = "imagenet", layer: str = "logits", size: int = 224
) -> Extractor:
    """Inception v3 (Szegedy et al. 2015); the authors' figure takes the 1000 logits of 224-pixel
    images.

    layer: "logits", or "penultimate": the 2048 pooled features that enter the last Linear
    weights: "imagenet" (torchvision's, downloaded once) or a state dict file of torchvision's
        inception_v3. Raises ClassifyError in one line where neither can be had.
    """
    state, source = read_weights("inception_v3", weights)
    # transform_input undoes ImageNet's normalisation: the network itself was trained on [-1, 1].
    model = tv.inception_v3(weights=None, transform_input=True, init_weights=False)
    load_strict(model, state, source)
    if layer == "logits":
        return Extractor(model.eval(), size, "imagenet", "Inception v3, 1000 logits")
    return Extractor(without_head(model), size, "imagenet", "Inception v3, 2048 pooled features")


def classifier(path: str | Path) -> Extractor:
    """What enters the head of a classifier that classify.py wrote; needs no download. ClassifyError
    if `path` is not one."""
    model, description = load(path)
    name = f"{description['model']} trained here, penultimate layer"
    return Extractor(without_head(model), description["size"], description["input_range"], name)


def features(extractor: Extractor, records: Sequence[Record], workers: int = 0) -> np.ndarray:
    """Features of the records' images, (N, D) float32."""
    images = PlaneImages(records, extractor.size, classes_of(records))
    loader = batches(images, BATCH, workers)
    return outputs(extractor.model, loader, extractor.input_range).cpu().numpy()

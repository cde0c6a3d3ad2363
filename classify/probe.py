"""What a frozen vision model does by itself: a linear probe, logistic regression on its features.

    python classify.py --model probe:facebook/dinov2-base --spanish FETAL_PLANES_ZENODO \\
        --african Zenodo_dataset --out runs/probe

A model is a hub id or a folder that transformers opens, or one of the five classifiers with
--weights. Nothing of it is trained; features are taken once and kept. model.safetensors then holds
the regression, and names the model, whose weights are opened again.
"""

import hashlib
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from classify import ClassifyError
from classify.features import BATCH, Extractor, features, without_head
from classify.images import Say, choose_records
from classify.models import MODELS, PROBE, build, load_strict, one_line
from classify.predict import write_run
from harness.files import sha256_of_all, whole_file
from planes.datasets import Record


class Frozen(nn.Module):
    """A vision model of transformers behind what its image processor makes of pixels: of each
    channel a sum of them all and an offset, such as a mean and a spread.

    (B, 3, size, size) in [0, 1] -> (B, D): the pooled output, or the class token, or the mean over
    the places of a map.
    """

    def __init__(self, vision: nn.Module, processor: Callable[..., Mapping], size: int):
        super().__init__()
        self.vision = vision
        # Whole images, squashed to a square as for the classifiers: cropping would cut off what a
        # scan shows.
        whole = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
        noise = torch.randint(256, (3, size, size), generator=torch.Generator().manual_seed(0))
        made = processor(noise.byte(), **whole)["pixel_values"][0].flatten(1).T.double()
        pixels = F.pad(noise.flatten(1).T.double() / 255, (0, 1), value=1.0)
        mix = torch.linalg.lstsq(pixels, made).solution
        if not torch.allclose(pixels @ mix, made, atol=1e-4):
            raise ValueError("its image processor does more to pixels than to scale them")
        # without the last digits, which other machines compute otherwise
        self.register_buffer("mix", mix.round(decimals=6).float())

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.movedim(1, -1) @ self.mix[:3] + self.mix[3]
        out = self.vision(pixel_values=pixels.movedim(-1, 1))
        found = out.last_hidden_state if out.get("pooler_output") is None else out.pooler_output
        if found.ndim == 4:  # a convolutional network's maps
            return found.flatten(2).mean(dim=2)
        return found[:, 0] if found.ndim == 3 else found


@torch.no_grad()
def open_frozen(name: str, weights: str, size: int, device: str) -> tuple[Extractor, str]:
    """A model by a hub id or folder, or one of MODELS with `weights` at `size` px; and a digest of
    its weights and of what its images go through.

    Raises ClassifyError, one line, for what cannot be opened, is no vision model, lacks weights, or
    gives one image two answers.
    """
    if name in MODELS:
        own = Extractor(without_head(build(name, weights, size)), size, "imagenet", name)
    else:
        try:
            own = _of_transformers(name)
        except Exception as error:  # of the hub, of files, of formats, of a size
            reason = one_line(error) or type(error).__name__
            raise ClassifyError(
                f"probe:{name}: cannot be opened by transformers: {reason}"
            ) from None
    digest = hashlib.sha256(str(own.size).encode())
    for value in own.model.state_dict().values():
        digest.update(value.numpy().tobytes())
    own.model.to(device, memory_format=torch.channels_last)
    return own, digest.hexdigest()


def _of_transformers(name: str) -> Extractor:
    # which take seconds, and the five classifiers do without
    from transformers import AutoImageProcessor, AutoModel, logging

    logging.set_verbosity_error()  # of weights that are missing it is told here
    model, loading = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    vision = getattr(model, "vision_model", model).eval()
    missing = {key for key in loading["missing_keys"] if vision is model or "vision_model" in key}
    if pooler := {key for key in missing if "pooler" in key}:
        vision.pooler = None  # which would be random
    if missing - pooler:
        raise ValueError(f"its files lack {min(missing - pooler)}")
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except OSError:
        raise ValueError("it has no preprocessor_config.json, as vision models have") from None
    side = getattr(processor, "crop_size", None) or processor.size
    size = side.get("height") or side.get("shortest_edge")
    frozen = Frozen(vision, processor, size).eval()
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    if not torch.allclose(frozen(image), frozen(image), atol=1e-4):
        raise ValueError(
            "it gives one image two answers, as a model does that hides parts at random"
        )
    return Extractor(frozen, size, "zero-one", name)


def kept_features(
    extractor: Extractor, digest: str, folder: Path, workers: int, records: Sequence[Record]
) -> np.ndarray:
    """(N, D) float32 features of the records' images, read from `folder` where they are there
    already."""
    hashes = sha256_of_all(record.path for record in records)
    levels = sorted({record.levels for record in records} - {()})
    key = hashlib.sha256(f"{digest} {levels} {hashes}".encode()).hexdigest()
    file = folder / f"{key[:24]}.npy"
    if file.is_file():
        return np.load(file)
    found = features(extractor, records, workers)
    with whole_file(file, shared=True) as part, part.open("wb") as stream:
        np.save(stream, found)
    return found


class Probe(nn.Linear):
    """(B, D) features -> (B, K) logits, in the float64 that scikit-learn computes in."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.double())


@torch.no_grad()
def fit(train: np.ndarray, targets: np.ndarray, classes: int) -> Probe:
    """scikit-learn's logistic regression with its default penalty on standardised features.

    train: (M, D); targets: (M,) class indices, of which some may be missing: their probability is 0
    """
    present = np.unique(targets)
    if len(present) < 2:
        raise ClassifyError("the training images are all of one class; a probe tells two apart")
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(max_iter=10_000).fit(scaler.transform(train), targets)
    weight = model.coef_ / scaler.scale_
    bias = model.intercept_ - weight @ scaler.mean_
    # of two classes scikit-learn has one row, the second's
    rows = np.pad(np.column_stack([weight, bias]), ((1, 0), (0, 0)))[-len(present) :]
    probe = Probe(train.shape[1], classes, dtype=torch.float64)
    probe.weight.zero_()
    probe.bias.fill_(-1e9)
    probe.weight[present] = torch.tensor(rows[:, :-1])
    probe.bias[present] = torch.tensor(rows[:, -1])
    return probe


def reopen(path: Path, description: dict) -> nn.Module:
    """The network of a probe's file, images to logits. Raises ClassifyError where the frozen model
    is no longer to be had, or is another one."""
    name = description["model"].removeprefix(PROBE)
    torch.manual_seed(description["seed"])  # of --weights none
    frozen, digest = open_frozen(name, description["weights"], description["size"], "cpu")
    if digest != description["digest"]:
        raise ClassifyError(f"{path}: {name} is another model than this probe was fitted on")
    state = load_file(path)
    probe = Probe(*reversed(state["weight"].shape), dtype=torch.float64)
    load_strict(probe, state, str(path))
    return nn.Sequential(frozen.model, probe).eval()


@torch.no_grad()
def run_probe(args: Namespace, say: Say) -> dict:
    """classify.py with such a --model: the same files and scores, with a regression for training.
    Raises ClassifyError."""
    if args.augment or args.contrast or args.balanced_sampling:
        raise ClassifyError(
            f"--model {args.model}: is frozen; leave --augment, --contrast, --balanced-sampling out"
        )
    chosen = choose_records(args, say)
    torch.manual_seed(args.seed)
    frozen, digest = open_frozen(
        args.model.removeprefix(PROBE), args.weights, args.size, args.device
    )
    folder = args.features or args.out / "features"
    of = partial(kept_features, frozen, digest, folder, args.workers)
    targets = np.array([chosen.classes.index(record.plane) for record in chosen.training])
    probe = fit(of(chosen.training), targets, len(chosen.classes))
    description = {key: getattr(args, key) for key in ("model", "weights", "seed")}
    description |= {"digest": digest, "size": frozen.size, "input_range": frozen.input_range}
    description |= {"batch_size": BATCH}
    groups = filter(None, (chosen.test, chosen.validation))
    found = [probe(torch.tensor(of(records))).float().softmax(dim=1) for records in groups]
    return write_run(args, chosen, probe, description, found, {args.model: digest}, say)

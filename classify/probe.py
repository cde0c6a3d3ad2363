"""What a frozen vision model does by itself: a linear probe, logistic regression on its features.

    python classify.py --model probe:facebook/dinov2-base --spanish FETAL_PLANES_ZENODO \\
        --african Zenodo_dataset --out runs/probe

A model is a hub id or a folder that transformers opens, or one of the five classifiers with
--weights. Nothing of it is trained; features are taken once and kept.
"""

import hashlib
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from classify import ClassifyError
from classify.features import Extractor, features, of_network
from classify.images import choose_records
from classify.models import MODELS, build, one_line
from classify.predict import write_outcome
from harness.files import sha256_of_all, whole_file, whole_files
from harness.record import record_run
from planes.datasets import Record


def probe_name(model: str) -> str | None:
    """What follows "probe:" in owner/name or a path; None of what is no probe."""
    head, _, name = model.partition(":")
    return name if head == "probe" and name else None


def open_frozen(name: str, weights: str, size: int, device: str) -> tuple[Extractor, str]:
    """A model by a hub id or folder, or one of MODELS with `weights` at `size` px; and a digest of
    its weights and of what its images go through.

    Raises ClassifyError, one line, for what cannot be opened or is no vision model.
    """
    if name in MODELS:
        own = of_network(build(name, weights, size).to(device), size, "imagenet")
        return own, _digest(own.model)
    # which take seconds, and the five classifiers do without
    from transformers import AutoImageProcessor, AutoModel

    try:
        model, loading = AutoModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
        vision = getattr(model, "vision_model", model).eval().to(device)
        if vision.main_input_name != "pixel_values":
            raise ValueError("it is no vision model; give DINOv2, BEiT, CLIP, ..")
        processor = AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # of the hub, of files, of formats
        raise ClassifyError(
            f"probe:{name}: cannot be opened by transformers: {one_line(error)}"
        ) from None
    if any("pooler" in key for key in loading["missing_keys"]):
        vision.pooler = None  # which would be random
    side = getattr(processor, "crop_size", None) or processor.size

    def forward(images: Tensor) -> Tensor:
        # Whole images, squashed to a square as for the classifiers: cropping would cut off what a
        # scan shows.
        whole = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
        out = vision(**processor(images.expand(-1, 3, -1, -1), **whole).to(device))
        found = out.last_hidden_state if out.get("pooler_output") is None else out.pooler_output
        if found.ndim == 4:  # a convolutional network's maps
            return found.flatten(2).mean(dim=2)
        return found[:, 0] if found.ndim == 3 else found

    side = side.get("height") or side.get("shortest_edge")
    return Extractor(vision, forward, side, name), _digest(vision, processor.to_json_string())


def _digest(model: nn.Module, text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for value in model.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def kept_features(
    extractor: Extractor, digest: str, records: Sequence[Record], folder: Path, workers: int
) -> np.ndarray:
    """(N, D) float32 features of the records' images, read from `folder` where they are there
    already."""
    hashes = sha256_of_all(record.path for record in records)
    key = hashlib.sha256(f"{digest} {extractor.size} {hashes}".encode()).hexdigest()
    file = folder / f"{key[:24]}.npy"
    if file.is_file():
        return np.load(file)
    found = features(extractor, records, workers)
    if not np.isfinite(found).all():
        raise ClassifyError("the model's features are not finite; give another")
    with whole_file(file) as part, part.open("wb") as stream:
        np.save(stream, found)
    return found


def linear_probe(
    train: np.ndarray, targets: np.ndarray, test: np.ndarray, classes: int
) -> np.ndarray:
    """(N, classes) probabilities of test images, by scikit-learn's logistic regression with its
    default penalty on standardised features.

    train, test: (M, D), (N, D); targets: (M,) class indices, of which some may be missing
    """
    if len(np.unique(targets)) < 2:
        raise ClassifyError("the training images are all of one class; a probe tells two apart")
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    found = np.zeros((len(test), classes))
    found[:, np.unique(targets)] = model.fit(train, targets).predict_proba(test)
    return found


def run_probe(args: Namespace, say: Callable[[str], object]) -> dict:
    """classify.py with such a --model: the same tables and scores, without training. Raises
    ClassifyError."""
    if args.augment or args.contrast or args.balanced_sampling:
        raise ClassifyError(
            f"--model {args.model}: is frozen; leave --augment, --contrast, --balanced-sampling out"
        )
    chosen = choose_records(args, say)
    frozen = open_frozen(probe_name(args.model), args.weights, args.size, args.device)
    folder = args.features or args.out / "features"
    train, test = (
        kept_features(*frozen, records, folder, args.workers)
        for records in (chosen.training, chosen.test)
    )
    targets = np.array([chosen.classes.index(record.plane) for record in chosen.training])
    probabilities = linear_probe(train, targets, test, len(chosen.classes))
    with whole_files(args.out) as part:
        result = write_outcome(part, chosen, probabilities, args.model)
    record_run(args.out, args, {args.model: frozen[1]})
    accuracy = result["scores"]["notebook"]["accuracy"]
    say(f"{args.model}: accuracy {100 * accuracy:.2f} on {len(test)} images")
    return result

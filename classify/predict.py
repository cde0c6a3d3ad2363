"""A trained classifier at work: what it takes a folder's images for, how sure it is, and itself as
ONNX."""

import json
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from classify import ClassifyError
from classify.data import INPUT_RANGES, PlaneImages, batches
from classify.images import Chosen
from classify.models import load
from classify.train import predict
from eval.figures import contact_sheet
from eval.figures import save as save_figure
from eval.metrics import evaluate
from harness.files import TYPES, images_of, sha256, whole_files, write_table
from harness.record import record_run
from planes.datasets import Record, count, require_images
from planes.pictures import open_image

LEAST_SURE = 20  # thumbnails
OPSET = 18
CLOSE = 1e-4  # of the probabilities of ONNX and torch


def outcome(
    chosen: Chosen,
    copies: set[Record],
    targets: Sequence[int],
    probabilities: np.ndarray,
    training: dict,
) -> tuple[dict, list[dict]]:
    """(what metrics.json says, the rows of predictions.csv).

    copies: test images that are byte for byte in training, without which there are scores too
    targets: (N,) class indices of the test images; probabilities: (N, K); training: how many images
        of what
    """
    test, classes = chosen.test, chosen.classes
    targets, patients = np.array(targets), np.array([record.patient for record in test])
    result = evaluate(targets, probabilities, patients)
    result |= {
        "test": count(test, classes) | {"copies_of_training": len(copies)},
        "training": training,
    }
    if copies:
        distinct = np.array([record not in copies for record in test])
        result["without_copies"] = evaluate(
            targets[distinct], probabilities[distinct], patients[distinct]
        )
    rows = []
    for record, p in zip(test, probabilities):
        row = {
            "image": record.name,
            "patient": record.patient,
            "center": record.center,
            "target": record.plane,
        }
        row |= {"prediction": classes[p.argmax()], "copy": int(record in chosen.twice)}
        rows.append(row | {name: f"{value:.6f}" for name, value in zip(classes, p)})
    return result, rows


def temperature(probabilities: Tensor, targets: Tensor) -> float:
    """The T that makes softmax(logits / T) likeliest on images that were not trained on (Guo et al.
    2017, section 4.2).

    probabilities: (N, K), of which the logarithms are logits; targets: (N,) class indices

    The likelihood has one maximum in 1 / T, which is found by halving between 1/20 and 20; never
    beyond.
    """
    logits, rows = probabilities.double().clamp(min=1e-30).log(), torch.arange(len(targets))

    def slope(beta: float) -> float:
        """Of the mean log-likelihood, by beta = 1 / T."""
        expected = (torch.softmax(beta * logits, dim=1) * logits).sum(dim=1)
        return (logits[rows, targets] - expected).mean().item()

    low, high = 1 / 20, 20.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 1 / middle


def use(args: Namespace, say: Callable[[str], object]) -> None:
    """--predict and --export of classify.py. Raises ClassifyError, DatasetError."""
    model, description = load(args.classifier)
    if args.predict is not None:
        # as it was tested: another order has other last bits
        model.to(args.device, memory_format=torch.channels_last)
        rows, sheet = predict_folder(model, description, args.predict, args.workers)
        with whole_files(args.out) as part:
            write_table(part / "predictions.csv", rows)
            save_figure(sheet, part / "least_sure.png")
        say(
            f"{len(rows)} images of {args.predict}: {args.out / 'predictions.csv'}; the least sure:"
            " least_sure.png"
        )
    if args.export:
        path, seconds, difference = export(model.cpu(), description, args.out)
        checked = "not checked: onnxruntime is not installed"
        if difference is not None:
            checked = (
                f"{seconds:.3f} s an image by onnxruntime on one core, {difference:.1e} from"
                " torch's probabilities"
            )
        say(f"{path}: {path.stat().st_size / 1e6:.1f} MB; {checked}")
    record_run(args.out, args, {str(args.classifier): sha256(args.classifier)})


def predict_folder(model: nn.Module, description: dict, folder: Path, workers: int):
    """(a row for each image in a folder and below it, in the order of their paths; a figure of the
    least sure ones).

    A row has the image's path, the likeliest class, the confidence in it and the probability of
    each class, as testing computes it. The confidence is that probability, or where the run had
    validation images what they make of it (`temperature`).
    """
    if not folder.is_dir():
        raise ClassifyError(
            f"{folder}: no such folder; --predict takes one with images in it or below it"
        )
    paths = images_of(folder, below=True)
    if not paths:
        raise ClassifyError(f"{folder}: no images in it or below it ({', '.join(TYPES)})")
    classes = description["classes"]
    # of no class that is known
    records = [Record(path, classes[0], str(path), False, "target", "") for path in paths]
    require_images(records)
    loader = batches(
        PlaneImages(records, description["size"], classes), description["batch_size"], workers
    )
    # as it was tested
    dtype = torch.bfloat16 if description.get("dtype") == "bf16" else torch.float32
    probabilities = predict(model, loader, description["input_range"], dtype)
    sure = (
        probabilities.double().clamp(min=1e-30).log() / description.get("temperature", 1.0)
    ).softmax(dim=1)
    sure = sure.max(dim=1).values.numpy()
    rows = [
        {
            "image": path.relative_to(folder).as_posix(),
            "prediction": classes[p.argmax()],
            "confidence": f"{c:.6f}",
        }
        | {name: f"{value:.6f}" for name, value in zip(classes, p)}
        for path, p, c in zip(paths, probabilities.numpy(), sure)
    ]
    least = np.argsort(sure, kind="stable")[:LEAST_SURE]
    cells = [
        open_image(paths[n]).convert("L").resize((128, 128), Image.Resampling.BILINEAR)
        for n in least
    ]
    titles = [f"{rows[n]['prediction']} {100 * sure[n]:.0f} %" for n in least]
    return rows, contact_sheet([cells], column_labels=titles)


class _Exported(nn.Module):
    """(B, 3, size, size) float32 in [0, 1] -> (B, K) probabilities; the input range is a part of
    it."""

    def __init__(self, model: nn.Module, input_range: str):
        super().__init__()
        self.model = model
        mean, std = INPUT_RANGES[input_range]
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std).softmax(dim=1)


@torch.no_grad()
def export(model: nn.Module, description: dict, out: Path) -> tuple[Path, float, float | None]:
    """Writes out/model.onnx; returns it, seconds an image and the largest difference from torch's
    probabilities, which is None where onnxruntime is not there to tell.

    Its metadata say what feeds it: the classes, and the side in px that a whole image is squashed
    to. Raises ClassifyError without the package onnx, and where the two differ by more than CLOSE;
    nothing is written then.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401, which torch's exporter is made of
    except ImportError as error:
        raise ClassifyError(f"--export: {error}; pip install onnx onnxscript onnxruntime") from None
    whole, size = _Exported(model.eval(), description["input_range"]).eval(), description["size"]
    example = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with whole_files(out) as part:
        file = part / "model.onnx"
        torch.onnx.export(
            whole,
            (example,),
            file,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
        written = onnx.load(file)
        facts = {
            "classes": description["classes"],
            "size": size,
            "images": "RGB in [0, 1], squashed to size x size",
        }
        onnx.helper.set_model_props(
            written, {key: json.dumps(value) for key, value in facts.items()}
        )
        onnx.save(written, file)
        seconds, difference = _try(file, example, whole(example))
        if difference is not None and not difference <= CLOSE:
            raise ClassifyError(
                f"--export: onnxruntime's probabilities differ from torch's by {difference:.1e}"
            )
    return out / "model.onnx", seconds, difference


def _try(file: Path, images: Tensor, expected: Tensor) -> tuple[float, float | None]:
    """Seconds an image on one core, and the largest difference; (0, None) without onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return 0.0, None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    start = time.perf_counter()
    session.run(None, {"images": images[:1].numpy()})
    return time.perf_counter() - start, float(np.abs(found - expected.numpy()).max())

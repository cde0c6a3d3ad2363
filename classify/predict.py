"""A trained classifier at work: scores of the test images, what it takes a folder's images for, how
sure it is, and itself as ONNX."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from classify import ClassifyError
from classify.data import PlaneImages, batches, normalise
from classify.images import Chosen
from classify.models import load
from classify.train import predict
from eval.figures import confusion_figure, contact_sheet
from eval.figures import save as save_figure
from eval.metrics import evaluate
from harness.files import TYPES, json_text, sha256, walk, whole_files, write_table
from harness.record import record_run
from planes.datasets import Record, count
from planes.pictures import open_image

LEAST_SURE = 20  # thumbnails
OPSET = 18
CLOSE = 1e-4  # of the probabilities of ONNX and torch


def write_outcome(folder: Path, chosen: Chosen, probabilities: np.ndarray, model: str) -> dict:
    """Writes metrics.json, predictions.csv and confusion.png of the test images; returns the first.

    probabilities: (N, K); model: its name
    Without test images that are byte for byte in training there are scores too.
    """
    test, classes, copies = chosen.test, chosen.classes, chosen.copies
    targets = np.array([classes.index(record.plane) for record in test])
    patients = np.array([record.patient for record in test])
    result = evaluate(targets, probabilities, patients)
    result["test"] = count(test, classes) | {"copies_of_training": len(copies)}
    result["training"] = count(chosen.training, classes)
    distinct = np.array([record not in copies for record in test])
    if copies and distinct.any():
        without = targets[distinct], probabilities[distinct], patients[distinct]
        result["without_copies"] = evaluate(*without)
    rows = [
        {
            "image": record.name,
            "patient": record.patient,
            "center": record.center,
            "target": record.plane,
            "prediction": classes[p.argmax()],
            "copy": int(record in chosen.twice),
        }
        | _columns(classes, p)
        for record, p in zip(test, probabilities)
    ]
    write_table(folder / "predictions.csv", rows)
    (folder / "metrics.json").write_text(json_text(result), encoding="utf-8")
    matrices = {("", f"{len(test)} test images, {model}"): np.array(result["confusion"])}
    save_figure(confusion_figure(matrices, classes), folder / "confusion.png")
    return result


def _columns(classes: tuple[str, ...], probabilities: np.ndarray) -> dict[str, str]:
    return {name: f"{value:.6f}" for name, value in zip(classes, probabilities)}


def temperature(probabilities: Tensor, targets: Tensor) -> float:
    """The T that makes softmax(logits / T) likeliest on images that were not trained on (Guo et al.
    2017, section 4.2).

    probabilities: (N, K), of which the logarithms are logits; targets: (N,) class indices

    The likelihood has one maximum in 1 / T, which is found by halving between 1/20 and 20; never
    beyond.
    """
    logits, rows = _logits(probabilities), torch.arange(len(targets))

    def slope(beta: float) -> float:
        """Of the mean log-likelihood, by beta = 1 / T."""
        expected = (torch.softmax(beta * logits, dim=1) * logits).sum(dim=1)
        return (logits[rows, targets] - expected).mean().item()

    low, high = 1 / 20, 20.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 1 / middle


def _logits(probabilities: Tensor) -> Tensor:
    return probabilities.double().clamp(min=1e-30).log()


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
        say(f"{len(rows)} images of {args.predict}: {args.out / 'predictions.csv'}, least_sure.png")
    if args.export:
        export(model.cpu(), description, args.out)
        say(f"{args.out / 'model.onnx'}: onnxruntime's probabilities are torch's within {CLOSE}")
    record_run(args.out, args, {str(args.classifier): sha256(args.classifier)})


def predict_folder(model: nn.Module, description: dict, folder: Path, workers: int):
    """(a row for each image in a folder and below it, in the order of their paths; a figure of the
    least sure ones).

    A row has the image's path, the likeliest class, the confidence in it and the probability of
    each class, as testing computes it. The confidence is that probability, or where the run had
    validation images what they make of it (`temperature`).
    """
    paths = walk(folder).images if folder.is_dir() else []
    if not paths:
        raise ClassifyError(f"--predict {folder}: no folder with images ({', '.join(TYPES)}) in it")
    classes = description["classes"]
    # of no class that is known
    records = [Record(path, classes[0], str(path), False, "target", "") for path in paths]
    images = PlaneImages(records, description["size"], classes)
    loader = batches(images, description["batch_size"], workers)
    # as it was tested
    dtype = torch.bfloat16 if description.get("dtype") == "bf16" else torch.float32
    probabilities = predict(model, loader, description["input_range"], dtype)
    tempered = (_logits(probabilities) / description.get("temperature", 1.0)).softmax(dim=1)
    confidence = tempered.max(dim=1).values.numpy()
    rows = [
        {
            "image": path.relative_to(folder).as_posix(),
            "prediction": classes[p.argmax()],
            "confidence": f"{sure:.6f}",
        }
        | _columns(classes, p)
        for path, p, sure in zip(paths, probabilities.numpy(), confidence)
    ]
    cells, titles = [], []
    for n in np.argsort(confidence, kind="stable")[:LEAST_SURE]:
        cells.append(open_image(paths[n]).resize((128, 128), Image.Resampling.BILINEAR))
        titles.append(f"{rows[n]['prediction']} {100 * confidence[n]:.0f} %")
    return rows, contact_sheet([cells], column_labels=titles)


class _Exported(nn.Module):
    """(B, 3, size, size) float32 in [0, 1] -> (B, K) probabilities; the input range is a part of
    it."""

    def __init__(self, model: nn.Module, input_range: str):
        super().__init__()
        self.model, self.input_range = model, input_range

    def forward(self, images: Tensor) -> Tensor:
        return self.model(normalise(images, self.input_range)).softmax(dim=1)


@torch.no_grad()
def export(model: nn.Module, description: dict, out: Path) -> None:
    """Writes out/model.onnx, whose metadata say what feeds it: the classes, and the side in px that
    a whole image is squashed to.

    Raises ClassifyError without its packages, and where onnxruntime's probabilities differ from
    torch's by more than CLOSE; nothing is written then.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, which torch's exporter is made of
    except ImportError as error:
        raise ClassifyError(f"--export: {error}; pip install onnx onnxscript onnxruntime") from None
    whole, size = _Exported(model, description["input_range"]).eval(), description["size"]
    example = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(
        whole,
        (example,),
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=OPSET,
        verbose=False,
    )
    squashed = "RGB in [0, 1], squashed to size x size"
    facts = {"classes": description["classes"], "size": size, "images": squashed}
    program.model.metadata_props.update({key: json.dumps(fact) for key, fact in facts.items()})
    with whole_files(out) as part:
        program.save(part / "model.onnx")
        session = onnxruntime.InferenceSession(part / "model.onnx")
        (found,) = session.run(None, {"images": example.numpy()})
        difference = np.abs(found - whole(example).numpy()).max()
        if not difference <= CLOSE:
            raise ClassifyError(f"--export: onnxruntime differs from torch by {difference:.1e}")

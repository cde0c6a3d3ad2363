"""A trained classifier at work: scores of the test images, what it takes a folder's images for, how
sure it is, and itself as ONNX."""

import json
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from classify import ClassifyError
from classify.data import PlaneImages, batches, normalise
from classify.images import Chosen, Say
from classify.models import load, save
from classify.train import predict
from eval.figures import confusion_figure, labelled_sheet
from eval.figures import save as save_figure
from eval.metrics import evaluate
from harness.files import TYPES, json_text, left_out, sha256, walk, whole_files, write_table
from harness.record import record_run
from planes.datasets import Record, count
from planes.pictures import open_image

LEAST_SURE = 20  # thumbnails
ONE_CLASS = 0.9  # the share of the test images from which on it is told
SPREAD = 0.5  # of log T, before any image is seen; chosen on phantoms of site C
ONNX, OPSET = "model.onnx", 18
CLOSE = 1e-4  # of what ONNX and torch say
FACTS = "classes", "size", "temperature", "validation", "levels"  # its metadata, where it has them
IMAGES = (
    "RGB, float32 in [0, 1], (batch, 3, size, size): the whole image, upright, grey as three equal"
    " channels, squashed to size x size in 8 bits by a bilinear filter with antialiasing (Pillow's"
    " resize with BILINEAR)"
)


def write_run(
    args: Namespace,
    chosen: Chosen,
    network: nn.Module,
    description: dict,
    found: Sequence[Tensor],
    inputs: dict[str, str],
    say: Say,
    history: Sequence[dict] = (),
) -> dict:
    """Writes what a run leaves, whole files or none: model.safetensors, metrics.json, which it
    returns, predictions.csv, confusion.png, train.csv of `history`, and args.json.

    description: what `load` needs of the network; how sure it is, set right on images that it was
        not trained on, is added (`temperature`)
    found: probabilities of the test images, (N, K), and of the validation images if there are any
    inputs: of record_run
    say: is told the scores, and where nearly all images are taken for one class

    Without test images that are byte for byte in training there are scores too, and of the paper's
    datasets the notebook's.
    """
    classes, copies, test = chosen.classes, chosen.copies, found[0].numpy()

    def scores(records: Sequence[Record], probabilities: np.ndarray) -> dict:
        targets = np.array([classes.index(record.plane) for record in records])
        patients = [record.patient for record in records]
        return evaluate(targets, probabilities, patients, classes, bool(args.african))

    result = scores(chosen.test, test)
    result["test"] = count(chosen.test, classes) | {"copies_of_training": len(copies)}
    result["training"] = description["training"] = count(chosen.training, classes)
    for held_out in found[1:]:
        result["validation"] = scores(chosen.validation, held_out.numpy())
        answers = [classes.index(record.plane) for record in chosen.validation]
        warmth = temperature(held_out, torch.tensor(answers))
        description |= {"temperature": warmth, "validation": len(answers)}
        say(f"confidence has temperature {warmth:.3g}, set on {len(answers)} validation images")
    if levels := next((r.levels for r in (*chosen.test, *chosen.training) if r.levels), ()):
        description["levels"] = levels
    distinct = [n for n, record in enumerate(chosen.test) if record not in copies]
    if copies and distinct:
        records = [chosen.test[n] for n in distinct]
        result["without_copies"] = scores(records, test[distinct])
    matrix = np.array(result["confusion"])
    said, most = matrix.sum(axis=0), ONE_CLASS * len(test)
    if said.max() >= most > matrix.sum(axis=1).max():
        name = classes[said.argmax()]
        say(f"warning: {said.max()} of {len(test)} test images are taken for {name}")
    matrices = {("", f"{len(test)} test images, {args.model}"): matrix}
    with whole_files(args.out) as part:
        write_table(part / "predictions.csv", _said(chosen, test))
        (part / "metrics.json").write_text(json_text(result), encoding="utf-8")
        save_figure(confusion_figure(matrices, classes), part / "confusion.png")
        save(part / "model.safetensors", network, description, classes)
        if history:
            write_table(part / "train.csv", history)
    record_run(args.out, args, inputs)
    main = next(iter(result["scores"].values()))
    line = "  ".join(f"{key} {100 * value:.2f}" for key, value in main.items())
    say(f"{line}  on {len(test)} images of {args.target or args.african}")
    return result


def _said(chosen: Chosen, probabilities: np.ndarray) -> list[dict]:
    """What each test image is, and is taken for."""
    return [
        {
            "image": record.name,
            "patient": record.patient,
            "center": record.center,
            "target": record.plane,
            "prediction": chosen.classes[p.argmax()],
            "copy": int(record in chosen.twice),
        }
        | _columns(chosen.classes, p)
        for record, p in zip(chosen.test, probabilities)
    ]


def _columns(classes: tuple[str, ...], probabilities: np.ndarray) -> dict[str, str]:
    return {name: f"{value:.6f}" for name, value in zip(classes, probabilities)}


def temperature(probabilities: Tensor, targets: Tensor) -> float:
    """The T that softmax(logits / T) most probably has, by images that were not trained on (Guo et
    al. 2017, section 4.2): log T is normal around 0, with the standard deviation SPREAD. At least 1
    where all images are right, since nothing says then that the network is too modest.

    probabilities: (N, K), of which the logarithms are logits; targets: (N,) class indices
    """
    logits = _logits(probabilities)

    def loss(log_t: float) -> float:
        likelihood = -F.cross_entropy(logits / math.exp(log_t), targets, reduction="sum").item()
        return (log_t / SPREAD) ** 2 / 2 - likelihood

    right = (probabilities.argmax(dim=1) == targets).all()
    return math.exp(minimize_scalar(loss, bounds=(0.0 if right else -3.0, 3.0)).x)


def _logits(probabilities: Tensor) -> Tensor:
    return probabilities.double().clamp(min=1e-30).log()


def _confidence(probabilities: Tensor, description: dict) -> Tensor:
    """(N, K) -> (N,): that of the likeliest class, as the temperature has it."""
    tempered = (_logits(probabilities) / description.get("temperature", 1.0)).softmax(dim=1)
    return tempered.amax(dim=1).float()


def use(args: Namespace, say: Say) -> None:
    """--predict and --export of classify.py. Raises ClassifyError, DatasetError, OSError."""
    if args.predict and args.out.resolve() == args.predict.resolve():
        raise ClassifyError(f"--out {args.out}: is the folder that --predict reads; give another")
    model, description = load(args.classifier)
    if args.predict is not None:
        # as it was tested: another order has other last bits
        model.to(args.device, memory_format=torch.channels_last)
        predict_folder(model, description, args, say)
    if args.export:
        export(model.cpu(), description, args.out)
        say(f"{args.out / ONNX}: says what --predict says, within {CLOSE}")
    record_run(args.out, args, {str(args.classifier): sha256(args.classifier)})


def predict_folder(model: nn.Module, description: dict, args: Namespace, say: Say) -> None:
    """Writes predictions.csv, a row for each image in a folder and below it, in the order of their
    paths, and least_sure.png.

    A row has the image's path, the likeliest class, the confidence in it and the probability of
    each class, in float32 as ONNX has it. The confidence is that probability, or where the run had
    validation images what they make of it (`temperature`).
    """
    folder = args.predict
    paths, others = walk(folder) if folder.is_dir() else ([], [])
    if not paths:
        raise ClassifyError(f"--predict {folder}: no folder with images ({', '.join(TYPES)}) in it")
    if line := left_out(folder, others):
        say(line)
    if levels := description.get("levels", ()):
        ends = "{:g}..{:g}".format(*levels)
        say(f"images of more than 8 bits are scaled from {ends} to 0..255, as in the test")
    sure = "its confidence was never checked: the run had no validation images"
    if count := description.get("validation"):
        sure = f"its confidence was set on {count} images of its own site; elsewhere it may be off"
    say(sure)
    classes = description["classes"]
    # of no class that is known
    about = classes[0], "", False, "target", "", levels
    images = PlaneImages([Record(path, *about) for path in paths], description["size"], classes)
    loader = batches(images, description["batch_size"], args.workers)
    probabilities = predict(model, loader, description["input_range"])
    confidence = _confidence(probabilities, description).numpy()
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
        cells.append(open_image(paths[n], levels).resize((128, 128), Image.Resampling.BILINEAR))
        titles.append(f"{rows[n]['prediction']} {100 * confidence[n]:.0f} %")
    with whole_files(args.out) as part:
        write_table(part / "predictions.csv", rows)
        save_figure(labelled_sheet(cells, titles), part / "least_sure.png")
    say(f"{len(rows)} images of {folder}: {args.out / 'predictions.csv'}, least_sure.png")


class _Exported(nn.Module):
    """(B, 3, size, size) float32 in [0, 1] -> (B, K) probabilities and (B,) confidence; input range
    and temperature are a part of it."""

    def __init__(self, model: nn.Module, description: dict):
        super().__init__()
        self.model, self.description = model, description

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(normalise(images, self.description["input_range"]))
        probabilities = logits.float().softmax(dim=1)
        return probabilities, _confidence(probabilities, self.description)


@torch.no_grad()
def export(model: nn.Module, description: dict, out: Path) -> None:
    """Writes out/model.onnx, whose metadata say what feeds it: the classes, the side in px, how a
    whole image becomes a square of it.

    Raises ClassifyError without its packages, and where onnxruntime's probabilities or confidence
    differ from torch's by more than CLOSE; nothing is written then.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, which torch's exporter is made of
    except ImportError as error:
        raise ClassifyError(f"--export: {error}; pip install onnx onnxscript onnxruntime") from None
    whole, size = _Exported(model, description).eval(), description["size"]
    example = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(
        whole,
        (example,),
        input_names=["images"],
        output_names=["probabilities", "confidence"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=OPSET,
        verbose=False,
    )
    facts = {key: description[key] for key in FACTS if key in description} | {"images": IMAGES}
    program.model.metadata_props.update({key: json.dumps(fact) for key, fact in facts.items()})
    with whole_files(out) as part:
        program.save(part / ONNX)
        session = onnxruntime.InferenceSession(part / ONNX)
        pairs = zip(session.run(None, {"images": example.numpy()}), whole(example))
        difference = max(np.abs(found - expected.numpy()).max() for found, expected in pairs)
        if not difference <= CLOSE:
            raise ClassifyError(f"--export: onnxruntime differs from torch by {difference:.1e}")

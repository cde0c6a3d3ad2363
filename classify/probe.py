"""What a frozen vision model does by itself: a linear probe, k nearest neighbours, or the prompts
it was trained with.

    python classify.py --model probe:facebook/dinov2-base --spanish FETAL_PLANES_ZENODO --african Zenodo_dataset --out p

probe: logistic regression on its features; knn: the nearest training images; prompts: no training
at all, the text nearest to an image, by a model with a text tower such as CLIP. A model is a hub id
or a folder that transformers opens, or one of the five classifiers with --weights. Nothing of it is
trained; features are taken once and kept.
"""

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from classify import ClassifyError
from classify.data import INPUT_RANGES, PlaneImages, batches, prepare
from classify.images import Chosen, choose_records, find_copies
from classify.models import MODELS, build, find_head
from classify.predict import outcome
from eval.figures import confusion_figure
from eval.figures import save as save_figure
from harness.files import json_text, sha256, whole_file, whole_files, write_table
from harness.record import record_run
from planes import PROMPTS
from planes.datasets import Record, count
from planes.sites import prompts_of

HEADS = ("probe", "knn", "prompts")
NEIGHBOURS = 20
BATCH = 32
# ImageNet's mean and spread: what most models were trained on
NORMAL = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Tower:
    """A frozen vision model.

    forward: (B, 3, size, size) normalised -> (B, D) features
    name: words for a table; digest: of its weights, so that kept features are nobody else's
    texts: prompts -> (K, D) in the images' space, where there is a text tower; scale: of their
        cosines
    """

    forward: Callable[[Tensor], Tensor]
    size: int
    normal: tuple[Sequence[float], Sequence[float]]
    name: str
    digest: str
    texts: Callable[[Sequence[str]], Tensor] | None = None
    scale: float = 1.0


def parts(model: str) -> tuple[str, str]:
    """("probe", "owner/name") of "probe:owner/name"; ("", model) of what is none."""
    head, colon, name = model.partition(":")
    return (head, name) if colon and head in HEADS and name else ("", model)


def open_tower(
    name: str, weights: str, size: int, device: torch.device, *, with_text: bool = False
) -> Tower:
    """A model by a hub id or folder, or one of MODELS with `weights` at `size` px.

    with_text: the images' features are to lie where its texts do. Raises ClassifyError, one line,
    for what cannot be opened, is no vision model, or has no text tower where one is asked for.
    """
    if name in MODELS:
        if with_text:
            raise ClassifyError(f"prompts:{name}: has no text tower; give a CLIP")
        return _own(name, weights, size, device)
    from transformers import AutoConfig, AutoModel  # seconds, which the five classifiers do without

    source = {"local_files_only": True} if Path(name).exists() else {}
    try:
        config = AutoConfig.from_pretrained(name, **source)
        model = AutoModel.from_pretrained(name, dtype=torch.float32, **source).eval().to(device)
    except Exception as error:  # of the hub, of files, of formats
        reason = " ".join(str(error).split())[:200]
        raise ClassifyError(
            f"{name}: cannot be opened by transformers ({reason}); give its folder or hub id"
        ) from None
    vision = getattr(model, "vision_model", model)
    if getattr(vision, "main_input_name", "") != "pixel_values":
        kind = getattr(config, "model_type", type(model).__name__)
        raise ClassifyError(
            f"{name}: {kind} is no vision model; give one that takes images: DINOv2, BEiT, CLIP, .."
        )
    model.requires_grad_(False)
    own = getattr(config, "vision_config", config)
    side, normal = _preprocessing(name, getattr(own, "image_size", None) or 224)
    texts = _texts(name, model, device, source) if with_text else None

    def forward(images: Tensor) -> Tensor:
        if with_text:
            return _plain(model.get_image_features(pixel_values=images))
        out = vision(pixel_values=images)
        pooled = getattr(out, "pooler_output", None)
        features = out.last_hidden_state if pooled is None else pooled
        if features.ndim == 4:  # a convolutional network's maps
            return features.flatten(2).mean(dim=2)
        return features[:, 0] if features.ndim == 3 else features

    scale = float(model.logit_scale.exp()) if hasattr(model, "logit_scale") else 1.0
    label = Path(name).name if Path(name).exists() else name
    return Tower(forward, side, normal, label, _digest(model), texts, scale)


def _own(name: str, weights: str, size: int, device: torch.device) -> Tower:
    model = build(name, weights, size).eval().to(device)
    path, _ = find_head(model)
    model.set_submodule(path, nn.Identity())
    return Tower(model, size, INPUT_RANGES["imagenet"], name, _digest(model))


def _preprocessing(name: str, side: int) -> tuple[int, tuple[Sequence[float], Sequence[float]]]:
    """Side in px and normalisation, as the model's own preprocessor_config.json has them where
    there is one.

    Whole images are squashed to a square, as for the classifiers: cropping would cut off what a
    scan shows.
    """
    from transformers.utils import cached_file

    try:
        file = cached_file(
            name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False
        )
        said = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        said = {}
    sizes = [said.get("crop_size"), said.get("size")]
    sizes = [s.get("height", s.get("shortest_edge")) if isinstance(s, dict) else s for s in sizes]
    side = next(
        (s for s in sizes if isinstance(s, int)), side if isinstance(side, int) else side[0]
    )
    return side, (said.get("image_mean") or NORMAL[0], said.get("image_std") or NORMAL[1])


def _texts(
    name: str, model: nn.Module, device: torch.device, source: dict
) -> Callable[[Sequence[str]], Tensor]:
    from transformers import AutoTokenizer

    if not hasattr(model, "get_text_features"):
        raise ClassifyError(f"prompts:{name}: has no text tower; give a CLIP")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    except Exception as error:  # a file is missing or broken
        reason = " ".join(str(error).split())[:200]
        raise ClassifyError(f"prompts:{name}: its tokenizer cannot be opened ({reason})") from None

    def texts(prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(prompts), padding=True, return_tensors="pt").to(device)
        return _plain(
            model.get_text_features(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
        )

    return texts


def _plain(features: object) -> Tensor:
    """The vectors of what transformers returns: a tensor, or since 5 an output that holds them."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(
            value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


@torch.no_grad()
def features(
    tower: Tower, records: Sequence[Record], kept: Path, device: torch.device, workers: int
) -> np.ndarray:
    """(N, D) float32 features of the records' images, read from the folder `kept` where they are
    there already."""
    hashes = "".join(sha256(record.path) for record in records)
    file = (
        kept
        / f"{hashlib.sha256(f'{tower.digest}{tower.size}{tower.normal}{hashes}'.encode()).hexdigest()[:24]}.npy"
    )
    if file.is_file():
        return np.load(file)
    images = PlaneImages(
        records, tower.size, tuple(dict.fromkeys(record.plane for record in records))
    )
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in tower.normal)
    found = [
        tower.forward((prepare(pixels.to(device), "zero-one") - mean) / std).float()
        for pixels, _, _ in batches(images, BATCH, workers)
    ]
    found = torch.cat(found).cpu().numpy()
    if not np.isfinite(found).all():
        raise ClassifyError(f"{tower.name}: its features are not finite; give another model")
    with whole_file(file) as part, part.open("wb") as stream:
        np.save(stream, found)
    return found


def fit(
    head: str, train: np.ndarray, targets: np.ndarray, classes: int
) -> Callable[[np.ndarray], np.ndarray]:
    """(N, D) features -> (N, classes) probabilities, by scikit-learn: "probe", logistic regression
    on standardised features with its default penalty; "knn", the NEIGHBOURS nearest by cosine, each
    weighing by its nearness."""
    if head == "probe":
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    else:
        model = KNeighborsClassifier(
            min(NEIGHBOURS, len(train)), metric="cosine", weights="distance"
        )
    if len(np.unique(targets)) < 2:
        raise ClassifyError("the training images are all of one class; a probe tells two apart")
    model.fit(train, targets)

    def probabilities(rows: np.ndarray) -> np.ndarray:
        found = np.zeros((len(rows), classes))
        found[:, model.classes_] = model.predict_proba(rows)
        return found

    return probabilities


def by_prompts(tower: Tower, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """(N, K) softmax of the scaled cosines between images and texts (Radford et al. 2021, figure
    3)."""
    with torch.no_grad():
        texts = torch.nn.functional.normalize(tower.texts(prompts).float().cpu(), dim=1)
    cosines = torch.nn.functional.normalize(torch.from_numpy(images), dim=1) @ texts.T
    return (tower.scale * cosines).softmax(dim=1).numpy()


def run_probe(args: Namespace, say: Callable[[str], object]) -> dict:
    """classify.py with such a --model: the same tables and scores, without training. Raises
    ClassifyError."""
    if args.augment or args.contrast or args.balanced_sampling:
        raise ClassifyError(
            f"--model {args.model}: is frozen; leave --augment, --contrast and"
            " --balanced-sampling out"
        )
    head, name = parts(args.model)
    chosen: Chosen = choose_records(args, say)
    copies, device = find_copies(chosen.training, chosen.test, say), torch.device(args.device)
    tower = open_tower(name, args.weights, args.size, device, with_text=head == "prompts")
    kept, counts = args.features or args.out / "features", count(chosen.training, chosen.classes)
    test = features(tower, chosen.test, kept, device, args.workers)
    if head == "prompts":
        prompts = PROMPTS if args.african else prompts_of(chosen.classes, args.prompt_template)
        probabilities = by_prompts(tower, test, [prompts[name] for name in chosen.classes])
    else:
        targets = np.array([chosen.classes.index(record.plane) for record in chosen.training])
        train = features(tower, chosen.training, kept, device, args.workers)
        probabilities = fit(head, train, targets, len(chosen.classes))(test)
    of_test = [chosen.classes.index(record.plane) for record in chosen.test]
    result, predictions = outcome(chosen, copies, of_test, probabilities, counts)
    with whole_files(args.out) as part:
        write_table(part / "predictions.csv", predictions)
        (part / "metrics.json").write_text(json_text(result), encoding="utf-8")
        title = f"{len(chosen.test)} test images, {head} of {tower.name}"
        save_figure(
            confusion_figure(np.array(result["confusion"]), chosen.classes, title),
            part / "confusion.png",
        )
    record_run(args.out, args, {tower.name: tower.digest})
    say(
        f"{args.model}: accuracy {100 * result['scores']['notebook']['accuracy']:.2f} on"
        f" {len(chosen.test)} images"
    )
    return result

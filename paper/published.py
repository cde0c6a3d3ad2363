"""What the paper printed (Wang et al. 2024, arXiv 2407.20072), as data, and where its authors' code
parts from it.

TABLE_1 is its zero-shot table, all twenty rows, as the repository (github.com/13204942/FU-LoRA)
stores it in a file. TABLE_2 is in the paper alone. Its HB, called HB-all here and in plan.py, is
trained on 6148 real images, not on table 1's 1150, although the paper's section 4 says of it "using
1150 Spanish images". All five of its numbers are those that the authors' committed notebook prints
for ViT on 6148 real and 5000 synthetic images with augmentation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.metrics import Scores
from paper.plan import CLASSIFIERS


@dataclass(frozen=True)
class Training:
    """What a data model was trained on: Spanish, synthetic and African images, and patients of the
    real ones."""

    spanish: int
    synthetic: int
    african: int
    patients: int


TRAINING: dict[str, Training] = {
    "ES": Training(6148, 0, 0, 612),
    "ES+DA": Training(6148, 0, 0, 612),
    "HB": Training(1150, 5000, 0, 486),
    "HB+DA": Training(1150, 5000, 0, 486),
    "AF": Training(0, 0, 217, 61),
    "ES+AF": Training(6148, 0, 217, 673),
    "HB-all": Training(6148, 5000, 0, 612),
}
"""ES: Spanish images; HB, hybrid: Spanish and synthetic ones; AF: African ones; DA:
augmentation."""

# of the paper's rows
_ORDER = ("densenet169", "mobilenet_v2", "efficientnet_b0", "resnet18", "vit_b_16")
# accuracy, recall, precision, F-score, AUC in percent
_PERCENT = {
    "ES": (
        (61.37, 62.38, 96.46, 73.31, 80.50),
        (68.67, 68.86, 96.50, 78.07, 83.99),
        (63.09, 62.64, 96.94, 74.34, 81.15),
        (54.94, 51.23, 90.95, 61.51, 76.09),
        (68.24, 67.05, 96.58, 77.53, 83.46),
    ),
    "ES+DA": (
        (68.67, 67.67, 92.43, 75.87, 82.52),
        (69.96, 69.05, 95.27, 78.95, 83.93),
        (59.66, 59.26, 94.72, 70.91, 79.09),
        (63.09, 61.10, 91.52, 71.01, 79.86),
        (74.68, 72.80, 97.05, 82.15, 86.23),
    ),
    "HB": (
        (75.54, 73.40, 98.66, 83.40, 77.04),
        (67.81, 65.18, 96.52, 76.63, 75.78),
        (72.96, 69.81, 97.50, 79.45, 77.65),
        (64.81, 60.15, 96.92, 69.95, 76.88),
        (72.10, 70.28, 96.81, 80.57, 76.26),
    ),
    "HB+DA": (
        (80.26, 77.61, 89.11, 82.59, 87.99),
        (77.68, 74.29, 86.69, 79.36, 86.11),
        (72.96, 68.75, 92.65, 75.91, 83.87),
        (82.40, 81.56, 89.15, 84.90, 89.29),
        (81.97, 79.92, 95.36, 86.54, 89.78),
    ),
}


def _fractions(percent: tuple[float, ...]) -> Scores:
    return Scores(*(value / 100 for value in percent))


TABLE_1: dict[tuple[str, str], Scores] = {
    (data, classifier): _fractions(row)
    for data, rows in _PERCENT.items()
    for classifier, row in zip(_ORDER, rows, strict=True)
}
"""(data model, classifier) -> the published scores, as fractions; AUC by the notebook's
definition."""

TABLE_2: dict[tuple[str, str], Scores] = {
    ("AF", "vit_b_16"): _fractions((91.41, 88.71, 93.23, 90.44, 93.81)),
    ("ES", "vit_b_16"): TABLE_1["ES", "vit_b_16"],
    ("ES+AF", "vit_b_16"): _fractions((92.27, 91.53, 96.67, 93.87, 95.40)),
    ("HB-all", "vit_b_16"): _fractions((78.54, 78.14, 97.44, 85.85, 88.76)),
}
"""The same of table 2, all with ViT b16; HB-all is its HB."""

PUBLISHED = TABLE_1 | TABLE_2


def published_difference(
    baseline: str, data: str, classifiers: Sequence[str] | None = None
) -> float:
    """The paper's accuracy of `data` less that of `baseline`, as a fraction, averaged over
    classifiers.

    classifiers: nan if the paper does not have all of them with both; None for those that it has
    """
    have = [c for c in CLASSIFIERS if {(baseline, c), (data, c)} <= PUBLISHED.keys()]
    chosen = have if classifiers is None else classifiers
    if not have or not set(chosen) <= set(have):
        return float("nan")
    return float(
        np.mean([PUBLISHED[data, c].accuracy - PUBLISHED[baseline, c].accuracy for c in chosen])
    )


CLAIMS: dict[tuple[str, str], float] = {
    pair: published_difference(*pair)
    for pair in (("ES+DA", "HB+DA"), ("ES", "HB"), ("ES", "HB-all"))
}
"""(baseline, data model that the paper says is better) -> its mean gain in accuracy, as a fraction,
over the five classifiers of table 1, or with table 2's ViT."""

DIFFERENCES: tuple[tuple[str, str, str], ...] = (
    ("LoRA: layers", "the U-Net's cross-attention", "kohya's standard set, and the text encoder's"),
    ("LoRA: start of A", "Gaussian", "kohya's, uniform"),
    ("LoRA: learning rate", "1e-4", "1e-4 (U-Net), 5e-5 (text encoder)"),
    ("LoRA: batch size", "2", "1"),
    (
        "LoRA: steps",
        "10000 = 100 images x 100 x 1 epoch; in batches of 2 that is 5000",
        "not recorded (1 epoch)",
    ),
    ("LoRA: image size", "512", "512 x 512 in area; buckets keep each image's shape"),
    ("LoRA: layer of CLIP", "not said", "the last but one (clip skip 2)"),
    ("sampling", "Euler and UniPC, 20 steps, LoRA at 1.0; guidance not said", "no code"),
    ("classifier: image size", "512 x 512", "224 x 224"),
    ("classifier: input range", "-1 to 1", "0 to 1"),
    ("classifier: momentum of SGD", "not said", "0.9"),
    (
        "classifier: which epoch is tested",
        "not said (20 epochs)",
        "the last of 20; early stopping is commented out",
    ),
    (
        "classifier: validation",
        "200 of the 6148 images, at random",
        "200 of the augmented training images themselves",
    ),
    ("augmentation: rotation", "up to 25 degrees", "up to 15 degrees"),
    ("augmentation: crop", "none", "random, 8 to 100 % of the area, scaled to the whole"),
    ("augmentation: vertical flip", "probability 0.1", "none"),
    (
        "AUC",
        "not defined",
        "from predicted labels; a prediction of Other is positive for every class",
    ),
    ("figure 3: features", "InceptionNet's", "its 1000 logits, of images of 224 x 224"),
    ("table 2, HB: real images", "6148 in the table, 1150 in the text", "6148"),
    ("table 2, HB: augmentation", "not named", "yes"),
)
"""Where the paper and the authors' repository part: (setting, paper, repository).

Paper: sections 2 to 4. Repository: of the LoRA the configuration in its README (kohya's type
Standard with a learning rate for the text encoder: so its layers and its start of A), of the
classifiers and of table 2's HB Replicate_All_Planes_Classification.ipynb, of figure 3 its other
notebook."""

"""What the paper printed (Wang et al. 2024, arXiv 2407.20072), as data.

TABLE_1 holds its zero-shot table, all twenty rows, as the authors' repository stores it. Table 2 (AF, ES, ES+AF and HB
with ViT) is in none of their files, so no published number stands beside a reproduced one there. NOTEBOOK_RUN is what
their committed notebook prints for ViT; it is no row of table 1.
"""

from dataclasses import dataclass

from eval.metrics import Scores
from eval.plan import CLASSIFIERS


@dataclass(frozen=True)
class Training:
    """What a data model was trained on: images of each kind, and patients of the real ones."""

    real: int
    synthetic: int
    patients: int


TRAINING: dict[str, Training] = {
    "ES": Training(6148, 0, 612),
    "ES+DA": Training(6148, 0, 612),
    "HB": Training(1150, 5000, 486),
    "HB+DA": Training(1150, 5000, 486),
}
"""Data models of table 1: Spanish images, or these and synthetic ones (hybrid); DA is augmentation."""

# accuracy, recall, precision, F-score, AUC in percent, in the order of CLASSIFIERS, which is the paper's
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
    for classifier, row in zip(CLASSIFIERS, rows, strict=True)
}
"""(data model, classifier) -> the published scores, as fractions; AUC by the notebook's definition."""

NOTEBOOK_RUN: Scores = _fractions((78.54, 78.14, 97.44, 85.85, 88.76))
"""The authors' committed run: ViT on 6148 real and 5000 synthetic images, augmented."""

CLAIMS: tuple[tuple[str, str], ...] = (("ES+DA", "HB+DA"), ("ES", "HB"))
"""(baseline, data model that the paper says is better)"""

DIFFERENCES: tuple[tuple[str, str, str], ...] = (
    ("LoRA: batch size", "2", "1"),
    ("LoRA: passes over each image", "100", "not recorded"),
    ("LoRA: learning rate", "1e-4", "1e-4 (U-Net), 5e-5 (text encoder)"),
    ("classifier: image size", "512 x 512", "224 x 224"),
    ("classifier: input range", "-1 to 1", "0 to 1"),
    ("classifier: epochs", "20", "20; the last one is tested, early stopping is commented out"),
    ("classifier: validation", "200 images of patients held out", "200 of the augmented training images themselves"),
    ("augmentation: rotation", "up to 25 degrees", "up to 15 degrees"),
    ("augmentation: crop", "none", "random, 8 to 100 % of the area, stretched to the whole"),
    ("augmentation: horizontal flip", "probability 0.5", "probability 0.5"),
    ("augmentation: vertical flip", "probability 0.1", "none"),
    ("HB: real images", "1150", "6148 in the committed run"),
)
"""Where the paper and the authors' repository part: (setting, paper, repository)."""

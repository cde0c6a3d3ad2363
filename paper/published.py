"""What the paper printed (Wang et al. 2024, arXiv 2407.20072): published.csv, in percent.

Table 1 is its zero-shot table, all twenty rows, as the repository (github.com/13204942/FU-LoRA)
stores it in a file. Table 2 is in the paper alone; its HB is called HB-all here and in plan.py.
What is to be known of these numbers: docs/paper_and_code.md. ES: Spanish images; HB, hybrid:
Spanish and synthetic ones; AF: African ones; DA: augmentation.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.metrics import Scores

with open(Path(__file__).with_suffix(".csv"), encoding="utf-8", newline="") as _file:
    PUBLISHED = {
        (data, classifier): Scores(*(float(value) / 100 for value in percent))
        for _, data, classifier, *percent in list(csv.reader(_file))[1:]
    }
"""(data model, classifier) -> the published scores, as fractions; AUC by the notebook's
definition."""


def published_difference(baseline: str, data: str, classifiers: Sequence[str]) -> float:
    """The paper's accuracy of `data` less that of `baseline`, as a fraction, averaged over
    classifiers; nan if it does not have all of them with both."""
    try:
        less = [PUBLISHED[data, c].accuracy - PUBLISHED[baseline, c].accuracy for c in classifiers]
    except KeyError:
        return float("nan")
    return float(np.mean(less))

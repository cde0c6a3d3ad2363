"""What a classifier says of the test images, as scores and as a table."""

from collections.abc import Sequence

import numpy as np

from classify.images import Chosen
from eval.metrics import evaluate
from planes.datasets import Record, count


def outcome(
    chosen: Chosen, copies: set[Record], targets: Sequence[int], probabilities: np.ndarray, training: dict
) -> tuple[dict, list[dict]]:
    """(what metrics.json says, the rows of predictions.csv).

    copies: test images that are byte for byte in training, without which there are scores too
    targets: (N,) class indices of the test images; probabilities: (N, K); training: how many images of what
    """
    test, classes = chosen.test, chosen.classes
    targets, patients = np.array(targets), np.array([record.patient for record in test])
    result = evaluate(targets, probabilities, patients)
    result |= {"test": count(test, classes) | {"copies_of_training": len(copies)}, "training": training}
    if copies:
        distinct = np.array([record not in copies for record in test])
        result["without_copies"] = evaluate(targets[distinct], probabilities[distinct], patients[distinct])
    rows = []
    for record, p in zip(test, probabilities):
        row = {"image": record.name, "patient": record.patient, "center": record.center, "target": record.plane}
        row |= {"prediction": classes[p.argmax()], "copy": int(record in chosen.twice)}
        rows.append(row | {name: f"{value:.6f}" for name, value in zip(classes, p)})
    return result, rows

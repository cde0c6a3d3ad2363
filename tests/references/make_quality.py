"""Makes quality.json: FID and KID by torch-fidelity, precision, recall, density and coverage by
prdc.

    python tests/references/make_quality.py

The tests take `cases` from here.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

Matrices = tuple[np.ndarray, np.ndarray, int]


def cases() -> dict[str, Matrices]:
    """Name -> (real, synthetic, k); of equal numbers of images, since torch-fidelity's KID takes no
    others."""
    rng = np.random.RandomState(0)  # whose stream numpy never changes
    mixing = rng.standard_normal((8, 8))
    tall = rng.standard_normal((200, 8)), 0.3 + 0.8 * rng.standard_normal((200, 8)) @ mixing / 3
    wide = rng.standard_normal((30, 64)), 0.2 + 0.9 * rng.standard_normal((30, 64))
    pooled = (
        0.4 * np.abs(rng.standard_normal((60, 32))),
        0.4 * np.abs(0.1 + rng.standard_normal((60, 32))),
    )
    return {
        "more images than features": (*tall, 5),
        "fewer images than features": (*wide, 3),
        "features that are never negative": (*pooled, 5),
    }


def reference(real: np.ndarray, synthetic: np.ndarray, k: int) -> dict[str, float]:
    import torch
    from prdc import compute_prdc
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = torch.tensor(real), torch.tensor(synthetic)
    fid = fid_statistics_to_metric(
        fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False
    )
    # one subset that is the whole set: the full estimate
    kid = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=len(a), verbose=False)
    distances = {
        "fid": fid["frechet_inception_distance"],
        "kid": kid["kernel_inception_distance_mean"],
    }
    return distances | {
        name: float(value) for name, value in compute_prdc(real, synthetic, k).items()
    }


def main() -> None:
    values = {name: reference(*case) for name, case in cases().items()}
    versions = {
        package: version(package)
        for package in ("torch-fidelity", "prdc", "numpy", "scikit-learn", "torch")
    }
    text = json.dumps({"versions": versions, "values": values}, indent=1)
    Path(__file__).with_name("quality.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Quality of a synthetic set: FID, KID, PRDC, a two-sample test, and what was copied from training.

All of it works on feature matrices, (N, D), an image a row, whatever made them: Inception's 2048
pooled features are usual for the distances; for copies take `pixel_features`. Values compare only
between sets of equal features and, FID above all, of equal numbers of images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import erfc, nan, sqrt

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import euclidean_distances, pairwise_distances_argmin
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from eval.figures import contact_sheet
from planes.datasets import Record
from planes.pictures import open_image

FOLDS = 5
MEASURES = "fid", "kid", "precision", "recall", "density", "coverage", "two_sample", "p_value"
COPIED = 1 / 3
"""Ratio below which an image is taken for a copy. In `pixel_features` of the real datasets and the
phantoms, images of different patients stay above 0.5, and copies with noise of 20 grey levels below
0.2."""


SAME = 1e-4
"""Distance, as a share of the features' norm, below which two images are one: rounding makes such
distances of equal rows, 1e-8 here and 1e-6 in a network's batches."""


# --- distances between distributions ---


def fid(real: np.ndarray, synthetic: np.ndarray) -> float:
    """Frechet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al.
    2017, eq. 6).

    real, synthetic: (N, D), (M, D) features; means and unbiased covariances are taken of them
    Few images bias it upwards; fewer than features will do. ValueError below 2.
    """
    real, synthetic = _matrices(real, synthetic, least=2)
    shift = real.mean(axis=0) - synthetic.mean(axis=0)
    a, b = _covariance_factor(real), _covariance_factor(synthetic)
    # C1 C2 = A'A B'B has the nonzero eigenvalues of (AB')(AB')', whose roots are the singular
    # values of AB': no root of a nearly singular D x D matrix is needed.
    root_trace = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(shift @ shift + (a**2).sum() + (b**2).sum() - 2 * root_trace)


def _covariance_factor(features: np.ndarray) -> np.ndarray:
    """A with A'A = the unbiased covariance, (min(N, D), D)."""
    centred = (features - features.mean(axis=0)) / sqrt(len(features) - 1)
    return centred if len(centred) <= centred.shape[1] else np.linalg.qr(centred, mode="r")


def kid(real: np.ndarray, synthetic: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), which may be
    negative.

    real, synthetic: (N, D), (M, D) features
    The estimate uses all pairs at once: no random subsets, hence no seed and no spread. ValueError
    below 2 images.
    """
    real, synthetic = _matrices(real, synthetic, least=2)
    within = _mean_of_pairs(real) + _mean_of_pairs(synthetic)
    return within - 2 * float(polynomial_kernel(real, synthetic).mean())


def _mean_of_pairs(x: np.ndarray) -> float:
    """Mean of the kernel over pairs of two different images."""
    kernel = polynomial_kernel(x)
    return float((kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)))


def prdc(real: np.ndarray, synthetic: np.ndarray, k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019, eq. 2), density and coverage (Naeem et al.
    2020, eqs. 5 and 6).

    real, synthetic: (N, D), (M, D) features
    k: an image's ball reaches to its k-th nearest neighbour of its own set; ValueError below k + 1
        images
    Returns fractions. precision: synthetic images in a ball of a real one; recall: real ones in a
    ball of a synthetic one; density: balls of real images that a synthetic one is in, / k, which
    may exceed 1; coverage: real images with a synthetic one in their ball.
    """
    real, synthetic = _matrices(real, synthetic, least=k + 1)
    between = euclidean_distances(real, synthetic)
    in_real = between <= _kth_neighbour(real, k)[:, None]
    in_synthetic = between <= _kth_neighbour(synthetic, k)
    return {
        "precision": float(in_real.any(axis=0).mean()),
        "recall": float(in_synthetic.any(axis=1).mean()),
        "density": float(in_real.sum(axis=0).mean() / k),
        "coverage": float(in_real.any(axis=1).mean()),
    }


def _kth_neighbour(features: np.ndarray, k: int) -> np.ndarray:
    """Distance of each image to its k-th nearest other one, (N,)."""
    distances = euclidean_distances(features)
    np.fill_diagonal(distances, np.inf)
    return np.partition(distances, k - 1, axis=1)[:, k - 1]


def two_sample(real: np.ndarray, synthetic: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Classifier two-sample test (Lopez-Paz and Oquab 2017): can logistic regression tell real from
    synthetic?

    real, synthetic: (N, D), (M, D) features, standardised within each fold; the larger set is
        reduced to the size of the smaller at random, so that chance is 0.5
    seed: of that choice and of the five folds
    Returns (accuracy, p_value): the fraction of held-out images told apart, and the chance of this
    or more, one-sided, accuracy being N(1/2, 1/4n) under the hypothesis for the n images, each held
    out once; folds share training images, which makes it approximate. ValueError below 5 images.
    """
    real, synthetic = _matrices(real, synthetic, least=FOLDS)
    rng, size = np.random.default_rng(seed), min(len(real), len(synthetic))
    images = np.concatenate([rng.permutation(real)[:size], rng.permutation(synthetic)[:size]])
    targets = np.repeat([0, 1], size)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    held_out = cross_val_predict(model, images, targets, cv=folds)
    accuracy = float((held_out == targets).mean())
    return accuracy, erfc((accuracy - 0.5) * sqrt(2 * len(targets))) / 2


def quality_table(
    real: np.ndarray,
    synthetic: np.ndarray,
    real_planes: Sequence[str],
    synthetic_planes: Sequence[str],
    samplers: Sequence[str],
    seed: int = 0,
) -> list[dict[str, str | int | float]]:
    """Every measure for each plane and sampler, and for "all" planes and, if there are several,
    "all" samplers.

    real, synthetic: (N, D), (M, D) features
    real_planes: (N,); synthetic_planes, samplers: (M,) labels
    Rows have plane, sampler, images (synthetic ones), real (images) and MEASURES, which are nan
    where either set has no more than five images.
    """
    planes, names = list(dict.fromkeys(synthetic_planes)), list(dict.fromkeys(samplers))
    rows = []
    for plane in [*planes, "all"]:
        a = real[_labelled(real_planes, plane)]
        for sampler in names + ["all"] * (len(names) > 1):
            b = synthetic[_labelled(synthetic_planes, plane) & _labelled(samplers, sampler)]
            row = {"plane": plane, "sampler": sampler, "images": len(b), "real": len(a)}
            measures = dict.fromkeys(MEASURES, nan)
            if min(len(a), len(b)) > FOLDS:
                values = fid(a, b), kid(a, b), *prdc(a, b).values(), *two_sample(a, b, seed)
                measures = dict(zip(MEASURES, values))
            rows.append(row | measures)
    return rows


def _labelled(labels: Sequence[str], name: str) -> np.ndarray:
    """Which of the images have this label; "all": each."""
    return np.array([name in (label, "all") for label in labels])


# --- copies of training images ---


def pixel_features(records: Sequence[Record]) -> np.ndarray:
    """The images at 32 x 32 pixels, each with mean 0 and norm 1: (N, 1024), distance^2 = 2 (1 -
    correlation).

    The features for `memorisation`: a copy is one of pixels, and scaling down averages its noise
    away, while a network's pooled features drop the place of things and so draw different images of
    a plane together.
    """

    def grey(record: Record) -> np.ndarray:
        image = open_image(record.path, record.levels).resize((32, 32), Image.Resampling.BILINEAR)
        return np.asarray(image, np.float32).reshape(1024, -1).mean(axis=1)

    images = np.stack([grey(record) for record in records])
    return normalize(images - images.mean(axis=1, keepdims=True))


@dataclass(frozen=True)
class Memorisation:
    """What each of M synthetic images has in training."""

    index: np.ndarray  # (M,) its nearest training image
    ratio: np.ndarray  # (M,) distance to it / the usual one from a training image to the next
    copied: np.ndarray  # (M,) bool, ratio below COPIED


def memorisation(train: np.ndarray, synthetic: np.ndarray) -> Memorisation:
    """Which synthetic images are copies: much nearer to a training image than training images are
    to each other.

    train: (N, D) features of the images that the generator was trained on; those of
        `pixel_features` are meant
    synthetic: (M, D)
    The yardstick is the median distance of a training image to its nearest other one, where images
    that are there several times count once. A low quantile would look stricter, but the datasets
    repeat images nearly, which brings it close to 0. ValueError below 2 different training images.
    """
    train, synthetic = _matrices(train, synthetic, least=1)
    same = euclidean_distances(train) <= SAME * np.linalg.norm(train, axis=1).max()
    once = train[~np.tril(same, -1).any(axis=1)]
    if len(once) < 2:
        raise ValueError("the training images are all one, so there is no distance between them")
    usual = float(np.median(_kth_neighbour(once, 1)))
    index = pairwise_distances_argmin(synthetic, train)
    # Computed anew: the fast way to all distances loses half the digits of those that matter here,
    # and a copy's is 0.
    ratio = np.linalg.norm(synthetic - train[index], axis=1) / usual
    return Memorisation(index, ratio, ratio < COPIED)


def closest_pairs_figure(
    found: Memorisation, train: Sequence[Record], synthetic: Sequence[Record]
) -> Figure:
    """The eight synthetic images nearest to training, above what they are nearest to, labelled with
    the ratio.

    train, synthetic: whose features `found` was made of, in the same order
    """
    closest = np.argsort(found.ratio, kind="stable")[:8]
    rows = [[synthetic[n] for n in closest], [train[found.index[n]] for n in closest]]
    images = [[open_image(record.path, record.levels) for record in row] for row in rows]
    return contact_sheet(
        images, ("synthetic", "training"), [f"{found.ratio[n]:.2f}" for n in closest]
    )


def _matrices(real: np.ndarray, synthetic: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64, which the differences of large sums above need."""
    real, synthetic = np.asarray(real, np.float64), np.asarray(synthetic, np.float64)
    if min(len(real), len(synthetic)) < least:
        raise ValueError(
            f"{len(real)} and {len(synthetic)} images, but at least {least} of each are needed"
        )
    return real, synthetic

"""t-SNE of image features (van der Maaten and Hinton 2008), as in the paper's figure of real and synthetic images."""

import numpy as np
from sklearn.manifold import TSNE


def tsne(features: np.ndarray, perplexity: float = 30.0, seed: int = 0) -> np.ndarray:
    """Two-dimensional embedding of features, each axis scaled to [0, 1].

    features: (N, D)
    perplexity: clipped to (N - 1) / 3, since a point is compared with about three times as many neighbours
    Returns (N, 2). ValueError for fewer than four images.
    """
    if len(features) < 4:
        raise ValueError(f"t-SNE needs at least 4 images, not {len(features)}")
    perplexity = min(perplexity, (len(features) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - low) / np.where(high > low, high - low, 1)

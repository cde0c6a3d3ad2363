"""Two small sites of drawn images, and a tiny network."""

import numpy as np
from PIL import Image
from torch import nn

from planes.datasets import Record


def tiny(num_classes=1000):
    """A network as torchvision builds them: its last layer is a Linear; dropout makes it random."""
    head = nn.Dropout(0.2), nn.Linear(8 * 16, num_classes)
    pooled = nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    return nn.Sequential(*pooled, *head)


def noise_records(folder, count, classes=("a", "b")):
    """Records of grey noise images of 50 x 40 px, of each class in turn."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    records = []
    for n in range(count):
        path = folder / f"{n}.png"
        Image.fromarray(rng.integers(0, 255, (40, 50), dtype=np.uint8)).save(path)
        records.append(Record(path, classes[n % len(classes)], str(n), True, "source", "here"))
    return records


def write_site(folder, seed, train, test):
    """images.csv and images of two classes, bright above or below, two of each patient."""
    rng, lines = np.random.default_rng(seed), ["image,class,patient,split"]
    folder.mkdir()
    for n in range(train + test):
        pixels = rng.integers(0, 120, (64, 64), dtype=np.uint8)
        pixels[32 * (n % 2) :][:32] += 100
        Image.fromarray(pixels).save(folder / f"{n}.png")
        lines.append(f"{n}.png,{'ab'[n % 2]},{n // 2},{'train' if n < train else 'test'}")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")

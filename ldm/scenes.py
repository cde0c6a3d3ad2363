"""Generic ultrasound scenes with generic captions: what the embedded miniature model is pre-trained on.

Discs, rings, rods, layers and clusters in speckled tissue, seen by every kind of probe, and words for what is there.
No plane of the paper is drawn or named here: teaching those is the LoRA's job.
"""

import numpy as np
from PIL import Image

from planes.scanner import FLUID, Probe, Rng, Tissue, annotate, scan

LEVELS = {"black": (-62, -50), "dark": (-42, -32), "grey": (-26, -18), "bright": (-12, 2)}  # echo levels, dB
SIZES = {"small": (0.05, 0.13), "medium": (0.13, 0.26), "large": (0.26, 0.45)}  # half axes, depths
KINDS = ("disc", "ring", "rod", "layer", "cluster", "broken ring")


def scene(rng: Rng, size: int) -> tuple[Image.Image, str]:
    """A random scene as a grey image (size, size) and its caption."""
    wide, fine, clear = rng.random(3)
    probe = Probe(
        width=round(size * rng.uniform(1.4, 2.2)),
        height=round(size * rng.uniform(1.3, 1.7)),
        half_angle=0.35 + 0.4 * wide,
        radius=rng.uniform(0.1, 0.8),
        axial=0.003 + 0.006 * (1 - fine),
        lateral=0.009 + 0.016 * (1 - fine),
        dynamic_range=rng.uniform(38, 64),
        gain=rng.uniform(-3, 9),
        tgc=rng.uniform(-6, 8),
        noise=-62 + 20 * (1 - clear),
        looks=int(rng.choice([1, 2, 4], p=[0.5, 0.3, 0.2])),
    )
    tissue = Tissue(probe, rng, level=rng.uniform(-40, -18))
    words = []
    if rng.random() < 0.25:
        tissue.paint(tissue.ellipse(rng.normal(0, 0.1), rng.uniform(0.35, 0.65), *rng.uniform(0.3, 0.6, 2)), FLUID)
        words.append("fluid")
    for _ in range(rng.choice([1, 2, 3, 4, 5], p=[0.15, 0.25, 0.25, 0.2, 0.15])):
        words.append(_shape(tissue, rng))
    image = scan(tissue, probe, rng)
    if rng.random() < 0.5:
        image = annotate(image, rng, letters=int(rng.integers(3, 14)))
    style = [
        ("narrow", "wide")[int(wide > 0.5)],
        ("coarse", "fine")[int(fine > 0.5)],
        ("noisy", "clear")[int(clear > 0.5)],
    ]
    keep = rng.random() < 0.7
    caption = "a photo of " + ", ".join(words[:5] + ([" ".join(style)] if keep else []))
    return _frame(image, rng).resize((size, size), Image.Resampling.BICUBIC), caption


def _shape(tissue: Tissue, rng: Rng) -> str:
    """Paint one random shape; returns the words for it."""
    kind, level, size = (str(rng.choice(list(words))) for words in (KINDS, LEVELS, SIZES))
    echo, half = rng.uniform(*LEVELS[level]), rng.uniform(*SIZES[size])
    cx, cy = rng.uniform(-0.35, 0.35), rng.uniform(0.2, 0.85)
    if size == "large":  # large things lie where they can be seen
        cx, cy = 0.4 * cx, 0.5 + 0.4 * (cy - 0.5)
    angle, ratio, thick = rng.uniform(0, np.pi), rng.uniform(0.5, 1.0), rng.uniform(0.014, 0.045)
    shadow = rng.random() < 0.4 and level == "bright"
    attenuation = rng.uniform(8, 160) if shadow else rng.uniform(0, 3)
    if kind == "disc":
        tissue.paint(tissue.ellipse(cx, cy, half, ratio * half, angle), echo, attenuation if shadow else 1.0)
    elif kind == "ring":
        if rng.random() < 0.5:
            tissue.paint(tissue.ellipse(cx, cy, half, ratio * half, angle), rng.uniform(-60, -18))
        tissue.paint(tissue.ring(cx, cy, half, ratio * half, thick, angle), echo, attenuation)
    elif kind == "broken ring":
        count = rng.integers(4, 10)
        for turn in np.arange(count) * 2 * np.pi / count + rng.uniform(0, 1):
            u, v = half * np.cos(turn), ratio * half * np.sin(turn)
            x, y = cx + np.cos(angle) * u - np.sin(angle) * v, cy + np.sin(angle) * u + np.cos(angle) * v
            tissue.paint(tissue.rod(x, y, 0.3 * half, thick, angle + turn + np.pi / 2, 2.0), echo, attenuation)
    elif kind == "rod":
        bend = rng.normal(0, 0.8)
        tissue.paint(tissue.rod(cx, cy, half, thick, angle, bend), echo, attenuation)
    elif kind == "layer":
        wave = 0.03 * np.sin(rng.uniform(2, 9) * tissue.x + rng.uniform(0, 6))
        tissue.paint(np.abs(tissue.y - cy + wave) - 0.5 * half, echo, attenuation / 4)
        shadow = False
    else:
        for _ in range(rng.integers(3, 8)):
            x, y = cx + rng.normal(0, 0.5 * half + 0.03), cy + rng.normal(0, 0.5 * half + 0.03)
            tissue.paint(tissue.ellipse(x, y, *rng.uniform(0.02, 0.06, 2), rng.uniform(0, 3)), echo, attenuation)
    place = (
        "left" if cx < -0.15 else "right" if cx > 0.15 else "top" if cy < 0.4 else "bottom" if cy > 0.6 else "middle"
    )
    return f"{size} {level} {kind} {place}" + (" shadow" if shadow else "")


def _frame(image: np.ndarray, rng: Rng) -> Image.Image:
    """The whole frame, or now and then a part of it, as scanners zoom."""
    picture = Image.fromarray(image)
    if rng.random() < 0.6:
        return picture
    share = rng.uniform(0.5, 0.95)
    width, height = share * picture.width, share * picture.height
    left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
    return picture.crop((round(left), round(top), round(left + width), round(top + height)))

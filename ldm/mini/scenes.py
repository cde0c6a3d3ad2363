"""Generic ultrasound scenes with generic captions: what the embedded miniature model is pre-trained
on.

Discs, rings, arcs, rods and layers in speckled tissue, alone, in groups of two to seven alike, and
one in the other, seen by every kind of probe; and words for what is there and for how it looks. No
plane of the paper is drawn or named here: choosing among these shapes and arranging them is the
LoRA's job.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from planes.phantoms.scanner import FLUID, Probe, Rng, Tissue, annotate, scan
from planes.style import style_words, with_style

LEVELS = {  # echo levels, dB, by the words that sonographers use
    "anechoic": (-62, -48),
    "hypoechoic": (-40, -29),
    "isoechoic": (-27, -18),
    "hyperechoic": (-12, 3),
}
SIZES = {"small": (0.03, 0.1), "medium": (0.1, 0.24), "large": (0.24, 0.46)}  # half axes, depths
NUMBERS = ("", "", "two", "three", "four", "five", "six", "seven")


class Frame(NamedTuple):
    """Where shapes are put: the whole image, or the inside of a shape; u and v run from -1 to 1
    within it."""

    cx: float
    cy: float
    rx: float
    ry: float
    angle: float = 0.0

    def at(self, u: float, v: float) -> tuple[float, float]:
        c, s = np.cos(self.angle), np.sin(self.angle)
        return (
            self.cx + c * self.rx * u - s * self.ry * v,
            self.cy + s * self.rx * u + c * self.ry * v,
        )


IMAGE = Frame(0.0, 0.52, 0.38, 0.34)


def scene(rng: Rng, size: int) -> tuple[Image.Image, str]:
    """A random scene as a grey image (size, size) and its caption."""
    wide, fine, clear = rng.random(3)
    probe = Probe(
        width=round(size * rng.uniform(1.2, 1.8)),
        height=round(size * rng.uniform(1.0, 1.4)),
        half_angle=0.38 + 0.34 * wide,
        radius=rng.uniform(0.1, 0.8),
        axial=0.003 + 0.006 * (1 - fine),
        lateral=0.009 + 0.016 * (1 - fine),
        dynamic_range=rng.uniform(36, 68),
        gain=rng.uniform(-12, 9),
        tgc=rng.uniform(-8, 8),
        noise=-62 + 20 * (1 - clear),
        looks=1 + int(rng.choice(4, p=[0.4, 0.25, 0.2, 0.15])),
    )
    tissue = Tissue(probe, rng, level=rng.triangular(-42, -24, -18))
    words = []
    if rng.random() < 0.2:
        cx, cy = rng.normal(0, 0.1), rng.uniform(0.35, 0.65)
        tissue.ellipse(cx, cy, *rng.uniform(0.3, 0.6, 2), 0, FLUID)
        words.append("fluid")
    if rng.random() < 0.15:
        words.append(_layer(tissue, rng))
    # now one large thing with things in it, now several beside each other
    if rng.random() < 0.65:
        words.append(_container(tissue, rng, IMAGE, deep=True))
        count = rng.choice(3, p=[0.6, 0.3, 0.1])
    else:
        count = 1 + rng.choice(4, p=[0.3, 0.35, 0.2, 0.15])
    for _ in range(count):
        draw = (_single, _single, _group, _rod, _container)[rng.integers(5)]
        words.append(draw(tissue, rng, IMAGE))
    image = scan(tissue, probe, rng)
    if rng.random() < 0.5:
        image = annotate(image, rng, letters=rng.integers(3, 14))
    picture = _crop(image, rng).resize((size, size), Image.Resampling.BICUBIC)
    looks = (
        "wide" if wide > 0.5 else "narrow",
        "fine" if fine > 0.5 else "coarse",
        "clear" if clear > 0.5 else "noisy",
    )
    look = " ".join(word for word in looks if rng.random() < 0.5)
    words = [word for word in words if rng.random() < 0.9]  # a prompt need not say all
    style = [word for word in style_words(picture) if rng.random() < 0.7]
    said = ", ".join(word for word in (*words, look) if word) or "ultrasound"
    return picture, with_style(f"a photo of {said}", style)


def _level(rng: Rng) -> tuple[str, float]:
    word = rng.choice([*LEVELS])
    return word, rng.uniform(*LEVELS[word])


def _size(rng: Rng, *sizes: str) -> tuple[str, float]:
    word = rng.choice(sizes)
    return word, rng.uniform(*SIZES[word])


def _shadow(rng: Rng, level: str) -> tuple[str, float]:
    """Attenuation, dB per depth, and the word for it where it is strong: what is bright as bone
    throws shadows."""
    if level == "hyperechoic" and rng.random() < 0.5:
        return " shadow", float(np.exp(rng.uniform(np.log(9), np.log(170))))
    return "", rng.uniform(0, 3)


def _place(u: float, v: float) -> str:
    if max(abs(u), abs(v)) < 0.4:
        return "middle"
    return ("left" if u < 0 else "right") if abs(u) > abs(v) else ("top" if v < 0 else "bottom")


def _single(tissue: Tissue, rng: Rng, frame: Frame) -> str:
    """A disc or a ring anywhere in the frame."""
    (size, half), (level, echo) = _size(rng, "small", "medium"), _level(rng)
    half = min(half, 0.6 * min(frame.rx, frame.ry))
    u, v = rng.uniform(-0.8, 0.8, 2)
    kind, (shadow, attenuation) = rng.choice(["disc", "disc", "ring"]), _shadow(rng, level)
    _shapes(tissue, rng, kind, half, [frame.at(u, v)], echo, attenuation)
    return f"{size} {level} {kind} {_place(u, v)}{shadow}"


def _rod(tissue: Tissue, rng: Rng, frame: Frame) -> str:
    """A rod, straight or bent; thick ones are tubes."""
    (size, half), (level, echo) = _size(rng, *SIZES), _level(rng)
    (shadow, attenuation), (u, v) = _shadow(rng, level), rng.uniform(-0.6, 0.6, 2)
    half, angle = min(0.8 * half, 0.9 * frame.rx), rng.uniform(0, np.pi)
    bend = rng.choice(2) * rng.normal()
    thick = rng.uniform(0.014, 0.055)
    tissue.rod(*frame.at(u, v), half, thick, angle, echo, attenuation, bend=bend)
    kind = ("thin " if thick < 0.03 else "thick ") + ("bent " if abs(bend) > 0.7 else "") + "rod"
    way = ("level", "rising", "upright", "falling")[round(((-angle) % np.pi) / (np.pi / 4)) % 4]
    return f"{size} {level} {kind} {way} {_place(u, v)}{shadow}"


def _layer(tissue: Tissue, rng: Rng) -> str:
    level, echo = _level(rng)
    depth, half = rng.uniform(0.25, 0.85), rng.uniform(0.03, 0.15)
    wave = 0.03 * np.sin(rng.uniform(2, 9) * tissue.x + rng.uniform(0, 6))
    tissue.paint(np.abs(tissue.y - depth + wave) - half, echo, soft=0.012)
    return f"{level} layer {_place(0, (depth - 0.55) / 0.3)}"


def _group(tissue: Tissue, rng: Rng, frame: Frame) -> str:
    """Two to seven alike: in a row, in a square, around, or scattered."""
    level, echo = _level(rng)
    shadow, attenuation = _shadow(rng, level)
    kind = rng.choice(["disc", "disc", "rod", "ring"])
    way = rng.choice(["row", "square", "around", "scattered"])
    count = 4 if way == "square" else int(rng.integers(2, 6 if way == "row" else 8))
    reach, turned = min(frame.rx, frame.ry), Frame(0, 0, 1, 1, rng.uniform(0, np.pi))
    if frame is IMAGE:  # anywhere in the image, and as large as it likes
        reach = rng.uniform(0.12, 0.3)
        frame = Frame(*frame.at(*rng.uniform(-0.5, 0.5, 2)), reach, reach)
    if way == "row":
        step = 1.5 / (count - 1) * rng.uniform(0.7, 1.0)
        spots = [((n - (count - 1) / 2) * step, 0.1 * rng.normal()) for n in range(count)]
    elif way == "square":
        spots = [(0.45 * u, rng.uniform(0.3, 0.45) * v) for u in (-1, 1) for v in (-1, 1)]
        step = 0.75
    elif way == "around":
        away = rng.uniform(0.5, 0.9)
        spots = [(away * np.cos(a), away * np.sin(a)) for a in np.arange(count) * 2 * np.pi / count]
        step = away * min(2 * np.sin(np.pi / count), 1.0)
    else:
        spots, step = rng.uniform(-0.75, 0.75, (count, 2)), 0.5
    half = max(0.018, reach * step * rng.uniform(0.25, 0.48))
    middles = [frame.at(*turned.at(u, v)) for u, v in spots]
    _shapes(tissue, rng, kind, half, middles, echo, attenuation)
    return f"{NUMBERS[count]} {level} {kind}s {way}{shadow}"


def _bar(tissue: Tissue, rng: Rng, frame: Frame) -> str:
    """A bar through the frame, along its longer or shorter axis or slanting."""
    level, echo = _level(rng)
    tilts = [0, np.pi / 2, rng.uniform(0, np.pi)]
    tilt = frame.angle + rng.choice(tilts, p=[0.5, 0.25, 0.25])
    length, thick = min(frame.rx, frame.ry) * rng.uniform(0.7, 1.05), rng.uniform(0.012, 0.03)
    u, v = rng.normal(0, 0.08, 2)
    tissue.rod(*frame.at(u, v), length, thick, tilt, echo)
    return f"{level} bar across"


def _container(tissue: Tissue, rng: Rng, frame: Frame, deep: bool = False) -> str:
    """A disc, a ring or arcs around a filling; and what lies inside, which may hold things
    itself."""
    if frame is IMAGE:
        sizes = ("medium", "large", "large") if deep else ("medium",)
        size, rx = _size(rng, *sizes)
        ry = rx * rng.uniform(0.55, 1.0)
        u, v = rng.normal(0, 0.12 if size == "large" else 0.4, 2).clip(-0.9, 0.9)
    else:
        rx, (u, v) = min(frame.rx, frame.ry) * rng.uniform(0.35, 0.62), rng.normal(0, 0.25, 2)
        size = next(word for word, (_, high) in SIZES.items() if rx <= high)
        ry = rx * rng.uniform(0.6, 1.0)
    inside = Frame(*frame.at(u, v), rx, ry, rng.uniform(0, np.pi))
    kind = rng.choice(["disc", "ring", "ring", "arcs"])
    (level, echo), (filling, fill) = _level(rng), _level(rng)
    said = f"{kind} {_place(u, v)}"
    tissue.ellipse(*inside, echo if kind == "disc" else fill, 1.0)
    if kind != "disc":
        level = "hyperechoic" if rng.random() < 0.6 else level
        echo, (shadow, attenuation) = rng.uniform(*LEVELS[level]), _shadow(rng, level)
        said += f"{shadow} of {filling}"
    if kind == "ring":
        line = rng.uniform(0.012, 0.04)
        tissue.ellipse(*inside, echo, min(attenuation, 20), line=line)
    elif kind == "arcs":
        count, thick = rng.integers(4, 9), rng.uniform(0.016, 0.035)
        half, bend = rng.uniform(0.1, 0.3) * rx, min(1 / rx, 2.5)
        turns = np.arange(count) * 2 * np.pi / count + rng.uniform(-0.1, 0.1, count)
        for turn in turns + rng.uniform(0, 1):
            x, y = inside.at(np.cos(turn), np.sin(turn))
            along = inside.angle + turn + np.pi / 2
            tissue.rod(x, y, half, thick, along, echo, min(attenuation, 40), bend=bend)
    said = f"{size} {level} {said}"
    shares = [0.1, 0.3, 0.35, 0.25] if deep else [0.3, 0.5, 0.2]  # of 0, 1, 2, .. things inside
    draws = (_single, _group, _bar, _rod, _single) + ((_container,) if deep else ())
    for _ in range(rng.choice(len(shares), p=shares)):
        said += " with " + draws[rng.integers(len(draws))](tissue, rng, inside)
    return said


def _shapes(
    tissue: Tissue,
    rng: Rng,
    kind: str,
    half: float,
    middles: list[tuple[float, float]],
    *look: float,
) -> None:
    """Shapes of one kind and size, all turned alike; look: echo level and attenuation."""
    ratio, angle = rng.uniform(0.6, 1.0), rng.uniform(0, np.pi)
    thick = min(rng.uniform(0.012, 0.035), half)
    for x, y in middles:
        if kind == "rod":
            tissue.rod(x, y, half, thick, angle, *look)
        else:
            line = thick if kind == "ring" else 0
            tissue.ellipse(x, y, half, ratio * half, angle, *look, line=line)


def _crop(image: np.ndarray, rng: Rng) -> Image.Image:
    """The whole frame, or now and then a part of it, as scanners zoom."""
    picture = Image.fromarray(image)
    if rng.random() < 0.8:
        return picture
    share = rng.uniform(0.6, 0.95)
    width, height = share * picture.width, share * picture.height
    left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
    return picture.crop((left, top, left + width, top + height))  # in whole pixels

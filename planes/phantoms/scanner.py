"""A scanner in numpy: tissue painted shape by shape, seen by a curved probe, with speckle, shadows
and noise.

A map of echo levels (dB) and of attenuation is given speckle, log-compressed and scan-converted:

    amplitude^2 = 10^((echo - 2 cumulative attenuation) / 10) + noise
    envelope    = |PSF * (amplitude n)|,  n complex normal
    pixel       = clip(1 + (20 log10 envelope + gain) / dynamic range, 0, 1)

In a uniform region the envelope is Rayleigh distributed, as fully developed speckle is (Wagner et
al. 1983). Lengths are fractions of the depth that the image shows; x runs to the right, y down from
the probe's face.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import map_coordinates

BONE, BRIGHT, TISSUE, DIM, FLUID = 0.0, -10.0, -24.0, -33.0, -60.0  # echo levels, dB

Rng = np.random.Generator


@dataclass(frozen=True)
class Probe:
    """How a scanner sees: geometry and look of one image."""

    width: int  # px
    height: int  # px
    half_angle: float  # of the sector, radians
    radius: float  # of the probe's face, in depths; small = pointed sector
    axial: float  # standard deviation of the point spread function along a beam, depths
    lateral: float  # and across, in depths at mid-depth
    dynamic_range: float  # dB from black to white
    gain: float  # dB
    tgc: float  # dB by which the bottom is brighter than the top
    noise: float  # level of the electronic noise, dB
    looks: int = 1  # independent views that are averaged (spatial compounding): smoother speckle


class Tissue:
    """What lies below the probe: echo level and attenuation on a polar grid (depth x beam), painted
    shape by shape."""

    def __init__(self, probe: Probe, rng: Rng, level: float = TISSUE):
        beams = round(probe.width * 0.75)
        self.depth = np.linspace(0, 1, probe.height, dtype=np.float32)[:, None]
        self.angle = np.linspace(-probe.half_angle, probe.half_angle, beams, dtype=np.float32)[None]
        reach = probe.radius + self.depth
        self.x = reach * np.sin(self.angle)
        self.y = reach * np.cos(self.angle) - probe.radius * np.cos(probe.half_angle)
        self.echo = np.full_like(self.x, level)
        self.attenuation = np.zeros_like(self.x)  # dB per depth, one way
        for _ in range(4):  # no tissue is uniform
            u, v, phase = *rng.normal(0, 7, 2).tolist(), rng.uniform(0, 2 * np.pi)
            self.echo += rng.uniform(0.5, 2.5) * np.sin(u * self.x + v * self.y + phase)

    def paint(
        self, distance: np.ndarray, level: float, attenuation: float = 0.0, soft: float = 0.008
    ) -> None:
        """Fill where the signed distance (depths) is negative, with an edge `soft` wide; `level` in
        dB."""
        mask = 1 / (1 + np.exp(np.clip(distance / soft, -40, 40)))
        texture = self.echo - TISSUE if level > FLUID else 0  # fluid has no texture
        self.echo += mask * (level + 0.3 * np.clip(texture, -6, 6) - self.echo)
        self.attenuation += mask * (attenuation - self.attenuation)

    def local(self, cx: float, cy: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates in a frame at (cx, cy) turned by `angle` (radians)."""
        x, y, c, s = self.x - cx, self.y - cy, np.cos(angle), np.sin(angle)
        return c * x + s * y, c * y - s * x

    def ellipse(
        self,
        cx: float,
        cy: float,
        rx: float,
        ry: float,
        angle: float,
        *look: float,
        line: float = 0,
    ) -> None:
        """Paint an ellipse with half axes rx, ry, or its outline alone, `line` wide.

        look: level and attenuation, as of `paint`
        """
        u, v = self.local(cx, cy, angle)
        distance = (np.hypot(u / rx, v / ry) - 1) * min(rx, ry)  # to first order
        self.paint(np.abs(distance) - line / 2 if line else distance, *look)

    def rod(
        self,
        cx: float,
        cy: float,
        half: float,
        thick: float,
        angle: float,
        *look: float,
        bend: float = 0.0,
    ) -> None:
        """Paint a rod 2 half long, round at the ends, bent by `bend` (curvature, 1 / depth)."""
        u, v = self.local(cx, cy, angle)
        beyond = np.maximum(np.abs(u) - half, 0)
        self.paint(np.hypot(beyond, v - bend * u**2 / 2) - thick / 2, *look)


def scan(tissue: Tissue, probe: Probe, rng: Rng) -> np.ndarray:
    """The image (height, width), uint8, that the probe makes of the tissue."""
    spread = 2 * np.cumsum(tissue.attenuation, axis=0) / probe.height
    amplitude = 10 ** ((tissue.echo - spread) / 20)
    # two independent Gaussians add up to one
    amplitude = np.hypot(amplitude, 10 ** (probe.noise / 20))
    envelope = sum(np.abs(speckle(amplitude, probe, rng)) for _ in range(probe.looks)) / probe.looks
    decibel = 20 * np.log10(envelope + 1e-6) + probe.gain + probe.tgc * (tissue.depth - 0.5)
    polar = np.clip(1 + decibel / probe.dynamic_range, 0, 1)
    return _scan_convert(polar, probe)


def speckle(amplitude: np.ndarray, probe: Probe, rng: Rng) -> np.ndarray:
    """Scatterers of the given amplitude, blurred by the point spread function; of unit power where
    amplitude is 1."""
    depths, beams = amplitude.shape
    unit = np.float32(np.sqrt(2))
    real, imaginary = rng.standard_normal((2, depths, beams), dtype=np.float32) / unit
    # a beam's width at mid-depth, depths
    beam = 2 * probe.half_angle * (probe.radius + 0.5) / beams
    f_axial = np.fft.fftfreq(depths).astype(np.float32)[:, None]
    f_lateral = np.fft.fftfreq(beams).astype(np.float32)[None]
    reach = (probe.axial * depths * f_axial) ** 2 + (probe.lateral / beam * f_lateral) ** 2
    transfer = np.exp(-2 * np.pi**2 * reach)
    transfer /= np.sqrt((transfer**2).mean())
    return np.fft.ifft2(np.fft.fft2(amplitude * (real + 1j * imaginary)) * transfer)


def _scan_convert(polar: np.ndarray, probe: Probe) -> np.ndarray:
    """Polar (depth, beam) in [0, 1] -> pixels (height, width) uint8, black outside the sector;
    bilinear."""
    top = probe.radius * np.cos(probe.half_angle)
    scale = (probe.radius + 1 - top) / probe.height  # depths per pixel
    y = (np.arange(probe.height)[:, None] + 0.5) * scale + top
    x = (np.arange(probe.width)[None] + 0.5 - probe.width / 2) * scale
    depths, beams = np.subtract(polar.shape, 1)
    row = (np.hypot(x, y) - probe.radius) * depths
    column = (np.arctan2(x, y) / probe.half_angle + 1) / 2 * beams
    inside = (row >= 0) & (row <= depths) & (column >= 0) & (column <= beams)
    r, c = np.clip(row, 0, depths - 0.001), np.clip(column, 0, beams - 0.001)
    value = map_coordinates(polar, (r, c), output=float, order=1)
    return np.where(inside, value * 255, 0).round().astype(np.uint8)


def annotate(image: np.ndarray, rng: Rng, letters: int) -> np.ndarray:
    """What scanners draw over the image: a line of text, a depth scale, a grey bar, now and then
    calipers."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    shade = int(rng.integers(120, 256))
    if letters:
        text = "".join(chr(c) for c in rng.integers(48, 91, letters))
        at = rng.integers(1, width // 4), rng.choice([1, height - 13])
        draw.text(at, text, fill=shade)
    if rng.random() < 0.6:
        x = width - 3
        for y in range(4, height - 4, height // 12):
            draw.line((x - 2, y, x, y), fill=shade)
    if rng.random() < 0.4:
        bar = np.linspace(255, 0, height // 3).astype(np.uint8)[:, None].repeat(4, axis=1)
        picture.paste(Image.fromarray(bar), (2, height // 3))
    if rng.random() < 0.3:
        for _ in range(2):
            x, y = (rng.integers(side // 4, 3 * side // 4) for side in picture.size)
            draw.line((x - 3, y, x + 3, y), fill=255)
            draw.line((x, y - 3, x, y + 3), fill=255)
    return np.asarray(picture)

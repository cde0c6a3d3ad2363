"""The equipment of the phantoms' sites: the ranges that a patient's probe is drawn from.

A stands for the Spanish hospital and B for the African ones. C is for choosing settings on, so that
B is read by the report alone; D differs from all in geometry, speckle and contrast at once, and is
looked at last.
"""

from collections.abc import Sequence

from planes.phantoms.scanner import Probe, Rng

Range = tuple[float, float]  # low, high


class Site:
    """The equipment of a place.

    sizes: (width, height), px
    ranges: from which the other numbers of a patient's `Probe` are drawn, in this order
    """

    def __init__(self, sizes: Sequence, looks: Range, letters: Range, **ranges: Range):
        self.sizes, self.looks, self.letters, self.ranges = sizes, looks, letters, ranges

    def probe(self, rng: Rng) -> Probe:
        width, height = self.sizes[rng.integers(len(self.sizes))]
        drawn = {name: rng.uniform(*ends) for name, ends in self.ranges.items()}
        return Probe(width, height, **drawn, looks=rng.integers(*self.looks))


SITES = {
    "A": Site(  # a well-equipped hospital: wide curved probes, compounding, low noise
        sizes=((240, 166), (228, 158), (192, 118), (224, 136)),
        half_angle=(0.52, 0.66),
        radius=(0.35, 0.55),
        axial=(0.003, 0.005),
        lateral=(0.010, 0.014),
        dynamic_range=(54, 62),
        gain=(2, 7),
        tgc=(0, 6),
        noise=(-62, -54),
        looks=(2, 5),
        letters=(0, 6),
    ),
    # portable scanners: narrower sectors, coarse speckle, high contrast, noise, more writing
    "B": Site(
        sizes=((150, 129), (120, 135), (150, 120), (180, 150)),
        half_angle=(0.42, 0.62),
        radius=(0.15, 0.35),
        axial=(0.005, 0.008),
        lateral=(0.016, 0.024),
        dynamic_range=(40, 50),
        gain=(0, 8),
        tgc=(-7, 3),
        noise=(-50, -42),
        looks=(1, 3),
        letters=(4, 14),
    ),
    # a clinic between the two: every choice is made on it, so that B is read by the report alone
    "C": Site(
        sizes=((200, 170), (176, 150), (188, 176)),
        half_angle=(0.45, 0.58),
        radius=(0.5, 0.8),
        axial=(0.004, 0.006),
        lateral=(0.012, 0.018),
        dynamic_range=(45, 54),
        gain=(-5, 2),
        tgc=(-4, 3),
        noise=(-58, -50),
        looks=(2, 4),
        letters=(2, 9),
    ),
    # phased arrays without compounding, a wide dynamic range: unlike all before; nothing was
    # chosen by it
    "D": Site(
        sizes=((210, 140), (160, 160), (196, 172)),
        half_angle=(0.62, 0.76),
        radius=(0.04, 0.14),
        axial=(0.0055, 0.009),
        lateral=(0.019, 0.028),
        dynamic_range=(63, 74),
        gain=(-9, -2),
        tgc=(5, 11),
        noise=(-46, -40),
        looks=(1, 2),
        letters=(9, 17),
    ),
}

"""The domain: five maternal-fetal standard planes, their prompts, and the datasets that hold them.

| concept | where |
|---|---|
| the five planes in class-index order, one prompt per plane | this file |
| the Spanish and African datasets, manifests, selections, leak checks | `datasets.py` |
| procedural ultrasound: two sites of phantoms in the datasets' own layouts | `phantom.py` |
| the scanner behind them: tissue, probe, speckle, shadows, scan conversion | `scanner.py` |
"""

from enum import StrEnum


class Plane(StrEnum):
    """A standard plane of fetal ultrasound (Burgos-Artizzu et al. 2020), or anything else."""

    ABDOMEN = "abdomen"
    BRAIN = "brain"
    FEMUR = "femur"
    THORAX = "thorax"
    OTHER = "other"


PLANES: tuple[Plane, ...] = tuple(Plane)
"""Class index = position: abdomen 0, brain 1, femur 2, thorax 3 (the African files' plane codes), other 4."""

PROMPTS: dict[Plane, str] = {
    Plane.ABDOMEN: "a photo of fetal abdomen",
    Plane.BRAIN: "a photo of fetal brain",
    Plane.FEMUR: "a photo of fetal femur",
    Plane.THORAX: "a photo of fetal thorax",
    Plane.OTHER: "a photo of fetal ultrasound",
}
"""One text per plane, the training caption and the sampling prompt alike (the authors' repository)."""

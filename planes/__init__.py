"""The domain: five maternal-fetal standard planes, their prompts, and the datasets that hold them.

| concept | where |
|---|---|
| the five planes in class-index order, one prompt per plane, more detailed ones | this file |
| prompts from a file, captions of training images, a token in either | `captions.py` |
| words for brightness and contrast, measured from the pixels | `style.py` |
| folders of captioned images: kohya's with repeats, flat ones, metadata.jsonl | `folders.py` |
| the Spanish and African datasets, manifests, selections | `datasets.py` |
| any other site, of any classes: a folder for each, or a table | `sites.py` |
| what there is at two sites before hours of work, what would be refused | `survey.py` |
| tables in which no row is lost | `tables.py` |
| image files, upright and opaque; DICOM, and grey of more than 8 bits | `pictures.py` |
| what leaks from training into test | `leaks.py` |
| fetching both datasets and the authors' synthetic images from Zenodo | `download.py` |
| procedural ultrasound: phantoms of four sites in the datasets' own layouts | `phantoms/` |
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
"""Class index = position: abdomen 0, brain 1, femur 2, thorax 3, as the African images' file names
count, other 4."""

PAPER_COUNTS: dict[Plane, int] = dict(zip(PLANES, (353, 1620, 516, 1058, 2601)))
"""The 6148 Spanish training images, cervix left out: 42 % are Other and 6 % abdomen."""

PROMPTS: dict[Plane, str] = {
    Plane.ABDOMEN: "a photo of fetal abdomen",
    Plane.BRAIN: "a photo of fetal brain",
    Plane.FEMUR: "a photo of fetal femur",
    Plane.THORAX: "a photo of fetal thorax",
    Plane.OTHER: "a photo of fetal ultrasound",
}
"""One text per plane, the training caption and the sampling prompt alike (the authors'
repository)."""

PROMPT_LISTS: dict[Plane, tuple[str, ...]] = {
    Plane.ABDOMEN: (
        "a photo of fetal abdomen, a round cross-section with the stomach bubble",
        (
            "a photo of fetal abdomen with the stomach and the umbilical vein, as measured for its"
            " circumference"
        ),
        "a photo of fetal abdomen, the umbilical vein curving into the portal sinus of the liver",
        (
            "a photo of fetal abdomen, a bright ring of skin and ribs around the liver, the spine"
            " at one side"
        ),
        "a photo of fetal abdomen, transverse, the dark stomach bubble and the shadow of the spine",
    ),
    Plane.BRAIN: (
        "a photo of fetal brain, an oval skull with the midline echo",
        "a photo of fetal brain, transthalamic, with the thalami and the cavum septi pellucidi",
        (
            "a photo of fetal brain, transventricular, with the lateral ventricle and its choroid"
            " plexus"
        ),
        "a photo of fetal brain, transcerebellar, with the cerebellum and the cisterna magna",
        (
            "a photo of fetal brain, the bright oval of the skull, as measured for the head"
            " circumference"
        ),
    ),
    Plane.FEMUR: (
        "a photo of fetal femur, one bright straight bone with a shadow below it",
        "a photo of fetal femur, the whole shaft lying level, as measured for its length",
        "a photo of fetal femur, the bright shaft in the soft tissue of the thigh",
        "a photo of fetal femur, a long bone with both ends in view",
        "a photo of fetal femur, slightly curved, the shadow of the bone beneath",
    ),
    Plane.THORAX: (
        "a photo of fetal thorax, a round cross-section with the heart",
        "a photo of fetal thorax with the four chambers of the heart between the lungs",
        "a photo of fetal thorax, the heart pointing to the left, the ribs around the lungs",
        (
            "a photo of fetal thorax, the two atria and the two ventricles around the crux of the"
            " heart"
        ),
        (
            "a photo of fetal thorax, transverse, the dark chambers of the heart and the shadow of"
            " the spine"
        ),
    ),
    Plane.OTHER: (
        "a photo of fetal ultrasound, the face in profile",
        "a photo of fetal ultrasound, the spine lengthwise",
        "a photo of fetal ultrasound, a hand or a foot in the fluid",
        "a photo of fetal ultrasound, the placenta on the wall of the uterus",
        "a photo of fetal ultrasound, a pocket of amniotic fluid and loops of the cord",
    ),
}
"""More detailed prompts for sampling: what the standard views show (ISUOG's guidelines on biometry
and screening)."""

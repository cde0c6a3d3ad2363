"""Zero-shot classification of fetal planes: train on one site and on synthetic images, test on another site.

| concept | where |
|---|---|
| the five networks, their weights, the trained file | `models.py` |
| which images: the flags that choose them, copies and patients in both sets | `images.py` |
| decoding, input ranges, augmentation | `data.py` |
| the controls: every class equally often; contrast varied at random | `balanced.py`, `contrast.py` |
| one epoch of SGD, prediction | `train.py` |
| what a run that was stopped goes on from | `checkpoint.py` |
"""


class ClassifyError(ValueError):
    """A mistake of the user's (a file, a size, a setting), told in one line."""

"""Zero-shot classification of fetal planes: train on one site and on synthetic images, test on
another site.

| concept | where |
|---|---|
| the five networks, their weights, the trained file | `models.py` |
| which images: the flags that choose them, copies and patients in both sets | `images.py` |
| decoding, input ranges, augmentation; every class equally often, contrast | `data.py` |
| one epoch of SGD, prediction, what a run that was stopped goes on from | `train.py` |
| what is written of the test images; a classifier on any folder, as ONNX | `predict.py` |
| image features: Inception v3 or a classifier of our own | `features.py` |
| what a frozen vision model does by itself: a linear probe | `probe.py` |
"""


class ClassifyError(ValueError):
    """A mistake of the user's (a file, a size, a setting), told in one line."""

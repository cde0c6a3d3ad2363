"""What leaks from training into test: images of one patient, and files that are byte for byte the
same."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from harness.files import sha256
from planes.datasets import Record


class Leak(NamedTuple):
    """A test image and a training image that share a "patient", or are byte for byte the same
    "file"."""

    kind: str
    train: Record
    test: Record


def leaks(train: list[Record], test: list[Record]) -> list[Leak]:
    """For each test image of a training patient one leak, and one for each byte-identical copy of
    it in training.

    The African set needs it: it repeats images under other patient numbers, across its own split.
    The images must be there.
    """
    patients, known = {record.patient: record for record in reversed(train)}, {*train}
    return [Leak("patient", patients[r.patient], r) for r in test if r.patient in patients] + [
        Leak("file", copy, r)
        for group in same_bytes(train + test)
        for r in group
        for copy in group
        if copy in known and r not in known
    ]


def same_bytes(images: Sequence) -> list[list]:
    """Those of each file that is there more than once. images: what has a path, such as records"""
    groups, sizes = defaultdict(list), Counter(image.path.stat().st_size for image in images)
    for image in images:
        if sizes[image.path.stat().st_size] > 1:  # others need not be read
            groups[sha256(image.path)].append(image)
    return [group for group in groups.values() if len(group) > 1]


def describe_leaks(found: list[Leak]) -> str:
    """The leaks in words, a line for each."""
    if not found:
        return "training and test share no file, and no patient of one site"
    lines = (f"{b.name} ({b.patient}) has the {k} of {a.name} ({a.patient})" for k, a, b in found)
    return "\n  ".join(["test images are not new:", *lines])


def repeated(african: list[Record]) -> set[Record]:
    """Test images that are byte for byte an African training image or an earlier test image,
    whatever is trained on."""
    ordered = sorted(african, key=lambda record: not record.train)  # training images first
    return {r for _, *others in same_bytes(ordered) for r in others if not r.train}

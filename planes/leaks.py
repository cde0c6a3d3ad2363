"""What leaks from training into test: images of one patient, and files that are byte for byte the
same."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from harness.files import sha256
from planes.datasets import Record, require_images


class Leak(NamedTuple):
    """A test image and a training image that share a "patient", or are byte for byte the same
    "file"."""

    kind: str
    train: Record
    test: Record


def leaks(train: Iterable[Record], test: Iterable[Record]) -> list[Leak]:
    """For each test image of a training patient one leak, and one for each byte-identical copy of
    it in training.

    The African set needs it: it repeats images under other patient numbers, across its own split.
    The images must be there, as for `require_images`.
    """
    train, test = list(train), list(test)
    require_images(train + test)
    of_patient = {record.patient: record for record in reversed(train)}
    found = [
        Leak("patient", of_patient[record.patient], record)
        for record in test
        if record.patient in of_patient
    ]

    sizes = {record.path.stat().st_size for record in test}
    copies = defaultdict(list)
    for record in train:
        # files of different sizes differ: no need to read them
        if record.path.stat().st_size in sizes:
            copies[sha256(record.path)].append(record)
    return found + [
        Leak("file", copy, record)
        for record in test
        for copy in copies.get(sha256(record.path), ())
    ]


def describe_leaks(found: list[Leak]) -> str:
    """The leaks in words: for each kind the number of test images concerned, then a line for each
    leak."""
    lines = []
    for kind in dict.fromkeys(leak.kind for leak in found):
        images = {leak.test for leak in found if leak.kind == kind}
        lines.append(f"{len(images)} test images share a {kind} with training:")
        lines += [
            f"  {b.name} ({b.patient}) with {a.name} ({a.patient})"
            for k, a, b in found
            if k == kind
        ]
    return "\n".join(lines) or "training and test share no patient and no file"


def repeated(african: list[Record]) -> set[Record]:
    """Test images that are byte for byte an African training image or an earlier test image,
    whatever is trained on."""
    seen, found = set(), set()
    for record in sorted(african, key=lambda record: not record.train):  # training images first
        digest = sha256(record.path)
        if not record.train and digest in seen:
            found.add(record)
        seen.add(digest)
    return found

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
    patients = {record.patient: record for record in reversed(train)}
    # files of different sizes differ: no need to read them
    sizes, copies = {record.path.stat().st_size for record in test}, defaultdict(list)
    for record in train:
        if record.path.stat().st_size in sizes:
            copies[sha256(record.path)].append(record)
    return [Leak("patient", patients[r.patient], r) for r in test if r.patient in patients] + [
        Leak("file", copy, r) for r in test for copy in copies.get(sha256(r.path), ())
    ]


def describe_leaks(found: list[Leak]) -> str:
    """The leaks in words: for each kind the number of test images concerned, then a line for each
    leak."""
    lines = []
    for kind in ("patient", "file"):
        some = [leak for leak in found if leak.kind == kind]
        if some:
            images = len({leak.test for leak in some})
            lines.append(f"{images} test images share a {kind} with training:")
        lines += [f"  {b.name} ({b.patient}) with {a.name} ({a.patient})" for _, a, b in some]
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

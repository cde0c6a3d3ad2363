"""What leaks from training into test: images of one patient, and files that are byte for byte the
same."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
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
    copies = copied([r.path for r in train], [r.path for r in test])
    of = {record.path: record for record in train}
    return [Leak("patient", patients[r.patient], r) for r in test if r.patient in patients] + [
        Leak("file", of[path], r) for r in test for path in copies.get(r.path, ())
    ]


def copied(train: Iterable[Path], test: Iterable[Path]) -> dict[Path, list[Path]]:
    """Files of `test` that are byte for byte in `train` -> those they are."""
    test, copies = list(test), defaultdict(list)
    sizes = {path.stat().st_size for path in test}  # others differ: no need to read them
    for path in train:
        if path.stat().st_size in sizes:
            copies[sha256(path)].append(path)
    return {path: copies[digest] for path in test if (digest := sha256(path)) in copies}


def describe_held_out(train: Iterable[Path], held_out: Iterable[Path]) -> str:
    """The line on images that are held out, and trained on nevertheless; empty without them."""
    if not (copies := copied(train, held_out)):
        return ""
    path, (other, *_) = next(iter(copies.items()))
    return f"warning: {len(copies)} held-out images are in training: {path} is {other}"


def same_names(first: Iterable[Record], second: Iterable[Record]) -> list[str]:
    """Names that patients have at two sites (`planes.sites`), who may be other people."""
    named = (
        {r.patient.partition("/")[2] for r in site if not r.patient.endswith(r.path.name)}
        for site in (first, second)
    )
    return sorted(set.intersection(*named))


def describe_leaks(found: list[Leak], same: Sequence[str] = ()) -> str:
    """The leaks in words: for each kind the number of test images concerned, then a line for each
    leak.

    same: names that patients have at both sites
    """
    lines = []
    for kind in ("patient", "file"):
        some = [leak for leak in found if leak.kind == kind]
        if some:
            images = len({leak.test for leak in some})
            lines.append(f"{images} test images share a {kind} with training:")
        lines += [f"  {b.name} ({b.patient}) with {a.name} ({a.patient})" for _, a, b in some]
    names = f"no file, but {len(same)} names of patients" if same else "no patient and no file"
    return "\n".join(lines) or f"training and test share {names}"


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

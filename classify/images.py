"""Which images a classifier is trained, validated and tested on, as the flags of classify.py choose them."""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable

from classify import ClassifyError
from planes.datasets import (
    Record,
    balanced,
    read_african,
    read_manifest,
    read_spanish,
    read_synthetic,
    require_images,
    validation_split,
)
from planes.leaks import describe_leaks, leaks, repeated


def choose_records(args: Namespace) -> tuple[list[Record], list[Record], list[Record], set[Record]]:
    """Training, validation and test records, every image there, and the test images that the African set has twice."""
    training, validation = [], []
    if args.spanish:
        records = read_spanish(args.spanish)
        if args.manifest:
            training = read_manifest(args.manifest, records)
        else:
            training = [record for record in records if record.train]
            training = balanced(training, args.per_plane, args.seed) if args.per_plane else training
        if args.validation:
            training, validation = validation_split(training, args.validation, seed=args.seed)
    for manifest in args.synthetic:
        training = training + read_synthetic(manifest)
    african = read_african(args.african)
    training += [record for record in african if record.train and args.african_train]
    test = [record for record in african if not record.train]

    if not training:
        raise ClassifyError("there is nothing to train on; give --spanish, --synthetic or --african-train")
    if not test:
        raise ClassifyError(f"{args.african}: has no test images")
    path, times = Counter(record.path for record in training).most_common(1)[0]
    if times > 1:
        raise ClassifyError(f"{path}: is among the training images {times} times; give each list once")
    require_images(training + validation + african)
    return training, validation, test, repeated(african)


def find_copies(training: list[Record], test: list[Record], say: Callable[[str], object]) -> set[Record]:
    """Test images with the same bytes as a training image; a shared patient is an error.

    say: is told what was found
    """
    found = leaks(training, test)
    if shared := [leak.test for leak in found if leak.kind == "patient"]:
        raise ClassifyError(f"{shared[0].patient} is in training and in test, as {len(shared)} test images are")
    copies = {leak.test for leak in found}
    say(f"leak check: {describe_leaks(found)}")
    if copies:
        say(f"warning: {len(copies)} test images are byte for byte in training; metrics.json also has scores without")
    return copies

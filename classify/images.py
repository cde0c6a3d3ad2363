"""Which images a classifier is trained, validated and tested on, as the flags of classify.py choose
them."""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from classify import ClassifyError
from harness.files import sha256_of_all
from planes import PLANES
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
from planes.sites import classes_of, read_site
from planes.survey import survey

Say = Callable[[str], object]
"""What is told lines for the user, such as print."""


@dataclass(frozen=True)
class Chosen:
    """Records, each image there.

    validation: images of --validation; without it those of --source that are not trained on
    twice: test images that their own site has twice
    copies: test images with the same bytes as a training image
    classes: names, class index = position
    """

    training: list[Record]
    validation: list[Record]
    test: list[Record]
    twice: set[Record]
    copies: set[Record]
    classes: tuple[str, ...]

    def hashes(self) -> dict[str, str]:
        """Of the files of each group."""
        return {
            f"{name} images": sha256_of_all(record.path for record in getattr(self, name))
            for name in ("training", "validation", "test")
        }


def choose_records(args: Namespace, say: Say) -> Chosen:
    """The paper's datasets where --spanish and --african name them, or any two sites by --source
    and --target.

    say: is told what `planes.survey` warns of, and which images that are tested on or held out are
        copies of training

    Raises ClassifyError, also where a patient is in training and in test, DatasetError.
    """
    first = read_site(args.source, "source", True, args.held_out) if args.source else []
    first = read_spanish(args.spanish) if args.spanish else first
    second = (
        read_site(args.target, "target", train=False) if args.target else read_african(args.african)
    )
    classes = PLANES if args.african else classes_of(first or second)
    if own := [site for site in ((args.source, first), (args.target, second)) if site[0]]:
        survey(own, say=say)

    training, validation = [record for record in first if record.train], []
    if args.manifest:
        training = read_manifest(args.manifest, first)
    elif args.per_plane:
        training = balanced(training, args.per_plane, args.seed, classes)
    if args.validation:
        training, validation = validation_split(training, args.validation, seed=args.seed)
    elif args.source:
        validation = [record for record in first if not record.train]
    for manifest in args.synthetic:
        training = training + read_synthetic(manifest, classes)
    training += [record for record in second if record.train and args.african_train]
    test = [record for record in second if not record.train]

    shown = {record.plane for record in training}
    if lost := [name for name in classes_of(first + test) if name not in shown]:
        raise ClassifyError(
            f"no training image is left of {', '.join(lost)}; give some (--source, --synthetic),"
            " hold fewer out (--validation, --seed), or take the class out"
        )
    if not test:
        raise ClassifyError(f"{args.target or args.african}: has no test images")
    path, times = Counter(record.path for record in training).most_common(1)[0]
    if times > 1:
        raise ClassifyError(
            f"{path}: is among the training images {times} times; give each list once"
        )
    require_images(training + validation + second)

    found = leaks(training, test)
    if shared := [leak.test.patient for leak in found if leak.kind == "patient"]:
        raise ClassifyError(f"{shared[0]} is in training and in test, on {len(shared)} test images")
    say(f"leak check: {describe_leaks(found)}")
    copies = {leak.test for leak in found}
    if copies:
        of = f"{len(copies)} of {len(test)} test images"
        say(f"warning: {of} are in training; metrics.json has scores of the others too")
    if held := {leak.test for leak in leaks(training, validation)}:
        say(f"warning: {len(held)} held-out images share a patient or file with training")
    return Chosen(training, validation, test, repeated(second), copies, classes)

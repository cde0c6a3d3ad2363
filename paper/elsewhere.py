"""The finished rows of a reproduction, tested at one more site: nothing is trained, nothing is
chosen.

    python -m paper.elsewhere runs/reproduce --african Other_dataset --out runs/elsewhere

Takes every row that lies in a folder of reproduce.py, but for linear probes, lets its classifier
see the test images of another dataset in the African layout, or with --target of any site, and
writes the same report of what it says there.
"""

import argparse
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from classify import ClassifyError
from harness.files import told_apart
from harness.record import arguments_of
from harness.script import alone, progress, run
from paper.plan import BEYOND_ROWS, EMBEDDED, ROWS
from paper.report import Context, build
from paper.results import Result, ResultError, read_by, read_result
from planes.datasets import DatasetError, Record, read_african, require_images
from planes.leaks import repeated
from planes.sites import classes_of, read_site


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, help="the --out of reproduce.py")
    site = parser.add_mutually_exclusive_group(required=True).add_argument
    site("--african", type=Path, help="a dataset in that layout: its test images")
    site("--target", type=Path, help="or any site, of the rows' classes or some of them")
    add("--out", type=Path, required=True, help="gets report.html, report.md and results.csv")
    return parser.parse_args(argv)


def retest(result: Result, records: Sequence[Record], twice: Collection[Record]) -> Result:
    """What a row's classifier says of other images. twice: those of them that are copies."""
    targets, probabilities = read_by(result.folder / "model.safetensors", records)
    patients, centers, images = np.array([(r.patient, r.center, r.name) for r in records]).T
    return replace(
        result,
        targets=targets,
        predictions=probabilities.argmax(axis=1),
        probabilities=probabilities,
        patients=patients,
        centers=centers,
        images=images,
        copies=np.array([record in twice for record in records]),
        leaked=0,
    )


@alone
def main(args):
    rows = {row.name: row for row in (*ROWS, *BEYOND_ROWS)}  # some in two tables
    found = [
        read_result(args.run, row, int(file.parent.name.removeprefix("seed")))
        for row in rows.values()
        for file in sorted(args.run.glob(f"rows/{row.data.name}/{row.classifier}/seed*/args.json"))
    ]
    if not found:
        raise ResultError(f"{args.run}: no finished row; give the --out of reproduce.py")
    site = args.target or args.african
    every = read_site(site, "target", train=False) if args.target else read_african(site)
    records = [record for record in every if not record.train]
    if not records:
        raise ResultError(f"{site}: has no test images")
    require_images(records)
    known = found[0].classes
    if unknown := [name for name in classes_of(records) if name not in known]:
        has = f"the rows of {args.run} know {', '.join(known)} alone"
        raise ResultError(f"{site}: has {', '.join(unknown)}, and {has}; take these images out")

    twice = repeated(every)
    results = [retest(row, records, twice) for row in progress(found, desc="rows", unit="row")]
    trained = arguments_of(found[0].folder)
    own, source = bool(trained.get("source") and args.target), trained.get("source")
    context = Context(
        material=f"as in {args.run}",
        sites=f"{site}, of which nothing was trained on",
        command=shlex.join(["python", "-m", "paper.elsewhere", *sys.argv[1:]]),
        left_out=EMBEDDED.left_out if trained.get("weights") == "none" else {},
        names=tuple(told_apart(Path(source), site)) if own else ("the first site", site.name),
        own=own,
        tests=records,
    )
    build(args.out, results, context)
    print(args.out / "report.html")


if __name__ == "__main__":
    run(parse_args, main, ClassifyError, DatasetError, ResultError)

"""The finished rows of a reproduction, tested at one more site: nothing is trained, nothing is
chosen.

    python -m paper.elsewhere runs/reproduce --african Other_dataset --out runs/elsewhere

Takes every row that lies in a folder of reproduce.py, lets its classifier see the test images of
another dataset in the African layout, and writes the same report of what it says there.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from classify import ClassifyError
from harness.files import sha256
from harness.script import alone, progress, run
from paper.plan import BEYOND_ROWS, ROWS
from paper.report import Context, build
from paper.results import Result, ResultError, read_by, read_result
from planes.datasets import DatasetError, Record, read_african, require_images


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, help="the --out of reproduce.py")
    add("--african", type=Path, required=True, help="a dataset in that layout: its test images")
    add("--out", type=Path, required=True, help="gets report.html, report.md and results.csv")
    return parser.parse_args(argv)


def retest(result: Result, classifier: Path, records: Sequence[Record]) -> Result:
    """What a row's classifier, a file of classify.py, says of other images."""
    targets, probabilities = read_by(classifier, records)
    patients, centers, images = np.array([(r.patient, r.center, r.name) for r in records]).T
    digests = [sha256(record.path) for record in records]
    return replace(
        result,
        targets=targets,
        predictions=probabilities.argmax(axis=1),
        probabilities=probabilities,
        patients=patients,
        centers=centers,
        images=images,
        copies=np.array([digest in digests[:n] for n, digest in enumerate(digests)]),
    )


@alone
def main(args):
    found = {}  # a row of two tables is one run
    for row in (*ROWS, *BEYOND_ROWS):
        about = row.table, row.data.name, row.classifier
        for file in sorted(args.run.glob(f"rows/{about[1]}/{about[2]}/seed*/args.json")):
            folder, seed = file.parent, int(file.parent.name.removeprefix("seed"))
            found.setdefault(folder, read_result(folder, *about, seed))
    if not found:
        raise ResultError(f"{args.run}: no finished row; give the --out of reproduce.py")
    records = [record for record in read_african(args.african) if not record.train]
    require_images(records)

    results = [
        retest(result, folder / "model.safetensors", records)
        for folder, result in progress(found.items(), desc="rows", unit="row")
    ]
    settings = json.loads((next(iter(found)) / "args.json").read_text(encoding="utf-8"))
    context = Context(
        material=f"as in {args.run}",
        sites=f"{args.african}, of which nothing was trained on",
        phantoms=True,  # or another dataset: the paper's numbers are of neither
        recipe=settings["arguments"]["recipe"],
        seeds=sorted({result.seed for result in results}),
        command=f"python -m paper.elsewhere {args.run} --african {args.african}",
        title="FU-LoRA at one more site",
    )
    build(args.out, results, context)
    print(args.out / "report.html")


if __name__ == "__main__":
    run(parse_args, main, ClassifyError, DatasetError, ResultError)

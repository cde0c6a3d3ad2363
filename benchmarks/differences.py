"""How much better is one way of training classifiers than another, on the same test images?

    python benchmarks/differences.py runs/ES runs/ES+DA

A folder holds runs of classify.py that differ in --seed alone. Prints paired differences of their
accuracy, over patients and seeds, as Markdown: on all test images, and on those that are no copies.
"""

import argparse
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

# a script sees its own folder, not the repository
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paper.results import Result, compare, read_result, require_same_test

HEAD = "accuracy, points | 95 % interval | p |\n| --- | --: | --: | --: |"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Paired differences between runs of classify.py.")
    parser.add_argument("folders", type=Path, nargs="+", help="of one training each, a run a seed")
    return parser.parse_args(argv)


def read_runs(folder: Path) -> list[Result]:
    """One for each seed."""
    paths = enumerate(sorted(folder.glob("*/metrics.json")))
    return [read_result(path.parent, "", folder.name, "", seed) for seed, path in paths]


def distinct(run: Result) -> Result:
    """The same without the test images that are copies."""
    fields = ("targets", "predictions", "patients")
    return replace(run, **{name: getattr(run, name)[~run.copies] for name in fields})


def main(args):
    rows = [read_runs(folder) for folder in args.folders]
    require_same_test([run for runs in rows for run in runs])
    for part in (rows, [[*map(distinct, runs)] for runs in rows]):
        print(f"\n| on {len(part[0][0].targets)} images | {HEAD}")
        for first, second in combinations(part, 2):
            found = compare([first], [second])["accuracy"]
            value, low, high = (f"{100 * x:+.1f}" for x in (found.value, found.low, found.high))
            names = f"{second[0].data} - {first[0].data}"
            print(f"| {names} | {value} | {low} to {high} | {found.p_value:.3f} |")


if __name__ == "__main__":
    main(parse_args())

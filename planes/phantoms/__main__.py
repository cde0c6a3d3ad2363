"""Writes the phantoms of two sites in the real datasets' layouts: python -m planes.phantoms --out
OUT."""

import argparse
from pathlib import Path

from harness.flags import seed_number
from harness.script import run
from planes.phantoms.phantom import write_african_layout, write_spanish_layout
from planes.phantoms.sites import SITES

TRAIN, TEST = 230, 40  # images per plane of site A
PATIENTS = 25  # per country of african/


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m planes.phantoms", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="gets spanish/ (site A) and african/")
    add("--african-site", choices=SITES, default="B", help="whose phantoms african/ holds")
    add("--seed", type=seed_number, default=0)
    return parser.parse_args(argv)


def main(args):
    write_spanish_layout(args.out / "spanish", TRAIN, TEST, args.seed)
    write_african_layout(args.out / "african", PATIENTS, args.seed, SITES[args.african_site])


if __name__ == "__main__":
    run(parse_args, main)

"""Writes the phantoms of two sites: python -m planes.phantoms --out OUT."""

import argparse
from pathlib import Path

from planes.phantoms.phantom import write_african_layout, write_spanish_layout
from planes.phantoms.sites import SITES


def main(argv=None):
    text = "Write both sites' phantoms in the layouts of the real datasets."
    parser = argparse.ArgumentParser(prog="python -m planes.phantoms", description=text)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="gets spanish/ (site A) and african/")
    add("--train", type=int, default=230, help="site A: training images per plane")
    add("--test", type=int, default=40, help="site A: test images per plane")
    add("--african-site", choices=SITES, default="B", help="whose phantoms african/ holds")
    add("--patients", type=int, default=25, help="patients per country of african/")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write_spanish_layout(args.out / "spanish", args.train, args.test, args.seed)
    write_african_layout(args.out / "african", args.patients, args.seed, SITES[args.african_site])


if __name__ == "__main__":
    main()

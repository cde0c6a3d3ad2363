"""reproduce.py with a tiny model and a scale of seconds: python small_reproduce.py MODEL FLAGS.."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ldm.cli
import paper.synthetic
import reproduce
from classify import ClassifyError
from harness.script import run
from paper.plan import Scale
from planes.datasets import DatasetError


def no_weights(**_):
    raise ClassifyError("no network")


ldm.cli.MINI = Path(sys.argv[1])
paper.synthetic.inception = no_weights
reproduce.QUICK = Scale(
    per_plane={"all": None, "balanced": 23, "lora": 20},
    train_lora="--layers transformer --batch-size 6 --save-every 1",
    repeats=2,
    rank=4,
    sample="--steps 2 --batch-size 4",
    count=3,
    without=2,
    classify="--size 64 --batch-size 6 --workers 0",
    passes={"resnet18": 24},
)

if __name__ == "__main__":
    run(lambda: reproduce.parse_args(sys.argv[2:]), reproduce.main, DatasetError, together=True)

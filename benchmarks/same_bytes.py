"""Does a change of the code change a byte of what comes out? The paper's stages in seconds, by two
checkouts.

    git worktree add ../before COMMIT
    python benchmarks/same_bytes.py ../before

Both run `reproduce.py --quick` at a scale of seconds with the weights of this checkout's embedded
model: two LoRAs, three sets of images, six classifiers, the report. Compared are the LoRAs'
tensors, the pixels of every image, metrics.json of every classifier and report.md. Prints a line
for each kind and exits with 1 where one differs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parents[1]
FILES = (
    "lora_*/lora.safetensors",
    "synthetic_*/*/*.png",
    "rows/*/*/*/metrics.json",
    "report.md",
)
RUN = """
import dataclasses, runpy, sys
import ldm.cli
ldm.cli.MINI = sys.argv.pop(1)
from planes import PLANES

script = runpy.run_path("reproduce.py", run_name="reproduce")
space = script["parse_args"].__globals__
scale = dict(
    per_plane={"all": 3, "balanced": 3, "lora": 2},
    train_lora="--layers transformer --batch-size 10 --repeats 2",
    repeats=2,  # where a scale has them, behind the flags above
    rank=32,
    sample="--steps 2",
    count=2,
    classify="--size 64 --batch-size 6",
    passes=dict.fromkeys(script["CLASSIFIERS"], 15),
)
quick = script["QUICK"]
scale = {name: value for name, value in scale.items() if hasattr(quick, name)}
space["QUICK"] = dataclasses.replace(quick, **scale)
space["PHANTOMS"] = {"train": dict.fromkeys(PLANES, 4), "patients": 4}
space["PANEL_COUNT"] = 2
script["main"](script["parse_args"](sys.argv[1:]))
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="a checkout of the commit to compare with")
    return parser.parse_args(argv)


def content(path: Path) -> object:
    """What must stay the same: tensors by name, pixels, or a text's bytes."""
    if path.suffix == ".safetensors":
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    if path.suffix == ".png":
        return np.asarray(Image.open(path)).tobytes()
    return path.read_bytes()


def outcome(checkout: Path, out: Path) -> dict[str, dict[str, object]]:
    """Each of FILES, and what is in the files of its kind. `out`, gone again afterwards, is called
    the same for both checkouts."""
    flags = ["--quick", "--device", "cpu", "--out", str(out)]
    subprocess.run(
        [sys.executable, "-c", RUN, str(HERE / "ldm" / "mini"), *flags],
        cwd=checkout,
        check=True,
        stdout=subprocess.DEVNULL,
        # one thread: sums in another order would differ in their last bits
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = {
        kind: {str(path.relative_to(out)): content(path) for path in sorted(out.glob(kind))}
        for kind in FILES
    }
    shutil.rmtree(out)
    return found


def main(args) -> int:
    with tempfile.TemporaryDirectory() as work:
        before, now = (outcome(checkout, Path(work, "run")) for checkout in (args.before, HERE))
    for kind, files in now.items():
        other = before[kind]
        differ = [name for name in other | files if other.get(name) != files.get(name)]
        print(f"{kind}: {len(files)} files, {', '.join(differ) or 'none'} differ")
    return int(now != before or not all(now.values()))


if __name__ == "__main__":
    sys.exit(main(parse_args()))

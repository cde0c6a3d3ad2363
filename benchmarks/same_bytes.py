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
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parents[1]
RUN = """
import dataclasses, runpy, sys
import ldm.cli
ldm.cli.MINI = sys.argv.pop(1)
from planes import PLANES

script = runpy.run_path("reproduce.py", run_name="reproduce")
space = script["parse_args"].__globals__
scale = dict(
    per_plane={"all": 3, "balanced": 3, "lora": 2},
    train_lora="--target transformer --batch-size 10 --repeats 2",
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


def tensors(path: Path) -> bytes:
    return b"".join(
        name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(load_file(path).items())
    )


def pixels(path: Path) -> bytes:
    return np.asarray(Image.open(path)).tobytes()


KINDS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "tensors of the LoRAs": ("lora_*/lora.safetensors", tensors),
    "pixels of the images": ("synthetic_*/*/*.png", pixels),
    "metrics.json": ("rows/*/*/*/metrics.json", Path.read_bytes),
    "report.md": ("report.md", Path.read_bytes),
}


def outcome(checkout: Path, work: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each kind and its files -> their hashes. The run's folder is called the same for every
    checkout."""
    out = work / "run"
    flags = ["--quick", "--device", "cpu", "--out", str(out)]
    subprocess.run(
        [sys.executable, "-c", RUN, str(HERE / "ldm" / "mini"), *flags],
        cwd=checkout,
        check=True,
        stdout=subprocess.DEVNULL,
        # one thread: sums in another order would differ in their last bits
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for kind, (pattern, read) in KINDS.items():
        files = sorted(out.glob(pattern))
        yield (
            kind,
            {str(path.relative_to(out)): hashlib.sha256(read(path)).hexdigest() for path in files},
        )
    shutil.rmtree(out)


def main(args) -> int:
    with tempfile.TemporaryDirectory() as work:
        before, now = (dict(outcome(checkout, Path(work))) for checkout in (args.before, HERE))
    for kind, files in now.items():
        other = [name for name in files | before[kind] if files.get(name) != before[kind].get(name)]
        print(
            f"{kind}: {len(files)} files,"
            f" {', '.join(other) + ' differ' if other or not files else 'the same bytes'}"
        )
    return int(now != before or not all(now.values()))


if __name__ == "__main__":
    sys.exit(main(parse_args()))

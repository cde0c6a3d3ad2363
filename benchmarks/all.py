"""Everything that is to be known of a machine's speed, in one command and at most eight minutes.

    python benchmarks/all.py --out runs/speed              # on a GPU: SD 1.5's size, random weights
    python benchmarks/all.py --device cpu --out runs/speed # a miniature of the same, to see that it runs

First the three comparisons with the peers (those that are installed), then the scripts themselves:
sample.py through to the files, train_lora.py with `--preset kohya` (8-bit AdamW, float16 with its
loss scale) through to the LoRA, and two processes at one run. Prints Markdown, also to
--out/speed.md; what the time does not suffice for says so.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

# before this folder: classify is the package, not this
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from load_checkpoint import write_material
from measure import machine, run

from ldm import MINI
from planes.phantoms.phantom import write_spanish_layout

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
SMALL = {  # what a CPU does of it
    "sample": [
        "--scale",
        "small",
        "--size",
        "64",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--rounds",
        "2",
    ],
    "train_lora": ["--scale", "small", "--size", "64", "--rank", "8", "--rounds", "2"],
    "classify": [
        "--size",
        "64",
        "--stored",
        "100",
        "--images",
        "40",
        "--batch-size",
        "10",
        "--workers",
        "1",
    ],
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="at most (8)")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def comparisons(on_gpu: bool, peers: bool, device: str) -> list[tuple[str, list[str]]]:
    """(script, flags) in the order of what matters most, should the time not suffice."""
    if not on_gpu:
        flags = {name: [*small, "--device", device] for name, small in SMALL.items()}
        if not peers:
            flags["sample"] += ["--rivals", "ours"]
            flags["train_lora"] += ["--rivals", "ours"]
        return [*flags.items()]
    sample = [] if peers else ["--rivals", "ours-compiled", "ours"]
    train = [] if peers else ["--rivals", "ours-compiled", "ours"]
    return [
        ("sample", ["--batch-size", "16", "--rounds", "2", *sample]),
        ("train_lora", ["--rounds", "3", *train]),
        ("classify", ["--rounds", "2", "--rivals", "ours", "ours-compiled", "imagefolder"]),
        ("sample", ["--batch-size", "1", "--rounds", "4", *sample]),
    ]


def facts_of(log: str) -> str:
    """What a script's log says of its speed and memory."""
    lines = [
        line
        for line in log.splitlines()
        if re.search(r"compiled, took|peak memory|optimizer:|images: ", line)
    ]
    return "; ".join(lines) or (log.strip().splitlines() or ["nothing"])[-1]


class Budget:
    """Seconds that are left."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    def left(self) -> float:
        return self.end - time.perf_counter()


def scripts(on_gpu: bool, device: str, folder: Path, budget: Budget, say) -> None:
    """The scripts as a user runs them, each through to its files."""
    if on_gpu:
        write_material(folder)
        tokenizer = folder / "config" / "tokenizer"
        model, count = ["--model", folder / "sd.safetensors", "--tokenizer", tokenizer], 320
    else:
        model, count = ["--model", MINI, "--steps", "2"], 4
    sample = [
        sys.executable,
        ROOT / "sample.py",
        *model,
        "--samplers",
        "euler",
        "--planes",
        "brain",
    ]
    sample += ["--device", device, "--batch-size", 16 if on_gpu else 2]
    code, seconds, log = run(
        *sample, "--count", count, "--out", folder / "images", seconds=budget.left()
    )
    say(
        f"- sample.py, {count} images through to the files: exit code {code}, {seconds:.0f} s;"
        f" {facts_of(log)}"
    )
    if code == 0:
        few = count // 4
        flags = ["--count", few, "--out", folder / "few"]
        _, short, _ = run(*sample, *flags, *["--compile"] * on_gpu, seconds=budget.left())
        each = (seconds - short) / (count - few)
        begin, minutes = seconds - count * each, (seconds + (5000 - count) * each) / 60
        say(
            f"  - {each:.3f} s an image and {begin:.0f} s to begin: 5,000 images in {minutes:.1f}"
            " minutes"
        )

    write_spanish_layout(folder / "spanish", 2, test=0, seed=0)
    model = [flag for flag in model if flag not in ("--steps", "2")]
    train = [
        sys.executable,
        ROOT / "train_lora.py",
        *model,
        "--spanish",
        folder / "spanish",
        "--device",
        device,
    ]
    train += ["--preset", "kohya", "--per-plane", 2, "--repeats", 4 if on_gpu else 1]
    code, seconds, log = run(*train, "--out", folder / "kohya", seconds=budget.left())
    say(f"- train_lora.py --preset kohya: exit code {code}, {seconds:.0f} s; {facts_of(log)}")
    if code == 0:
        rows = [
            line.split(",") for line in (folder / "kohya" / "loss.csv").read_text().splitlines()[1:]
        ]
        finite = sum(row[2] != "nan" and row[3] not in ("nan", "inf") for row in rows)
        state = torch.load(
            folder / "kohya" / "checkpoint.pt", weights_only=True, map_location="cpu"
        )
        kind, scale = state["identity"].get("the optimizer"), state["scaler"].get("scale")
        say(f"  - {finite} of {len(rows)} steps finite; {kind}; loss scale {scale or 'none'}")

    # torchrun's own: on a CPU last bits hang on the number of threads
    os.environ["OMP_NUM_THREADS"] = "1"
    two = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        *sample[1:],
    ]
    code, seconds, log = run(
        *two,
        "--count",
        4,
        "--out",
        folder / "two",
        *["--no-compile"] * on_gpu,
        seconds=budget.left(),
    )
    one_code, _, _ = run(
        *sample,
        "--count",
        4,
        "--out",
        folder / "one",
        *["--no-compile"] * on_gpu,
        seconds=budget.left(),
    )
    if code == one_code == 0:
        pairs = [
            (path, folder / "two" / "brain" / path.name)
            for path in (folder / "one" / "brain").glob("*.png")
        ]
        same = sum(a.read_bytes() == b.read_bytes() for a, b in pairs)
        say(
            f"- two processes of torchrun: {same} of {len(pairs)} images the bytes of one's,"
            f" {seconds:.0f} s"
        )
    else:
        say(f"- two processes of torchrun: exit codes {code} and {one_code}; {facts_of(log)}")


def main(args):
    budget, on_gpu = Budget(60 * args.minutes - 5), args.device.startswith("cuda")
    args.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{machine(args.device)}\n")
    peers = all(map(find_spec, ("diffusers", "peft")))
    if not peers:
        say("diffusers and peft are not installed: only what needs neither is compared\n")
    for number, (name, flags) in enumerate(comparisons(on_gpu, peers, args.device)):
        found = args.out / f"{number}_{name}.json"
        code, seconds, log = run(
            sys.executable,
            HERE / f"{name}.py",
            *flags,
            "--json",
            found,
            seconds=min(budget.left(), 200),
        )
        if code:
            say(
                f"{name}.py {' '.join(flags)}: exit code {code} after {seconds:.0f} s;"
                f" {facts_of(log)}\n"
            )
            continue
        rows = json.loads(found.read_text())
        heads = [*rows[0]][1:]
        say(
            f"{rows[0]['work']} ({seconds:.0f} s in all)\n\n| "
            + " | ".join(heads)
            + " |\n|"
            + " --- |" * len(heads)
        )
        for row in rows:
            say("| " + " | ".join(row[head] for head in heads) + " |")
        say("")
    folder = Path(tempfile.mkdtemp(prefix="speed-"))
    try:
        scripts(on_gpu, args.device, folder, budget, say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"\n{60 * args.minutes - 5 - budget.left():.0f} s in all, {os.cpu_count()} cores")
    (args.out / "speed.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse_args())

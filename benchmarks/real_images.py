"""The embedded model on real images: do its synthetic ones help a classifier of a hundred at the
other site?

    python benchmarks/real_images.py --spanish FETAL_PLANES_ZENODO --african Zenodo_dataset \\
        --manifest lora_train_data.csv --weights mobilenet_v2.pth --out runs/real

The LoRAs, with words for the style and without, are trained on the listed Spanish images, and so
are the classifiers: MobileNet v2, the notebook's recipe at 224 px, as many image passes whatever
the data. Nothing is chosen by what comes out. Writes report.html and the paired differences, on all
African test images and on those that are no copies. What is done in --out is kept.
"""

import argparse
import shlex
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

# a script sees its own folder, not the repository
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classify import ClassifyError
from harness import script
from harness.files import folder_hash, sha256, write_text
from harness.flags import HelpFormatter
from ldm import MINI, CheckpointError
from lora import LoRAError
from paper.plan import DATA, EMBEDDED, Row
from paper.report import Context, build
from paper.results import Result, compare, read_result, row_folder
from paper.stages import Stages
from planes.datasets import DatasetError
from samplers import SamplerError

CLASSIFIER = "mobilenet_v2"
TRAIN_LORA = (  # 1,000 steps; reproduce.py's own, on phantoms, learns the convolutions too
    "--layers transformer --lr 2e-3 --schedule cosine --debiased-estimation-loss --batch-size 20"
    " --guidance-scale 1.5 --rank 32"
)
NAMES = ("ES", "ES+DA", "ES+contrast", "ES+DA+contrast", "HB", "HB+DA", "HB+contrast", "HB-styles")
NAMES += ("HB-styles+DA", "HB-styles+contrast")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--spanish", type=Path, required=True)
    add("--african", type=Path, required=True)
    add("--manifest", type=Path, required=True, help="the list of Spanish images to train on")
    add("--weights", required=True, help="of MobileNet v2: a file, or imagenet")
    add("--data", nargs="+", choices=NAMES, default=NAMES, help="data models")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the classifiers")
    add("--model", default=MINI, help="whose LoRAs draw the images")
    add("--steps", type=int, default=20, help="of the samplers")
    add("--count", type=int, default=20, help="synthetic images per plane and sampler")
    add("--repeats", type=int, default=200, help="of each image that a LoRA learns")
    add("--passes", type=int, default=2000, help="images that a classifier sees, with repeats")
    add("--size", type=int, default=224, help="of a classifier's images, px")
    add("--out", type=Path, required=True)
    return parser.parse_args(argv)


def differences(results: list[Result]) -> str:
    """How much better each data model is than those before it, as a Markdown table."""
    runs: dict[str, list[Result]] = {}
    for result in results:
        runs.setdefault(result.data, []).append(result)
    lines = [
        f"| on {len(results[0].targets)} images | accuracy, points | 95 % interval | p |",
        "| --- | --: | --: | --: |",
    ]
    for baseline, data in combinations(runs, 2):
        found = compare([runs[baseline]], [runs[data]])["accuracy"]
        points = f"{100 * found.value:+.1f} | {100 * found.low:+.1f} to {100 * found.high:+.1f}"
        lines.append(f"| {data} - {baseline} | {points} | {found.p_value:.3f} |")
    return "\n".join(lines) + "\n"


def synthetic(args, run, inputs: dict[str, str], kind: str, real: list) -> Path:
    """The list of images by a LoRA of the real ones; kind: "lora", or "styles" with their words."""
    styles, model = kind == "styles", ["--model", args.model]
    flags = [*model, *real, *TRAIN_LORA.split(), "--repeats", args.repeats]
    flags += ["--style-words"] * styles
    flags += ["--resume"]
    lora = run("train_lora", args.out / f"lora_{kind}", *flags, inputs=inputs) / "lora.safetensors"
    flags = [*model, *EMBEDDED.sample.split(), "--count", args.count, "--steps", args.steps]
    flags += ["--prompts", "styles"] * styles + ["--lora", lora]
    inputs = inputs | {"lora": sha256(lora)}
    return run("sample", args.out / f"synthetic_{kind}", *flags, inputs=inputs) / "manifest.csv"


def main(args):
    real = ["--spanish", args.spanish, "--manifest", args.manifest]
    flags = [*real, "--african", args.african, "--model", CLASSIFIER, "--weights", args.weights]
    flags += ["--recipe", "notebook", "--passes", args.passes, "--dtype", "fp32"]
    flags += ["--size", args.size, "--resume"]
    read = args.spanish, args.african, args.manifest, Path(args.weights)
    inputs = {path.name: folder_hash(path) for path in read if path.exists()}
    results, run = [], Stages(print).run
    for name in args.data:
        data = DATA[name]
        row, more, also = Row("real", data, CLASSIFIER), data.flags.split(), {}
        if data.synthetic:
            images = synthetic(args, run, inputs, data.synthetic, real)
            more, also = [*more, "--synthetic", images], {"images": folder_hash(images.parent)}
        for seed in args.seeds:
            out = row_folder(args.out, name, CLASSIFIER, seed)
            run("classify", out, *flags, *more, "--seed", seed, inputs=inputs | also)
            results.append(read_result(args.out, row, seed))

    context = Context(
        material="the embedded miniature model",
        sites=f"a hundred images of {args.spanish.name}, and {args.african.name}",
        command=f"python {shlex.join(sys.argv)}",
    )
    build(args.out, results, context)
    kept = ~results[0].copies
    fields = ("targets", "predictions", "patients")  # which a comparison reads
    distinct = [replace(r, **{name: getattr(r, name)[kept] for name in fields}) for r in results]
    text = "\n".join(map(differences, (results, distinct)))
    write_text(args.out / "differences.md", text)
    print(text)


if __name__ == "__main__":
    mistakes = CheckpointError, ClassifyError, DatasetError, LoRAError, SamplerError
    script.run(parse_args, main, *mistakes)

"""The embedded model on real images: do its synthetic ones help a classifier of a hundred at the
other site?

    python benchmarks/real_images.py --spanish FETAL_PLANES_ZENODO --african Zenodo_dataset \\
        --manifest lora_train_data.csv --weights mobilenet_v2.pth --out runs/real

The LoRAs, with words for the style and without, are trained on the listed Spanish images, and so
are the classifiers: MobileNet v2, the notebook's recipe at 224 px, as many image passes whatever
the data. Nothing is chosen by what comes out. Writes report.html and the paired differences, on all
African test images and on those that are no copies.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

# a script sees its own folder, not the repository
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.files import write_text
from paper.gain import Step, measure
from paper.plan import ROWS
from paper.report import Context, build
from paper.results import Result, read_result
from paper.stages import Stages
from reproduce import EMBEDDED

CLASSIFIER = "mobilenet_v2"
TRAIN_LORA = (  # 1,000 steps; reproduce.py's own, on phantoms, learns the convolutions too
    "--target transformer --lr 2e-3 --schedule cosine --debiased-estimation-loss --batch-size 20"
    " --guidance-scale 1.5 --rank 32 --repeats 200"
)
DATA = ("ES", "ES+DA", "ES+DA+contrast", "HB", "HB+DA", "HB-styles", "HB-styles+DA")
PAIRS = (
    ("ES", "ES+DA"),
    ("ES", "ES+DA+contrast"),
    ("ES", "HB"),
    ("ES", "HB-styles"),
    ("ES", "HB-styles+DA"),
    ("ES+DA", "HB+DA"),
    ("ES+DA", "HB-styles+DA"),
    ("ES+DA+contrast", "HB-styles+DA"),
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--spanish", type=Path, required=True)
    add("--african", type=Path, required=True)
    add("--manifest", type=Path, required=True, help="the list of Spanish images to train on")
    add("--weights", required=True, help="of MobileNet v2: a file, or imagenet")
    add("--data", nargs="+", choices=DATA, default=DATA, help="data models (all)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the classifiers (0 to 4)")
    add("--count", type=int, default=20, help="synthetic images per plane and sampler (20)")
    add(
        "--passes",
        type=int,
        default=2000,
        help="images that a classifier sees, repeats included (2000)",
    )
    add("--dtype", default="bf16", help="of the classifiers' autocast (bf16)")
    add("--out", type=Path, required=True)
    return parser.parse_args(argv)


def differences(results: list[Result], label: str) -> str:
    """PAIRS as a Markdown table."""
    cells: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        cells.setdefault((result.data, result.classifier), []).append(result)
    lines = [f"| on {label} | accuracy, points | 95 % interval | p |", "| --- | --: | --: | --: |"]
    for gain in measure([Step("", *pair) for pair in PAIRS], cells, {}):
        found = gain.accuracy
        bounds = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
        lines.append(
            f"| {gain.step.data} - {gain.step.baseline} | {100 * found.value:+.1f} | {bounds} |"
            f" {found.p_value:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main(args):
    stages = Stages(partial(print, flush=True))
    real = ["--spanish", args.spanish, "--manifest", args.manifest]
    manifests = {}
    for kind, style, prompts in (
        ("lora", [], []),
        ("styles", ["--style-words"], ["--prompts", "styles"]),
    ):
        lora = stages.run(
            "train_lora", args.out / f"lora_{kind}", *real, *TRAIN_LORA.split(), *style, "--resume"
        )
        flags = [
            *EMBEDDED.sample.split(),
            "--count",
            args.count,
            "--lora",
            lora / "lora.safetensors",
            *prompts,
        ]
        manifests[kind] = (
            stages.run("sample", args.out / f"synthetic_{kind}", *flags, needs=(lora,))
            / "manifest.csv"
        )

    results = []
    for row in [row for row in ROWS if row.classifier == CLASSIFIER and row.data.name in args.data]:
        flags = [*real, "--african", args.african, "--model", CLASSIFIER, "--weights", args.weights]
        flags += ["--recipe", "notebook", "--passes", args.passes, "--dtype", args.dtype]
        flags += ["--augment"] * row.data.augment + ["--contrast"] * row.data.contrast
        made = [manifests[row.data.synthetic]] if row.data.synthetic else []
        flags += ["--synthetic", *made] if made else []
        for seed in args.seeds:
            out = args.out / "rows" / row.data.name / CLASSIFIER / f"seed{seed}"
            stages.run(
                "classify", out, *flags, "--seed", seed, needs=tuple(path.parent for path in made)
            )
            results.append(read_result(out, row.table, row.data.name, CLASSIFIER, seed))

    context = Context(
        material="the embedded miniature model",
        sites=f"{args.spanish.name} and {args.african.name}",
        phantoms=True,  # the paper's numbers are of 60 times as many images
        recipe="notebook",
        seeds=args.seeds,
        command=f"python {' '.join(sys.argv)}",
        title="FU-LoRA on a hundred real images",
    )
    build(args.out, results, context)
    kept = ~results[0].copies
    fields = ("targets", "predictions", "probabilities", "patients", "centers", "images", "copies")
    distinct = [
        replace(result, **{name: getattr(result, name)[kept] for name in fields})
        for result in results
    ]
    text = "\n".join(
        differences(some, f"{len(some[0].targets)} images") for some in (results, distinct)
    )
    write_text(args.out / "differences.md", text)
    print(text)


if __name__ == "__main__":
    main(parse_args())

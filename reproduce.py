"""FU-LoRA end to end: real images -> LoRA -> synthetic images -> classifiers -> a zero-shot test at another site.

    python reproduce.py                                              # the embedded default: minutes on two CPU cores
    python reproduce.py --model v1-5-pruned.safetensors --spanish FETAL_PLANES_ZENODO --african Zenodo_dataset

The first takes a miniature Stable Diffusion and phantoms of two sites, the second the paper's own material. Each stage
is one run of another script; a stage that is done is not done again. The outcome is report.md in --out.
"""

import argparse
import json
import runpy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from classify import ClassifyError
from classify.data import PlaneImages, batches
from classify.models import load as load_classifier
from classify.train import predict
from eval.features import classifier, features, inception
from eval.figures import save, tsne_figure
from eval.record import record_run, write_atomically
from eval.report import lora_table, zero_shot_table
from eval.tsne import tsne
from ldm.checkpoint import CheckpointError
from ldm.images import ImageError
from lora import LoRAError
from planes import PLANES
from planes.datasets import DatasetError, Record, read_african, read_spanish, read_synthetic, require_images
from planes.phantom import write_african_layout, write_spanish_layout
from samplers import SamplerError

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Scale:
    """How large each stage is, as the flags of its script; what is not named stands at the paper's setting there."""

    es: str  # real images that ES trains on
    hb: str  # and HB, beside the synthetic ones
    train_lora: str
    sample: str
    classify: str


PAPER = Scale(
    es="",  # all 6148
    hb="--per-plane 230",
    train_lora="--rank 128",
    sample="--count 500",
    classify="--model resnet18",
)
EMBEDDED = Scale(
    es="--per-plane 60",
    hb="--per-plane 60",
    train_lora="--target transformer --rank 32 --lr 2e-3 --batch-size 20 --guidance-scale 4",
    sample="--count 20 --guidance-scale 4 --batch-size 20",
    classify="--model resnet18 --size 64 --lr 5e-3 --epochs 15",
)


PHANTOMS = {"train": 60, "patients": 25}  # images per plane at site A; patients per country at site B


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="SD 1.5: a .safetensors file or a diffusers folder (default: the embedded model)")
    add("--tokenizer", type=Path, help="folder with vocab.json and merges.txt, where --model is a single file")
    add("--spanish", type=Path, help="the Spanish dataset (default: phantoms of site A)")
    add("--african", type=Path, help="the African dataset (default: phantoms of site B)")
    add("--weights", help="of the classifiers: imagenet, none or a file (default: imagenet with --model, else none)")
    add("--seed", type=int, default=0)
    add("--device", help="of every stage (default: CUDA where there is one)")
    add("--out", type=Path, default=Path("runs/reproduce"))
    args = parser.parse_args(argv)
    if (args.spanish is None) != (args.african is None):
        parser.error("--spanish and --african belong together: give both, or neither for phantoms")
    return args


class Stages:
    """Runs scripts one after the other; what is there, made with the same arguments, is not made again."""

    def __init__(self, root: Path, *common: object) -> None:
        self.root = root  # every stage has a folder in it
        self.common = common  # flags of every stage
        self.done: set[Path] = set()

    def run(self, script: str, out: Path, *flags: object) -> Path:
        """Run script.py with these flags into `out`, unless it has been; returns `out`."""
        argv = [str(flag) for flag in (*flags, *self.common, "--out", out)]
        print(f"\n$ python {script}.py {' '.join(argv)}", flush=True)
        module = runpy.run_path(str(HERE / f"{script}.py"), run_name="stage")
        args = module["parse_args"](argv)
        if self.is_done(out, args):
            print("done before")
        else:
            self.forget_the_rest()
            module["main"](args)
        self.done.add(out)
        return out

    def forget_the_rest(self) -> None:
        """What was made behind a stage that runs again is stale, also for a later run if this one is killed."""
        for record in self.root.glob("*/args.json"):
            if record.parent not in self.done:
                record.unlink()

    def is_done(self, out: Path, args: argparse.Namespace) -> bool:
        """args.json is what a script writes last."""
        try:
            before = json.loads((out / "args.json").read_text(encoding="utf-8"))["arguments"]
        except (OSError, ValueError, KeyError):
            return False
        return before == json.loads(json.dumps(vars(args), default=str))


def recognised(classifier_file: Path, manifest: Path) -> dict[str, float]:
    """Share of the synthetic images that the classifier takes for the plane of their prompt, by sampler."""
    model, description = load_classifier(classifier_file)
    records = read_synthetic(manifest)
    images = PlaneImages(records, description["size"])
    predictions = predict(model, batches(images, 64), description["input_range"]).argmax(dim=1).numpy()
    hits = predictions == np.array([PLANES.index(record.plane) for record in records])
    centers = np.array([record.center for record in records])
    return {str(sampler): float(hits[centers == sampler].mean()) for sampler in dict.fromkeys(centers)}


def source_figure(records: Mapping[str, list[Record]], classifier_file: Path, path: Path, seed: int) -> str:
    """Figure 3: for each plane, t-SNE of 35 images of each source. Returns which features were embedded."""
    try:
        extractor = inception()
    except ClassifyError as error:
        print(f"t-SNE: {error}; taking the features of our own classifier")
        extractor = classifier(classifier_file)
    rng = np.random.default_rng(seed)
    panels = {}
    for plane in PLANES[:4]:  # the African set has no Other
        chosen = []
        for group in records.values():
            candidates = [record for record in group if record.plane is plane]
            chosen += [candidates[n] for n in rng.permutation(len(candidates))[:35]]
        points = tsne(features(extractor, chosen), seed=seed)
        panels[str(plane)] = (points, [record.source for record in chosen])
    save(tsne_figure(panels, caption=f"t-SNE of {extractor.name}"), path)
    return extractor.name


def write_report(args: argparse.Namespace, results: Mapping, shares: Mapping, feature_name: str) -> None:
    """report.md: the table, what the LoRA does, the pictures."""
    first = next(iter(results.values()))
    material = "the embedded miniature model" if args.model is None else args.model.name
    sites = "phantoms of two sites" if args.spanish is None else f"{args.spanish.name} and {args.african.name}"
    text = f"""# FU-LoRA, reproduced

Made with {material} on {sites}, seed {args.seed}. ES: real images of the first site alone; HB: these and synthetic
ones; DA: augmentation. Tested zero-shot on {first["test"]["images"]} images of {first["test"]["patients"]} patients
of the second site; recall, precision, F-score and AUC are macro averages over the planes present there. In brackets:
95 % intervals by bootstrap over patients.

## Zero-shot classification (table 1)

The authors' metrics, with the AUC of their notebook:

{zero_shot_table(results, "notebook")}

With the plain one-vs-rest AUC:

{zero_shot_table(results, "plain")}

## What the LoRA does

Of the synthetic images, the share that the classifiers of real images alone take for the plane of their prompt, in
percent (chance: {100 / len(PLANES):.0f}):

{lora_table(shares)}

## Samples (figure 2)

![with LoRA](synthetic/contact_sheet.png)

Without LoRA, the same prompts:

![without LoRA](synthetic_without_lora/contact_sheet.png)

## Where the sources lie (figure 3)

Features: {feature_name}.

![t-SNE](tsne.png)
"""
    write_atomically(args.out / "report.md", text)


def main(args):
    spanish, african = args.spanish, args.african
    scale = EMBEDDED if args.model is None else PAPER
    weights = args.weights or ("imagenet" if args.model else "none")
    stages = Stages(args.out, "--seed", args.seed, *(["--device", args.device] if args.device else []))

    # two sites
    if spanish:
        real = [r for r in read_spanish(spanish) if r.train] + [r for r in read_african(african) if not r.train]
        require_images(real)  # hours before the first classifier would miss one
    else:
        spanish, african = args.out / "phantoms" / "spanish", args.out / "phantoms" / "african"
        if not (african / "African_planes_database.csv").exists():
            print("phantoms of two sites", flush=True)
            stages.forget_the_rest()
            write_spanish_layout(spanish, train=PHANTOMS["train"], test=0, seed=args.seed)
            write_african_layout(african, patients=PHANTOMS["patients"], seed=args.seed)

    # LoRA on a hundred images of the first; synthetic images with it and, to see what it does, without it
    model = [f for name in ("model", "tokenizer") if (path := getattr(args, name)) for f in (f"--{name}", path)]
    fine_tune = [*model, "--spanish", spanish, *scale.train_lora.split(), "--resume"]
    draw = [*model, *scale.sample.split()]
    lora = stages.run("train_lora", args.out / "lora", *fine_tune) / "lora.safetensors"
    synthetic = stages.run("sample", args.out / "synthetic", *draw, "--lora", lora) / "manifest.csv"
    without = stages.run("sample", args.out / "synthetic_without_lora", *draw, "--count", 10) / "manifest.csv"

    # classifiers on four data models, tested on the second site, of which nothing was ever trained on
    learn = ["--spanish", spanish, "--african", african, *scale.classify.split(), "--weights", weights]
    es, hb = scale.es.split(), [*scale.hb.split(), "--synthetic", synthetic]
    results = {}
    for name, mix in {"ES": es, "ES+DA": [*es, "--augment"], "HB": hb, "HB+DA": [*hb, "--augment"]}.items():
        out = stages.run("classify", args.out / name.replace("+", "_"), *learn, *mix)
        results[name] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))

    # figures and report
    judge = args.out / "ES_DA" / "model.safetensors"
    shares = {
        f"{name}, {kind}": recognised(args.out / name.replace("+", "_") / "model.safetensors", manifest)
        for name in ("ES", "ES+DA")
        for kind, manifest in (("with LoRA", synthetic), ("without", without))
    }
    sources = {
        "spain": [record for record in read_spanish(spanish) if record.train],
        "africa": [record for record in read_african(african) if not record.train],
        "synthetic": read_synthetic(synthetic),
    }
    feature_name = source_figure(sources, judge, args.out / "tsne.png", args.seed)
    write_report(args, results, shares, feature_name)
    record_run(args.out, args, {})
    print(f"\n{args.out / 'report.md'}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (CheckpointError, ClassifyError, DatasetError, ImageError, LoRAError, SamplerError) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        sys.exit(2)

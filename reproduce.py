"""FU-LoRA end to end: real images -> LoRA -> synthetic images -> classifiers -> a zero-shot test at
another site.

    python reproduce.py --quick                                      # the embedded default: minutes on two CPU cores
    python reproduce.py                                              # every row that --plan lists: over an hour
    python reproduce.py --model v1-5-pruned.safetensors --spanish FETAL_PLANES_ZENODO --african Zenodo_dataset

The first two take a miniature Stable Diffusion and phantoms of two sites, the third the paper's own
material. Each stage is one run of another script; what is done is not done again. The outcome is
report.html (and .md) in --out.
"""

import argparse
import sys
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path

from classify import ClassifyError
from classify.data import RECIPES
from classify.probe import parts
from harness import processes
from harness.files import folder_hash, sha256
from harness.flags import device_name, seed_number
from harness.record import record_environment
from harness.script import alone_in, run
from ldm import CheckpointError
from ldm.cli import add_model_arguments, describe_models, lora_path, model_flags, model_paths
from lora import LoRAError
from paper.material import PHANTOMS, Selections, lists, make_phantoms
from paper.plan import BEYOND_ROWS, CLASSIFIERS, QUICK_ROWS, RANKS, ROWS, Row, choose, probe_rows
from paper.preview import preview
from paper.report import Context, build
from paper.results import ResultError, is_run, read_result, row_folder
from paper.scales import EMBEDDED, PAPER, QUICK, Scale
from paper.stages import Stages, images_hash
from paper.synthetic import Findings, describe
from planes.captions import PROMPTS_FILE
from planes.datasets import DatasetError, read_synthetic, require_images
from planes.record import fetch_synthetic
from samplers import SamplerError

PANEL_COUNT = 18  # of the ranks that only figure 3 shows: 36 of a plane, of which it takes 35
# the sources of their images: a user's own or not
SITES = {False: ("spain", "africa"), True: ("source", "target")}
QUICK_SEEDS = [0, 1, 2]
TOKEN, RARE_TOKEN = "<fetal-us>", "sks"  # Textual Inversion's and DreamBooth's


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.usage = "%(prog)s [flags]"
    add = parser.add_argument
    add_model_arguments(parser)
    parser.set_defaults(model=None)  # the embedded one, at a scale of its own
    add("--spanish", type=Path, help="the Spanish dataset (default: phantoms of site A)")
    add("--african", type=Path, help="the African dataset (default: phantoms of site B)")
    add(
        "--source",
        type=Path,
        help="instead: any site, a folder of images for each class (planes/sites.py)",
    )
    add("--target", type=Path, help="with it: another site of the same classes, that is tested on")
    add(
        "--prompt-template",
        default="an ultrasound image of {class}",
        help="a prompt for each class of --source",
    )
    add(
        "--manifests",
        type=Path,
        help="folder with the authors' lists of images (default: drawn by the same rules)",
    )
    add(
        "--synthetic",
        type=Path,
        help="a list of synthetic images to take instead of making them, or zenodo: the authors'",
    )
    add(
        "--lora", type=lora_path, help="a LoRA to take instead of training one: a file, or a hub id"
    )
    add(
        "--recipe",
        choices=RECIPES,
        default="paper",
        help="of the classifiers: the paper's, or its notebook's (paper)",
    )
    add(
        "--weights",
        help=(
            "of the classifiers: imagenet, none or a file (default: imagenet with --model, else"
            " none)"
        ),
    )
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="ROW",
        help='some rows: "HB+DA/ResNet18", HB+DA, resnet18, "table 2"',
    )
    add(
        "--quick",
        action="store_true",
        help="ResNet18 on six data models, three seeds, fewer synthetic images",
    )
    add(
        "--probe",
        nargs="+",
        default=[],
        metavar="KIND:MODEL",
        help="rows of frozen models: probe:ID, knn:ID, prompts:ID",
    )
    add(
        "--beyond",
        action="store_true",
        help="also detailed prompts, Textual Inversion and DreamBooth",
    )
    add(
        "--plan",
        action="store_true",
        help="print the rows, what they need and what is missing here; run nothing",
    )
    add(
        "--seeds",
        type=seed_number,
        nargs="+",
        help="of the classifiers: each row is run with each (0; --quick: 0 1 2)",
    )
    add(
        "--seed",
        type=seed_number,
        default=0,
        help="of selections, phantoms, the LoRAs and the synthetic images (0)",
    )
    add("--device", type=device_name, help="of every stage (default: CUDA where there is one)")
    add("--out", type=Path, default=Path("runs/reproduce"))
    args = parser.parse_args(argv)
    if (args.spanish is None) != (args.african is None):
        parser.error("--spanish and --african belong together: give both, or neither for phantoms")
    if (args.source is None) != (args.target is None) or (args.source and args.spanish):
        parser.error(
            "--source and --target belong together, and not to --spanish and --african: give two of"
            " a kind"
        )
    if args.manifests and not args.spanish:
        parser.error("--manifests lists real images: give --spanish and --african too")
    if bad := next((name for name in args.probe if not parts(name)[0]), None):
        parser.error(
            f"--probe {bad}: say what is done with it, as in probe:{bad}, knn:{bad} or"
            f" prompts:{bad}"
        )
    args.seeds = args.seeds or (QUICK_SEEDS if args.quick else [0])
    args.weights = args.weights or ("imagenet" if args.model else "none")
    try:
        rows = (
            (QUICK_ROWS if args.quick else ROWS)
            + (BEYOND_ROWS if args.beyond else ())
            + probe_rows(args.probe)
        )
        args.rows = choose(rows, args.only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    return args


class Experiment:
    """The stages of one reproduction, each with its flags; folders are the methods' results."""

    def __init__(self, args, scale: Scale, selections: Selections):
        self.args, self.scale, self.selections, self.digest = (
            args,
            scale,
            selections,
            selections.digest,
        )
        self.owners: dict[Path, int] = {}  # of LoRAs: which process of torchrun trains them
        self.stages = Stages(
            partial(print, flush=True), *(["--device", args.device] if args.device else [])
        )
        self.model = model_flags(args)
        self.phantoms = () if args.spanish or args.source else (args.out / "phantoms",)

    @cached_property
    def model_hashes(self) -> dict[str, str]:
        return {part: folder_hash(path) for part, path in model_paths(self.args).items()}

    def lora(
        self, rank: int, name: str = "lora", *flags: object, needs: tuple[Path, ...] = ()
    ) -> Path:
        """The LoRA's file."""
        if self.args.lora and name in ("lora", "lora_styles"):
            return self.args.lora
        flags = (
            *self.model,
            *self.selections.flags("lora"),
            *self.scale.train_lora.split(),
            *flags,
        )
        flags += ("--prompt-template", self.args.prompt_template) if self.args.source else ()
        flags += (
            "--repeats",
            self.scale.repeats,
            "--seed",
            self.args.seed,
            "--rank",
            rank,
            "--resume",
        )
        flags += ("--lr", self.scale.rates[rank]) if rank in self.scale.rates else ()
        out, inputs = (
            self.args.out / f"{name}_r{rank}",
            {"images": self.digest("lora"), **self.model_hashes},
        )
        by = self.owners.setdefault(out, len(self.owners) % processes.size())
        self.stages.run(
            "train_lora", out, *flags, needs=(*needs, *self.phantoms), inputs=inputs, by=by
        )
        return out / "lora.safetensors"

    def styles_lora(self) -> Path:
        return self.lora(self.scale.rank, "lora_styles", "--style-words")

    def draw(
        self,
        name: str,
        count: int,
        *flags: object,
        needs: tuple[Path, ...] = (),
        lora: Path | None = None,
    ) -> Path:
        """The folder of the images."""
        flags = (
            *self.model,
            *self.scale.sample.split(),
            "--count",
            count,
            "--seed",
            self.args.seed,
            *flags,
        )
        processes.barrier()  # for LoRAs that others train
        flags, inputs = (*flags, *(["--lora", lora] if lora else [])), dict(self.model_hashes)
        if lora and lora == self.args.lora:
            inputs["lora"] = folder_hash(lora)
        elif lora:
            needs = (*needs, lora.parent)
        return self.stages.run("sample", self.args.out / name, *flags, needs=needs, inputs=inputs)

    def lora_images(self, rank: int) -> Path:
        """Synthetic images by the LoRA of this rank: those to train on, or the fewer that figure 3
        needs."""
        lora = self.lora(rank)
        count = self.scale.count if rank == self.scale.rank else PANEL_COUNT
        return self.draw(f"synthetic_r{rank}", count, lora=lora)

    def images_without_lora(self) -> Path:
        # whose run says what the classes are called
        lora = self.lora(self.scale.rank) if self.args.source else None
        flags = ["--prompts", lora.parent / PROMPTS_FILE] if lora else []
        return self.draw("synthetic_without_lora", 10, *flags, needs=(lora.parent,) if lora else ())

    @cache  # noqa: B019 (one Experiment a run): the processes of torchrun meet to draw, and would at every row
    def synthetic(self, kind: str) -> Path:
        """The list of synthetic images of this kind (paper.plan.DataModel), made if need be."""
        rank = self.scale.rank
        if kind == "lora":
            return self.args.synthetic or self.lora_images(rank) / "manifest.csv"
        if kind == "styles":
            lora, flags = self.styles_lora(), ["--prompts", "styles"]
        elif kind == "prompts":
            lora, flags = self.lora(rank), ["--prompts", "detailed"]
        elif kind == "token":
            lora = self.lora(rank, "token", "--learn-token", TOKEN)
            flags = ["--embedding", lora.parent / "embedding.safetensors"]
        else:
            prior = self.images_without_lora()
            lora = self.lora(
                rank,
                "dreambooth",
                "--rare-token",
                RARE_TOKEN,
                "--prior",
                prior / "manifest.csv",
                needs=(prior,),
            )
            flags = ["--rare-token", RARE_TOKEN]
        return self.draw(f"synthetic_{kind}", self.scale.count, *flags, lora=lora) / "manifest.csv"

    def classify(self, row: Row, seed: int, by: int = 0) -> Path:
        """Train and test one row with one seed. by: the process of torchrun that does it."""
        data, args = row.data, self.args
        second = "--target" if args.source else "--african"
        flags = [
            second,
            self.selections.roots[1],
            "--model",
            row.classifier,
            "--weights",
            args.weights,
        ]
        flags += ["--recipe", args.recipe, *self.scale.classify.split(), "--seed", seed]
        flags += [] if row.classifier in CLASSIFIERS else ["--features", args.out / "features"]
        needs, inputs = self.phantoms, {"african": self.digest("african")}
        if data.spanish:
            inputs["spanish"] = self.digest(data.spanish)
            flags += self.selections.flags(data.spanish)
            if self.scale is PAPER and args.recipe == "paper" and not args.source:
                flags += ["--validation", 200]
        if data.synthetic:
            manifest = self.synthetic(data.synthetic)
            inputs["synthetic"] = images_hash(manifest, self.selections.classes)
            flags += ["--synthetic", manifest]
            needs = (*needs, manifest.parent) if (manifest.parent / "args.json").exists() else needs
        flags += ["--african-train"] * data.african + ["--augment"] * data.augment
        flags += ["--contrast"] * data.contrast + ["--balanced-sampling"] * data.balanced_sampling
        if row.classifier in self.scale.passes:
            flags += ["--passes", self.scale.passes[row.classifier]]
        out = row_folder(args.out, data.name, row.classifier, seed)
        inputs |= {"weights": sha256(Path(args.weights))} if Path(args.weights).is_file() else {}
        return self.stages.run(
            "classify", out, *flags, "--resume", needs=needs, inputs=inputs, by=by
        )


def write_report(
    args, experiment: Experiment, selections: Selections, results, panels, without
) -> None:
    """report.html, report.md, results.csv, figures/ and environment.json."""
    material = "the embedded miniature model" if args.model is None else Path(args.model).name
    roots, own = selections.roots, bool(args.source)
    sites = (
        f"{roots[0].name} and {roots[1].name}" if args.spanish or own else "phantoms of two sites"
    )
    command, left_out = f"python {' '.join(sys.argv)}", experiment.scale.left_out
    context = Context(
        material, sites, args.spanish is None, args.recipe, args.seeds, command, left_out=left_out
    )
    if own:
        context = replace(
            context, own=True, title=f"FU-LoRA from {roots[0].name} to {roots[1].name}"
        )
    found, synthetic_of = (
        Findings(),
        lambda folder: read_synthetic(folder / "manifest.csv", selections.classes),
    )
    if panels:
        seed = args.seeds[0]
        files = {
            name: row_folder(args.out, name, "resnet18", seed) / "model.safetensors"
            for name in ("ES", "ES+DA")
        }
        found = describe(
            args.out,
            dict(zip(SITES[own], (selections.spanish("all"), selections.african(train=False)))),
            selections.spanish("lora"),
            {rank: synthetic_of(folder) for rank, folder in panels.items()},
            experiment.scale.rank,
            {name: file for name, file in files.items() if file.exists()},
            synthetic_of(without),
            args.seed,
            selections.classes,
        )
    context = replace(context, notes=found.notes)
    files = [
        *selections.tables(),
        *selections.manifests.values(),
        args.model,
        args.vae,
        args.synthetic,
        args.weights,
    ]
    record_environment(
        args.out, args, {str(path): sha256(path) for path in files if path and Path(path).is_file()}
    )
    build(
        args.out,
        results,
        context,
        quality=found.quality,
        recognised=found.recognised or None,
        figures=found.figures,
    )


def main(args):
    """What --plan says, or all of it."""
    scale = PAPER if args.model else QUICK if args.quick else EMBEDDED
    given = (args.source, args.target) if args.source else (args.spanish, args.african)
    select = partial(
        Selections, manifests=lists(args.manifests), per_plane=scale.per_plane, seed=args.seed
    )
    select = partial(select, own=bool(args.source))
    if args.plan:
        selections = select(given) if given[0] else None
        done = partial(is_run, args.out)
        print(
            preview(args, scale, selections, describe_models(args), full=scale is PAPER, done=done)
        )
    else:
        with alone_in(args.out, together=True):
            # the first of several processes makes and fetches, the others find it there
            for turn in (True, False):
                if processes.is_first() is turn and not given[0]:
                    print("phantoms of two sites", flush=True)
                    given = make_phantoms(args.out / "phantoms", args.seed, PHANTOMS)
                if (
                    processes.is_first() is turn
                    and str(args.synthetic) == "zenodo"
                    and not args.synthetic.exists()
                ):
                    args.synthetic = fetch_synthetic(args.out / "zenodo", args.manifests)
                processes.barrier()
            reproduce(args, scale, select(given))


def reproduce(args, scale: Scale, selections: Selections) -> None:
    """LoRAs, images, rows, report: whatever of it is not done yet."""
    kinds = dict.fromkeys([row.data.spanish for row in args.rows if row.data.spanish] + ["lora"])
    # hours before one would be missed
    require_images(record for kind in kinds for record in selections.spanish(kind))
    require_images(selections.african(train=True) + selections.african(train=False))

    # LoRAs of three ranks and their images; then every row, tested on the second site
    experiment = Experiment(args, scale, selections)
    panels, without = {}, None
    if not args.only and not args.synthetic:
        widths = (scale.rank,) if args.quick or args.lora else RANKS
        for width in widths:
            experiment.lora(width)
        experiment.styles_lora()
        panels, without = (
            {rank: experiment.lora_images(rank) for rank in widths},
            experiment.images_without_lora(),
        )
    rows = [row for row in args.rows if not row.data.african or selections.african(train=True)]
    if left_out := [row.name for row in args.rows if row not in rows]:
        print(f"left out, as the second site has no training images: {', '.join(left_out)}")
    runs = [(row, seed) for row in rows for seed in args.seeds]
    folders = [experiment.classify(*run, by=n % processes.size()) for n, run in enumerate(runs)]
    processes.barrier()
    if not processes.is_first():
        return
    results = [
        read_result(f, row.table, row.data.name, row.classifier, s)
        for f, (row, s) in zip(folders, runs)
    ]
    write_report(args, experiment, selections, results, panels, without)
    print(f"\n{args.out / 'report.html'}")


if __name__ == "__main__":
    run(
        parse_args,
        main,
        CheckpointError,
        ClassifyError,
        DatasetError,
        LoRAError,
        ResultError,
        SamplerError,
    )

"""FU-LoRA end to end: real images -> LoRA -> synthetic images -> classifiers -> a zero-shot test at
another site.

    python reproduce.py --quick    # the embedded default: minutes on two CPU cores
    python reproduce.py            # every row that --plan lists: over an hour
    python reproduce.py --model v1-5-pruned.safetensors --tokenizer openai/clip-vit-large-patch14 \\
        --spanish FETAL_PLANES_ZENODO --african Zenodo_dataset

The first two take a miniature Stable Diffusion and phantoms of two sites, the third the paper's own
material. Each stage is one run of another script; what is done is not done again. The work is
shared by as many processes as there are GPUs, or cores. The outcome is report.html (and .md) in
--out.
"""

import argparse
import os
import shlex
import sys
from functools import cache, cached_property, partial
from itertools import pairwise
from pathlib import Path

import torch

from classify import ClassifyError
from classify.data import RECIPES
from classify.models import MODELS, read_weights
from harness import processes
from harness.files import folder_hash, sha256, sha256_of_all
from harness.flags import TEMPLATE, HelpFormatter, device_name, require_at_least, seed_number
from harness.record import record_environment
from harness.script import alone_in, run
from ldm import CheckpointError
from ldm.cli import add_model_arguments, lora_path, model_flags, model_paths
from lora import LoRAError
from paper.gain import JUDGE
from paper.material import Selections, make_phantoms
from paper.plan import (
    BEYOND_ROWS,
    CLASSIFIERS,
    EMBEDDED,
    PAPER,
    QUICK,
    QUICK_ROWS,
    ROWS,
    Row,
    Scale,
    choose,
    image_kinds,
    probe_rows,
)
from paper.preview import DRAW, LEARN, count_stages, figure_ranks, preview, worth_starting
from paper.report import Context, build
from paper.results import ResultError, read_result, row_folder
from paper.stages import Stages
from paper.synthetic import describe
from planes.captions import PROMPTS_FILE, prompts_file, read_prompts, write_prompts
from planes.datasets import DatasetError, read_synthetic, require_images
from planes.download import fetch_synthetic
from planes.sites import prompts_of
from planes.survey import survey
from samplers import SamplerError

PANEL_COUNT = 18  # of the ranks that only figure 3 shows: 36 of a class, of which it takes 35
TOKEN, RARE_TOKEN = "<fetal-us>", "sks"  # Textual Inversion's and DreamBooth's


PROCESSES = argparse.ArgumentParser(add_help=False)
"""The flag that says who does the work, and nothing of what comes out."""
PROCESSES.add_argument(
    "--processes", type=int, help="that share the work (else: one to a GPU, or to a core)"
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, parents=[PROCESSES]
    )
    parser.usage = "%(prog)s [flags]"
    add_model_arguments(parser)
    parser.set_defaults(model=None)  # the embedded one, at a scale of its own
    add = parser.add_argument_group("data").add_argument
    add("--spanish", type=Path, help="the Spanish dataset (else: phantoms of site A)")
    add("--african", type=Path, help="the African dataset (else: phantoms of site B)")
    add("--source", type=Path, help="instead: any site, a folder of images for each class")
    add("--target", type=Path, help="with it: another site of the same classes, the test")
    add("--prompt-template", **TEMPLATE)
    add("--manifests", type=Path, help="folder with the authors' lists of images (else: drawn)")
    add("--synthetic", type=Path, help="a list of images instead of making them, or zenodo")
    add("--lora", type=lora_path, help="a LoRA instead of training one: a file, or a hub id")
    add = parser.add_argument_group("rows").add_argument
    rows = 'some rows: "HB+DA/ResNet18", HB+DA, resnet18, "table 2"'
    add("--only", nargs="+", default=[], metavar="ROW", help=rows)
    add("--quick", action="store_true", help="ResNet18, six data models, fewer synthetic images")
    add("--probe", nargs="+", default=[], metavar="ID", help="rows of frozen models too")
    add("--beyond", action="store_true", help="detailed prompts, Textual Inversion, DreamBooth too")
    add("--plan", action="store_true", help="print the rows and what is missing; run nothing")
    add("--recipe", choices=RECIPES, default="paper", help="of the classifiers")
    weights = "of the classifiers: imagenet, none or a file (else: imagenet with --model, or none)"
    add("--weights", help=weights)
    add("--seeds", type=seed_number, nargs="+", help="of each row (else: 0, with --quick 0 1 2)")
    add = parser.add_argument_group("machine and output").add_argument
    add("--seed", type=seed_number, default=0, help="of selections, phantoms, LoRAs, images")
    add("--device", type=device_name, help="of every stage (else: CUDA where there is one)")
    add("--out", type=Path, default=Path("runs/reproduce"), help="a folder")
    args = parser.parse_args(argv)
    if (args.spanish is None) != (args.african is None):
        parser.error("--spanish and --african belong together: give both, or neither for phantoms")
    if (args.source is None) != (args.target is None) or (args.source and args.spanish):
        parser.error("--source and --target belong together, and not to --spanish and --african")
    if args.manifests and not args.spanish:
        parser.error("--manifests lists real images: give --spanish and --african too")
    if args.prompt_template and not args.source:
        parser.error("--prompt-template belongs to --source")
    require_at_least(parser, args, 1, "processes")
    args.seeds = [*dict.fromkeys(args.seeds or ([0, 1, 2] if args.quick else [0]))]
    args.weights = args.weights or ("imagenet" if args.model else "none")
    rows = [row for row in ROWS if row.classifier == "resnet18" or not args.quick]
    rows = [*(QUICK_ROWS if args.quick and not args.only else rows), *BEYOND_ROWS * args.beyond]
    if args.source:  # nobody has written detailed prompts, nor taught other LoRAs style words
        unknown = "prompts", "styles" if args.lora else "prompts"
        rows = [row for row in rows if row.data.synthetic not in unknown]
    try:
        args.rows = choose([*rows, *probe_rows(args.probe)], args.only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    return args


class Experiment:
    """The stages of one reproduction, each with its flags; folders are the methods' results."""

    def __init__(self, args, scale: Scale, selections: Selections):
        self.args, self.scale, self.selections = args, scale, selections
        self.owners: dict[Path, int] = {}  # of LoRAs: which process of torchrun trains them
        say = partial(print, flush=True)
        common = ["--device", args.device] if args.device else []
        rows = [row for row in args.rows if selections.can_train(row)]
        self.stages = Stages(say, *common, ahead=count_stages(args, scale, rows))

    @cached_property
    def model_hashes(self) -> dict[str, str]:
        return {part: folder_hash(path) for part, path in model_paths(self.args).items()}

    @cache  # noqa: B019 (one Experiment a run), for rows that share a list
    def images_hash(self, manifest: Path) -> str:
        """One hash of a list of synthetic images and of the images."""
        records = read_synthetic(manifest, self.selections.classes)
        return sha256_of_all([manifest, *(record.path for record in records)])

    def learn(self, script: str, name: str, *flags: object, **inputs: str) -> Path:
        """The folder of what a script learned from the LoRA's images. inputs: hashes of what it
        reads besides."""
        args, out = self.args, self.args.out / name
        flags += (*model_flags(args), *self.selections.flags("lora"), "--seed", args.seed)
        flags += ("--prompt-template", args.prompt_template) if args.source else ()
        inputs |= {"images": self.selections.digest("lora"), **self.model_hashes}
        by = self.owners.setdefault(out, len(self.owners) % processes.size())
        return self.stages.run(script, out, *flags, inputs=inputs, by=by, what=LEARN)

    def lora(self, rank: int, styles: bool = False) -> Path:
        """The LoRA's file. styles: by captions that also say brightness and contrast."""
        if self.args.lora:
            return self.args.lora
        flags = (*self.scale.train_lora.split(), "--repeats", self.scale.repeats, "--rank", rank)
        flags += ("--lr", self.scale.rates[rank]) if rank in self.scale.rates else ()
        flags += ("--style-words",) * styles + ("--resume",)
        name = f"lora{'_styles' * styles}_r{rank}"
        return self.learn("train_lora", name, *flags) / "lora.safetensors"

    def called(self, rank: int) -> str:
        """The LoRA of this rank, or the one that is given, as figures name it."""
        return Path(self.args.lora).name if self.args.lora else f"r = {rank}"

    def beyond(self, method: str, token: str, *flags: object, **inputs: str) -> Path:
        """The folder of what Textual Inversion or DreamBooth learned."""
        flags += ("--token", token, "--rank", self.scale.rank, *self.scale.beyond.split())
        return self.learn("beyond", method, method, *flags, **inputs)

    def words(self) -> tuple[object, ...]:
        """--prompts of sample.py for an own site's classes: the file beside the LoRA that is given,
        or the one in --out."""
        if not self.args.source:
            return ()
        beside = not self.args.prompt_template and prompts_file([self.args.lora])
        return "--prompts", beside or self.args.out / PROMPTS_FILE

    def draw(self, name: str, count: int, *flags: object) -> Path:
        """The folder of the images."""
        flags += () if "--prompts" in flags else self.words()
        processes.barrier()  # for files that others make
        flags += (*model_flags(self.args), *self.scale.sample.split(), "--count", count)
        inputs = self.model_hashes | {
            flag.strip("-"): folder_hash(path)
            for flag, path in pairwise(flags)
            if isinstance(path, Path)
        }
        flags += ("--seed", self.args.seed)
        return self.stages.run("sample", self.args.out / name, *flags, inputs=inputs, what=DRAW)

    def lora_images(self, rank: int) -> Path:
        """Synthetic images by the LoRA of this rank: those to train on, or the fewer that figure 3
        needs."""
        count = self.scale.count if rank == self.scale.rank else PANEL_COUNT
        return self.draw(f"synthetic_r{rank}", count, "--lora", self.lora(rank))

    def images_without_lora(self) -> Path:
        return self.draw("synthetic_without_lora", self.scale.without)

    @cache  # noqa: B019 (one a run), as the processes of torchrun meet to draw
    def synthetic(self, kind: str) -> Path:
        """The list of synthetic images of this kind (paper.plan.DataModel), made if need be."""
        rank = self.scale.rank
        if kind == "lora":
            return self.args.synthetic or self.lora_images(rank) / "manifest.csv"
        if kind == "styles":
            flags = ("--prompts", "styles", "--lora", self.lora(rank, styles=True))
        elif kind == "prompts":
            flags = ("--prompts", "detailed", "--lora", self.lora(rank))
        elif kind == "token":
            embedding = self.beyond("inversion", TOKEN) / "embedding.safetensors"
            flags = ("--embedding", embedding, "--lora", self.lora(rank))
        else:
            prior = self.images_without_lora() / "manifest.csv"
            hashed = self.images_hash(prior)
            learned = self.beyond("dreambooth", RARE_TOKEN, "--prior", prior, prior=hashed)
            flags = ("--rare-token", RARE_TOKEN, "--lora", learned / "lora.safetensors")
        return self.draw(f"synthetic_{kind}", self.scale.count, *flags) / "manifest.csv"

    def classify(self, row: Row, seed: int, by: int = 0) -> Path:
        """Train and test one row with one seed. by: the process of torchrun that does it."""
        data, args, scale, selections = row.data, self.args, self.scale, self.selections
        flags = ["--target" if args.source else "--african", selections.roots[1]]
        flags += ["--model", row.classifier, "--weights", args.weights, "--recipe", args.recipe]
        flags += [*scale.classify.split(), "--seed", seed, "--resume"]
        inputs = {"african": selections.digest("target")}
        if data.source:
            inputs["spanish"] = selections.digest(data.source)
            flags += selections.flags(data.source)
            if scale is PAPER and args.recipe == "paper" and not args.source:
                flags += ["--validation", 200]
        if data.synthetic:
            manifest = self.synthetic(data.synthetic)
            inputs["synthetic"] = self.images_hash(manifest)
            flags += ["--synthetic", manifest]
        if Path(args.weights).is_file():
            inputs["weights"] = sha256(Path(args.weights))
        flags += [*data.flags.split(), *["--african-train"] * data.target]
        if row.classifier in scale.passes:
            flags += ["--passes", scale.passes[row.classifier]]
        if row.classifier not in CLASSIFIERS:
            flags += ["--features", args.out / "features"]
        out = row_folder(args.out, data.name, row.classifier, seed)
        return self.stages.run("classify", out, *flags, inputs=inputs, by=by, what=row.classifier)


def look(args, scale: Scale, selections: Selections | None, say=None) -> str:
    """What two own sites hold, in words. say: is told the odd, at the start of a run, which writes
    their prompts. Raises DatasetError for what a later stage would refuse."""
    if not selections or not selections.own:
        return ""
    template, count = args.prompt_template, scale.per_plane["lora"]
    given = {"", "lora" if args.synthetic else ""}
    if not {row.data.synthetic for row in args.rows} - given and (args.only or args.synthetic):
        count = 0  # nothing is drawn
    elif not (template or args.beyond) and args.lora and (file := prompts_file([args.lora])):
        read_prompts(str(file), dict.fromkeys(selections.classes))
    else:
        prompts = prompts_of(selections.classes, template)
        if say and processes.is_first():
            write_prompts(args.out, prompts)
    sites = list(zip(selections.roots, (selections.first, selections.second)))
    return f"{survey(sites, per_class=0 if args.lora else count, fewer=True, say=say)}\n\n"


def main(args):
    """What --plan says, or all of it."""
    scale = PAPER if args.model else QUICK if args.quick else EMBEDDED
    roots = (args.source, args.target) if args.source else (args.spanish, args.african)
    choice = args.manifests, scale.per_plane, args.seed, bool(args.source)
    if args.plan:
        selections = Selections(roots, *choice) if roots[0] else None
        print(look(args, scale, selections) + preview(args, scale, selections))
        return
    if work_is_shared(args):
        return
    with alone_in(args.out):
        if not roots[0]:
            print("phantoms of two sites", flush=True)
            roots = make_phantoms(args.out / "phantoms", args.seed)
        # the first of several processes fetches, the others find it there
        for turn in (True, False):
            if processes.is_first() is turn:
                if args.synthetic == Path("zenodo"):
                    args.synthetic = fetch_synthetic(args.out / "zenodo", args.manifests)
                for name in {row.classifier for row in args.rows} & {*MODELS}:
                    if args.weights != "none":  # hours before they would be missed
                        read_weights(name, args.weights)
            processes.barrier()
        reproduce(
            args, scale, Selections(roots, *choice, phantoms=not (args.spanish or args.source))
        )


def work_is_shared(args) -> bool:
    """Starts as many processes as pay, says how many and why, and waits until they have done all;
    or does none of it, where this is one of them already, or is best alone."""
    if "WORLD_SIZE" in os.environ or (sys.platform == "win32" and not args.processes):
        return False  # there, torch's launcher works with some of its builds
    count, threads, why = worth_starting(args)
    print(f"{count} process{'es' * (count > 1)} at work, {why}", flush=True)
    if count == 1 and threads in (0, torch.get_num_threads()):
        return False
    processes.launch(count, sys.argv)
    return True


def reproduce(args, scale: Scale, selections: Selections) -> None:
    """LoRAs, images, rows, report: whatever of it is not done yet."""
    # hours before something would be missed
    look(args, scale, selections, partial(print, flush=True))
    for kind in image_kinds(args.rows):
        require_images(selections.images(kind))

    # LoRAs of three ranks and their images; then every row, tested on the second site
    experiment, panels, without = Experiment(args, scale, selections), {}, None
    if ranks := figure_ranks(args, scale):
        for rank in ranks:
            experiment.lora(rank)
        experiment.lora(scale.rank, styles=True)
        panels = {experiment.called(rank): experiment.lora_images(rank) for rank in ranks}
        without = experiment.images_without_lora()
    rows = [row for row in args.rows if selections.can_train(row)]
    if left_out := [row.name for row in args.rows if row not in rows]:
        print(f"left out, as the second site has no training images: {', '.join(left_out)}")
    runs = [(row, seed) for row in rows for seed in args.seeds]
    for n, (row, seed) in enumerate(runs):
        # shifted, or a process would have all of the slowest classifier
        experiment.classify(row, seed, by=(n + n // processes.size()) % processes.size())
    processes.barrier()
    if not processes.is_first():
        return

    # report.html, report.md, results.csv, figures/ and environment.json
    results = [read_result(args.out, *run) for run in runs]
    names = selections.names
    material = "the embedded miniature model" if args.model is None else Path(args.model).name
    if args.synthetic:
        material = f"{args.synthetic}, in place of plain ones by {material}"
    context = Context(
        material,
        "phantoms, procedural ultrasound images" if selections.phantoms else " and ".join(names),
        f"python {shlex.join(PROCESSES.parse_known_args(sys.argv)[1])}",
        scale.left_out if args.weights == "none" else {},
        names=tuple(names),
        own=args.source is not None,
        tests=selections.target(train=False),
        compared=args.spanish is not None,
    )
    files = args.model, args.vae, args.synthetic, args.lora, args.weights
    hashes = {str(path): sha256(path) for path in files if path and Path(path).is_file()}
    hashes |= {site: selections.digest(kind) for site, kind in zip(names, ("all", "target"))}
    del args.processes  # of which nothing here depends
    record_environment(args.out, args, hashes)
    judges = {
        row.data.name: row_folder(args.out, row.data.name, JUDGE, args.seeds[0])
        for row in rows
        if row.classifier == JUDGE and row.data.name in ("ES", "ES+DA")
    }
    judges = {name: folder / "model.safetensors" for name, folder in judges.items()}
    about = selections, panels, experiment.called(scale.rank), without, judges
    build(args.out, results, context, describe(args.out, *about) if panels else None)
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
        together=True,
    )

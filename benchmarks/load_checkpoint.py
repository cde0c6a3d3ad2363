"""Loading Stable Diffusion 1.5 from one half-precision file: this package beside diffusers, in time
and memory.

    python benchmarks/load_checkpoint.py                 # a 2.1 GB file of random weights, removed afterwards
    python benchmarks/load_checkpoint.py --folder /scratch --repeats 5 --dtype fp32

Each reading is a fresh process, the two loaders take turns, and the file is in the page cache.
Weights that are mapped from the file are not read before they are used, so a second column adds one
pass over all of them. Memory is counted above what the process held after its imports, as a
multiple of the file: resident memory with the mapped pages of the file, which the system may drop,
and anonymous memory, which it may not.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice, product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LOADERS = ("ours", "diffusers")
DTYPES = {"fp16": "float16", "fp32": "float32"}
VOCABULARY, MARKS = 49408, ("<|startoftext|>", "<|endoftext|>")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--folder",
        type=Path,
        help="where the file is written for the time being (default: a temporary folder)",
    )
    add("--dtype", choices=DTYPES, default="fp16", help="to load into; the file is fp16 (fp16)")
    add("--repeats", type=int, default=5, help="processes of each loader (5)")
    add("--loader", choices=LOADERS, help=argparse.SUPPRESS)  # one reading, in a process of its own
    return parser.parse_args(argv)


def write_tokenizer(folder: Path) -> None:
    """A vocabulary of CLIP's format and size: 256 letters, each also at a word's end, pairs of
    them, and the marks."""
    letters = [chr(code) for code in range(0x100, 0x200)]
    pairs = list(islice(product(letters, letters), VOCABULARY - 2 * len(letters) - len(MARKS)))
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, pairs), *MARKS]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: n for n, token in enumerate(tokens)}), encoding="utf-8"
    )
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs), encoding="utf-8"
    )
    marks = {
        "bos_token": MARKS[0],
        "eos_token": MARKS[1],
        "pad_token": MARKS[1],
        "unk_token": MARKS[1],
    }
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77} | marks
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_material(folder: Path) -> None:
    """The checkpoint, all 1131 tensors of it, and a diffusers folder without weights, for the
    configs and tokenizer."""
    import torch
    from safetensors.torch import save_file

    from ldm.checkpoints import NETWORKS
    from ldm.checkpoints.folder import Config, write_config
    from ldm.checkpoints.single_file import single_file_tensors

    config = Config()
    with torch.device("meta"):
        networks = {name: build(getattr(config, name)) for name, build in NETWORKS.items()}
    generator = torch.Generator().manual_seed(0)

    def weight(shape: torch.Size, is_norm: bool) -> torch.Tensor:
        """As a network begins with, so that what it says is finite in float16."""
        if len(shape) == 1:
            return torch.full(shape, float(is_norm), dtype=torch.float16)
        bound = shape[1:].numel() ** -0.5
        return torch.empty(shape, dtype=torch.float16).uniform_(-bound, bound, generator=generator)

    state = {
        f"{name}.{key}": weight(value.shape, key.endswith("weight"))
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }
    tensors = single_file_tensors(config, state)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[
        None
    ]
    save_file(tensors, folder / "sd.safetensors")
    write_config(folder / "config", config)
    write_tokenizer(folder / "config" / "tokenizer")


class Memory:
    """Peaks of resident and of anonymous memory above those at the beginning, in bytes."""

    def __enter__(self):
        self.peak = self.start = self._now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.done.set()
        self.thread.join()
        self.resident, self.anonymous = (peak - start for peak, start in zip(self.peak, self.start))

    def _watch(self):
        while not self.done.wait(0.005):
            self.peak = tuple(map(max, self.peak, self._now()))

    @staticmethod
    def _now() -> tuple[int, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = {
            line.split(":")[0]: line.split()[1]
            for line in lines
            if line.startswith(("VmRSS", "RssAnon"))
        }
        return int(sizes["VmRSS"]) * 1024, int(sizes["RssAnon"]) * 1024


def read_once(loader: str, folder: Path, dtype_name: str) -> dict[str, float]:
    """Load the checkpoint in this process: seconds and bytes."""
    start = time.perf_counter()
    import torch

    dtype = getattr(torch, DTYPES[dtype_name])
    if loader == "ours":
        from ldm.checkpoints import load
    else:
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        from diffusers import StableDiffusionPipeline
    # else a sweep of what the imports left would fall into one loader's time or the other's
    gc.collect()
    imported = time.perf_counter()
    with Memory() as memory:
        begin = time.perf_counter()
        if loader == "ours":
            model = load(
                folder / "sd.safetensors", dtype=dtype, tokenizer=folder / "config" / "tokenizer"
            )
        else:
            model = StableDiffusionPipeline.from_single_file(
                str(folder / "sd.safetensors"),
                config=str(folder / "config"),
                torch_dtype=dtype,
                local_files_only=True,
            )
        loaded = time.perf_counter()
        torch.set_num_threads(1)  # the pass waits for pages, not for arithmetic
        for network in (model.unet, model.vae, model.text_encoder):
            for parameter in network.parameters():
                parameter.view(torch.int16 if dtype_name == "fp16" else torch.int32).max()
        passed = time.perf_counter()
    return {
        "imports": imported - start,
        "load": loaded - begin,
        "pass": passed - begin,
        "resident": memory.resident,
        "anonymous": memory.anonymous,
    }


def measure(folder: Path, args) -> dict[str, list[dict[str, float]]]:
    """Readings of each loader, taken in turn."""
    readings = {loader: [] for loader in LOADERS}
    for _ in range(args.repeats):
        for loader in LOADERS:
            command = [
                sys.executable,
                __file__,
                "--loader",
                loader,
                "--folder",
                str(folder),
                "--dtype",
                args.dtype,
            ]
            outcome = subprocess.run(command, check=True, capture_output=True, text=True)
            readings[loader].append(json.loads(outcome.stdout.splitlines()[-1]))
    return readings


def table(readings: dict[str, list[dict[str, float]]], size: int) -> str:
    """Times as medians, with the least and the greatest; memory as the greatest reading."""
    heads = (
        "imports, s",
        "load, s",
        "load and one pass, s",
        "peak resident / file",
        "peak anonymous / file",
    )
    rows = ["".join(head.rjust(22) for head in ("", *heads))]
    for loader, taken in readings.items():
        cells = [loader]
        for name in ("imports", "load", "pass"):
            seconds = sorted(reading[name] for reading in taken)
            cells.append(f"{statistics.median(seconds):.2f} ({seconds[0]:.2f}..{seconds[-1]:.2f})")
        cells += [
            f"{max(reading[name] for reading in taken) / size:.3f}"
            for name in ("resident", "anonymous")
        ]
        rows.append("".join(cell.rjust(22) for cell in cells))
    return "\n".join(rows)


def main(args):
    if args.loader:
        print(json.dumps(read_once(args.loader, args.folder, args.dtype)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="load_checkpoint-") as scratch:
        write_material(Path(scratch))
        size = (Path(scratch) / "sd.safetensors").stat().st_size
        print(
            f"{size:,} bytes of fp16 weights into {args.dtype}, {args.repeats} processes each, in"
            " turn"
        )
        print(table(measure(Path(scratch), args), size))


if __name__ == "__main__":
    main(parse_args())

"""Rivals at the same work, in turn, in one process: how long, how much memory, the share of the
best rate."""

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from load_checkpoint import Memory
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.unet import UNet, UNetConfig

SMALL = {
    "block_out_channels": (32, 64),
    "attention": (True, False),
    "num_heads": (2, 2),
    "cross_attention_dim": 32,
}
UNETS = {"sd15": UNetConfig(), "small": UNetConfig(**SMALL)}
PEAK_SIDE = {"cuda": 8192, "cpu": 2048}  # of the square matrices whose product tells the best rate


@dataclass
class Rival:
    """Somebody's way to do the work.

    work: does all of it once and returns what is compared
    own: bytes that its weights and the like take before
    """

    name: str
    work: Callable[[], Tensor]
    own: int = 0
    seconds: list[float] = field(default_factory=list)
    first: float = 0.0  # seconds of the first time, compilation included
    peak: int = 0  # bytes, own ones included
    difference: float = 0.0  # from the first rival's outcome, relative


def diffusers_unet(unet: UNet, device: str) -> nn.Module:
    """The same network with the same weights by diffusers."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    config = unet.config
    with torch.device(device):
        theirs = diffusers.UNet2DConditionModel(
            block_out_channels=config.block_out_channels,
            cross_attention_dim=config.cross_attention_dim,
            attention_head_dim=config.num_heads,
            down_block_types=tuple(
                "CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention
            ),
            up_block_types=tuple(
                "CrossAttnUpBlock2D" if a else "UpBlock2D" for a in config.attention[::-1]
            ),
            layers_per_block=(config.layers_per_block,) * len(config.block_out_channels),
        )
    theirs.load_state_dict(unet.state_dict())
    return theirs


def bytes_of(*networks: nn.Module) -> int:
    return sum(t.numel() * t.itemsize for n in networks for t in (*n.parameters(), *n.buffers()))


def side_by_side(rivals: list[Rival], rounds: int, device: str) -> None:
    """Each works once to compile and warm up, when outcomes and memory are taken, then in turn
    `rounds` times."""
    expected = None
    for rival in rivals:
        with Peak(device) as peak:
            start = time.perf_counter()
            outcome = rival.work().detach().double().cpu()
            rival.first = time.perf_counter() - start
        rival.peak = rival.own + peak.bytes
        expected = outcome if expected is None else expected
        if not outcome.isfinite().all():
            sys.exit(f"{rival.name}: the outcome is not finite")
        rival.difference = ((outcome - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    for turn in range(rounds):
        for rival in rivals if turn % 2 == 0 else rivals[::-1]:
            wait(device)
            start = time.perf_counter()
            rival.work()
            wait(device)
            rival.seconds.append(time.perf_counter() - start)


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Peak:
    """Bytes taken at most above those at the beginning: torch's on a GPU, the process's own memory
    on a CPU (Linux)."""

    def __init__(self, device: str):
        self.on_gpu = device.startswith("cuda")

    def __enter__(self):
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            # what is free goes back, so that it counts when it is taken again
            ctypes.CDLL(None).malloc_trim(0)
            self.memory = Memory().__enter__()
        return self

    def __exit__(self, *exception):
        if self.on_gpu:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.start
        else:
            self.memory.__exit__()
            self.bytes = self.memory.anonymous


def flops(work: Callable[[], object]) -> int:
    """Of one call, as torch counts them; plain code only, no compiled one."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def best_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of matrices, the best of ten."""
    side = PEAK_SIDE["cuda" if device.startswith("cuda") else "cpu"]
    a = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(10):
        wait(device)
        start = time.perf_counter()
        a @ a
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def add_flags(
    parser: ArgumentParser,
    rivals: Sequence[str],
    dtypes: Mapping[str, torch.dtype],
    rounds: int,
    half: str,
):
    """The flags that every comparison has; `half`: the precision on a GPU."""
    add, on_gpu = parser.add_argument, torch.cuda.is_available()
    add(
        "--rivals",
        nargs="+",
        choices=rivals,
        help="the last one is what the others are measured by",
    )
    add("--size", type=int, default=512, help="px (512)")
    add("--rounds", type=int, default=rounds, help=f"({rounds})")
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--dtype", choices=dtypes, default=half if on_gpu else "fp32")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="the table goes there too")


def report(
    args,
    title: str,
    rivals: list[Rival],
    items: float,
    unit: str,
    count: float = 0,
    best: float = 0,
) -> None:
    """Prints the machine and a Markdown table, whose rows also go to args.json.

    items: of `unit` in one piece of work, as images; count: FLOPs of one piece; best: FLOP/s, or 0
    """
    rows = []
    for rival in rivals:
        median, *spread = statistics.median(rival.seconds), min(rival.seconds), max(rival.seconds)
        rows.append(
            {
                "work": title,
                "who": rival.name,
                f"s / {unit}": (
                    f"{median / items:.4g} ({spread[0] / items:.4g} to {spread[1] / items:.4g})"
                ),
                "speed": f"{statistics.median(rivals[-1].seconds) / median:.2f}",
                "peak, GiB": f"{rival.peak / 2**30:.2f}",
                "memory": f"{rival.peak / max(rivals[-1].peak, 1):.2f}",
                "of the best rate": f"{count / median / best:.0%}" if best else "",
                "first time, s": f"{rival.first:.1f}",
                "differs by": f"{rival.difference:.1e}",
            }
        )
    heads = [*rows[0]][1:]
    print(machine(args.device))
    print(f"\n{title}; speed and memory as shares of the last row's\n")
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for row in rows:
        print("| " + " | ".join(row[head] for head in heads) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def machine(device: str) -> str:
    """The card or processor, and the versions that matter, in a line."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        lines = (
            Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        )
        name = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
            platform.machine(),
        )
        name += f", {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__}
    for peer in ("diffusers", "peft", "torchvision", "bitsandbytes"):
        try:
            versions[peer] = __import__(peer).__version__
        except Exception:  # whatever keeps a peer from being there
            versions[peer] = "none"
    return f"{name}; " + ", ".join(f"{name} {version}" for name, version in versions.items())


def run(*command: object, seconds: float) -> tuple[int, float, str]:
    """A command's exit code, how long it took, and what it said; 124 where it took longer than
    `seconds`."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, timeout=max(seconds, 1)
        )
        return done.returncode, time.perf_counter() - start, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")
        return 124, time.perf_counter() - start, said

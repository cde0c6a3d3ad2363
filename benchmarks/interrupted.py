"""Runs that are killed at any moment, or run out of room, and go on: do they end with the files of
a run left alone?

    python benchmarks/interrupted.py killed                      # 20 times each script, by SIGKILL and SIGTERM in turn
    sudo python benchmarks/interrupted.py full                   # 20 times each, on a small tmpfs (Linux, as root)

Every script runs as a process of its own, forked where torch is loaded already. It is killed at a
random time or, every second time, the moment it opens a file to write or renames one. Then the same
command (with --resume where there is one) is given until it ends, and all files of --out are
compared, names and bytes, with an uninterrupted run's. A full disk must give one line, exit code 2,
and no .part; with more room the same command must end alike. Prints a line for each script and
exits with 1 where a run ended otherwise.
"""

import argparse
import hashlib
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

# a script sees its own folder, not the repository
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planes import PLANES, PROMPTS
from planes.datasets import read_spanish
from planes.phantoms.phantom import write_african_layout, write_spanish_layout

ROOT = Path(__file__).resolve().parents[1]
LORA = "--images {data}/images --repeats 3 --batch-size 4 --rank 4 --save-every 1 --resume"
IMAGES = "--planes brain femur --count 2 --steps 2 --batch-size 2"
ROW = (
    "--spanish {data}/spanish --african {data}/african --model mobilenet_v2 --weights none --size"
    " 64 --epochs 6 "
)
COMMANDS = {
    "train_lora": LORA,
    "sample": IMAGES,
    "classify": ROW + "--batch-size 8 --workers 1 --schedule cosine --augment --resume",
    "reproduce": "--quick --seeds 0 --only HB+DA ES+DA+contrast",
}
SCALE = {  # of reproduce.py: seconds
    "per_plane": {"all": 2, "balanced": 2, "lora": 1},
    "train_lora": "--batch-size 5 --save-every 1",
    "repeats": 2,
    "rank": 4,
    "sample": "--steps 2",
    "count": 1,
    "classify": "--size 64 --batch-size 8 --workers 0",
    "passes": {"resnet18": 30},
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("killed", "full"))
    parser.add_argument(
        "--only", nargs="+", choices=COMMANDS, default=[*COMMANDS], help="scripts (all four)"
    )
    parser.add_argument("--times", type=int, default=20, help="how often each (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and sizes")
    return parser.parse_args(argv)


class Trial:
    """One script's command in a folder of its own, run as often as need be."""

    def __init__(self, script: str, data: Path, work: Path):
        self.script, self.work, self.log = script, work, data / "log"
        self.argv = [*COMMANDS[script].format(data=data).split(), "--device", "cpu", "--out", "out"]

    def start(self, die_at: int | None = None) -> int:
        """Forks; the child's id. die_at: it kills itself when it touches its files for the n-th
        time."""
        self.log.write_bytes(b"")
        if pid := os.fork():
            return pid
        code = 1
        try:
            os.chdir(self.work)
            for number in (1, 2):
                os.dup2(os.open(self.log, os.O_WRONLY | os.O_APPEND), number)
            self.watch(die_at)
            sys.argv = [f"{self.script}.py", *self.argv]
            self.call()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            (self.log.parent / "touched").write_text(str(self.touched))
            os._exit(code)

    def watch(self, die_at: int | None) -> None:
        self.touched = 0

        def hook(event: str, details: tuple) -> None:
            writes = (
                event == "open"
                and isinstance(details[2], int)
                and details[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if (
                (writes or event == "os.rename")
                and "out" in str(details[0])
                and "/log" not in str(details[0])
            ):
                self.touched += 1
                if self.touched == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    def call(self) -> None:
        path = str(ROOT / f"{self.script}.py")
        if self.script != "reproduce":
            runpy.run_path(path, run_name="__main__")
            return
        space = runpy.run_path(path, run_name="reproduce")["parse_args"].__globals__
        space["QUICK"] = space["Scale"](**SCALE)
        space["PHANTOMS"] = {"train": dict.fromkeys(PLANES, 3), "patients": 2}
        names = (
            "CheckpointError",
            "ClassifyError",
            "DatasetError",
            "LoRAError",
            "ResultError",
            "SamplerError",
        )
        space["run"](space["parse_args"], space["main"], *(space[name] for name in names))

    def finish(self, pid: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def files(self) -> dict[str, str]:
        """Every file of --out and its hash."""
        out = self.work / "out"
        paths = sorted(path for path in out.rglob("*") if path.is_file())
        return {
            str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths
        }


def reference(trial: Trial) -> tuple[dict[str, str], float, int, int]:
    """An uninterrupted run's files, seconds, touches of files, and bytes."""
    begin = time.monotonic()
    code = trial.finish(trial.start())
    seconds = time.monotonic() - begin
    if code:
        raise SystemExit(f"{trial.script}: exit code {code}\n{trial.log.read_text()}")
    size = sum(path.stat().st_size for path in trial.work.rglob("*") if path.is_file())
    return trial.files(), seconds, int((trial.log.parent / "touched").read_text()), size


def differences(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    return sorted(
        name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
    )


def killed(trial: Trial, times: int, rng: random.Random) -> list[str]:
    """Kills and goes on; a line for each run that did not end as the reference."""
    wanted, seconds, touches, _ = reference(trial)
    wrong, deaths = [], 0
    for n in range(times):
        shutil.rmtree(trial.work / "out")
        number = (signal.SIGKILL, signal.SIGTERM)[n % 2]
        if n % 4 < 2:
            pid, what = trial.start(), f"{number.name} after"
            wait = rng.uniform(0.1, seconds)
            time.sleep(wait)
            os.kill(pid, number)
            what += f" {wait:.1f} s"
        else:
            die_at = rng.randint(1, touches)
            pid, what = trial.start(die_at), f"SIGKILL at touch {die_at} of {touches}"
        code = trial.finish(pid)
        deaths += code != 0
        if code not in (0, -9, -15, 143):
            wrong.append(f"{what}: exit code {code}: {trial.log.read_text()[-300:]}")
        if (code := trial.finish(trial.start())) != 0:
            wrong.append(
                f"{what}: does not go on, exit code {code}: {trial.log.read_text()[-300:]}"
            )
        elif other := differences(trial.files(), wanted):
            wrong.append(f"{what}: {', '.join(other[:5])}")
    print(
        f"{trial.script}: killed {deaths} of {times} times, {len(wrong)} ended otherwise",
        flush=True,
    )
    return wrong


def full(trial: Trial, times: int, rng: random.Random) -> list[str]:
    """Runs on a small tmpfs, then with room; a line for each run that was not refused in a line or
    ended otherwise."""
    wanted, _, _, size = reference(trial)
    shutil.rmtree(trial.work / "out")
    wrong, refused = [], 0
    for _ in range(times):
        room = rng.randint(20_000, size) // 4096 * 4096
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(trial.work)], check=True
        )
        try:
            code, said = trial.finish(trial.start()), trial.log.read_text()
            parts = [path.name for path in trial.work.rglob("*") if ".part" in path.name]
            refused += code == 2
            last = said.rstrip().rpartition("\n")[2]
            one_line = (
                last.startswith(f"{trial.script}.py: ") and said.count(f"{trial.script}.py: ") == 1
            )
            if code and (code != 2 or not one_line or "Traceback" in said or parts):
                wrong.append(f"{room} bytes: exit code {code}, {parts}: {said[-400:]}")
            subprocess.run(["mount", "-o", "remount,size=1g", str(trial.work)], check=True)
            if (code := trial.finish(trial.start())) != 0:
                wrong.append(
                    f"{room} bytes, then more: exit code {code}: {trial.log.read_text()[-400:]}"
                )
            elif other := differences(trial.files(), wanted):
                wrong.append(f"{room} bytes, then more: {', '.join(other[:5])}")
        finally:
            subprocess.run(["umount", str(trial.work)], check=True)
    print(
        f"{trial.script}: {refused} of {times} times without room, {len(wrong)} ended otherwise",
        flush=True,
    )
    return wrong


def main(args):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in COMMANDS:  # what they load, once
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="loaded")
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_spanish_layout(data / "spanish", 4, test=0, seed=0)
        write_african_layout(data / "african", patients=2, seed=0)
        (data / "images").mkdir()
        for n, record in enumerate(read_spanish(data / "spanish")[:4]):
            shutil.copy(record.path, data / "images" / f"{n}.png")
            (data / "images" / f"{n}.txt").write_text(PROMPTS[record.plane])
        for script in args.only:
            (data / script).mkdir()
            rng = random.Random(f"{script} {args.seed}")
            wrong += {"killed": killed, "full": full}[args.task](
                Trial(script, data, data / script), args.times, rng
            )
    for line in wrong:
        print(line)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(parse_args())

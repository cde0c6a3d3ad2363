"""The commands of the benchmarks run, each at its smallest."""

import json
import re
import runpy

import pytest
from shorthand import ROOT

from ldm.unet import UNetConfig
from ldm.vae import VAEConfig

pytestmark = pytest.mark.slow

SPEED = {  # of each task: flags, the peer, and how far outcomes may be apart
    "sampling": ("--size 32 --batch-size 1 --steps 2", "diffusers", 1e-2),
    "lora": ("--size 32 --steps 1", "diffusers + peft", 1e-5),
    # each augments by draws of its own
    "classifier": ("--size 64 --batch-size 10 --steps 2", "torchvision", 0.5),
}


CONFIGS = (
    UNetConfig(
        block_out_channels=(32, 64),
        attention=(True, False),
        num_heads=(2, 2),
        cross_attention_dim=32,
    ),
    VAEConfig(block_out_channels=(32,) * 4),
)


def rows_of_speed(task: str, capsys, **names: object) -> list[list[str]]:
    """The table that benchmarks/speed.py prints. names: what stands in it otherwise."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "speed.py"))
    main = script["main"]
    main.__globals__.update(names, CONFIGS=CONFIGS)
    main(script["parse_args"]([task, *SPEED[task][0].split(), "--rounds", "1", "--device", "cpu"]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


@pytest.mark.parametrize("task", SPEED)
def test_speed_sets_ours_beside_a_peer_whose_outcome_agrees(task, capsys):
    _, peer, tolerance = SPEED[task]
    for package in peer.split(" + "):
        pytest.importorskip(package)
    ours, theirs = rows_of_speed(task, capsys)
    assert (ours[0], theirs[0]) == ("ours", peer)
    assert float(ours[2]) > 0 and float(theirs[2]) == 1
    assert float(ours[4]) == 0 and float(theirs[4]) < tolerance


def test_speed_leaves_out_a_peer_that_is_not_installed(capsys):
    (ours,) = rows_of_speed("lora", capsys, find_spec=lambda package: None)
    assert ours[0] == "ours"


def test_differences_are_those_of_all_test_images_and_of_those_that_are_no_copies(tmp_path, capsys):
    header = "image,patient,center,plane,prediction,copied,a,b\n"
    for row, right in (("ES", 3), ("HB", 6)):
        for seed in "01":
            rows = [
                f"{n}.png,{n // 2},x,a,{'a' if n < right else 'b'},{n > 6:d},0.5,0.5\n"
                for n in range(8)
            ]
            counts = [[right, 8 - right], [0, 0]]
            folder = tmp_path / row / seed
            folder.mkdir(parents=True)
            (folder / "predictions.csv").write_text(header + "".join(rows))
            metrics = {"training": {}, "confusion": counts}
            (folder / "metrics.json").write_text(json.dumps(metrics))
    space = runpy.run_path(str(ROOT / "benchmarks" / "differences.py"))
    space["main"](space["parse_args"]([str(tmp_path / row) for row in ("ES", "HB")]))
    every, distinct = re.findall(
        r"on (\d) images.*\n.*\n\| HB - ES \| ([+.\d]+) ", capsys.readouterr().out
    )
    assert every == ("8", "+37.5") and distinct == ("7", "+42.9")

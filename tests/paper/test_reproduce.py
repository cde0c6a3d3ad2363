"""reproduce.py: from end to end on the embedded default, every stage as small as it goes, also when
it is killed."""

import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paper.stages import Stages
from planes import PROMPTS
from planes.style import STYLES, with_style

ROOT = Path(__file__).resolve().parents[2]

# Runs reproduce.py with a scale that takes seconds; its arguments are those of the script.
TINY = """
import runpy, sys
from dataclasses import replace
from functools import partial
import paper.adapt
from planes import PLANES
paper.adapt.generate = partial(paper.adapt.generate, steps=2)  # of the sheets, which are to be looked at alone
script = runpy.run_path("reproduce.py", run_name="reproduce")
space = script["parse_args"].__globals__
space["EMBEDDED"] = script["Scale"](
    per_plane={"all": 3, "balanced": 3, "lora": 2},
    train_lora="--target transformer --batch-size 10 --save-every 1",
    repeats=2,
    rank=32,
    sample="--steps 2",
    count=2,
    classify="--size 64 --batch-size 6",
    passes=dict.fromkeys(script["CLASSIFIERS"], 15),
)
space["PHANTOMS"] = {"train": dict.fromkeys(PLANES, 4), "patients": 4}
space["QUICK"] = replace(space["EMBEDDED"], count=3)
space["PANEL_COUNT"] = 2
script["main"](script["parse_args"](sys.argv[1:]))
"""


MINUTES = 20 * 60  # in which a run of seconds has ended, or hangs
QUICK = ("--quick", "--seeds", 0)


def command(*flags):
    return [sys.executable, "-c", TINY, "--device", "cpu", *map(str, flags)]


def numbers(out: Path) -> dict[str, bytes]:
    """What a report says in numbers: its tables, the rows' metrics, its pictures."""
    files = [out / "results.csv", *out.glob("rows/*/*/*/metrics.json"), *out.glob("figures/*.png")]
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(files)}


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_with_the_numbers_of_one_that_is_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(
        command(*QUICK, "--out", whole), cwd=ROOT, check=True, capture_output=True, timeout=MINUTES
    )

    deaths = 0
    # each kind of stage
    for sign in ("lora_r32/checkpoint.pt", "synthetic_r32/*/*.png", "rows/*/*/*/metrics.json"):
        with subprocess.Popen(
            command(*QUICK, "--out", killed),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            end = time.monotonic() + MINUTES
            while process.poll() is None and not any(killed.glob(sign)) and time.monotonic() < end:
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
        deaths += process.wait() == -signal.SIGKILL
    assert deaths == 3
    subprocess.run(
        command(*QUICK, "--out", killed), cwd=ROOT, check=True, capture_output=True, timeout=MINUTES
    )
    assert numbers(killed) == numbers(whole)
    assert len(numbers(whole)) > 8

    again = subprocess.run(
        command(*QUICK, "--out", whole),
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=MINUTES,
    )
    assert again.stdout.count("done before") == 11  # two LoRAs, three sets of images, six rows
    assert numbers(killed) == numbers(whole)

    report = (whole / "report.md").read_text(encoding="utf-8")
    for name in (
        "ES",
        "HB+DA",
        "BAL+DA",
        "ES+DA+contrast",
        "HB-styles+DA",
        "ES, with LoRA",
        "ES+DA, without",
    ):
        assert f"| {name} |" in report
    for line in report.splitlines():
        if line.startswith("!["):
            assert (whole / line.split("(")[-1].rstrip(")")).exists()
    html = (whole / "report.html").read_text(encoding="utf-8")
    assert "src=" in html and html.count("src=") == html.count('src="data:image/png;base64,')
    metrics = json.loads((whole / "rows/HB+DA/resnet18/seed0/metrics.json").read_text())
    assert metrics["training"]["sources"] == {"spain": 15, "synthetic": 30}
    contrast = json.loads((whole / "rows/ES+DA+contrast/resnet18/seed0/args.json").read_text())[
        "arguments"
    ]
    assert contrast["contrast"] and contrast["augment"] and not contrast["balanced_sampling"]
    # of the first of its images by Euler
    styled = with_style(PROMPTS["femur"], STYLES[400_000 % len(STYLES)])
    assert styled in (whole / "synthetic_styles" / "manifest.csv").read_text()
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["inputs"] and environment["machine"]["cpus"] == os.cpu_count()


@pytest.mark.slow
def test_some_rows_are_run_with_several_seeds_and_with_what_goes_beyond_the_paper(tmp_path):
    flags = (
        "--only",
        "AF/ViT b16",
        "beyond/ResNet18",
        "--beyond",
        "--seeds",
        0,
        1,
        "--out",
        tmp_path,
    )
    refused = subprocess.run(command(*flags), cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "no row is called 'beyond/ResNet18'" in refused.stderr
    flags = (
        "--only",
        "ES/MobileNet v2",
        "table beyond",
        "--beyond",
        "--seeds",
        0,
        1,
        "--out",
        tmp_path,
    )
    subprocess.run(command(*flags), cwd=ROOT, check=True, capture_output=True, timeout=MINUTES)
    rows = {
        str(path.parent.relative_to(tmp_path / "rows"))
        for path in tmp_path.glob("rows/*/*/*/metrics.json")
    }
    names = (
        "HB-prompts+DA/resnet18",
        "HB-token+DA/resnet18",
        "HB-dreambooth+DA/resnet18",
        "ES/mobilenet_v2",
    )
    assert rows == {f"{name}/seed{seed}" for name in names for seed in (0, 1)}
    assert "<fetal-us>" in (tmp_path / "synthetic_token" / "manifest.csv").read_text()
    assert " sks " in (tmp_path / "synthetic_dreambooth" / "manifest.csv").read_text()


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "reproduce.py"), run_name="reproduce")


def test_a_stage_is_done_until_its_arguments_or_what_it_needs_change(tmp_path):
    stages, args = Stages(print), argparse.Namespace(steps=3, out=tmp_path / "b")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inputs.json").write_text('{"images": "1f"}')
        (tmp_path / name / "args.json").write_text(
            json.dumps({"arguments": {"steps": 3, "out": str(tmp_path / "b")}})
        )
        os.utime(tmp_path / name / "args.json", ns=(0, 10 + (name == "b")))
    same = {"images": "1f"}
    assert stages.is_done(tmp_path / "b", args, (tmp_path / "a",), same)
    assert not stages.is_done(
        tmp_path / "b", argparse.Namespace(steps=4, out=tmp_path / "b"), (), same
    )
    # an image was replaced, a model named
    for other in ({}, {"images": "2f"}, {"images": "1f", "model": "1f"}):
        assert not stages.is_done(tmp_path / "b", args, (tmp_path / "a",), other)
    os.utime(tmp_path / "a" / "args.json", ns=(0, 12))  # made again
    assert not stages.is_done(tmp_path / "b", args, (tmp_path / "a",), same)
    (tmp_path / "a" / "args.json").unlink()  # or being made at the moment
    assert not stages.is_done(tmp_path / "b", args, (tmp_path / "a",), same)


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--spanish", "x"], "--spanish and --african belong together"),
        (["--manifests", "x"], "--manifests lists real images"),
        (["--only", "HB/ResNet50"], "no row is called 'HB/ResNet50'"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(script, capsys, flags, line):
    with pytest.raises(SystemExit) as refused:
        script["parse_args"](flags)
    assert refused.value.code == 2
    assert line in capsys.readouterr().err

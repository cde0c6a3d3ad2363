"""The commands of the benchmarks run, each at its smallest."""

import runpy
import sys

import pytest
import torch
from shorthand import ROOT, read_json
from torchvision.models import mobilenet_v2

from ldm.unet import UNetConfig
from ldm.vae import VAEConfig
from planes.datasets import read_spanish
from planes.phantoms.phantom import write_african_layout, write_spanish_layout
from planes.style import STYLES

pytestmark = pytest.mark.slow

SPEED = {  # of each task: flags, the peer, and how far outcomes may be apart
    "sampling": ("--size 32 --batch-size 1 --steps 2", "diffusers", 1e-2),
    "lora": ("--size 32 --steps 1", "diffusers + peft", 1e-5),
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


def script(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    return runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="benchmark")


def test_the_real_images_command_of_docs_runs_on_phantoms_in_their_layouts(
    tiny_model, tmp_path, monkeypatch, capsys
):
    spanish, african = tmp_path / "FETAL_PLANES_ZENODO", tmp_path / "Zenodo_dataset"
    write_spanish_layout(spanish, train=1, test=0, seed=0)
    write_african_layout(african, patients=2, seed=0)
    listed = [f"{record.name},{record.plane}" for record in read_spanish(spanish)]
    (tmp_path / "list.csv").write_text("\n".join(["Image_name,Plane", *listed]))
    torch.save(mobilenet_v2().state_dict(), tmp_path / "weights.pth")
    real = script("real_images", monkeypatch)
    small = {"count": 1, "steps": 1, "repeats": 1, "passes": 10, "size": 64, "seeds": 0}
    flags = ["--spanish", spanish, "--african", african, "--manifest", tmp_path / "list.csv"]
    flags += ["--weights", tmp_path / "weights.pth", "--out", tmp_path / "out"]
    flags += ["--model", tiny_model, "--data", "ES", "HB-styles+contrast"]
    flags += [word for name, number in small.items() for word in (f"--{name}", number)]
    for _ in "ab":  # the second time all is there
        real["main"](real["parse_args"]([str(flag) for flag in flags]))
    said = (tmp_path / "out" / "differences.md").read_text()
    assert said.count("| HB-styles+contrast - ES |") == 2 and said in capsys.readouterr().out
    assert said.startswith("| on 18 images |")
    assert "HB-styles+contrast" in (tmp_path / "out" / "report.html").read_text()
    assert len([*(tmp_path / "out" / "synthetic_styles").glob("*/*.png")]) == 10
    row = tmp_path / "out" / "rows" / "HB-styles+contrast" / "mobilenet_v2" / "seed0"
    read = {"FETAL_PLANES_ZENODO", "Zenodo_dataset", "list.csv", "weights.pth", "images"}
    assert {*read_json(row / "inputs.json")} == read | {"arguments"}


def test_every_task_of_the_miniatures_judge_runs(tmp_path, monkeypatch, capsys):
    mini = script("mini", monkeypatch)
    space = mini["parse_args"].__globals__
    monkeypatch.setitem(space, "TESTED", 1)
    monkeypatch.setitem(space, "SCENES", 150)
    spanish = tmp_path / "spanish"
    write_spanish_layout(spanish, train=9, test=0, seed=0)
    rows = [
        f'{record.path},{record.plane},"a photo, {light}, {contrast}",euler'
        for record, (light, contrast) in zip(read_spanish(spanish), STYLES * 9)
    ]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join(["image,plane,prompt,sampler", *rows]))

    def said(task, *flags):
        flags = [task, "--judge", tmp_path / "judge", *flags]
        mini["main"](mini["parse_args"]([*map(str, flags)]))
        return capsys.readouterr().out

    assert "% of 5 recognised" in said("judge", "--per-plane", 4, "--epochs", 1)
    assert "% of 45 recognised  (abdomen " in said("recognise", manifest)
    assert said("style", manifest).count("share of the scenes': grey") == 5

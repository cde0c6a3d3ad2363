"""reproduce.py from end to end on the embedded default, every stage as small as it goes."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TINY = {
    "es": "--per-plane 3",
    "hb": "--per-plane 3",
    "train_lora": "--rank 4 --batch-size 10 --repeats 1 --per-plane 2",
    "sample": "--count 2 --steps 2",
    "classify": "--model resnet18 --size 64 --epochs 1 --batch-size 6",
}


@pytest.mark.slow
def test_it_goes_from_phantoms_to_a_report_and_does_nothing_twice(tmp_path, capsys, monkeypatch):
    script = runpy.run_path(str(ROOT / "reproduce.py"), run_name="reproduce")
    space = script["main"].__globals__  # what main looks its names up in
    monkeypatch.setitem(space, "EMBEDDED", script["Scale"](**TINY))
    monkeypatch.setitem(space, "PHANTOMS", {"train": 4, "patients": 4})
    flags = ["--out", str(tmp_path), "--device", "cpu"]

    script["main"](script["parse_args"](flags))
    report = (tmp_path / "report.md").read_text()
    for name in ("ES", "ES+DA", "HB", "HB+DA", "ES, with LoRA", "ES+DA, without"):
        assert f"| {name} |" in report
    for line in report.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.split("(")[1].rstrip(")")).exists()
    metrics = json.loads((tmp_path / "HB_DA" / "metrics.json").read_text())
    assert metrics["training"]["sources"] == {"spain": 15, "synthetic": 20}

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    capsys.readouterr()
    script["main"](script["parse_args"](flags))
    assert capsys.readouterr().out.count("done before") == 7
    assert (tmp_path / "report.md").read_text() == report
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before


def test_a_stage_that_runs_again_makes_those_behind_it_stale_even_if_the_run_is_killed(tmp_path):
    for name in ("lora", "synthetic", "ES"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text("{}")
    stages = runpy.run_path(str(ROOT / "reproduce.py"), run_name="reproduce")["Stages"](tmp_path)
    stages.done.add(tmp_path / "lora")
    stages.forget_the_rest()
    assert [path.parent.name for path in tmp_path.glob("*/args.json")] == ["lora"]

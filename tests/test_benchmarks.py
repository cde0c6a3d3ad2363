"""The benchmarks run, each at its smallest, beside the peer where that is installed, and agree
before they time."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
SMALL = {
    "sample": ["--scale", "small", "--size", "32", "--steps", "2", "--batch-size", "1"],
    "train_lora": ["--scale", "small", "--size", "32", "--rank", "4", "--batch-size", "1"],
    "classify": [
        "--size",
        "64",
        "--stored",
        "70",
        "--images",
        "20",
        "--batch-size",
        "10",
        "--workers",
        "0",
    ],
}
PEERS = {"sample": "diffusers", "train_lora": "peft", "classify": "torchvision"}
# the last augments by draws of its own
AGREE = {"sample": 1e-2, "train_lora": 1e-5, "classify": 0.5}


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_prints_a_table_and_its_rivals_agree(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip(PEERS[name])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    script = runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="benchmark")
    flags = [
        *SMALL[name],
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    script["main"](script["parse_args"](flags))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 and rows[0]["who"] == "ours" and float(rows[1]["speed"]) == 1
    assert float(rows[1]["differs by"]) < AGREE[name]
    assert all(float(row["speed"]) > 0 and float(row["peak, GiB"]) >= 0 for row in rows)
    assert f"| {rows[0]['who']} |" in capsys.readouterr().out

"""Flags that every script has: devices that are not here, seeds that no generator takes, text that
is none."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from ldm.webui import lora_labels
from planes import PLANES
from planes.captions import read_prompts
from planes.datasets import DatasetError, read_synthetic
from planes.folders import read_captioned_folder

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {
    "sample": ["--prompt", "x"],
    "train_lora": ["--spanish", "{nowhere}"],
    "classify": ["--african", "{nowhere}"],
    "reproduce": ["--quick"],
}
every_script = pytest.mark.parametrize("script", NEEDED)


def refusal(script, flags, out, monkeypatch, capsys):
    """What the script says in its last line, having made nothing."""
    needed = [flag.format(nowhere=out.parent / "nowhere") for flag in NEEDED[script]]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *needed, "--out", str(out), *map(str, flags)])
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2 and "Traceback" not in said and sorted(out.parent.rglob("*")) == before
    )
    return said.splitlines()[-1].removeprefix(f"{script}.py: error: ")


@every_script
@pytest.mark.parametrize("device", ["foo", "cuda:99", "mps:7", "meta", ""])
def test_a_device_that_is_not_here_is_one_line(script, device, tmp_path, monkeypatch, capsys):
    line = refusal(script, ["--device", device], tmp_path / "out", monkeypatch, capsys)
    assert line.startswith(f"argument --device: {device}: not here (") and line.endswith(
        "; cpu always is"
    )


@every_script
@pytest.mark.parametrize("seed", ["-1", "4294967296", "18446744073709551616", "1.5", "x"])
def test_a_seed_that_not_every_generator_takes_is_one_line(
    script, seed, tmp_path, monkeypatch, capsys
):
    line = refusal(script, [f"--seed={seed}"], tmp_path / "out", monkeypatch, capsys)
    assert line == f"argument --seed: {seed}: choose a whole number from 0 to 4294967295"


def test_seeds_of_images_that_would_be_one_to_the_generator_are_refused(
    tmp_path, monkeypatch, capsys
):
    line = refusal("sample", ["--seeds", 5, 4294967301], tmp_path / "out", monkeypatch, capsys)
    assert line == "argument --seeds: 4294967301: choose a whole number from 0 to 4294967295"
    line = refusal("sample", ["--seed", 4294967000], tmp_path / "out", monkeypatch, capsys)
    assert (
        line == "sample.py: --seed 4294967000: those of the last plane would lie beyond 4294967295"
    )


@every_script
def test_an_out_that_is_a_file_is_one_line(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    line = refusal(script, [], tmp_path / "file", monkeypatch, capsys)
    assert (
        line.startswith(f"{script}.py: --out {tmp_path / 'file'}: ") and "is not a folder" in line
    )


@pytest.mark.parametrize(
    "script, flag",
    [("sample", flag) for flag in ("--prompt", "--negative-prompt", "--rare-token", "--token")]
    + [("train_lora", flag) for flag in ("--learn-token", "--rare-token", "--init-word")],
)
def test_bytes_that_are_no_text_are_refused_on_the_command_line(
    script, flag, tmp_path, monkeypatch, capsys
):
    line = refusal(script, [flag, "f\udce9tal"], tmp_path / "out", monkeypatch, capsys)
    assert (
        line
        == rf"argument {flag}: 'f\udce9tal': no text in this terminal's encoding; type it in UTF-8"
    )


def test_half_a_character_is_refused_in_files_of_prompts_and_captions(tmp_path):
    lists = {plane: ["a photo"] for plane in PLANES} | {"brain": ["a photo", "half \ud83d"]}
    (tmp_path / "prompts.json").write_text(json.dumps(lists))
    with pytest.raises(DatasetError, match=r"prompts\.json: .*surrogates not allowed"):
        read_prompts(str(tmp_path / "prompts.json"))
    (tmp_path / "a.png").touch()
    row = json.dumps({"file_name": "a.png", "text": "half \ud83d"})
    (tmp_path / "metadata.jsonl").write_text(f"{row}\n")
    with pytest.raises(DatasetError, match=r"metadata\.jsonl, line 1: must be like"):
        read_captioned_folder(tmp_path)


def test_a_loras_name_ends_no_tag_of_the_webui():
    names = ["fetal:v2", "a>b", "<c", "d,e", "plain"]
    assert lora_labels([Path(f"{name}.safetensors") for name in names]) == [
        "fetal_v2",
        "a_b",
        "_c",
        "d_e",
        "plain",
    ]


def test_images_of_one_seed_are_different_patients(tmp_path):
    rows = [
        f"{plane}/{sampler}_7.png,{plane},{sampler}"
        for plane in PLANES
        for sampler in ("euler", "unipc")
    ]
    (tmp_path / "manifest.csv").write_text("image,plane,sampler\n" + "\n".join(rows) + "\n")
    assert len({record.patient for record in read_synthetic(tmp_path / "manifest.csv")}) == len(
        rows
    )

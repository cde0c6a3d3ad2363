"""A user's mistake costs one line and exit code 2, and leaves nothing: each script's flags, and
files that cannot be used."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from shorthand import ROOT

import beyond
import merge_lora
import sample
import train_lora
from harness.script import run
from ldm import MINI, CheckpointError
from ldm.cli import add_model_arguments, load_model
from lora.layer import LoRAError
from planes.datasets import DatasetError
from samplers import SamplerError

SCRIPTS = {"train_lora": train_lora, "sample": sample, "merge_lora": merge_lora, "beyond": beyond}
MISTAKES = (CheckpointError, DatasetError, LoRAError, SamplerError)


def refused(script, words, monkeypatch, capsys):
    """The script's one line."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    with pytest.raises(SystemExit) as stop, monkeypatch.context() as patch:
        patch.setattr("warnings.showwarning", None)
        run(SCRIPTS[script].parse_args, SCRIPTS[script].main, *MISTAKES)
    usage, _, line = capsys.readouterr().err.strip().rpartition(f"{script}.py: ")
    assert stop.value.code == 2 and line and "\n" not in line and "Traceback" not in usage
    return line


REFUSED = {
    "train_lora": {
        "": "one of the arguments --spanish --source --images is required",
        "--images x --spanish x": "--spanish: not allowed with argument --images",
        "--images x --manifest x": "--manifest lists images of --spanish",
        "--images x --bucket --compile": "--compile: compiles each shape",
        "--images x --lr nan": "--lr nan: at least 1e-12",
        "--images x --text-encoder-lr 0": "--text-encoder-lr 0.0: at least",
        "--images x --size -64": "--size -64: at least 1",
        "--images x --validation -1": "--validation -1: at least 0",
        "--images x --preset papers": "invalid choice: 'papers'",
        "--images x --device foo": "--device: foo: not here (",
        "--images nowhere": "nowhere: no such folder",
        "--images IMAGES --held-out 0.2": "--held-out: a share of the patients of --source",
        "--images IMAGES --layers none": "'none' matches no layer of UNet",
        "--images IMAGES --size 60": "--size 60x60: both must be multiples of 16",
    },
    "sample": {
        "--prompt x --planes brain": "give --prompt, or --prompts and --planes",
        "--seeds 1 2 --count 3": "--count: not allowed with argument --seeds",
        "--seeds 5 4294967301": "--seeds: 4294967301: choose a whole number",
        "--seed 4293967296": "--seed 4293967296: those of the last plane would lie",
        "--count 0": "--count 0: at least 1",
        "--count 100001": "--count 100001: at most 100000",
        "--embedding x --rare-token y": "not allowed with argument --embedding",
        "--samplers euler --order 2": "--order 2: UniPC has one, euler does not",
        "--samplers unipc --order 4": "argument --order: invalid choice: 4",
        "--spacing even": "unknown spacing 'even'",
        "--lora EMBEDDING EMBEDDING --lora-weight 1 2 3": "3 numbers for 2 LoRAs; give one",
        "--lora-weight 0.5": "--lora-weight 0.5: of a --lora FILE",
        "--lora EMBEDDING EMBEDDING": "two files of one name",
        "--prompt <lora:x:1>": "give LoRAs by --lora and --lora-weight",
        "--prompt f\udce9tal": "no text in this terminal's encoding",
        "--size 64y64": "64y64: give the side of a square",
        "--size 64x100": "--size 64x100: both must be multiples of 16",
        "--prompts nowhere": "nowhere: ",
        "--lora nowhere.safetensors": "nowhere.safetensors: no such file",
        "--model nowhere": "nowhere: no such file or folder",
        "--embedding EMBEDDING": "holds 2 tensors; an embedding of one token is one",
        "--ema": "load it without --ema",
    },
    "merge_lora": {
        "x EMBEDDING --strength 1 2": "2 numbers for 1 LoRAs; give one, or one of each",
        "x EMBEDDING --out a.ckpt": "a single file has a name in .safetensors",
        "nowhere EMBEDDING": "nowhere: no such file or folder",
    },
    "beyond": {
        "other --images x --token y": "invalid choice: 'other'",
        "inversion --images x": "the following arguments are required: --token",
        "inversion --images x --token y --prior z": "inversion has none",
        "inversion --images x --token y --lr 0": "--lr 0.0: at least",
        "dreambooth --images x --token y": "--prior MANIFEST: dreambooth needs it",
        "inversion --images IMAGES --token ultrasound": "has it already; choose",
        "inversion --images IMAGES --token <x> --init-word vein": "'vein': is 4 tokens",
        "dreambooth --images IMAGES --token x --prior nowhere": "nowhere",
    },
}


@pytest.mark.parametrize(
    "script, flags, words",
    [(script, *row) for script, rows in REFUSED.items() for row in rows.items()],
)
def test_a_mistake_costs_one_line_and_leaves_nothing(
    script, flags, words, tiny_model, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    save_file({"<a>": torch.zeros(16), "<b>": torch.zeros(16)}, tmp_path / "embedding.safetensors")
    places = {"IMAGES": str(folder), "EMBEDDING": "embedding.safetensors"}
    given = ["--out", "out/of/it", *(places.get(word, word) for word in flags.split())]
    if script != "merge_lora":
        given += ["--device", "cpu"] * ("--device" not in given)
        given += ["--model", str(tiny_model)] * ("--model" not in given)
    assert words in refused(script, given, monkeypatch, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["embedding.safetensors"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_the_command_and_defaults(script, capsys):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].parse_args(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and f"python {script}.py " in said and "(default: " in said


@pytest.mark.slow
def test_a_script_by_itself_tells_a_mistake_in_one_line(tmp_path):
    command = [sys.executable, "sample.py", "--model", "nowhere", "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    line = "sample.py: nowhere: no such file or folder"
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(line)
    assert not done.stdout and list(tmp_path.iterdir()) == []


def test_flags_of_the_model_reach_it(tiny_model, other_model):
    parser = train_lora.argparse.ArgumentParser()
    add_model_arguments(parser)
    line = f"--model {tiny_model} --vae {other_model / 'vae'} --prediction-type v_prediction"
    args = parser.parse_args([*line.split(), "--tokenizer", str(MINI / "tokenizer")])
    model = load_model(args, dtype=torch.bfloat16)
    files = {name.split("/")[0]: path.parents[1] for name, path in model.files.items()}
    assert files == {"unet": tiny_model, "vae": other_model, "text_encoder": tiny_model}
    assert model.prediction_type == "v_prediction"
    assert model.unet.conv_in.weight.dtype == torch.bfloat16
    assert load_model(parser.parse_args([])).files["unet/diffusion_pytorch_model.safetensors"]

"""Every command of docs/your_data.md does its work, in the page's order, on two small sites and a
tiny Stable Diffusion."""

import re
import runpy
import shlex
import shutil

import pytest
from shorthand import ROOT, write_site

from classify import ClassifyError
from ldm import MINI
from paper.plan import Scale

PAGE = (ROOT / "docs" / "your_data.md").read_text(encoding="utf-8")
SMALL = {  # what a command is given behind its own flags: the last one counts
    "train_lora.py": "--rank 2 --per-plane 2 --repeats 1 --validation 2",
    "sample.py": "--count 1 --steps 2",
    "classify.py": "--weights none --size 64 --epochs 1 --workers 0 --validation 2",
    "reproduce.py": "--weights none --seeds 0 --processes 1 --only ES+DA/ResNet18 HB+DA/ResNet18",
    "planes.sites": "",
    "paper.elsewhere": "",
}
SCALE = Scale(
    per_plane={"all": None, "balanced": 4, "lora": 2},
    train_lora="--batch-size 6",
    repeats=1,
    rank=2,
    sample="--steps 2",
    count=1,
    classify="--size 64 --batch-size 6 --workers 0",
    passes={"resnet18": 12},
)
LEFT = (  # what each leaves
    "runs/look/sites.png",
    "runs/chest/report.html",
    "runs/try/rows/HB+DA/resnet18/seed0/model.safetensors",
    "runs/lora/prompts.json",
    "runs/synthetic/manifest.csv",
    "runs/classifier/model.safetensors",
    "runs/new/predictions.csv",
    "runs/onnx/model.onnx",
    "runs/dino/predictions.csv",
    "runs/third/report.html",
)


@pytest.mark.slow
def test_the_commands_for_own_sites_do_their_work(tiny_model, tmp_path, monkeypatch):
    def no_weights(**_):
        raise ClassifyError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.cli.MINI", tiny_model)
    monkeypatch.setattr("paper.synthetic.inception", no_weights)
    for scale in ("QUICK", "PAPER"):
        monkeypatch.setattr(f"paper.plan.{scale}", SCALE)
    for site, bright in (("clinic_a", 240), ("clinic_b", 120), ("clinic_c", 180)):
        write_site(tmp_path / site, {"normal": 9, "nodule": 10}, bright)
    write_site(tmp_path / "new_images", {"ward": 3}, 90)
    shutil.copytree(tiny_model, "v1-5-pruned.safetensors")
    shutil.copytree(MINI / "tokenizer", "openai/clip-vit-large-patch14")

    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    for line in filter(None, blocks.splitlines()):
        script, *words = shlex.split(line.replace("-m ", "").removeprefix("python "))
        words = [word.replace("probe:facebook/dinov2-base", "probe:resnet18") for word in words]
        run = runpy.run_path if script.endswith(".py") else runpy.run_module
        module = script.replace("planes.sites", "planes.survey")  # where its command stands
        space = run(str(ROOT / module) if run is runpy.run_path else module, run_name="docs")
        space["main"](space["parse_args"](words + SMALL[script].split()))
    assert all((tmp_path / file).is_file() for file in LEFT)

"""What a PNG and the manifest say of an image, to the letter."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from shorthand import refused

from ldm.webui import shots
from ldm.webui.manifest import manifest_text, other_rows
from planes.tables import DatasetError

SHOT = shots.Shot(
    image="euler/femur_3.png",
    plane="femur",
    prompt="a, photo: of (fetal femur:1.2)",
    negative_prompt="text, caliper: 3 cm",
    sampler="unipc",
    steps=20,
    guidance=7.0,
    seed=3,
    width=512,
    height=384,
    clip_skip=2,
    spacing="karras",
    order=2,
    loras="<lora:fetal:0.8>",
    lora_hashes="fetal: 0123456789ab",
    model="v1-5, mine\nand: yours é",
    model_hash="6ce0161689",
    dtype="fp32",
    prediction_type="epsilon",
    ema=False,
    tokenizer="abc",
)
TEXT = """\
a, photo: of (fetal femur:1.2) <lora:fetal:0.8>
Negative prompt: text, caliper: 3 cm
Steps: 20, Sampler: UniPC, Schedule type: Karras, CFG scale: 7, Seed: 3, Size: 512x384, \
Model hash: 6ce0161689, Model: "v1-5, mine\\nand: yours é", Clip skip: 2, \
RNG: CPU, UniPC order: 2, Lora hashes: "fetal: 0123456789ab", \
Version: fu-lora"""
PLAIN = """\
Steps: 20, Sampler: Euler, Schedule type: Automatic, CFG scale: 0.3333333333333333, Seed: 3, \
Size: 512x384, Model hash: 6ce0161689, Model: mini, RNG: CPU, Version: fu-lora"""
PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


BARE = {"sampler": "euler", "spacing": None, "order": None, "model": "mini"}
BARE |= dict.fromkeys(("prompt", "negative_prompt", "loras", "lora_hashes"), "")
EULER = replace(SHOT, **BARE, guidance=1 / 3, clip_skip=1, image="a.png")


def test_the_text_of_an_image_is_the_webuis_to_the_letter():
    """As the webui's own parser reads it back, quoted where a value has a comma, a colon or a line
    end."""
    assert shots.webui_text(SHOT) == TEXT
    assert shots.webui_text(EULER) == PLAIN
    assert "Schedule type: leading, CFG" in shots.webui_text(replace(SHOT, spacing="leading"))


def test_an_image_is_saved_whole_with_its_settings_or_is_not_there(tmp_path):
    path = tmp_path / "a.png"
    assert not shots.is_saved(path, SHOT)
    shots.save_shot(path, PIXELS, SHOT)
    with Image.open(path) as image:
        assert np.array_equal(image, PIXELS) and image.text["parameters"] == TEXT
    assert shots.is_saved(path, SHOT) and not shots.is_saved(path, replace(SHOT, seed=4))
    data = path.read_bytes()
    for damaged in (data[:-30], data[:-20] + bytes([data[-20] ^ 1]) + data[-19:], b""):
        path.write_bytes(damaged)
        assert not shots.is_saved(path, SHOT)
    assert list(tmp_path.iterdir()) == [path]


def test_loras_and_models_have_the_webuis_names_and_short_hashes(tmp_path):
    paths = [tmp_path / name for name in ("a/x.safetensors", "b/x.safetensors", "b/<n:e,w>.s")]
    for n, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        save_file({"x": torch.full((2,), float(n))}, path)
    assert shots.lora_labels(paths) == ["a-x", "b-x", "_n_e_w_"]
    hashes = "a-x: af5570f5a181, b-x: 80b8fd6d60fa, _n_e_w_: ad02908e7dc8"
    assert shots.lora_hashes(paths) == hashes  # of the bytes behind the header
    assert (
        shots.tags(paths, [1.0, -0.25, 1e-7])
        == "<lora:a-x:1> <lora:b-x:-0.25> <lora:_n_e_w_:1e-07>"
    )
    paths[0].rename(tmp_path / "a" / "adapter_model.safetensors")
    assert shots.lora_hash(tmp_path / "a") == hashes[5:17]
    assert shots.model_hash({"model.safetensors": "0123456789abcdef"}) == "0123456789"
    assert shots.model_hash({"b": "2", "a": "1"}) == "6b51d431df"  # of "12"


def test_the_manifest_keeps_rows_of_other_planes_and_samplers_whose_files_are_there(tmp_path):
    assert other_rows([SHOT], tmp_path) == []
    before = [SHOT, replace(EULER, prompt=" spaces, kept\n"), replace(EULER, image="gone.png")]
    text = manifest_text(before, [], tmp_path)
    assert text.startswith("image,plane,prompt,negative_prompt,sampler,steps,guidance,seed,width,")
    (tmp_path / "manifest.csv").write_text(text)
    (tmp_path / "a.png").touch()
    made = [replace(SHOT, seed=4), replace(EULER, plane="brain")]
    rows = other_rows(made, tmp_path)
    assert [row["image"] for row in rows] == ["a.png", "gone.png"]
    assert manifest_text(made, rows, tmp_path) == manifest_text([before[1], *made], [], tmp_path)
    said = []  # a class that was renamed
    rows = other_rows(made, tmp_path, ["brain", SHOT.plane], said.append)
    assert len(rows) == 2 and not said
    assert other_rows(made, tmp_path, ["brain"], said.append) == []
    assert said == [
        f"{tmp_path}/manifest.csv: no prompt is of {SHOT.plane}: their rows go, their images stay"
    ]
    (tmp_path / "manifest.csv").write_text("image,plane\na,b\n")
    with refused(DatasetError, "mend or remove it, or give another --out"):
        other_rows([SHOT], tmp_path)

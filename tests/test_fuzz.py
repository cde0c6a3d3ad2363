"""Damaged files, 40 of each kind: what opens them works, or raises the room's own error in one
line."""

import csv
import json
import os
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from classify import ClassifyError
from classify.models import read_weights
from harness.resume import read_state, write_state
from ldm import MINI, CheckpointError
from ldm.checkpoints.tokenizer import load_tokenizer
from ldm.checkpoints.weights import open_weights
from ldm.cli import load_model
from ldm.embedding import save_embedding
from ldm.text import TextConfig
from ldm.webui.shots import Shot, is_saved, save_shot
from lora.files import save_lora
from lora.files.formats import read
from lora.layer import LoRAError
from lora.model import inject
from planes import PLANES
from planes.captions import read_prompts
from planes.datasets import DatasetError, read_african, read_spanish, read_synthetic
from planes.folders import read_captioned_folder
from planes.phantoms.phantom import write_african_layout, write_spanish_layout
from planes.pictures import open_image

pytestmark = pytest.mark.slow
COUNT, SEED = 40, int(os.environ.get("FUZZ_SEED", 0))
MISTAKES = (CheckpointError, ClassifyError, DatasetError, LoRAError, OSError)


def mutations(data):
    """Damaged copies of some bytes, a third each: cut short, single bytes changed, two stretches
    swapped."""
    print(f"FUZZ_SEED={SEED}")
    rng = np.random.default_rng(SEED)
    for n in range(COUNT):
        damaged = bytearray(data)
        if n % 3 == 0:
            damaged = damaged[: rng.integers(len(data))]
        elif n % 3 == 1:
            end = min(len(data), 600) if n % 2 else len(data)  # every second time in the header
            for place in rng.integers(end, size=rng.integers(1, 6)):
                damaged[place] = rng.integers(256)
        else:
            size = int(rng.integers(1, max(2, min(64, len(data) // 4))))
            a, b = sorted(rng.integers(len(data) - size, size=2).tolist())
            damaged[a : a + size], damaged[b : b + size] = data[b : b + size], data[a : a + size]
        if bytes(damaged) != data:
            yield bytes(damaged)


def readings(path, reader, mistakes):
    """What is read of each damaged copy of a file, None of one that is refused in one line."""
    for damaged in mutations(path.read_bytes()):
        path.write_bytes(damaged)
        try:
            result = reader(path)
        except mistakes as error:
            assert str(error).strip() and "\n" not in str(error)
            result = None
        yield result


def captions(folder):
    for name in "abc":
        Image.new("L", (8, 8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a photo of fetal brain, é, dark\nmore", "utf-8")
    return folder / "a.txt", lambda path: read_captioned_folder(folder)


def caption_list(folder):
    captions(folder)
    rows = [json.dumps({"file_name": f"{name}.png", "text": "a photo"}) for name in "abc"]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder / "metadata.jsonl", lambda path: read_captioned_folder(folder)


def prompts(folder):
    lists = {plane: [f"a photo of fetal {plane}", f"a scan, {plane}"] for plane in PLANES}
    (folder / "prompts.json").write_text(json.dumps(lists))
    return folder / "prompts.json", lambda path: read_prompts(str(path))


def manifest(folder):
    with (folder / "manifest.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "plane", "prompt", "sampler"])
        writer.writerows([f"{p}/{n}.png", p, "a, b", "euler"] for p in PLANES for n in range(9))
    return folder / "manifest.csv", read_synthetic


def spanish(folder):
    write_spanish_layout(folder, 2, test=1, seed=0)
    return folder / "FETAL_PLANES_DB_data.csv", lambda path: read_spanish(folder)


def african(folder):
    write_african_layout(folder, patients=2, seed=0)
    return folder / "African_planes_database.csv", lambda path: read_african(folder)


def vocabulary(folder):
    shutil.copytree(MINI / "tokenizer", folder, dirs_exist_ok=True)
    return folder / "vocab.json", lambda path: load_tokenizer(folder, TextConfig())


def merges(folder):
    return vocabulary(folder)[0].with_name("merges.txt"), vocabulary(folder)[1]


def tensors(folder):
    save_embedding(folder / "a.safetensors", "<us>", torch.arange(9.0))

    def all_of(path):
        weights = open_weights(path)
        return {key: weights.tensor(key) for key in weights.shapes}

    return folder / "a.safetensors", all_of


def lora(folder):
    network = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Linear(24, 24))
    inject(network, 4, 4.0, ".*")
    save_lora(folder / "a.safetensors", {"lora_unet": network}, {"ss_seed": 0})
    return folder / "a.safetensors", read


def pickled(folder):
    torch.save({"fc.weight": torch.ones(5, 9), "fc.bias": torch.ones(5)}, folder / "a.pth")
    return folder / "a.pth", lambda path: str(read_weights("resnet18", path)[0])


def state(folder):
    identity, lora = {"rank": "4"}, [torch.arange(96.0)]
    write_state(folder / "checkpoint.pt", {"identity": identity, "lora": lora, "rows": [(1, "a")]})
    return folder / "checkpoint.pt", lambda path: read_state(path, identity, "x", LoRAError, str)


def picture(folder):
    pixels = np.random.default_rng(0).integers(256, size=(24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    return folder / "a.png", lambda path: open_image(path).tobytes()


TEXTS = (captions, caption_list, prompts, manifest, spanish, african, vocabulary, merges)
SUMS = (pickled, state, picture)  # kinds whose own sums tell every change


@pytest.mark.parametrize("kind", (*TEXTS, tensors, lora, *SUMS))
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, tmp_path):
    path, reader = kind(tmp_path)
    whole, refused = reader(path), 0
    for result in readings(path, reader, MISTAKES):
        refused += result is None
        assert result is None or kind not in SUMS or result == whole
    assert whole is not None and refused > COUNT // 12


@pytest.mark.parametrize("name", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"])
def test_a_model_with_a_damaged_file_is_whole_and_finite_or_refused(name, tiny_model, tmp_path):
    path = shutil.copytree(tiny_model, tmp_path / "a") / name
    flags = dict.fromkeys(("tokenizer", "vae", "prediction_type", "ema"))
    flags, refused = Namespace(**flags, model=str(tmp_path / "a")), 0
    for model in readings(path, lambda _: load_model(flags), CheckpointError):
        refused += model is None
        assert not model or all(weight.isfinite().all() for weight in model.unet.parameters())
    assert refused > COUNT // 4


def test_an_image_that_is_damaged_is_made_again(tmp_path):
    path, rng = tmp_path / "brain" / "euler_1.png", np.random.default_rng(0)
    shot = Shot(**dict.fromkeys(Shot.__dataclass_fields__, 1) | {"sampler": "euler"})
    save_shot(path, rng.integers(256, size=(24, 32, 3), dtype=np.uint8), shot)
    assert is_saved(path, shot)
    for damaged in mutations(path.read_bytes()):
        path.write_bytes(damaged)
        assert not is_saved(path, shot)

"""What the tests of several scripts share: a folder of images, two LoRAs, and pictures for people
that take no time."""

import shutil
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train_lora
from ldm.checkpoints import load
from lora.files import save_lora
from lora.model import inject, lora_layers


@pytest.fixture(scope="package", autouse=True)
def quick_pictures():
    """Sample sheets are drawn in two steps instead of twenty, curves and contact sheets are not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lora, "generate", partial(train_lora.generate, steps=2))
        for script in (train_lora, sample):
            patch.setattr(script, "save", lambda figure, path: path.touch())
        yield


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """kohya's folders: two wide images of 2 repeats, three square ones of 1, dark to bright."""
    root = tmp_path_factory.mktemp("folders")
    generator = torch.Generator().manual_seed(0)
    for name, size, count in (("2_fetal brain", (96, 40), 2), ("1_fetal femur", (48, 48), 3)):
        (root / name).mkdir()
        for n in range(count):
            pixels = torch.rand(size[1], size[0], 3, generator=generator) * 255 / (count - n)
            Image.fromarray(pixels.byte().numpy()).save(root / name / f"{n}.png")
    return root


@pytest.fixture(scope="package")
def make_lora():
    """make_lora(path, model, seed, **metadata): a LoRA of U-Net and text encoder that changes
    images a good deal."""

    def make(path, model, seed, **metadata):
        model = load(model)
        networks = {"lora_unet": model.unet, "lora_te": model.text_encoder}
        for network, target in zip(networks.values(), ("transformer", "text-encoder")):
            inject(network, 2, 1 + seed, target, seed=seed)
            for layer in lora_layers(network).values():
                generator = torch.Generator().manual_seed(seed)
                torch.nn.init.normal_(layer.B.weight, std=0.3, generator=generator)
        save_lora(path, networks, metadata, torch.float32)
        return path

    return make


@pytest.fixture(scope="package")
def loras(tiny_model, make_lora, tmp_path_factory):
    """Two files, the first of which says that it was trained with clip skip 2."""
    place = tmp_path_factory.mktemp("loras")
    fetal = make_lora(place / "fetal.safetensors", tiny_model, 0, ss_clip_skip=2)
    return [fetal, make_lora(place / "sharp.safetensors", tiny_model, 1)]


@pytest.fixture
def other_model(tiny_model, tmp_path):
    """tiny_model with one weight that is other."""
    place = shutil.copytree(tiny_model, tmp_path / "other_model")
    path = place / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"conv_out.bias": tensors["conv_out.bias"] + 1}, path)
    return place


@pytest.fixture
def changed_by(tiny_model, monkeypatch):
    """changed_by(script, line): runs it; the names of tensors of U-Net and text encoder that it
    left otherwise than tiny_model has them, A and B among them."""

    def run(script, line):
        models, load_model = [], script.load_model

        def remember(*args, **settings):
            models.append(load_model(*args, **settings))
            return models[-1]

        monkeypatch.setattr(script, "load_model", remember)
        script.main(script.parse_args(line.split()))
        states = []
        for model in (load(tiny_model), *models):
            networks = {"unet": model.unet, "te": model.text_encoder}
            states.append(
                {
                    f"{name}.{key.replace('.base.', '.').replace('.table.', '.')}": value
                    for name, network in networks.items()
                    for key, value in network.state_dict().items()
                }
            )
        before, after = states
        assert before.keys() <= after.keys()
        return {k for k in after if k not in before or not torch.equal(before[k], after[k])}

    return run

"""Pre-training of the embedded model, a few steps of it: scenes, resuming, the folder it leaves."""

import re

import numpy as np
import pytest
from safetensors.torch import load_file

from ldm.checkpoint import load
from ldm.pretrain_mini import main, parse_args
from ldm.scenes import scene
from planes import PLANES


def test_scenes_are_grey_squares_with_generic_captions():
    for n in range(20):
        image, caption = scene(np.random.default_rng(n), 64)
        assert image.size == (64, 64) and image.mode == "L"
        assert caption.startswith("a photo of ") and len(re.findall(r"\w+|,", caption)) <= 34
        assert not set(caption.split()) & {"fetal", *PLANES}


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one_and_the_folder_loads(tmp_path):
    tiny = ["--scenes", "64", "--vae-steps", "2", "--unet-decay", "2", "--save-every", "1", "--device", "cpu"]

    def run(work, steps, out):
        flags = ["--work", str(tmp_path / work), "--out", str(tmp_path / out), "--unet-steps", str(steps)]
        main(parse_args([*tiny, *flags]))

    run("whole", 2, "one")
    run("parts", 1, "half")
    run("parts", 2, "two")
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        one, two = (load_file(tmp_path / out / f"{name}.safetensors") for out in ("one", "two"))
        assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)
    half = load_file(tmp_path / "half/unet/diffusion_pytorch_model.safetensors")
    assert not half["conv_in.weight"].equal(
        load_file(tmp_path / "one/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    )
    assert load(tmp_path / "one").sample_size == 8
    with pytest.raises(SystemExit, match="exists already"):
        run("whole", 2, "one")

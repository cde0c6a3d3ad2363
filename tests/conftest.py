"""Tests in up to four processes where pytest-xdist is installed, each with one thread, which torch
reads at import; and a tiny Stable Diffusion for all of them."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """As if `-n auto --maxprocesses 4 --dist loadfile` were given, since a file's tests share
    fixtures; -n 0: one."""
    options, in_worker = config.option, "PYTEST_XDIST_WORKER" in os.environ
    free = config.pluginmanager.hasplugin("xdist") and not in_worker and not options.usepdb
    if free and options.numprocesses is None:
        options.numprocesses, options.dist = min(os.cpu_count() or 1, 4), "loadfile"
        # in the order below, and not the files with the most tests first
        options.loadscopereorder = False


LONGEST = [
    "test_launch.py",
    "test_reproduce.py",
    "test_pretrain.py",
    "test_processes.py",
    "test_fuzz.py",
]


def pytest_collection_modifyitems(items):
    """The files that take longest come first: at the end no process then waits for another that is
    minutes in one."""
    rank = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a Stable Diffusion of random weights, every one of which counts: images of 64
    px, latents of 8, U-Net of two levels, CLIP of three layers, the embedded model's tokenizer."""
    import torch

    from ldm import MINI
    from ldm.checkpoints import Model, save_folder
    from ldm.checkpoints.tokenizer import load_tokenizer
    from ldm.text import TextConfig, TextEncoder
    from ldm.unet import UNet, UNetConfig
    from ldm.vae import AutoencoderKL, VAEConfig

    tokenizer = load_tokenizer(MINI / "tokenizer", TextConfig())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = (
            UNet(UNetConfig(4, 4, (8, 16), (True, True), 1, (2, 2), 16, norm_num_groups=4)),
            AutoencoderKL(VAEConfig(3, 3, 4, (4, 4, 4, 4), 1, 2)),
            TextEncoder(TextConfig(len(tokenizer), 16, 32, 3, 2)),
        )
        for parameter in (p for network in networks for p in network.parameters()):
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:  # norms and biases
                parameter.data += 0.1 * torch.randn(parameter.shape)
    path = tmp_path_factory.mktemp("tiny") / "tiny_model"
    save_folder(Model(*networks, tokenizer, sample_size=8), path)
    return path

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


LONGEST = (
    "test_reproduce.py",
    "test_pretrain.py",
    "test_processes.py",
    "test_fuzz.py",
    "test_use.py",
)


def pytest_collection_modifyitems(items):
    """The files that take longest come first: at the end no process then waits for another that is
    minutes in one."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A diffusers folder: random weights, a U-Net and a VAE of two levels, a text tower with the
    embedded model's vocabulary; images of 16 px in milliseconds."""
    import torch

    from ldm import MINI
    from ldm.checkpoints import NETWORKS, Model, save_folder
    from ldm.checkpoints.tokenizer import load_tokenizer
    from ldm.text import TextConfig
    from ldm.unet import UNetConfig
    from ldm.vae import VAEConfig

    text = TextConfig(760, 8, 16, 2, 2, 64)
    vae = VAEConfig(block_out_channels=(8, 8), norm_num_groups=4)
    attention = {"attention": (True, True), "num_heads": (2, 2), "cross_attention_dim": 8}
    unet = UNetConfig(block_out_channels=(8, 16), norm_num_groups=4, **attention)
    torch.manual_seed(0)
    networks = {
        name: build(config).eval().requires_grad_(False)
        for (name, build), config in zip(NETWORKS.items(), (unet, vae, text))
    }
    tokenizer, folder = load_tokenizer(MINI / "tokenizer", text), tmp_path_factory.mktemp("sd")
    save_folder(Model(**networks, tokenizer=tokenizer, sample_size=8), folder / "tiny")
    return folder / "tiny"

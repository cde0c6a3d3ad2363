"""The embedded miniature model: its size, what its autoencoder keeps of real images, that the peers
open it."""

import pytest
import torch
from shorthand import DATA, real_data
from test_checkpoint import assert_near

from ldm import MINI
from ldm.checkpoints import load
from ldm.images import read_image
from ldm.text import encode_prompts
from planes import PROMPTS
from planes.datasets import read_manifest, read_spanish


@pytest.fixture(scope="module")
def mini():
    return load(MINI)


def test_it_weighs_at_most_40_megabytes():
    assert sum(path.stat().st_size for path in MINI.rglob("*") if path.is_file()) <= 40_000_000


def test_every_prompt_is_whole_words_and_differs_for_the_text_encoder(mini):
    for prompt in PROMPTS.values():
        assert mini.tokenizer.tokenize(prompt) == [f"{word}</w>" for word in prompt.split()]
    context = encode_prompts(mini.tokenizer, mini.text_encoder, [*PROMPTS.values()]).flatten(1)
    distances = torch.cdist(context, context)[~torch.eye(5, dtype=torch.bool)]
    assert distances.min() > 0.05 * context.norm(dim=1).mean()


@pytest.mark.slow
@real_data
def test_its_vae_reconstructs_real_images_it_never_saw_with_at_least_22_db(mini):
    spanish = read_spanish(DATA / "FETAL_PLANES_ZENODO")
    records = read_manifest(DATA / "manifests" / "lora_train_data.csv", spanish)[::5]
    side = mini.sample_size * mini.vae.config.downsampling
    images = torch.stack([read_image(record.path, side) for record in records])
    decoded = mini.vae.decode(mini.vae.to_latents(images)).clamp(-1, 1)
    psnr = -10 * torch.log10(((images - decoded) / 2).square().mean(dim=(1, 2, 3)))
    assert len(images) == 20 and psnr.mean() >= 22


@pytest.mark.slow
def test_diffusers_opens_the_folder_and_its_networks_say_the_same(mini):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(MINI / "unet").eval()
    side = mini.sample_size
    x = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(0))
    context = encode_prompts(mini.tokenizer, mini.text_encoder, [*PROMPTS.values()][:2])
    t = torch.tensor([999, 20])
    vae = diffusers.AutoencoderKL.from_pretrained(MINI / "vae")
    with torch.no_grad():
        assert_near(mini.unet(x, t, context), unet(x, t, context).sample, 1e-5)
        images = mini.vae.decode(x)
        assert_near(images, vae.decode(x / mini.vae.config.scaling_factor).sample, 1e-5)
        posterior, known = mini.vae.encode(images), vae.encode(images).latent_dist
    assert_near(posterior.mean, known.mean, 1e-5)
    assert_near(posterior.std, known.std, 1e-5)

"""The networks: sizes, and numerics that are easily got wrong. Their outputs are compared with the
original modules' in checkpoints/, with diffusers' there and in mini/."""

import math
from dataclasses import replace

import pytest
import torch
from shorthand import agree, refused
from torch import nn

from ldm.layers import SpatialTransformer, timestep_embedding
from ldm.text import TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from ldm.vae import AutoencoderKL, VAEConfig

UNET = UNetConfig(4, 4, (24, 40, 40), (False, True, False), 1, (4, 4, 4), 8, norm_num_groups=4)
VAE = VAEConfig(block_out_channels=(8, 24), layers_per_block=1, norm_num_groups=4)
TEXT = TextConfig(50, 16, 32, 3, 4, 12)


def randomized(network, seed=0):
    """The network with every weight drawn, none left at zero or one, and activations of order
    one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            draw = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(draw / math.sqrt(p[0].numel()))
            else:
                p.copy_(0.2 * draw + name.endswith("weight"))
    return network.eval()


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SD_2 = UNetConfig(num_heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)


@pytest.mark.parametrize(
    "build, config, parameters, tensors",
    [
        (UNet, UNetConfig(), 859_520_964, 686),
        (UNet, SD_2, 865_910_724, 686),
        (AutoencoderKL, VAEConfig(), 83_653_863, 248),
        (TextEncoder, TextConfig(), 123_060_480, 196),
    ],
)
def test_the_default_networks_have_the_size_of_sd_15_and_sd_2(build, config, parameters, tensors):
    with torch.device("meta"):
        network = build(config)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == tensors


@pytest.mark.parametrize("dim", [32, 320])
def test_the_timestep_embedding_is_cosines_then_sines_of_unrounded_times(dim):
    t = torch.tensor([0.0, 1.0, 37.25, 500.0, 981.0, 999.0])
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = t.double()[:, None] * frequencies
    expected = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    # float32 angles of about 1000 are off by 6e-5
    agree(timestep_embedding(t, dim), expected, 1e-4)
    assert timestep_embedding(t.half(), dim).dtype == torch.float32


def test_every_norm_has_the_epsilon_of_the_original():
    unet, vae, text = UNet(UNET), AutoencoderKL(VAE), TextEncoder(TEXT)
    inside = {id(m.norm) for m in unet.modules() if isinstance(m, SpatialTransformer)}
    norms = [m for m in unet.modules() if isinstance(m, nn.GroupNorm)]
    assert {m.eps for m in norms if id(m) in inside} == {1e-6}
    assert {m.eps for m in norms if id(m) not in inside} == {1e-5}
    assert {m.eps for m in vae.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}
    for network in (unet, text):
        assert {m.eps for m in network.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


def test_a_number_as_time_means_that_time_for_the_whole_batch():
    unet = randomized(UNet(UNET))
    latents, context = draw(2, 4, 4, 4), draw(2, 3, 8)
    with torch.no_grad():
        batch = unet(latents, torch.tensor([37.25, 37.25]), context)
        agree(unet(latents, 37.25, context), batch, 0)
        assert not torch.equal(unet(latents, 37, context), batch)


def test_gradient_checkpointing_changes_no_gradient():
    unet = randomized(UNet(UNET))
    gradients = []
    for unet.gradient_checkpointing in (False, True):
        unet.zero_grad()
        unet(draw(1, 4, 4, 4), 500, draw(1, 3, 8)).square().sum().backward()
        gradients.append([p.grad.clone() for p in unet.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_sizes_that_do_not_halve_evenly_are_refused():
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):  # of the skips
        UNet(UNET)(draw(1, 4, 6, 8), 0, draw(1, 3, 8))
    with refused(ValueError, "4x5: both sides must be multiples of 2"):
        AutoencoderKL(VAE).encode(draw(1, 3, 4, 5))


def test_the_log_variance_is_clamped_to_minus_30_and_20():
    vae = randomized(AutoencoderKL(VAE))
    with torch.no_grad():
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias.copy_(torch.tensor([100.0, -100.0, 0.0, 0.0, -100.0, 100.0, 5.0, 0.0]))
        posterior = vae.encode(draw(1, 3, 4, 4))
    assert posterior.logvar.amax((0, 2, 3)).tolist() == [-30.0, 20.0, 5.0, 0.0]
    assert posterior.mean.amax((0, 2, 3)).tolist() == [100.0, -100.0, 0.0, 0.0]  # the mean is not


def test_latents_are_the_scaled_mean_plus_std_times_noise():
    vae = randomized(AutoencoderKL(VAE))
    images, noise = draw(2, 3, 8, 8), draw(2, 4, 4, 4, seed=2)
    with torch.no_grad():
        mean, logvar = vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)
        torch.testing.assert_close(vae.to_latents(images), 0.18215 * mean)
        torch.testing.assert_close(
            vae.to_latents(images, noise), 0.18215 * (mean + (0.5 * logvar).exp() * noise)
        )


def test_clip_skip_is_the_tower_without_its_last_layers():
    tower = randomized(TextEncoder(TEXT))
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        last = tower.text_model(input_ids=ids).last_hidden_state
        agree(tower(ids), last, 0)
        for clip_skip in (2, 3):
            shorter = TextEncoder(replace(TEXT, num_hidden_layers=4 - clip_skip)).eval()
            known = {k: v for k, v in tower.state_dict().items() if k in shorter.state_dict()}
            shorter.load_state_dict(known)
            agree(tower(ids, clip_skip), shorter(ids), 1e-6)


@pytest.mark.parametrize("clip_skip", [0, 4, -1])
def test_a_layer_that_the_tower_lacks_is_refused(clip_skip):
    with refused(ValueError, f"clip skip {clip_skip}: .* has layers 1 to 3"):
        TextEncoder(TEXT)(torch.zeros(1, 12, dtype=torch.long), clip_skip)


def test_text_attention_is_causal_and_does_not_mask_the_padding():
    tower = randomized(TextEncoder(TEXT))
    ids = torch.tensor([[48, 7, 9, 49, 49, 49, 49, 49, 49, 49, 49, 49]])
    other = ids.clone()
    other[0, 6] = 20
    with torch.no_grad():
        a, b = tower(ids), tower(other)
    agree(a[:, :6], b[:, :6], 1e-6)  # no token sees a later one
    # every later one sees it, though it is padding
    assert (a[:, 7:] - b[:, 7:]).abs().amax(-1).min() > 1e-3

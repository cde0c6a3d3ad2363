"""Compiled networks say what the plain ones say, as one graph; the decoder's batches and its way
out of float16."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from ldm import CheckpointError, fast
from ldm.generate import generate
from ldm.images import decode_images
from ldm.unet import UNet, UNetConfig
from ldm.vae import AutoencoderKL, VAEConfig
from lora.layer import LoRALayer
from lora.model import inject, lora_layers, merge
from planes.pictures import ImageError

SMALL = UNetConfig(
    block_out_channels=(8, 16),
    attention=(True, False),
    num_heads=(2, 2),
    cross_attention_dim=12,
    norm_num_groups=4,
)
SMALL_VAE = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
compiles = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile: no C++ compiler"
)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    return UNet(SMALL).eval().requires_grad_(False)


def with_lora(unet, merged):
    inject(unet, 4, 4.0, "transformer")
    for layer in lora_layers(unet).values():
        layer.B.data.normal_(0, 0.1)
    if merged:
        merge(unet)
    assert any(isinstance(module, LoRALayer) for module in unet.modules())


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("lora", ["merged", "unmerged"])
def test_a_compiled_unet_is_one_graph_without_a_break_and_says_the_same_with_both_samplers(
    unet, lora
):
    with_lora(unet, lora == "merged")
    context, negative = torch.randn(2, 5, 12), torch.randn(1, 5, 12)

    x, t = torch.randn(4, 4, 4, 6), torch.full((4,), 700.5)

    @torch.no_grad()
    def draw():
        texts = unet.read(torch.cat([negative.expand_as(context), context]))
        latents = [
            generate(unet, context, negative, [1, 2], (4, 6), sampler=s, steps=4)
            for s in ("euler", "unipc")
        ]
        return [unet(x, t, texts).clone(), *latents]

    plain = draw()
    fast.compile_whole(unet)
    for compiled, eager in zip(draw(), plain, strict=True):
        torch.testing.assert_close(
            compiled, eager, rtol=0, atol=1e-5 * max(1, eager.abs().max().item())
        )
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert counters["stats"]["calls_captured"] > 100  # it was this network, and not a piece of it


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without its C++: the graphs, their breaks and their number are the same."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **how: plain(module, **how, backend="aot_eager")
    )


@pytest.mark.slow
def test_compiled_blocks_train_lora_as_plain_ones_do_with_and_without_checkpointing(unet, traced):
    with_lora(unet, merged=False)
    x, t, context = torch.randn(2, 4, 4, 6), torch.tensor([10, 900]), torch.randn(2, 5, 12)
    layers = lora_layers(unet)

    def gradients():
        unet.zero_grad(set_to_none=True)
        unet(x, t, context).square().mean().backward()
        return [layer.A.grad.clone() for layer in layers.values()]

    plain = gradients()
    fast.compile_blocks(unet)
    for unet.gradient_checkpointing in (False, True):
        for compiled, eager in zip(gradients(), plain, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    assert not counters["graph_break"]
    assert 2 <= counters["stats"]["unique_graphs"] <= 2 * sum(1 for _ in unet.modules())
    assert torch._dynamo.config.recompile_limit >= fast.FORMS


@pytest.mark.slow
def test_blocks_of_more_shapes_than_torch_keeps_forms_of_are_all_compiled(traced):
    torch._dynamo.reset()
    counters.clear()
    widths = {
        "block_out_channels": (4, 8, 12, 16, 20),
        "attention": (False,) * 5,
        "num_heads": (1,) * 5,
    }
    config = UNetConfig(**widths, layers_per_block=1, cross_attention_dim=4, norm_num_groups=2)
    unet = UNet(config).eval().requires_grad_(False)
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor(5.0), torch.randn(1, 2, 4)
    plain = unet(x, t, context)
    fast.compile_blocks(unet)
    torch.testing.assert_close(unet(x, t, context), plain, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] > 8 and not counters["graph_break"]


def test_compiling_is_the_users_wish_or_a_gpus_with_enough_to_do(monkeypatch):
    monkeypatch.setattr(fast, "cannot_compile", lambda device: None)
    assert fast.wants_compiling(None, "cuda", fast.ENOUGH) and fast.wants_compiling(
        None, "cuda:1", 5000
    )
    assert not fast.wants_compiling(None, "cuda", fast.ENOUGH - 1) and not fast.wants_compiling(
        None, "cpu", 5000
    )
    assert fast.wants_compiling(True, "cpu", 1) and not fast.wants_compiling(False, "cuda", 5000)
    monkeypatch.setattr(fast, "cannot_compile", lambda device: "it needs triton")
    assert not fast.wants_compiling(None, "cuda", 5000)
    with pytest.raises(CheckpointError, match="--compile: it needs triton; leave it out"):
        fast.wants_compiling(True, "cuda", 5000)


def test_without_a_compiler_there_is_a_reason(monkeypatch):
    def compile(function, **how):
        raise RuntimeError("\nCannot find a working triton installation.\nSee ..")

    monkeypatch.setattr(torch, "compile", compile)
    assert fast.cannot_compile("cpu") == "Cannot find a working triton installation."
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    assert fast.cannot_compile("cpu") is None


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(1)
    return AutoencoderKL(SMALL_VAE).eval().requires_grad_(False)


def test_images_decoded_together_are_those_decoded_one_by_one(vae):
    latents = torch.randn(5, 4, 6, 8)
    one = decode_images(vae, latents)
    assert one.shape == (5, 12, 16, 3) and one.dtype == torch.uint8 and len(one.unique()) > 20
    assert (decode_images(vae, latents, at_once=2).int() - one.int()).abs().max() <= 1


def test_what_float16_makes_of_an_image_and_is_not_finite_is_decoded_in_float32(vae):
    latents = torch.randn(3, 4, 6, 8)
    calls, decode = [], AutoencoderKL.decode

    class Overflowing(AutoencoderKL):
        def decode(self, rows):
            calls.append((rows.dtype, len(rows)))
            images = decode(self, rows)
            return (
                images * torch.inf
                if rows.dtype == torch.float16 and (rows == latents[2].half()).any()
                else images
            )

    half = Overflowing(SMALL_VAE).half()
    half.load_state_dict(vae.state_dict())
    exact = AutoencoderKL(SMALL_VAE)
    exact.load_state_dict({key: value.half().float() for key, value in vae.state_dict().items()})
    images = decode_images(half, latents)
    assert [dtype for dtype, _ in calls] == [torch.float16] * 3 + [torch.float32]
    # as it was: the next image does not hang on this one
    assert half.post_quant_conv.weight.dtype == torch.float16
    assert torch.equal(images[2], decode_images(exact, latents[2:])[0])
    assert (images[:2].int() - decode_images(exact, latents[:2]).int()).abs().max() <= 2


def test_what_is_not_finite_in_float32_either_is_told(vae):
    latents = torch.zeros(1, 4, 4, 4)
    latents[0, 0, 0, 0] = torch.nan
    with pytest.raises(ImageError, match="is not finite; give another --vae"):
        decode_images(vae, latents)


def test_the_decoder_takes_as_many_images_as_memory_holds_and_the_batch_can_be_cut_into(
    vae, monkeypatch
):
    assert fast.decoded_at_once(vae, 512, 512, 16) == 1  # on a CPU
    weight = SimpleNamespace(is_cuda=True, device="cuda", itemsize=2)
    on_gpu = SimpleNamespace(config=VAEConfig(), post_quant_conv=SimpleNamespace(weight=weight))
    for gigabytes, batch, at_once in (
        (80, 16, 16),
        (24, 16, 8),
        (8, 16, 4),
        (24, 12, 12),
        (24, 13, 1),
        (1, 8, 1),
    ):
        card = SimpleNamespace(total_memory=gigabytes << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert fast.decoded_at_once(on_gpu, 512, 512, batch) == at_once, (gigabytes, batch)

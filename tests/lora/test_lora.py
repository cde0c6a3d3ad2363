"""LoRA layers: Eq. 2, its exact edges (injection, strength 0, unmerge, removal), precision,
targets, errors."""

import copy
import itertools

import pytest
import torch
from torch import nn

from ldm.text import TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from lora import (
    LoRAError,
    LoRALayer,
    inject,
    lora_layers,
    lora_names,
    lora_parameters,
    merge,
    remove,
    set_strength,
    unmerge,
)

TINY = UNetConfig(
    block_out_channels=(8, 16),
    attention=(True, False),
    layers_per_block=1,
    num_heads=(2, 2),
    cross_attention_dim=12,
    norm_num_groups=4,
)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(TINY)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    latents, context = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, 4, 4), (2, 5, 12))
    )
    return latents, torch.tensor([3, 800]), context


def train_a_little(model):
    """Gives each B values of a trained size, so that the LoRA changes the output."""
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():
        layer.B.data.normal_(0, 0.3, generator=generator)


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


@pytest.mark.parametrize("base", [nn.Linear(6, 5), nn.Conv2d(6, 5, 1)], ids=["linear", "1x1"])
def test_the_layer_is_equation_2(base):
    layer = LoRALayer(base, rank=3, alpha=2.0)
    nn.init.normal_(layer.B)
    layer.strength = 0.7
    x = torch.randn(2, 6, 4, 4)
    W0, b, A, B = (
        tensor.detach().double() for tensor in (base.weight.view(5, 6), base.bias, layer.A, layer.B)
    )
    pixels = x.double().permute(0, 2, 3, 1)
    expected = pixels @ W0.T + b + 0.7 * (2.0 / 3) * (pixels @ (B @ A).T)
    h = (
        layer(x).permute(0, 2, 3, 1)
        if isinstance(base, nn.Conv2d)
        else layer(x.permute(0, 2, 3, 1))
    )
    torch.testing.assert_close(h.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings", [{"padding": 1}, {"padding": (0, 2), "stride": 2}, {"dilation": 2}]
)
def test_of_a_convolution_a_is_one_of_its_kind_and_b_acts_on_pixels(settings):
    layer = LoRALayer(base := nn.Conv2d(6, 5, 3, **settings).double(), rank=3, alpha=2.0)
    nn.init.normal_(layer.B)
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    BA = torch.einsum("or,rikl->oikl", layer.B.double(), layer.A.double().view(3, 6, 3, 3))
    whole = nn.functional.conv2d(x, base.weight + 2 / 3 * BA, base.bias, **settings)
    torch.testing.assert_close(layer(x), whole, atol=1e-5, rtol=0)
    layer.merge()
    torch.testing.assert_close(layer(x), whole, atol=1e-5, rtol=0)


def test_locon_reaches_what_kohyas_network_with_conv_dim_reaches(unet):
    """sd-scripts' networks/lora.py: linear layers and convolutions inside four classes of
    module."""
    classes = {"SpatialTransformer", "ResnetBlock", "Downsample", "Upsample"}
    inside = [path for path, module in unet.named_modules() if type(module).__name__ in classes]
    assert {type(unet.get_submodule(path)).__name__ for path in inside} == classes
    reached = {
        path
        for path, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and any(path.startswith(f"{block}.") for block in inside)
    }
    assert set(inject(unet, 2, 2, "locon")) == reached and len(reached) > 20


@pytest.mark.parametrize("target", ["cross-attention", "attention", "transformer", "locon"])
def test_injection_leaves_the_output_bit_equal(unet, inputs, target):
    before = unet(*inputs)
    inject(unet, 4, 4, target)
    assert torch.equal(unet(*inputs), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_injection_is_bit_equal_in_every_precision_of_the_base(dtype):
    base = nn.Linear(16, 16).to(dtype)
    x = torch.randn(8, 16, dtype=dtype)
    h = LoRALayer(base, 4, 4)(x)
    assert h.dtype == dtype and torch.equal(h, base(x))


def test_strength_scales_the_correction_and_zero_is_bit_equal_to_the_base(unet, inputs):
    before = unet(*inputs)
    inject(unet, 4, 4, "transformer")
    train_a_little(unet)
    with torch.no_grad():
        assert (unet(*inputs) - before).abs().max() > 0.05
        set_strength(unet, 0)
        assert torch.equal(unet(*inputs), before)
        layer, x = next(iter(lora_layers(unet).values())), torch.randn(1, 8, 4, 4)
        change = {}
        for layer.strength in (1.0, -2.0):
            change[layer.strength] = layer(x) - layer.base(x)
        torch.testing.assert_close(change[-2.0], -2 * change[1.0], atol=1e-5, rtol=0)
        layer.strength, layer.B[0, 0] = 0.0, torch.nan  # not multiplied by 0 but left out
        assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_merged_equals_injected_and_no_longer_reads_the_lora(unet, inputs, strength):
    inject(unet, 4, 8, "transformer")
    train_a_little(unet)
    set_strength(unet, strength)
    with torch.no_grad():
        injected = unet(*inputs)
        merge(unet)
        for parameter in lora_parameters(unet):
            parameter.fill_(torch.nan)
        torch.testing.assert_close(unet(*inputs), injected, atol=1e-5, rtol=0)


def test_merge_takes_a_strength_of_its_own(unet, inputs):
    inject(unet, 4, 4)
    train_a_little(unet)
    with torch.no_grad():
        set_strength(unet, 0.5)
        half = unet(*inputs)
        set_strength(unet, 1)
        merge(unet, strength=0.5)
        torch.testing.assert_close(unet(*inputs), half, atol=1e-5, rtol=0)


def test_a_half_precision_base_is_merged_in_float32_and_rounded_once():
    base = nn.Linear(64, 64).half()
    W0 = base.weight.detach().clone()
    layer = LoRALayer(base, 4, 3)
    nn.init.normal_(layer.B, std=0.1)
    layer.merge()
    assert torch.equal(base.weight, (W0.float() + 3 / 4 * (layer.B @ layer.A)).half())
    layer.unmerge()
    assert torch.equal(base.weight, W0)


def test_unmerge_and_remove_give_back_the_same_bits_and_modules(unet, inputs):
    weights, modules, before = copy.deepcopy(unet.state_dict()), list(unet.modules()), unet(*inputs)
    inject(unet, 4, 4, "transformer")
    train_a_little(unet)
    injected = unet(*inputs)
    merge(unet, 0.3)
    unmerge(unet)
    set_strength(unet, 1)
    assert torch.equal(unet(*inputs), injected)
    merge(unet)
    remove(unet)
    assert list(unet.modules()) == modules
    assert same_bits(unet.state_dict(), weights)
    assert torch.equal(unet(*inputs), before)


def test_only_the_lora_is_trained_and_the_base_keeps_its_bits(unet, inputs):
    weights = copy.deepcopy(unet.state_dict())
    inject(unet, 4, 4)
    optimizer = torch.optim.AdamW(lora_parameters(unet), lr=0.1)
    for _ in range(2):  # B moves first, A from the second step on
        optimizer.zero_grad()
        unet(*inputs).square().mean().backward()
        optimizer.step()
    with_gradient = {id(parameter) for parameter in unet.parameters() if parameter.grad is not None}
    assert with_gradient == {id(parameter) for parameter in lora_parameters(unet)}
    assert all(parameter.grad.abs().max() > 0 for parameter in lora_parameters(unet))
    remove(unet)
    assert same_bits(unet.state_dict(), weights)


def test_the_lora_stays_float32_and_keeps_its_bits_when_the_model_is_halved(unet):
    inject(unet, 4, 4)
    train_a_little(unet)
    kept = [parameter.clone() for parameter in lora_parameters(unet)]
    merge(unet)
    originals = [layer.original.clone() for layer in lora_layers(unet).values()]
    unet.half()
    unmerge(unet)
    assert all(
        torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(lora_parameters(unet), kept)
    )
    for layer, original in zip(lora_layers(unet).values(), originals):
        assert torch.equal(layer.base.weight, original.half())


def test_halving_before_or_after_injection_is_the_same():
    models = [nn.Sequential(nn.Linear(8, 8)).requires_grad_(False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[0].half()
    for model in models:
        inject(model, 2, 2, "0")
        train_a_little(model)
    models[1].half()
    x = torch.randn(3, 8).half()
    assert torch.equal(models[0](x), models[1](x))


def test_under_autocast_the_output_is_the_bases_and_gradients_are_float32(unet, inputs):
    inject(unet, 4, 4)
    layer, x = next(iter(lora_layers(unet).values())), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and torch.equal(layer(x), layer.base(x))
        unet(*inputs).float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in lora_parameters(unet))


@pytest.mark.parametrize(
    ("target", "layers", "parameters"),
    [
        ("cross-attention", 64, 795_648),
        ("attention", 128, 1_594_368),
        ("transformer", 192, 3_391_488),
        ("locon", 278, 8_406_528),
    ],
)
def test_the_targets_have_sd_15s_counts_at_rank_8(target, layers, parameters):
    with torch.device("meta"):
        unet = UNet()
    assert len(inject(unet, 8, 8, target)) == layers
    assert sum(parameter.numel() for parameter in lora_parameters(unet)) == parameters


def test_the_text_encoder_target_has_clips_72_layers():
    with torch.device("meta"):
        text_encoder = TextEncoder(TextConfig(vocab_size=10, hidden_size=24, intermediate_size=96))
    assert len(inject(text_encoder, 2, 2, "text-encoder")) == 72


def test_a_regular_expression_picks_the_layers_of_any_module():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    )
    assert inject(model, 1, 1, r"2\.\d") == ["2.0", "2.1"]
    assert list(lora_layers(model)) == ["2.0", "2.1"]
    assert not model[0].weight.requires_grad


def test_a_is_drawn_as_the_paper_or_as_kohya_does():
    base = nn.Linear(320, 320)
    for rank in (8, 128):
        A = LoRALayer(base, rank, rank).A
        assert (
            A.std().item() == pytest.approx(1 / rank, rel=0.05)
            and abs(A.mean().item()) < 0.1 / rank
        )
        assert A.abs().max() > 2 / rank  # tails: not uniform
        A = LoRALayer(base, rank, rank, init="kaiming").A
        assert A.std().item() == pytest.approx((3 * 320) ** -0.5, rel=0.05)
        assert 0.98 * 320**-0.5 < A.abs().max() <= 320**-0.5


def test_a_depends_on_seed_and_path_alone():
    def drawn(seed, *targets):
        unet = UNet(TINY)
        for target in targets:
            inject(unet, 4, 4, target, generator=torch.Generator().manual_seed(seed))
        return {path: layer.A for path, layer in lora_layers(unet).items()}

    state = torch.get_rng_state()
    layer = LoRALayer(nn.utils.skip_init(nn.Linear, 4, 4), 2, 2)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(
        layer.A, LoRALayer(layer.base, 2, 2).A
    )
    one, other, together = (
        drawn(5, *targets)
        for targets in ([".*attn1.to_q", ".*to_v"], [".*to_v", ".*attn1.to_q"], ["attention"])
    )
    assert same_bits(one, other)
    assert all(torch.equal(one[path], together[path]) for path in one)
    assert len({A.sum().item() for A in one.values()}) == len(one)
    assert not torch.equal(
        one["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"],
        drawn(6, ".*attn1.to_q")["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"],
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, "rank 0: must be a whole number of at least 1"),
        ({"rank": 2.0}, "rank 2.0"),
        ({"rank": True}, "rank True"),
        ({"alpha": 0}, "alpha 0: must be a positive number"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"init": "xavier"}, "init 'xavier': must be 'gaussian' or 'kaiming'"),
        ({"target": "attn3"}, "matches no layer of UNet.*such as conv_in"),
        ({"target": "(attn"}, "nor a regular expression"),
    ],
)
def test_a_wrong_setting_is_one_line_and_changes_nothing(unet, setting, message):
    weights = copy.deepcopy(unet.state_dict())
    with pytest.raises(LoRAError, match=message) as error:
        inject(unet, **{"rank": 4, "alpha": 4} | setting)
    assert "\n" not in str(error.value)
    assert same_bits(unet.state_dict(), weights)
    assert all(parameter.requires_grad for parameter in unet.parameters())


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (nn.Conv2d(6, 6, 3, groups=2), "a convolution in 2 groups"),
        (nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"), "padded with circular"),
        (nn.GroupNorm(2, 6), "GroupNorm is neither"),
    ],
)
def test_a_layer_of_another_kind_is_refused(base, message):
    with pytest.raises(LoRAError, match=message):
        LoRALayer(base, 2, 2)


def test_a_layer_gets_one_lora_only(unet):
    inject(unet, 4, 4)
    with pytest.raises(LoRAError, match=r"attn2\.to_q: has a LoRA already"):
        inject(unet, 4, 4, "attention")
    with pytest.raises(LoRAError, match="matches no layer"):
        inject(unet, 4, 4, r".*attn2\.to_q\.base")
    assert len(lora_layers(unet)) == 16
    with pytest.raises(LoRAError, match="LayerNorm is neither"):
        LoRALayer(nn.LayerNorm(4), 1, 1)


def test_a_rank_beyond_full_is_allowed_with_a_warning():
    with pytest.warns(UserWarning, match="rank 5: the narrowest of the layers has full rank at 3"):
        inject(nn.Sequential(nn.Linear(3, 8)), 5, 5, "0")


def test_a_merged_lora_is_neither_merged_again_nor_scaled(unet, inputs):
    inject(unet, 4, 4)
    train_a_little(unet)
    merge(unet)
    merged = unet(*inputs)
    for action in (lambda: merge(unet), lambda: set_strength(unet, 0.5)):
        with pytest.raises(LoRAError, match="unmerge first"):
            action()
    assert torch.equal(unet(*inputs), merged)
    unmerge(unet)
    with pytest.raises(LoRAError, match="strength inf"):
        set_strength(unet, float("inf"))


def pile(base, names):
    """LoRALayers around one layer, each with A and B of its name alone."""
    for name in names:
        generator = torch.Generator().manual_seed(ord(name))
        base = LoRALayer(base, 2, 3.0, generator=generator, name=name)
        base.B.data.normal_(generator=generator)
        base.strength = {"a": 1.0, "b": -0.5, "c": 0.3}[name]
    return base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_loras_add_up_to_the_same_bits_in_any_order(dtype):
    base, x = nn.Linear(6, 5).to(dtype), torch.randn(4, 6, dtype=dtype)
    piles = {
        "".join(names): pile(copy.deepcopy(base), names) for names in itertools.permutations("abc")
    }
    expected = base(x).double() + sum(
        lora.strength * 3 / 2 * (x.double() @ lora.A.double().T @ lora.B.double().T)
        for lora in piles["abc"].loras
    )
    torch.testing.assert_close(
        piles["abc"](x).double(), expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0
    )
    together, merged = piles["abc"](x), []
    for layer in piles.values():
        assert torch.equal(layer(x), together)
        layer.merge()
        merged.append(layer.root.weight.clone())
        assert torch.equal(merged[-1], merged[0])
        torch.testing.assert_close(
            layer(x).double(), expected, atol=1e-5 if dtype == torch.float32 else 0.2, rtol=0
        )
        layer.unmerge()
        assert torch.equal(layer.root.weight, base.weight)


@pytest.mark.parametrize("gone", "abc")
def test_one_lora_is_removed_or_scaled_and_the_others_keep_their_bits(gone):
    base, x = nn.Linear(6, 5), torch.randn(4, 6)
    model = nn.Sequential(pile(copy.deepcopy(base), "abc"))
    others = pile(copy.deepcopy(base), sorted({*"abc"} - {gone}))(x)
    assert (model(x) - others).abs().max() > 1e-2
    set_strength(model, 0, gone)
    assert torch.equal(model(x), others)
    merge(model)
    remove(model, gone)  # unmerges first
    assert torch.equal(model(x), others) and lora_names(model) == {*"abc"} - {gone}
    assert len(lora_parameters(model)) == 4 and list(lora_layers(model)) == ["0"]
    with pytest.raises(LoRAError, match=f"no LoRA is named '{gone}'"):
        set_strength(model, 1, gone)
    with pytest.raises(LoRAError, match=f"no LoRA is named '{gone}'"):
        remove(model, gone)
    remove(model)
    assert type(model[0]) is nn.Linear and torch.equal(model(x), base(x))

"""LoRA layers: Eq. 2, how A is drawn, what is trained, which layers a target names, what is
refused."""

import pytest
import torch
from shorthand import agree, refused
from torch import nn

from ldm.text import TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from lora import LoRAError, LoRALayer, inject, lora_layers, lora_parameters
from lora.model import add_updates

TINY = UNetConfig(4, 4, (8, 16), (True, False), 1, (2, 2), 12, norm_num_groups=4)
INPUTS = torch.randn(2, 4, 4, 4), torch.tensor([3, 800]), torch.randn(2, 5, 12)


@pytest.fixture
def unet():
    return UNet(TINY)


@pytest.mark.parametrize(
    "base",
    [
        nn.Linear(6, 5),
        nn.Conv2d(6, 5, 1),
        nn.Conv2d(6, 5, 3, padding=(0, 2), stride=2),
        nn.Conv2d(6, 5, 3, dilation=2),
    ],
    ids=str,
)
def test_the_layer_is_equation_2(base):
    layer = LoRALayer(base.double(), rank=3, alpha=2.0).double()
    nn.init.normal_(layer.B.weight)
    x = torch.randn(2, 6, 7, 6, dtype=torch.float64)
    A, B, W0 = layer.A.weight, layer.B.weight, base.weight.detach().clone()
    BA = torch.einsum("or,ri->oi", B.flatten(1), A.flatten(1)).view_as(W0)
    h = layer(x)
    base.weight.data = W0 + 2 / 3 * BA
    agree(h, base(x), 1e-12)
    base.weight.data = W0.clone()
    add_updates(base.weight, [(2 / 3, A, B)])  # in float32
    agree(h, base(x), 1e-5)


def test_half_precision_weights_are_summed_in_float32_and_rounded_once():
    base, (A, C), (B, D) = nn.Linear(64, 64).half(), torch.randn(2, 4, 64), torch.randn(2, 64, 4)
    expected = base.weight.float() + 0.75 * (B @ A) + -0.1 * (D @ C)
    add_updates(base.weight, [(0.75, A, B), (-0.1, C, D)])
    assert torch.equal(base.weight, expected.half())


def test_a_is_drawn_as_the_paper_or_as_kohya_does():
    linear, A = nn.Linear(320, 320), LoRALayer(nn.Linear(320, 320), 8, 8).A.weight
    assert A.std().item() == pytest.approx(1 / 8, rel=0.05) and A.abs().max() > 3 / 8  # has tails
    for base, inputs in ((linear, 320), (nn.Conv2d(80, 8, 3), 720)):
        A = LoRALayer(base, 8, 8, init="kaiming").A.weight
        assert A.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.05)
        assert 0.99 < A.abs().max() * inputs**0.5 <= 1
    layer = LoRALayer(nn.Linear(2, 2), 1, 1)
    assert layer.A.weight.tolist() == [[pytest.approx(1.5409961), pytest.approx(-0.2934289)]]


def test_a_depends_on_seed_and_path_alone_and_the_global_generator_is_untouched():
    def drawn(seed, *targets):
        unet = UNet(TINY)
        state = torch.get_rng_state()
        for target in targets:
            inject(unet, 4, 4, target, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return {path: layer.A.weight for path, layer in lora_layers(unet).items()}

    one, other = drawn(5, ".*attn1.to_q", ".*to_v"), drawn(5, ".*to_v", ".*attn1.to_q")
    every, another = drawn(5, "attention"), drawn(6, "attention")
    for path, A in one.items():
        assert torch.equal(A, other[path]) and torch.equal(A, every[path])
        assert not torch.equal(A, another[path])
    assert len({A.sum().item() for A in every.values()}) == len(every) == 32
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    expected = torch.tensor([0.24002, 0.11810, -0.58561])
    agree(every[path][0, :3], expected, 1e-5)


@pytest.mark.parametrize("target", ["cross-attention", "locon"])
def test_injection_leaves_the_output_bit_equal_and_only_a_and_b_are_trained(unet, target):
    weights, before = list(unet.parameters()), unet(*INPUTS)
    kept = [weight.clone() for weight in weights]
    paths = inject(unet, 4, 4, target)
    after = unet(*INPUTS)
    assert torch.equal(after, before) and paths == list(lora_layers(unet))
    optimizer = torch.optim.AdamW(lora_parameters(unet), lr=0.1)
    for _ in range(2):  # B moves first, A from the second step on
        optimizer.zero_grad()
        unet(*INPUTS).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in lora_parameters(unet))
    assert all(weight.grad is None for weight in weights) and unet(*INPUTS).ne(before).any()
    assert all(map(torch.equal, weights, kept))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_half_precision_base_a_and_b_are_float32_and_autocast_trains_them(dtype):
    model, x = nn.Sequential(nn.Linear(16, 16)).to(dtype), torch.randn(8, 16, dtype=dtype)
    before = model(x)
    inject(model, 4, 4, "0")
    with torch.autocast("cpu", dtype):
        h = model(x)
    assert h.dtype == dtype and torch.equal(h, before)
    h.float().square().mean().backward()
    A, B = lora_parameters(model)
    assert A.dtype == B.dtype == B.grad.dtype == torch.float32 and B.grad.any()


@pytest.mark.parametrize(
    "target, layers, parameters",
    [
        ("cross-attention", 64, 795_648),
        ("attention", 128, 1_594_368),
        ("transformer", 192, 3_391_488),
        ("locon", 278, 8_406_528),
        ("text-encoder", 72, 1_327_104),
    ],
)
def test_the_targets_have_sd_15s_counts_at_rank_8(target, layers, parameters):
    with torch.device("meta"):
        model = TextEncoder(TextConfig()) if target == "text-encoder" else UNet()
    assert len(inject(model, 8, 8, target)) == layers
    assert sum(parameter.numel() for parameter in lora_parameters(model)) == parameters


def test_a_regular_expression_picks_layers_of_any_module_and_a_rank_beyond_full_is_warned_of():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    with pytest.warns(UserWarning, match="rank 3: the narrowest .* full rank at 2") as caught:
        assert inject(model, 3, 1, r"1\.\d") == ["1.0", "1.1"]
    assert caught[0].filename == __file__ and not model[0].weight.requires_grad
    inject(model, 2, 1, "0")
    assert list(lora_layers(model)) == ["0", "1.0", "1.1"]
    twin = nn.Sequential(nn.Linear(3, 4))
    inject(twin, 2, 1, "0", seed=0)  # as where none is given
    assert torch.equal(twin[0].A.weight, model[0].A.weight)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"rank": 0}, "rank 0: must be a whole number of at least 1"),
        ({"rank": 2.0}, "rank 2.0"),
        ({"rank": True}, "rank True"),
        ({"alpha": 0}, "alpha 0: must be a positive number"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"init": "xavier"}, "init 'xavier': must be 'gaussian' or 'kaiming'"),
        ({"target": "attn3"}, "matches no layer of Sequential.* such as 0"),
        ({"target": "(attn"}, "nor a regular expression"),
        ({"target": "1|.*base"}, "1: has a LoRA already"),
        ({"target": r"1\.(base|A)"}, "matches no layer"),
        ({"target": "2"}, "2: a convolution in 2 groups: only plain ones"),
        ({"target": "3"}, "3: a convolution padded with circular values"),
    ],
)
def test_a_wrong_setting_is_one_line_and_changes_nothing(setting, message):
    model = nn.Sequential(
        nn.Linear(4, 4),
        LoRALayer(nn.Linear(4, 4), 2, 2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding_mode="circular"),
    )
    modules = list(model.modules())
    with refused(LoRAError, message):
        inject(model, **{"rank": 4, "alpha": 4, "target": "0"} | setting)
    assert list(model.modules()) == modules
    assert model[0].weight.requires_grad


def test_a_layer_of_another_kind_has_no_lora():
    with refused(LoRAError, r"LayerNorm is neither nn.Linear nor nn.Conv2d"):
        LoRALayer(nn.LayerNorm(4), 1, 1)

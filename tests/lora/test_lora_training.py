"""What a training step sees, what its errors count, the held-out loss, the optimizer: numbers that
must never move, since runs are repeated by their seeds."""

import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from shorthand import agree
from torch import nn

from lora.training import Draws, held_out_loss, loss_weights, make_optimizer
from samplers import NoiseSchedule

LATENTS = [torch.full((4, 2, 2 + n % 2), float(n)) for n in range(5)]  # a to e, of two shapes
REPEATS = [3, 1, 2, 1, 2]
SCHEDULE = NoiseSchedule()


def draws(batch_size=2, accumulate=2, seed=3, **settings):
    return Draws(LATENTS, "abcde", REPEATS, batch_size, accumulate, seed, **settings)


def shown(draws, steps):
    return [["".join(batch.captions) for batch in draws(step)] for step in steps]


def test_each_epoch_shows_each_image_so_often_in_batches_of_one_shape():
    every = draws()
    assert (every.batches_per_epoch, every.steps_per_epoch) == (5, 3)
    for epoch in range(4):
        passes = "".join(map("".join, shown(every, range(3 * epoch, 3 * epoch + 3))))
        assert Counter(passes) == dict(zip("abcde", REPEATS))
    for batch in (batch for step in range(12) for batch in every(step)):
        of_caption = torch.stack([LATENTS["abcde".index(caption)] for caption in batch.captions])
        assert torch.equal(batch.latents, of_caption) and batch.noise.shape == of_caption.shape
    one_shape = Draws(LATENTS[::2], "ace", [1, 1, 1], 1, 1, seed=3)
    assert shown(one_shape, range(6)) == [["e"], ["a"], ["c"], ["a"], ["c"], ["e"]]


def test_what_a_step_sees_is_these_numbers_whatever_was_asked_before():
    expected = [["a", "ac"], ["ee", "ca"], ["db"], ["ca", "db"], ["a", "ce"], ["ae"], ["db", "ac"]]
    assert shown(draws(), range(7)) == expected
    first, second = draws()(4)  # as a run that goes on there
    assert first.captions == ["a"] and second.captions == ["c", "e"] and first.of == second.of == 3
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 500_009 + 4)
    noise = [torch.randn(LATENTS[n].shape, generator=generator) for n in (0, 2, 4)]
    assert torch.equal(torch.cat([first.noise, second.noise]), torch.stack(noise))
    assert torch.equal(torch.cat([first.t, second.t]), torch.tensor([536, 245, 901]))
    assert max(t for step in range(50) for b in draws()(step) for t in b.t) > 980


def test_the_shares_of_several_processes_are_the_whole():
    for step in range(6):
        shares = [list(draws(batch_size=3, share=slice(rank, None, 2))(step)) for rank in (0, 1)]
        for part in ("latents", "noise", "t"):
            whole = [batch for b in draws(batch_size=3)(step) for batch in getattr(b, part)]
            found = [x for share in shares for b in share for x in getattr(b, part)]
            assert sorted(map(str, found)) == sorted(map(str, whole))
        assert len({batch.of for share in shares for batch in share}) == 1


def test_errors_count_1_or_with_debiased_the_root_of_the_noise_to_signal_ratio():
    abar = SCHEDULE.alphas_cumprod
    assert torch.equal(loss_weights(abar, "epsilon", False), torch.ones(1000))
    for prediction_type, expected in {
        "epsilon": [1000**-0.5, 0.04131441, 1.61827886, 14.6146412],  # an SNR of 1000 at most
        "v_prediction": [1 / 1001, 0.00170397, 0.72366732, 0.99533993],
    }.items():
        weights = loss_weights(abar, prediction_type, True)
        expected = torch.tensor(expected)
        agree(weights[[0, 1, 500, 999]], expected, 1e-7, 1e-6)


@pytest.mark.parametrize(
    "prediction_type, expected", [("epsilon", 0.467102), ("v_prediction", 0.743497)]
)
def test_the_held_out_loss_is_at_the_same_noise_and_times_at_every_look(prediction_type, expected):
    seen, state = [], torch.get_rng_state()

    def predict(x_t, t, captions):
        seen.append((t.tolist(), captions))
        return x_t / 2

    for _ in range(2):
        loss = held_out_loss(predict, LATENTS[:2], "ab", SCHEDULE, prediction_type, seed=3)
        assert loss == pytest.approx(expected, rel=1e-5)
    assert seen[0] == ([104, 131, 360, 476, 541, 721, 847, 944], ["a"] * 8) == seen[2]
    assert seen[1][1] == ["b"] * 8 and seen[1][0] != seen[0][0]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_optimizer_is_adamw_and_8_bit_without_a_gpu_is_torchs_with_a_warning(monkeypatch):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in (0.1, 0.2)]
    with pytest.warns(UserWarning, match=r"torch's AdamW in place .* \(no CUDA device\)") as caught:
        optimizer = make_optimizer(groups, 0.02, eight_bit=True)
    assert type(optimizer) is torch.optim.AdamW and caught[0].filename == __file__
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.02}
    for group, rate in zip(optimizer.param_groups, (0.1, 0.2)):
        assert group.items() >= (settings | {"lr": rate, "fused": False}).items()
    fake = SimpleNamespace(AdamW8bit=lambda groups, **settings: (groups, settings))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", fake)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=fake))
    groups = [{"params": [SimpleNamespace(is_cuda=True)], "lr": 0.1}]
    assert make_optimizer(groups, 0.02, eight_bit=True) == (groups, settings)

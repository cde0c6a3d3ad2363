"""Noise levels: the forward process in time t, and the nodes at which the samplers stop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


class SamplerError(ValueError):
    """A sampler or its schedule was asked for something it cannot do."""


@dataclass(frozen=True)
class NoiseSchedule:
    """Forward process of DDPM (Ho et al. 2020, arXiv 2006.11239) with the "scaled linear" betas of
    Stable Diffusion.

    The square roots of the betas are evenly spaced over T = num_train_timesteps. All tables are
    float64: in float32 the subtraction 1 - alphas_cumprod costs three digits at small t.

    Training mixes signal and noise such that the variance stays 1 (`add_noise`). Samplers divide
    that by sqrt(alphas_cumprod_t), so that x = x_0 + sigma eps (`sigma`).
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000

    def __len__(self) -> int:
        return self.num_train_timesteps

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float64, the products of 1 - beta."""
        ends = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
        return torch.cumprod(
            1 - torch.linspace(*ends, self.num_train_timesteps, dtype=torch.float64) ** 2, 0
        )

    @cached_property
    def _log_sigmas(self) -> np.ndarray:
        alphas_cumprod = self.alphas_cumprod.numpy()
        return np.log((1 - alphas_cumprod) / alphas_cumprod) / 2

    def sigma(self, t: float | np.ndarray) -> float | np.ndarray:
        """sqrt((1 - alphas_cumprod) / alphas_cumprod) at time t in [0, T - 1]; between whole t
        linear in log sigma."""
        return np.exp(np.interp(t, np.arange(self.num_train_timesteps), self._log_sigmas))

    def t(self, sigma: float | np.ndarray) -> float | np.ndarray:
        """The time, fractional, at which `sigma(t)` is this sigma; the nearest end of [0, T - 1]
        beyond the table."""
        return np.interp(np.log(sigma), self._log_sigmas, np.arange(self.num_train_timesteps))

    @property
    def sigma_min(self) -> float:
        """sigma(0), 0.0292 for Stable Diffusion."""
        return float(self.sigma(0))

    @property
    def sigma_max(self) -> float:
        """sigma(T - 1), 14.6146 for Stable Diffusion."""
        return float(self.sigma(self.num_train_timesteps - 1))

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) eps, for training (Ho et
        al. 2020, eq. 4).

        latents: (B, ...) clean, x_0; noise: the same shape, unit normal, eps; t: (B,) integers in
            [0, T - 1]

        Returns the shape and dtype of latents. Raises SamplerError where t is fractional or not one
        per row.
        """
        sqrt_alphas_cumprod, sqrt_one_minus = self._roots_at(latents, t)
        return sqrt_alphas_cumprod * latents + sqrt_one_minus * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor, prediction_type: str) -> Tensor:
        """What a network is trained to say: the noise, or for "v_prediction" the velocity v =
        sqrt(alphas_cumprod_t) eps - sqrt(1 - alphas_cumprod_t) x_0 (Salimans & Ho 2022, arXiv
        2202.00512, section 4); arguments, result and errors as in `add_noise`."""
        if prediction_type == "epsilon":
            return noise
        sqrt_alphas_cumprod, sqrt_one_minus = self._roots_at(latents, t)
        return sqrt_alphas_cumprod * noise - sqrt_one_minus * latents

    def _roots_at(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The square roots of alphas_cumprod and its complement at t, (B, 1, ..), rounded to
        latents' dtype last."""
        if t.is_floating_point() or t.shape != latents.shape[:1]:
            raise SamplerError(
                f"t is {t.dtype} of shape {tuple(t.shape)}: it must be one integer for each of"
                f" {len(latents)} rows"
            )
        rows = (-1, *[1] * (latents.ndim - 1))
        alphas_cumprod = self.alphas_cumprod[t.cpu()].view(rows)
        roots = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        return tuple(root.to(latents.device, latents.dtype) for root in roots)


@dataclass(frozen=True)
class Nodes:
    """The noise levels that a sampler visits: N calls of the model, N + 1 sigmas.

    timesteps: the N times that the model is told, possibly fractional
    sigmas: the N + 1 noise levels, falling; the last, 0 or not, is where the sampler ends and the
        model is not called
    init_scale: the sampler starts from init_scale * unit noise
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    init_scale: float

    def t(self, sigma: float) -> float:
        """The time to tell the model at this sigma: exactly a node's own at a node, linear in log
        sigma between.

        Not the schedule's t(sigma), since rounded times do not sit exactly on the schedule.
        Samplers that stop between nodes, as ones of second order do, ask for others.
        """
        rising = np.log(self.sigmas[-2::-1])
        return float(np.interp(np.log(sigma), rising, self.timesteps[::-1]))


def euler_nodes(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "linspace",
    *,
    final: str = "zero",
    steps_offset: int = 0,
) -> Nodes:
    """Nodes for Euler, by default those of Stable Diffusion web UI: even in t, fractional, from
    T - 1 down to 0.

    spacing: "linspace"; "leading" or "trailing", whole times (Lin et al. 2023, arXiv 2305.08891,
        table 2); "karras", even in sigma^(1/7) (Karras et al. 2022, eq. 5)
    final: the last sigma, "zero" or "sigma_min"; steps_offset: added to the times of "leading"

    Raises SamplerError where one of these is unknown or steps do not fit the schedule.
    """
    _check(schedule, steps, spacing, ("linspace", "leading", "trailing", "karras"), final)
    if spacing == "karras":
        sigmas = karras_sigmas(steps, schedule.sigma_max, schedule.sigma_min)
        times = schedule.t(sigmas)
    else:
        times = _spaced(schedule, spacing, steps, steps_offset)
        sigmas = schedule.sigma(times)
    # "leading" starts well below T - 1, where the signal in x_T is no longer negligible: noise such
    # that x / sqrt(1 + sigma^2) has unit variance; elsewhere, as the webui, without the 1
    init_scale = math.hypot(1, sigmas[0]) if spacing == "leading" else float(sigmas[0])
    return _nodes(schedule, times, sigmas, final, init_scale)


def unipc_nodes(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "time_uniform",
    *,
    final: str = "sigma_min",
    steps_offset: int = 0,
) -> Nodes:
    """Nodes for UniPC, by default those of its authors and of Stable Diffusion web UI: even in t,
    fractional.

    spacing: "time_uniform", whose N + 1 times end at t = 0 and whose sigmas interpolate log alpha;
        "linspace", the same rounded to whole times; "leading", "trailing" or "karras" as for Euler,
        with whole times
    final: the last sigma, "sigma_min" or "zero"; steps_offset: added to the times of "leading"

    Raises SamplerError where one of these is unknown or steps do not fit the schedule.
    """
    spacings = ("time_uniform", "linspace", "leading", "trailing", "karras")
    _check(schedule, steps, spacing, spacings, final)
    if spacing == "karras":
        sigmas = karras_sigmas(steps, schedule.sigma_max, schedule.sigma_min)
        times = np.round(schedule.t(sigmas))
    elif spacing == "time_uniform":
        times = _spaced(schedule, "linspace", steps + 1)[:-1]
        log_alphas_cumprod = np.log(schedule.alphas_cumprod.numpy())
        sigmas = np.sqrt(
            np.expm1(-np.interp(times, np.arange(schedule.num_train_timesteps), log_alphas_cumprod))
        )
    else:
        if spacing == "trailing":
            times = _spaced(schedule, spacing, steps)
        # counted up, as diffusers does: ties of the rounding hang on the last bit
        elif spacing == "linspace":
            times = np.round(np.linspace(0, schedule.num_train_timesteps - 1, steps + 1))[:0:-1]
        else:  # the last of N + 1 times is left to `final`
            times = _spaced(schedule, spacing, steps + 1, steps_offset)[:-1]
        sigmas = schedule.sigma(times)
    return _nodes(schedule, times, sigmas, final, math.hypot(1, sigmas[0]))


def karras_sigmas(steps: int, sigma_max: float, sigma_min: float) -> np.ndarray:
    """(steps,) sigmas, evenly spaced in sigma^(1/7) from sigma_max to sigma_min (Karras et al.
    2022, eq. 5)."""
    sigmas = np.linspace(sigma_max ** (1 / 7), sigma_min ** (1 / 7), steps) ** 7.0
    # exact, so that a final sigma_min is not a rounding error above
    sigmas[-1], sigmas[0] = sigma_min, sigma_max
    return sigmas


def checked_sigmas(sigmas: Sequence[float] | Tensor) -> list[float]:
    """Python floats of two noise levels or more, positive but for the last, which do not rise, or
    SamplerError."""
    values = [float(sigma) for sigma in sigmas]
    if len(values) < 2:
        raise SamplerError(f"{len(values)} sigmas: a sampler needs at least a first and a last one")
    for sigma, target in pairwise(values):
        if not (math.inf > sigma > 0 and sigma >= target >= 0):
            raise SamplerError(
                f"sigmas {sigma:g}, {target:g}: they must be finite and fall, and only the last may"
                " be 0"
            )
    return values


def _check(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str,
    spacings: tuple[str, ...],
    final: str,
) -> None:
    if spacing not in spacings:
        raise SamplerError(f"unknown spacing {spacing!r}: choose one of {', '.join(spacings)}")
    if final not in ("zero", "sigma_min"):
        raise SamplerError(f"unknown final {final!r}: choose zero or sigma_min")
    if not 1 <= steps < schedule.num_train_timesteps:
        raise SamplerError(f"{steps} steps: choose from 1 to {schedule.num_train_timesteps - 1}")


def _spaced(schedule: NoiseSchedule, spacing: str, count: int, steps_offset: int = 0) -> np.ndarray:
    """(count,) falling times."""
    T = schedule.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(T - 1, 0, count)
    if spacing == "trailing":
        return np.round(np.arange(T, 0, -T / count)[:count]) - 1
    times = np.arange(count)[::-1] * float(T // count) + steps_offset
    if not 0 <= times[-1] <= times[0] <= T - 1:
        raise SamplerError(f"steps offset {steps_offset}: moves the times beyond [0, {T - 1}]")
    return times


def _nodes(
    schedule: NoiseSchedule, times: np.ndarray, sigmas: np.ndarray, final: str, init_scale: float
) -> Nodes:
    last = schedule.sigma_min if final == "sigma_min" else 0.0
    return Nodes(tuple(times.tolist()), (*sigmas.tolist(), last), init_scale)

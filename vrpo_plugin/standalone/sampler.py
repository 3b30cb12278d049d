"""Samplers from noise (t = 1) to data (t = 0): Euler and Heun for the ODE, Euler-Maruyama for the SDE."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.functional.interpolant import (
    PATH_TYPES,
    PathType,
    clean_estimate,
    path_coefficients,
    time_like,
)
from vrpo_plugin.functional.tensors import widest_dtype
from vrpo_plugin.modules.guide import RewardGuide
from vrpo_plugin.modules.parametrisation import Parametrisation, of_path

Solver = Literal["euler", "heun", "euler_maruyama"]
SOLVERS: tuple[str, ...] = get_args(Solver)
LAST_STOCHASTIC_TIME = 0.04


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    noise: Tensor,
    y: Tensor | None = None,
    *,
    num_steps: int = 50,
    solver: Solver = "euler",
    path_type: PathType = "linear",
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    null_label: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    guide: RewardGuide | None = None,
) -> Tensor:
    """Draws samples by following the model's velocity from noise to data.

    ODE: dx = v dt; SDE: dx = (v - t score) dt + sqrt(2 t) dw, its last step, from t = 0.04, without noise.

    Args:
        model: ``model(x, t, y)`` gives the velocity, or a tuple that starts with it; x and t (B,) have
            the dtype of ``noise``. A module is in eval mode for the call, and as it was afterwards.
        noise: standard normal (B, C, H, W), any floating dtype; the state in between is float64, on a device that has
            none (MPS) float32.
        y: labels (B,), or None for an unconditional model.
        num_steps: steps, at least 1; Heun calls the model twice per step, except in the last.
        solver: ``euler``, ``heun`` or ``euler_maruyama``.
        path_type: the path that the model was trained on; only ``euler_maruyama`` and ``guide`` depend on it.
        guidance_scale: classifier-free guidance, at least 1; 1 is none.
        guidance_interval: lowest and highest t, both included, at which a guided step may start.
        null_label: the label that stands for no class; ``model.null_label`` if None.
        generator: source of the SDE's noise, or one per sample, so that a sample does not depend on its batch; needed
            by ``euler_maruyama`` only.
        guide: raises a reward at each step, with no further call of the model; after classifier-free guidance.

    Returns:
        Samples (B, C, H, W), of the dtype of ``noise``.

    Raises:
        ConfigError: a setting is unknown or out of range, guidance without labels or null label, or
            ``euler_maruyama`` without generator.

    Source: SiT, arXiv 2401.08740, section 3; time grid of REPA@67f7145:samplers.py.
    """
    _check_choice("path_type", path_type, PATH_TYPES)
    _check_sampling(
        solver=solver, num_steps=num_steps, guidance_scale=guidance_scale, guidance_interval=guidance_interval
    )
    null_labels = _null_labels(model, y, guidance_scale, null_label)
    field = _Field(model, y, noise.dtype, guidance_scale, null_labels, guidance_interval, guide, of_path(path_type))
    x = noise.to(widest_dtype(noise.device))
    with _eval_mode(model):
        if solver == "euler_maruyama":
            x = _solve_sde(field, x, num_steps, path_type, generator)
        else:
            x = _solve_ode(field, x, num_steps, heun=solver == "heun")
    return x.to(noise.dtype)


def _check_sampling(
    *, solver: str, num_steps: int, guidance_scale: float, guidance_interval: tuple[float, float]
) -> None:
    _check_choice("solver", solver, SOLVERS)
    if not (num_steps >= 1 and num_steps == int(num_steps)):
        raise ConfigError("num_steps", expected="at least 1", got=num_steps, do="Correct it.")
    if not 1 <= guidance_scale < math.inf:
        do = "1 is no guidance."
        raise ConfigError("guidance_scale", expected="at least 1", got=guidance_scale, do=do)
    low, high = guidance_interval
    if not 0 <= low <= high <= 1:
        raise ConfigError("guidance_interval", expected="0 <= low <= high <= 1", got=(low, high), do="Correct it.")


@dataclass(frozen=True)
class _Field:
    """The model as a velocity field of the state's dtype, guided where a step starts inside the interval."""

    model: Callable[..., Any]
    y: Tensor | None
    dtype: torch.dtype
    guidance_scale: float
    null_labels: Tensor | None
    guidance_interval: tuple[float, float]
    guide: RewardGuide | None
    parametrisation: Parametrisation

    def __call__(self, x: Tensor, t: float, *, step_start: float) -> Tensor:
        if self.guide is None:
            return self._combined(x, t, step_start)
        with self.guide.watch() as hidden:
            velocity = self._combined(x, t, step_start)
        times, start = (x.new_full((len(x),), one) for one in (t, step_start))
        return self.guide.guide(velocity, x, times, self.y, hidden, self.parametrisation, start=start)

    def _combined(self, x: Tensor, t: float, step_start: float) -> Tensor:
        """The model's velocity, combined with that of no class inside the interval."""
        low, high = self.guidance_interval
        if self.null_labels is None or not low <= step_start <= high:
            return self._velocity(x, t, self.y)
        assert self.y is not None
        both = self._velocity(torch.cat([x, x]), t, torch.cat([self.y, self.null_labels]))
        conditional, unconditional = both.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _velocity(self, x: Tensor, t: float, y: Tensor | None) -> Tensor:
        out = self.model(x.to(self.dtype), x.new_full((len(x),), t).to(self.dtype), y)
        return (out[0] if isinstance(out, tuple) else out).to(x.dtype)


def _times(first: float, last: float, count: int) -> list[float]:
    return [float(t) for t in np.linspace(first, last, count)]


def _solve_ode(field: _Field, x: Tensor, num_steps: int, *, heun: bool) -> Tensor:
    times = _times(1.0, 0.0, num_steps + 1)
    for t, t_next in pairwise(times):
        velocity = field(x, t, step_start=t)
        x_next = x + (t_next - t) * velocity
        # The model is never asked at t = 0, the end of its training range: the last step stays Euler's.
        if heun and t_next > 0:
            # One step is guided as a whole: a change of field within it would cost Heun its order.
            velocity = (velocity + field(x_next, t_next, step_start=t)) / 2
            x_next = x + (t_next - t) * velocity
        x = x_next
    return x


def _solve_sde(
    field: _Field,
    x: Tensor,
    num_steps: int,
    path_type: PathType,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    if generator is None:
        raise ConfigError("generator", expected="a torch.Generator", got=None, do="Pass a seeded one for the SDE.")
    times = _times(1.0, LAST_STOCHASTIC_TIME, num_steps)
    for t, t_next in pairwise([*times, 0.0]):
        velocity = field(x, t, step_start=t)
        diffusion = 2 * t
        # Guiding the velocity guides the score too: it is affine in the velocity.
        drift = velocity - diffusion / 2 * _score(x, velocity, t, path_type)
        x = x + drift * (t_next - t)
        if t_next > 0:
            x = x + (diffusion * (t - t_next)) ** 0.5 * _normal_like(x, generator)
    return x


def _normal_like(x: Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    if isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    return torch.cat([_normal_like(one, own) for one, own in zip(x.split(1), generator, strict=True)])


def _score(x: Tensor, velocity: Tensor, t: float, path_type: PathType) -> Tensor:
    """grad log p_t(x) = (alpha x0_hat - x) / sigma^2, for t > 0."""
    time = x.new_full((len(x),), t)
    alpha, sigma, _, _ = path_coefficients(time_like(time, x), path_type)
    return (alpha * clean_estimate(x, velocity, time, path_type) - x) / sigma**2


def _null_labels(model: Callable[..., Any], y: Tensor | None, scale: float, null_label: int | None) -> Tensor | None:
    """Null labels (B,), or None where nothing is to be guided."""
    if scale == 1:
        return None
    if null_label is None:
        null_label = getattr(model, "null_label", None)
    if y is None or null_label is None:
        raise ConfigError(
            f"guidance_scale={scale}",
            expected="labels y and a null_label",
            got=f"y {'missing' if y is None else 'given'}, null_label={null_label}",
            do="Pass both, or guidance_scale=1.",
        )
    return torch.full_like(y, null_label)


@contextmanager
def _eval_mode(model: Callable[..., Any]) -> Iterator[None]:
    """Restores every submodule's own mode: a frozen part of a training model stays in eval mode."""
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    if isinstance(model, nn.Module):
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(name, expected=f"one of {choices}", got=repr(value), do="Choose one of these.")

"""What a model's output means at sampling time: the clean estimate that it holds, and how one moves the other."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.functional.interpolant import (
    PATH_TYPES,
    PathType,
    estimate_from_noise,
    estimate_from_velocity,
    noise_level,
    path_coefficients,
    time_like,
)

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]
SMALLEST_SIGMA = 1e-3  # below, an output has no say in the estimate and is left as it is


@dataclass(frozen=True)
class Parametrisation:
    """Times and outputs of a model, in this package's units.

    Attributes:
        coefficients: times (B,) to alpha, sigma of x_t = alpha x0 + sigma noise, (B,) each, and their derivatives by
            the model's time. For a model that predicts the noise alone: alpha_dot = 1, sigma_dot = 0 are not read.
        predicts: ``velocity`` or ``noise``.
    """

    coefficients: Callable[[Tensor], Coefficients]
    predicts: str = "velocity"

    def level(self, t: Tensor) -> Tensor:
        """Noise levels (B,) in [0, 1], the linear path's times, of the model's times (B,)."""
        alpha, sigma, _, _ = self.coefficients(t)
        return noise_level(alpha, sigma)

    def estimate(self, x_t: Tensor, output: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The clean estimate, and what else moving the output needs.

        Args:
            x_t: (B, C, H, W).
            output: the prediction, same shape.
            t: the model's times (B,).

        Returns:
            x0_hat (B, C, H, W); the noise level (B,) in [0, 1], the linear path's time; and d output / d x0_hat at a
            fixed x_t, (B, 1, 1, 1), 0 where sigma is next to 0.
        """
        alpha, sigma, alpha_dot, sigma_dot = (time_like(c, x_t) for c in self.coefficients(t))
        level = noise_level(alpha, sigma).flatten()
        visible = sigma > SMALLEST_SIGMA
        safe_sigma = torch.where(visible, sigma, 1)
        if self.predicts == "noise":
            x0_hat, slope = estimate_from_noise(x_t, output, alpha, sigma), -alpha / safe_sigma
        else:
            x0_hat = estimate_from_velocity(x_t, output, alpha, sigma, alpha_dot, sigma_dot)
            slope = -(alpha * sigma_dot - alpha_dot * sigma) / safe_sigma
        return x0_hat, level, torch.where(visible, slope, 0)


def of_path(path_type: PathType = "linear") -> Parametrisation:
    """Ours and REPA's: t = 0 is data, 1 is noise, the velocity points to the noise.

    Raises:
        ConfigError: the path is unknown.
    """
    _check(path_type, PATH_TYPES)
    return Parametrisation(lambda t: path_coefficients(t, path_type))


def of_sit_path(path: str = "Linear") -> Parametrisation:
    """SiT's: t = 1 is data, 0 is noise, the velocity points to the data.

    Args:
        path: ``Linear`` or ``GVP``, as SiT's ``--path-type``.

    Raises:
        ConfigError: another path.
    """
    names: dict[str, PathType] = {"Linear": "linear", "GVP": "cosine"}
    _check(path, tuple(names))

    def coefficients(t: Tensor) -> Coefficients:
        alpha, sigma, alpha_dot, sigma_dot = path_coefficients(1 - t, names[path])
        return alpha, sigma, -alpha_dot, -sigma_dot

    return Parametrisation(coefficients)


def of_diffusion(diffusion: Any) -> Parametrisation:
    """DiT's: whole-number steps of the training schedule, 0 next to the data; the noise is predicted.

    Args:
        diffusion: what ``create_diffusion`` returned: ``alphas_cumprod``, and ``timestep_map`` with
            ``original_num_steps`` where it skips steps.

    Raises:
        ConfigError: it predicts something else than the noise.
    """
    predicts = getattr(getattr(diffusion, "model_mean_type", None), "name", "EPSILON")
    if predicts != "EPSILON":
        do = "Use create_diffusion's defaults."
        raise ConfigError("diffusion.model_mean_type", expected="EPSILON", got=predicts, do=do)
    kept = torch.as_tensor(diffusion.alphas_cumprod, dtype=torch.float64)
    steps = list(getattr(diffusion, "timestep_map", range(len(kept))))
    # A step that the schedule skips has no value: NaN shows at once what would be wrong in silence.
    table = torch.full((max(steps) + 1, 2), math.nan)
    table[steps] = torch.stack([kept.sqrt(), (1 - kept).sqrt()], 1).float()

    def coefficients(t: Tensor) -> Coefficients:
        alpha, sigma = table.to(t.device)[t.long()].unbind(-1)
        return alpha, sigma, torch.ones_like(alpha), torch.zeros_like(alpha)

    return Parametrisation(coefficients, "noise")


def _check(value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError("path_type", expected=f"one of {known}", got=repr(value), do="Choose one of these.")

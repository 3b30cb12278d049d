"""Paths between data and noise, in the package's one convention: t = 0 is data, t = 1 is noise."""

import math
from typing import Literal, get_args

from torch import Tensor

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.functional.tensors import require_shape

PathType = Literal["linear", "cosine"]
PATH_TYPES: tuple[str, ...] = get_args(PathType)


def path_coefficients(t: Tensor, path_type: PathType = "linear") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients of x_t = alpha x_0 + sigma noise and of its velocity (equation 1).

    Args:
        t: any shape, in [0, 1]; 0 is data.
        path_type: ``linear`` (alpha = 1 - t, sigma = t) or ``cosine``
            (alpha = cos(pi t / 2), sigma = sin(pi t / 2)).

    Returns:
        ``alpha, sigma, alpha_dot, sigma_dot``, each of the shape of ``t``.

    Raises:
        ConfigError: ``path_type`` is unknown.

    Source: SiT, arXiv 2401.08740, section 2.
    """
    if path_type == "linear":
        one = t.new_ones(()).expand_as(t)
        return 1 - t, t, -one, one
    if path_type == "cosine":
        angle = t * (math.pi / 2)
        alpha, sigma = angle.cos(), angle.sin()
        return alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha
    raise ConfigError("path_type", expected=f"one of {PATH_TYPES}", got=repr(path_type), do="Choose one of these.")


def time_like(t: Tensor, x: Tensor) -> Tensor:
    """Reshapes t (B,) to (B, 1, ..., 1) so that it broadcasts over x (B, ...)."""
    return t.reshape(-1, *(1 for _ in x.shape[1:]))


def noisy_sample(x0: Tensor, noise: Tensor, t: Tensor, path_type: PathType = "linear") -> tuple[Tensor, Tensor]:
    """The noisy latent and the velocity that a model should predict there (equation 1).

    Args:
        x0: clean latents (B, C, H, W).
        noise: standard normal, same shape.
        t: times (B,) in [0, 1].
        path_type: see :func:`path_coefficients`.

    Returns:
        ``x_t, velocity``, each (B, C, H, W), ``velocity`` pointing from data to noise.

    Raises:
        ConfigError: ``path_type`` is unknown.
        ShapeError: the shapes differ.

    Source: SiT, arXiv 2401.08740, section 2.
    """
    require_shape("noise", noise, x0.shape)
    alpha, sigma, alpha_dot, sigma_dot = path_coefficients(time_like(t, x0), path_type)
    return alpha * x0 + sigma * noise, alpha_dot * x0 + sigma_dot * noise


def clean_estimate(x_t: Tensor, velocity: Tensor, t: Tensor, path_type: PathType = "linear") -> Tensor:
    """One-step estimate of the clean latent from a velocity (equation 2).

    x0_hat = (sigma_dot x_t - sigma v) / (alpha sigma_dot - alpha_dot sigma); on the linear path x_t - t v.

    Args:
        x_t: noisy latents (B, C, H, W).
        velocity: the model's prediction, same shape.
        t: times (B,) in [0, 1].
        path_type: see :func:`path_coefficients`.

    Returns:
        x0_hat (B, C, H, W).

    Raises:
        ConfigError: ``path_type`` is unknown.
        ShapeError: the shapes differ.

    Source: solves SiT's (arXiv 2401.08740) section 2 for x_0.
    """
    require_shape("velocity", velocity, x_t.shape)
    if path_type == "linear":
        return x_t - time_like(t, x_t) * velocity
    return _solve_for_data(x_t, velocity, *path_coefficients(time_like(t, x_t), path_type))


def estimate_from_velocity(
    x_t: Tensor,
    velocity: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    alpha_dot: Tensor | float,
    sigma_dot: Tensor | float,
) -> Tensor:
    """One-step estimate of the clean latent on any path and in any direction of time (equation 2).

    Its derivative by the velocity, -sigma / (alpha sigma_dot - alpha_dot sigma), grows without bound on SiT's VP path,
    where data hardly change any more; the gradient is taken as if it were at most 1, as on the linear path.

    Args:
        x_t: alpha x_0 + sigma noise, (B, C, H, W).
        velocity: prediction of alpha_dot x_0 + sigma_dot noise, same shape.
        alpha, sigma, alpha_dot, sigma_dot: broadcast over x_t; derivatives by the host's own time.

    Returns:
        x0_hat (B, C, H, W).

    Source: solves SiT's (arXiv 2401.08740) section 2 for x_0.
    """
    slope = sigma / (alpha * sigma_dot - alpha_dot * sigma)
    excess = slope - slope.clamp(-1, 1)
    value = _solve_for_data(x_t, velocity, alpha, sigma, alpha_dot, sigma_dot)
    return value + excess * (velocity - velocity.detach())


def _solve_for_data(
    x_t: Tensor,
    velocity: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    alpha_dot: Tensor | float,
    sigma_dot: Tensor | float,
) -> Tensor:
    return (sigma_dot * x_t - sigma * velocity) / (alpha * sigma_dot - alpha_dot * sigma)


def estimate_from_noise(x_t: Tensor, noise_hat: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """One-step estimate of the clean latent from predicted noise (equation 2b).

    The value is (x_t - sigma noise_hat) / alpha. Its derivative by noise_hat, -sigma / alpha, grows without
    bound towards pure noise (157 at the last of DiT's steps), so the gradient is taken as -sigma: that of a
    model that predicts the velocity on a variance-preserving path.

    Args:
        x_t: alpha x_0 + sigma noise, (B, C, H, W).
        noise_hat: the model's prediction, same shape.
        alpha, sigma: broadcast over x_t; alpha > 0.

    Returns:
        x0_hat (B, C, H, W).

    Source: DDPM, arXiv 2006.11239, equation 15; velocity prediction, arXiv 2202.00512; the gradient is our
        derivation.
    """
    value = (x_t - sigma * noise_hat.detach()) / alpha
    return value - sigma * (noise_hat - noise_hat.detach())


def noise_level(alpha: Tensor, sigma: Tensor) -> Tensor:
    """The linear path's time of the same signal-to-noise ratio, sigma / (alpha + sigma), in [0, 1]."""
    return sigma / (alpha + sigma)

"""The step of guided sampling."""

import torch
from torch import Tensor

from vrpo_plugin.functional.interpolant import time_like

TINY_GRADIENT = 1e-20


def estimate_error(level: Tensor, data_std: float) -> Tensor:
    """Expected error of a clean estimate, root mean square per number, if data were Gaussian (equation 19).

    e(t)^2 = s^2 t^2 / (s^2 (1 - t)^2 + t^2): 0 at the data, their own standard deviation s at pure noise.

    Args:
        level: noise levels t (B,) in [0, 1], of the linear path.
        data_std: s, of the latents or pixels.

    Returns:
        Errors (B,).

    Source: the Wiener filter; EDM, arXiv 2206.00364, has the same in its c_out.
    """
    variance = data_std**2
    # At the data both terms of the denominator cannot be 0 at once: s > 0.
    return (variance * level.square() / (variance * (1 - level).square() + level.square())).sqrt()


def guided_change(gradient: Tensor, level: Tensor, *, strength: float, data_std: float) -> Tensor:
    """The step of a clean estimate along a reward's gradient (equation 20).

    Its root mean square is ``strength`` times the error that the estimate is expected to have anyway, at every noise
    level and for every sample, whatever the reward's scale.

    Args:
        gradient: of the reward by x0_hat, (B, C, H, W).
        level: noise levels (B,) in [0, 1].
        strength: share of the error.
        data_std: see :func:`estimate_error`.

    Returns:
        The change (B, C, H, W); 0 for a sample without a gradient.

    Source: our derivation.
    """
    length = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    size = strength * estimate_error(level, data_std) * gradient[0].numel() ** 0.5
    scale = torch.where(length > TINY_GRADIENT, size / length.clamp(min=TINY_GRADIENT), 0)
    return time_like(scale, gradient) * gradient

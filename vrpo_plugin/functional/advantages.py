"""Group-relative advantages."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vrpo_plugin.errors import ConfigError, ShapeError
from vrpo_plugin.functional.tensors import is_finite, promote

Scale = Literal["group", "none"]
SCALES: tuple[str, ...] = get_args(Scale)


@dataclass(frozen=True)
class GroupMoments:
    """First two moments of every group, over its finite rewards alone.

    Attributes:
        deviation: reward minus the group's mean (..., S, G); 0 where there is no finite reward.
        count: finite rewards per group (..., S, 1).
        variance: unbiased (..., S, 1); 0 for dead groups.
    """

    deviation: Tensor
    count: Tensor
    variance: Tensor


def group_moments(rewards: Tensor, *, mask: Tensor | None = None) -> GroupMoments:
    """Mean-free rewards and variance of every group; NaN and infinite rewards are left out.

    A group is dead, with deviations of exactly 0, when its spread is below the rounding error of its rewards, or
    squared below the smallest number there is.

    Args:
        rewards: (..., S, G) or (G,): S groups of G rewards.
        mask: same shape or broadcastable; False for empty slots.

    Returns:
        :class:`GroupMoments`.

    Raises:
        ShapeError: ``rewards`` is a scalar or has empty groups.

    Source: GRPO, arXiv 2402.03300, section 4.1; dead groups as in DAPO, arXiv 2503.14476.
    """
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        raise ShapeError(
            "rewards", expected="(..., G), G >= 1", got=tuple(rewards.shape), do="Pass one reward per action."
        )
    rewards = promote(rewards)
    valid = is_finite(rewards)
    if mask is not None:
        valid = valid & mask
    finite = torch.where(valid, rewards, 0)
    count = valid.sum(-1, keepdim=True)
    mean = finite.sum(-1, keepdim=True) / count.clamp(min=1)
    highest = torch.where(valid, rewards, -torch.inf).amax(-1, keepdim=True)
    lowest = torch.where(valid, rewards, torch.inf).amin(-1, keepdim=True)
    resolution = 8 * torch.finfo(rewards.dtype).eps * finite.abs().amax(-1, keepdim=True)
    live = (highest - lowest > resolution) & (count >= 2)
    deviation = torch.where(valid & live, rewards - mean, 0)
    variance = deviation.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return GroupMoments(deviation=torch.where(variance > 0, deviation, 0), count=count, variance=variance)


def inverse_scale(variance: Tensor, *, scale: Scale = "group") -> Tensor:
    """What deviations are multiplied by (equation 9): 1 / deviation, or 0 where the variance is 0 or unknown.

    Args:
        variance: of the group, any shape.
        scale: ``group``, or ``none``: the factor is 1, also where the variance is 0.

    Returns:
        Factors of the shape of ``variance``.

    Raises:
        ConfigError: ``scale`` is unknown.

    Source: GRPO, arXiv 2402.03300, section 4.1 (``group``); Dr. GRPO, arXiv 2503.20783 (``none``).
    """
    if scale not in SCALES:
        raise ConfigError("scale", expected=f"one of {SCALES}", got=repr(scale), do="Choose one of these.")
    if scale == "none":
        return torch.ones_like(variance)
    return torch.where(variance > 0, variance.rsqrt(), 0)


def group_relative_advantages(rewards: Tensor, *, mask: Tensor | None = None, scale: Scale = "group") -> Tensor:
    """Advantages A_i = (R_i - mean_G R) / s (equation 9).

    Args:
        rewards: (..., S, G) or (G,): S groups of G rewards, higher is better.
        mask: same shape or broadcastable; False for empty slots.
        scale: see :func:`inverse_scale`.

    Returns:
        Advantages of the shape of ``rewards``: exactly 0 in dead groups, in empty slots and for rewards that
        are not finite.

    Raises:
        ConfigError: ``scale`` is unknown.
        ShapeError: ``rewards`` is a scalar or has empty groups.

    Source: GRPO, arXiv 2402.03300, section 4.1; Dr. GRPO, arXiv 2503.20783 (``none``).
    """
    moments = group_moments(rewards, mask=mask)
    return moments.deviation * inverse_scale(moments.variance, scale=scale)

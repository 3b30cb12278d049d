"""Group-relative advantages."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vrpo_plugin.errors import ConfigError, ShapeError, explain
from vrpo_plugin.functional.tensors import promote

Scale = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
SCALES: tuple[str, ...] = get_args(Scale)


@dataclass(frozen=True)
class GroupMoments:
    """First two moments of every group, over its finite rewards alone.

    Attributes:
        deviation: reward minus the group's mean (..., S, G); 0 where there is no finite reward.
        valid: True where a finite reward stands (..., S, G).
        count: finite rewards per group (..., S, 1).
        variance: unbiased (..., S, 1); 0 for dead groups.
        live: False for groups with fewer than two finite rewards or no spread (..., S, 1).
    """

    deviation: Tensor
    valid: Tensor
    count: Tensor
    variance: Tensor
    live: Tensor


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
            explain(
                "rewards",
                expected="(..., G), G >= 1",
                got=tuple(rewards.shape),
                do="Pass one reward per action.",
            )
        )
    rewards = promote(rewards)
    valid = torch.isfinite(rewards)
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
    live = live & (variance > 0)
    deviation = torch.where(live, deviation, 0)
    return GroupMoments(deviation=deviation, valid=valid, count=count, variance=variance, live=live)


def inverse_scale(moments: GroupMoments, *, scale: Scale = "batch", eps: float = 1e-4) -> Tensor:
    """What deviations are multiplied by: 1 / (s + eps), or 0 for a dead group (equation 9).

    Args:
        moments: of rewards (..., S, G).
        scale: ``group``: s is the group's standard deviation; ``batch``: the pooled one of all live groups
            (the last two dimensions); ``none``: the factor is 1, for dead groups too.
        eps: added to s, in units of the reward.

    Returns:
        Factors (..., S, 1).

    Raises:
        ConfigError: ``scale`` is unknown.

    Source: GRPO, arXiv 2402.03300, section 4.1 (``group``); Dr. GRPO, arXiv 2503.20783 (``none``).
    """
    if scale not in SCALES:
        raise ConfigError(explain("scale", expected=f"one of {SCALES}", got=repr(scale), do="Choose one of these."))
    if scale == "none":
        return torch.ones_like(moments.variance)
    variance = moments.variance
    if scale == "batch" and variance.ndim >= 2:
        freedom = torch.where(moments.live, moments.count - 1, 0)
        pooled = (variance * freedom).sum(-2, keepdim=True) / freedom.sum(-2, keepdim=True).clamp(min=1)
        variance = pooled.expand_as(variance)
    return torch.where(moments.live, 1 / (variance.sqrt() + eps), 0)


def group_relative_advantages(
    rewards: Tensor, *, mask: Tensor | None = None, scale: Scale = "batch", eps: float = 1e-4
) -> Tensor:
    """Advantages A_i = (R_i - mean_G R) / (s + eps) (equation 9).

    Args:
        rewards: (..., S, G) or (G,): S groups of G rewards, higher is better.
        mask: same shape or broadcastable; False for empty slots.
        scale: see :func:`inverse_scale`.
        eps: added to the scale, in units of the reward.

    Returns:
        Advantages of the shape of ``rewards``: exactly 0 in dead groups, in empty slots and for rewards that
        are not finite.

    Raises:
        ConfigError: ``scale`` is unknown.
        ShapeError: ``rewards`` is a scalar or has empty groups.

    Source: GRPO, arXiv 2402.03300, section 4.1; Dr. GRPO, arXiv 2503.20783 (``none``).
    """
    moments = group_moments(rewards, mask=mask)
    return moments.deviation * inverse_scale(moments, scale=scale, eps=eps)


def combine_rewards(
    moments: GroupMoments,
    weights: Tensor,
    *,
    scale: Scale = "batch",
    aggregation: Aggregation = "sum_then_normalize",
    eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """One advantage from several rewards, and the factor of each reward's gradient (equations 9 and 11).

    ``sum_then_normalize``: A = sum_k w_k d_k / s, factors w_k / s, s the scale of the weighted total;
    ``normalize_then_sum``: A = sum_k w_k d_k / s_k, factors w_k / s_k. d_k is the deviation from the group's mean.

    Args:
        moments: of rewards (K, S, G).
        weights: (K, S, 1) or broadcastable.
        scale: see :func:`inverse_scale`.
        aggregation: which of the two.
        eps: added to the scale.

    Returns:
        ``advantages`` (S, G) and ``coefficients`` (K, S, 1). A sample without any finite reward has advantage 0.

    Raises:
        ConfigError: ``scale`` is unknown.

    Source: our derivation; the two orders carry the names of TRL's GRPOTrainer.
    """
    if aggregation == "normalize_then_sum":
        coefficients = weights * inverse_scale(moments, scale=scale, eps=eps)
        return (coefficients * moments.deviation).sum(0), coefficients
    total = (weights * moments.deviation).sum(0)
    total_moments = group_moments(total, mask=moments.valid.any(0))
    factor = inverse_scale(total_moments, scale=scale, eps=eps)
    return total_moments.deviation * factor, weights * factor

"""Noise levels: the groups that rewards are compared in, with a memory (equations 8 and 11).

Moments are tensors (3, K, L): of K rewards at L levels, how many samples there were, their mean, and the sum of their
squared deviations from it. Means and deviations are merged, never sums of squares, which would cancel.
"""

import torch
from torch import Tensor

from vrpo_plugin.errors import ShapeError
from vrpo_plugin.functional.tensors import promote

LEVELS = 10  # bins of t of equal width
HORIZON = 1024  # samples after which a level has forgotten two thirds of what it knew
PRIOR = 4  # samples that all levels together count for in the variance of each
RESOLUTION = 8  # rewards that differ by fewer roundings of their mean are equal


def noise_levels(t: Tensor) -> Tensor:
    """The level of each sample (B,), int64, of times t (B,); those outside [0, 1] belong to the next one."""
    return (t * LEVELS).long().clamp(0, LEVELS - 1)


def level_moments(rewards: Tensor, level: Tensor, valid: Tensor) -> Tensor:
    """Moments (3, K, L) of one batch.

    Args:
        rewards: (K, B).
        level: of each sample (B,), as :func:`noise_levels` gives it.
        valid: (K, B); False leaves a reward out.

    Raises:
        ShapeError: the shapes differ.
    """
    if rewards.ndim != 2 or valid.shape != rewards.shape or level.shape != rewards.shape[1:]:
        raise ShapeError(
            "level, valid",
            expected=f"(B,) and (K, B) of rewards {tuple(rewards.shape)}",
            got=(tuple(level.shape), tuple(valid.shape)),
            do="Pass one level per sample.",
        )
    rewards = promote(rewards)[:, :, None]
    member = valid[:, :, None] & (level[:, None] == torch.arange(LEVELS, device=level.device))
    count = member.sum(1)
    mean = torch.where(member, rewards, 0).sum(1) / count.clamp(min=1)
    deviation = torch.where(member, rewards - mean[:, None], 0).square().sum(1)
    return torch.stack([count.to(mean.dtype), mean, deviation])


def merge_moments(parts: Tensor) -> Tensor:
    """Moments (3, K, L) of the union of batches (P, 3, K, L).

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    counts, means, deviations = parts.unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp(min=1)
    return torch.stack([count, mean, (deviations + counts * (means - mean).square()).sum(0)])


def remember(memory: Tensor, new: Tensor) -> Tensor:
    """The memory (3, K, L) after new moments (3, K, L).

    What a level knew is forgotten by the number of samples that it got, not by the number of calls: one batch of 256
    and 64 batches of 4 leave the same memory.
    """
    (known, mean, deviation), (count, new_mean, new_deviation) = memory, new
    kept = (1 - 1 / HORIZON) ** count
    known, deviation = known * kept, deviation * kept
    total = known + count
    share = count / total.clamp(min=1)
    apart = new_mean - mean
    return torch.stack([total, mean + share * apart, deviation + new_deviation + known * share * apart.square()])


def level_variance(moments: Tensor) -> Tensor:
    """Variance of each reward at each level (K, L), about the level's own mean.

    A level that has seen few samples leans on the variance of all levels. NaN where nothing was ever compared; 0 where
    rewards differ by no more than their rounding errors.
    """
    count, mean, deviation = moments
    freedom = (count - 1).clamp(min=0)
    pooled = deviation.sum(1, keepdim=True) / freedom.sum(1, keepdim=True)
    variance = (deviation + PRIOR * pooled) / (freedom + PRIOR)
    size = mean.abs().amax(1, keepdim=True)
    return torch.where(variance <= (RESOLUTION * torch.finfo(mean.dtype).eps * size).square(), 0, variance)


def level_differs(moments: Tensor) -> Tensor:
    """Whether the rewards of a level differ (K, L); False too where there are fewer than two."""
    count, mean, deviation = moments
    return deviation > (count - 1).clamp(min=0) * (RESOLUTION * torch.finfo(mean.dtype).eps * mean).square()

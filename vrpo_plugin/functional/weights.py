"""Weights of several rewards."""

import torch
from torch import Tensor

from vrpo_plugin.errors import ConfigError, ShapeError, explain
from vrpo_plugin.functional.tensors import promote


def noise_gate(t: Tensor, kind: str, end: float) -> Tensor | float:
    """Weight of the rewards by noise, g(t) (equation 12): their estimates are biased most where there is most noise.

    Args:
        t: times (B,), 0 = data.
        kind: ``none`` (1), ``linear`` (2 (1 - t), of mean 1 over t) or ``cut`` (1 for t <= end, else 0).
        end: of ``cut``.

    Returns:
        (B,), float32 at least; the number 1 for ``none``.

    Source: ``cut`` as in PixelGen, arXiv 2602.02493; ``linear`` is ours.
    """
    t = promote(t)
    if kind == "linear":
        return 2 * (1 - t)
    return (t <= end).to(t.dtype) if kind == "cut" else 1.0


def inverse_variance_weights(variance: Tensor, *, floor: float = 1e-8, cap: float = 1.0) -> Tensor:
    """Weights of least total variance, w_k = (1 / sigma_k^2) / sum_j (1 / sigma_j^2) (equation 10).

    With a cap, the minimiser of sum_k w_k^2 sigma_k^2 under sum_k w_k = 1 and w_k <= cap.

    Args:
        variance: variance of each reward (K, ...), rewards first; 0, NaN or inf marks a reward that says nothing.
        floor: smallest variance that is believed, in squared units of the reward.
        cap: largest weight, in (0, 1]; raised to 1 / (number of live rewards) where it is smaller.

    Returns:
        Weights (K, ...), summing to 1 over the first dimension. A reward without variance gets 0; if none has
        any, all get 1 / K.

    Raises:
        ConfigError: ``cap`` is not in (0, 1] or ``floor`` is not positive.
        ShapeError: there is no reward.

    Source: VRPO, arXiv 2606.00583, appendix, equation 17 (the formula); floor and cap are ours.
    """
    if not 0 < cap <= 1 or not floor > 0:
        raise ConfigError(
            explain("cap, floor", expected="0 < cap <= 1, floor > 0", got=(cap, floor), do="Correct them.")
        )
    if variance.ndim == 0 or variance.shape[0] == 0:
        raise ShapeError(
            explain("variance", expected="(K, ...), K >= 1", got=tuple(variance.shape), do="Pass one per reward.")
        )
    variance = promote(variance)
    live = torch.isfinite(variance) & (variance > 0)
    believed = torch.where(live, variance.clamp(min=max(floor, torch.finfo(variance.dtype).tiny)), torch.inf)
    # In units of the smallest: 1 / variance itself can be infinite, or all of them 0.
    inverse = torch.where(live, believed.amin(0, keepdim=True) / believed, 0)
    limit = (1 / live.sum(0, keepdim=True).clamp(min=1).to(variance.dtype)).clamp(min=cap)
    capped = torch.zeros_like(live)
    weights = inverse
    for _ in range(variance.shape[0]):  # over rewards: each round caps at least one or changes nothing
        free = torch.where(capped, 0, inverse)
        rest = 1 - limit * capped.sum(0, keepdim=True)
        share = rest * free / free.sum(0, keepdim=True).clamp(min=torch.finfo(variance.dtype).tiny)
        weights = torch.where(capped, limit, share)
        capped = capped | (weights > limit)
    weights = weights / weights.sum(0, keepdim=True).clamp(min=torch.finfo(variance.dtype).tiny)
    return torch.where(live.any(0, keepdim=True), weights, 1 / variance.shape[0])

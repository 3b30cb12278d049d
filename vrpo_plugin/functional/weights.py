"""Weights of several rewards."""

import torch
from torch import Tensor

from vrpo_plugin.errors import ShapeError
from vrpo_plugin.functional.tensors import is_finite, promote


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


def inverse_variance_weights(variance: Tensor) -> Tensor:
    """Weights of least total variance, w_k = (1 / sigma_k^2) / sum_j (1 / sigma_j^2) (equation 10).

    The minimiser of sum_k w_k^2 sigma_k^2 under sum_k w_k = 1: exact for uncorrelated rewards, and in the rewards' own
    units, so that a reward multiplied by 10 gets a hundredth of the weight.

    Args:
        variance: variance of each reward (K, ...), rewards first; 0, NaN or inf marks a reward that says nothing.

    Returns:
        Weights (K, ...), summing to 1 over the first dimension. A reward without variance gets 0; if none has
        any, all get 1 / K.

    Raises:
        ShapeError: there is no reward.

    Source: VRPO, arXiv 2606.00583, appendix, equation 17 (the formula); the zero is ours.
    """
    if variance.ndim == 0 or variance.shape[0] == 0:
        raise ShapeError("variance", expected="(K, ...), K >= 1", got=tuple(variance.shape), do="Pass one per reward.")
    variance = promote(variance)
    live = is_finite(variance) & (variance > 0)
    believed = torch.where(live, variance.clamp(min=torch.finfo(variance.dtype).tiny), torch.inf)
    # In units of the smallest: 1 / variance itself can be infinite, or all of them 0.
    inverse = torch.where(live, believed.amin(0, keepdim=True) / believed, 0)
    total = inverse.sum(0, keepdim=True)
    return torch.where(total > 0, inverse / total, 1 / variance.shape[0])

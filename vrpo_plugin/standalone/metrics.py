"""Kernel distance (KID) and Inception Score, from features and logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vrpo_plugin.errors import ConfigError, DataError, ShapeError
from vrpo_plugin.functional.tensors import widest_dtype


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of N, not N - 1) over subsets or splits."""

    mean: float
    std: float


def kernel_distance(
    generated: Tensor,
    real: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    on_subset: Callable[[int], object] = lambda subsets: None,
) -> Spread:
    """Kernel distance, squared maximum mean discrepancy, without bias.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j), with the cubic kernel
    k(x, y) = (x . y / D + 1)^3, in float64; mean over random subsets. With Inception's pooled features it is KID.

    Args:
        generated: features (N, D), on the device that shall compute.
        real: features (M, D).
        subsets: how many are drawn.
        subset_size: samples in each, at least 2 and at most min(N, M).
        seed: of the draws.
        on_subset: called with 1 after each subset, for a progress bar.

    Returns:
        Mean and standard deviation over the subsets; the mean may be slightly negative.

    Raises:
        ShapeError: the two are not (N, D) and (M, D).
        ConfigError: ``subsets`` or ``subset_size`` is out of range.
        DataError: a feature is not finite.

    Source: Binkowski et al., arXiv 1801.01401, equation 4; draws as torch-fidelity 0.4 makes them.
    """
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        got = f"{tuple(generated.shape)} and {tuple(real.shape)}"
        do = "Pass pooled features of one network."
        raise ShapeError("kernel_distance", expected="features (N, D) and (M, D)", got=got, do=do)
    smallest = min(len(generated), len(real))
    if subsets < 1 or not 2 <= subset_size <= smallest:
        expected = f"subsets >= 1 and 2 <= subset_size <= {smallest} (the smaller set)"
        got = f"subsets={subsets}, subset_size={subset_size}"
        raise ConfigError("kernel_distance", expected=expected, got=got, do="Correct them, or give more images.")
    _check_finite("kernel_distance", generated, real)
    dtype = widest_dtype(generated.device)
    generated, real = generated.detach().to(dtype), real.detach().to(generated.device, dtype)
    random = np.random.RandomState(seed)  # the generator of the reference implementation
    distances = []
    for _ in range(subsets):
        x, y = (
            features[torch.from_numpy(random.choice(len(features), subset_size, replace=False)).to(features.device)]
            for features in (generated, real)
        )
        distances.append(float(_within(x) + _within(y) - 2 * _kernel(x, y).mean()))
        on_subset(1)
    return Spread(float(np.mean(distances)), float(np.std(distances)))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _within(x: Tensor) -> Tensor:
    kernel = _kernel(x, x)
    return (kernel.sum() - kernel.diagonal().sum()) / (len(x) * (len(x) - 1))


def inception_score(logits: Tensor, *, splits: int = 10) -> Spread:
    """Inception Score of each split of the samples, in their order.

    IS = exp(mean_x KL(p(y|x) || p(y))), where p(y) is the mean over the split, in float64.

    Args:
        logits: (N, classes); of Inception, without the bias of its last layer.
        splits: of nearly equal size; 10 splits of 50,000 samples are those of ADM.

    Returns:
        Mean and standard deviation over the splits.

    Raises:
        ShapeError: ``logits`` is not (N, classes) with N >= ``splits`` >= 1.
        DataError: a logit is not finite.

    Source: Salimans et al., arXiv 1606.03498, section 4; splits of ADM,
    openai/guided-diffusion@22e0df8:evaluations/evaluator.py.
    """
    if logits.ndim != 2 or not 1 <= splits <= len(logits):
        got, do = f"{tuple(logits.shape)}, {splits} splits", "Pass one row per sample, and as many as splits."
        raise ShapeError("inception_score", expected="logits (N, classes), N >= splits >= 1", got=got, do=do)
    _check_finite("inception_score", logits)
    log_p = logits.detach().to(widest_dtype(logits.device)).log_softmax(1)
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = []
    for start, end in pairwise(bounds):
        part = log_p[start:end]
        log_marginal = part.logsumexp(0) - math.log(len(part))
        scores.append(float((part.exp() * (part - log_marginal)).sum(1).mean().exp()))
    return Spread(float(np.mean(scores)), float(np.std(scores)))


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        do = "Look for NaN in the generated images."
        raise DataError(name, expected="finite values", got="NaN or infinity", do=do)

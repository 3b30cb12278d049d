"""Improved precision and recall: how much of one set lies in the other's neighbourhood."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vrpo_plugin.errors import ConfigError, DataError, ShapeError
from vrpo_plugin.functional.tensors import widest_dtype


@dataclass(frozen=True)
class PrecisionRecall:
    """Both in [0, 1]: ``precision`` is how realistic the samples are, ``recall`` how much is covered."""

    precision: float
    recall: float


def precision_recall(
    real: Tensor,
    generated: Tensor,
    *,
    k: int = 3,
    chunk_size: int = 1024,
    on_rows: Callable[[int], object] = lambda rows: None,
) -> PrecisionRecall:
    """Improved precision and recall, exact.

    precision = share of generated g with |g - r| <= rho_k(r) for a real r; recall the same, roles swapped;
    rho_k(r) is the distance of r to its k-th nearest neighbour in its own set.

    Args:
        real: features (N, D), on the device that shall compute.
        generated: features (M, D).
        k: neighbours, at least 1.
        chunk_size: rows of the distance matrix held at a time; memory is 8 * chunk_size * max(N, M) bytes
            or a small multiple.
        on_rows: called with the number of rows after each chunk, N + 2 M rows in all, for a progress bar.

    Returns:
        Precision and recall.

    Raises:
        ShapeError: the two are not (N, D) and (M, D).
        ConfigError: k < 1, or a set has not more than k samples, or chunk_size < 1.
        DataError: a feature is not finite.

    Source: Kynkaanniemi et al., arXiv 1904.06991, equations 1-2; k = 3 as there.
    """
    _check(real, generated, k, chunk_size)
    dtype = widest_dtype(real.device)
    real, generated = real.detach().to(dtype), generated.detach().to(real.device, dtype)
    real_radii = _radii(real, k, chunk_size, on_rows)
    generated_radii = _radii(generated, k, chunk_size, on_rows)
    precise = 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, radii in zip(generated.split(chunk_size), generated_radii.split(chunk_size), strict=True):
        distances = _distances(rows, real)
        precise += int((distances <= real_radii).any(1).sum())
        recalled |= (distances <= radii[:, None]).any(0)
        on_rows(len(rows))
    return PrecisionRecall(precise / len(generated), int(recalled.sum()) / len(real))


def _radii(points: Tensor, k: int, chunk_size: int, on_rows: Callable[[int], object]) -> Tensor:
    radii = []
    for rows in points.split(chunk_size):
        # k + 1: the smallest distance is that of a point to itself.
        radii.append(_distances(rows, points).kthvalue(k + 1, 1).values)
        on_rows(len(rows))
    return torch.cat(radii)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # The matrix-product shortcut rounds |a - b| by its place in the chunk, so that duplicates are not at
    # distance 0 and a k-th neighbour can fall out of its own ball.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _check(real: Tensor, generated: Tensor, k: int, chunk_size: int) -> None:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ShapeError(
            "precision_recall",
            expected="features (N, D) and (M, D)",
            got=f"{tuple(real.shape)} and {tuple(generated.shape)}",
            do="Pass pooled features of one network.",
        )
    smallest = min(len(real), len(generated))
    if not 1 <= k < smallest or chunk_size < 1:
        raise ConfigError(
            "precision_recall",
            expected=f"1 <= k < {smallest} (the smaller set) and chunk_size >= 1",
            got=f"k={k}, chunk_size={chunk_size}",
            do="Generate more samples, or take a smaller k.",
        )
    if not (real.isfinite().all() and generated.isfinite().all()):
        raise DataError(
            "precision_recall",
            expected="finite features",
            got="NaN or infinity",
            do="Look for NaN in the generated images.",
        )

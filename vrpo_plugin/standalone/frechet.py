"""Frechet distance between two sets of features, each seen as one Gaussian."""

import logging
import os
import zipfile
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vrpo_plugin.errors import DataError, ShapeError
from vrpo_plugin.files import write_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of a set of features.

    Attributes:
        mean: (D,), float64.
        covariance: (D, D), float64, with N - 1 in the denominator.
        count: number of samples N; None where a reference file does not say.

    Raises:
        ShapeError: ``mean`` and ``covariance`` do not fit each other.
        DataError: a value is not finite.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "covariance"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        if self.mean.ndim != 1 or self.covariance.shape != (self.mean.size, self.mean.size):
            raise ShapeError(
                "feature statistics",
                expected="mean (D,) and covariance (D, D)",
                got=f"{self.mean.shape} and {self.covariance.shape}",
                do="Pass the statistics of one set of pooled features.",
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise DataError(
                "feature statistics",
                expected="finite values",
                got="NaN or infinity",
                do="Look for NaN in the generated images.",
            )

    @classmethod
    def from_features(cls, features: Tensor | np.ndarray) -> "FeatureStatistics":
        """Statistics of features (N, D), N at least 2, computed in float64.

        Raises:
            ShapeError: ``features`` is not (N, D) with N >= 2.
            DataError: a feature is not finite.
        """
        if isinstance(features, Tensor):
            features = features.detach().cpu().double().numpy()
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or len(features) < 2:
            raise ShapeError(
                "features",
                expected="(N, D) with N >= 2",
                got=features.shape,
                do="Pass one pooled feature vector per image.",
            )
        # An infinite feature would make numpy warn before the constructor could refuse the result.
        with np.errstate(invalid="ignore"):
            covariance = np.atleast_2d(np.cov(features, rowvar=False))
        return cls(features.mean(0), covariance, len(features))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes ``mu``, ``sigma`` and ``count`` to an .npz file, the keys that pytorch-fid and ADM use."""
        count = {} if self.count is None else {"count": np.int64(self.count)}
        write_file(path, lambda file: np.savez(file, mu=self.mean, sigma=self.covariance, **count))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FeatureStatistics":
        """Reads an .npz file with ``mu`` and ``sigma``, such as the reference files of pytorch-fid and ADM.

        Raises:
            DataError: the file is not an .npz archive, lacks a key, or holds pickled objects.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                count = int(file["count"]) if "count" in file else None
                return cls(file["mu"], file["sigma"], count)
        except (KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, ValueError) as error:
            if isinstance(error, DataError | ShapeError):
                raise
            raise DataError(
                str(path),
                expected="an .npz file with the arrays mu and sigma",
                got=f"{type(error).__name__}: {error}",
                do="Write it with FeatureStatistics.save, or take a file of pytorch-fid or ADM.",
            ) from error


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Frechet distance (squared 2-Wasserstein) of two Gaussians.

    d = |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)).

    Args:
        a: statistics of one set.
        b: statistics of the other, in the same feature network.

    Returns:
        d, at least 0, in squared units of the features.

    Raises:
        ShapeError: the two differ in D.

    Source: Heusel et al., arXiv 1706.08500, equation 6.
    """
    from scipy.linalg import eigh, eigvalsh

    if a.mean.shape != b.mean.shape:
        raise ShapeError(
            "frechet_distance",
            expected="two statistics of one dimension",
            got=f"D = {a.mean.size} and D = {b.mean.size}",
            do="Compute both with the same feature network.",
        )
    for statistics in (a, b):
        if statistics.count is not None and statistics.count <= statistics.mean.size:
            logger.warning(
                "%d samples leave a covariance of %d dimensions singular: the Frechet distance is biased "
                "upwards; compare it only with distances of as many samples",
                statistics.count,
                statistics.mean.size,
            )
    # The product S_a S_b has the eigenvalues of L^T S_b L where S_a = L L^T, which is symmetric: its root stays
    # real where that of the product would not. Null directions of S_a are cut off, else they add root(rounding).
    values, vectors = eigh(a.covariance, driver="evd")
    kept = values > values[-1] * values.size * np.finfo(np.float64).eps
    factor = vectors[:, kept] * np.sqrt(values[kept])
    # Older scipy refuses an empty matrix.
    eigenvalues = eigvalsh(factor.T @ b.covariance @ factor) if kept.any() else np.zeros(1)
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance)
    return max(float(distance - 2 * np.sqrt(eigenvalues.clip(min=0)).sum()), 0.0)

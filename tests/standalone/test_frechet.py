import logging

import numpy as np
import pytest
import torch

from vrpo_plugin.errors import DataError, ShapeError
from vrpo_plugin.standalone.frechet import FeatureStatistics, frechet_distance


def rotation(dim, rng):
    return np.linalg.qr(rng.standard_normal((dim, dim)))[0]


def random_spd(dim, rng):
    a = rng.standard_normal((dim, dim))
    return a @ a.T / dim + 0.1 * np.eye(dim)


def product_root_formula(a, b):
    """The textbook formula with the eigenvalues of the (unsymmetric) product."""
    eigenvalues = np.linalg.eigvals(a.covariance @ b.covariance)
    root = np.sqrt(eigenvalues.astype(complex)).sum().real
    return (np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root).item()


@pytest.mark.parametrize(("zeros_a", "zeros_b"), [(0, 0), (5, 5), (12, 0), (0, 12), (5, 0), (0, 5), (9, 5), (12, 12)])
def test_commuting_gaussians_closed_form(zeros_a, zeros_b):
    rng = np.random.default_rng(0)
    q = rotation(12, rng)
    u, v = rng.uniform(0.1, 3, 12), rng.uniform(0.1, 3, 12)
    u[:zeros_a], v[:zeros_b] = 0, 0
    a = FeatureStatistics(rng.standard_normal(12), (q * u) @ q.T)
    b = FeatureStatistics(rng.standard_normal(12), (q * v) @ q.T)
    expected = np.square(a.mean - b.mean).sum() + np.square(np.sqrt(u) - np.sqrt(v)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-11 if zeros_a >= zeros_b else 1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_random_spd_equals_the_formula_of_the_product(seed):
    rng = np.random.default_rng(seed)
    a = FeatureStatistics(rng.standard_normal(20), random_spd(20, rng))
    b = FeatureStatistics(rng.standard_normal(20), random_spd(20, rng))
    assert frechet_distance(a, b) == pytest.approx(product_root_formula(a, b), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_invariant_to_a_rotation_of_the_features():
    rng = np.random.default_rng(0)
    x, y, q = rng.standard_normal((90, 7)), 2 * rng.standard_normal((90, 7)) + 1, rotation(7, rng)
    plain = frechet_distance(FeatureStatistics.from_features(x), FeatureStatistics.from_features(y))
    turned = frechet_distance(FeatureStatistics.from_features(x @ q), FeatureStatistics.from_features(y @ q))
    assert plain == pytest.approx(turned, rel=1e-10)


@pytest.mark.parametrize("count", [5, 30, 200])
def test_equal_sets_give_zero_never_less(count):
    for seed in range(6):
        features = 1e3 * np.random.default_rng(seed).standard_normal((count, 30))
        statistics = FeatureStatistics.from_features(features)
        assert 0 <= frechet_distance(statistics, statistics) < 1e-6


def test_disjoint_subspaces_add_their_traces():
    a = FeatureStatistics(np.zeros(4), np.diag([2.0, 1.0, 0, 0]))
    b = FeatureStatistics(np.zeros(4), np.diag([0, 0, 3.0, 4.0]))
    assert frechet_distance(a, b) == pytest.approx(10)


def test_statistics_of_features():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    statistics = FeatureStatistics.from_features(features)
    assert statistics.count == 50
    assert statistics.mean.dtype == statistics.covariance.dtype == np.float64
    np.testing.assert_allclose(statistics.mean, features.double().mean(0))
    np.testing.assert_allclose(statistics.covariance, features.double().T.cov())
    assert FeatureStatistics.from_features(features[:, :1]).covariance.shape == (1, 1)


def test_few_samples_warn_and_enough_do_not(caplog):
    features = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    enough, few = (FeatureStatistics.from_features(f) for f in (features[:7], features[:6]))
    with caplog.at_level(logging.WARNING):
        frechet_distance(enough, enough)
        assert not caplog.records
        frechet_distance(enough, few)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "6 samples" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_features_are_refused(value):
    features = torch.zeros(5, 3)
    features[1, 2] = value
    with pytest.raises(DataError, match="finite"):
        FeatureStatistics.from_features(features)


def test_shapes_are_checked():
    with pytest.raises(ShapeError, match=r"\(N, D\)"):
        FeatureStatistics.from_features(torch.zeros(1, 3))
    with pytest.raises(ShapeError, match=r"\(N, D\)"):
        FeatureStatistics.from_features(torch.zeros(4, 3, 2))
    with pytest.raises(ShapeError, match="covariance"):
        FeatureStatistics(np.zeros(3), np.eye(4))
    three, four = (FeatureStatistics(np.zeros(d), np.eye(d)) for d in (3, 4))
    with pytest.raises(ShapeError, match="D = 3 and D = 4"):
        frechet_distance(three, four)


def test_save_and_load(tmp_path):
    statistics = FeatureStatistics.from_features(np.random.default_rng(0).standard_normal((9, 4)))
    path = tmp_path / "reference"
    statistics.save(path)
    loaded = FeatureStatistics.load(path)
    np.testing.assert_array_equal(loaded.mean, statistics.mean)
    np.testing.assert_array_equal(loaded.covariance, statistics.covariance)
    assert loaded.count == 9


def test_reference_files_without_a_count_load(tmp_path):
    path = tmp_path / "VIRTUAL_imagenet256.npz"
    np.savez(path, mu=np.ones(3, np.float32), sigma=np.eye(3), mu_s=np.ones(5), sigma_s=np.eye(5))
    loaded = FeatureStatistics.load(path)
    assert loaded.count is None
    assert loaded.mean.tolist() == [1, 1, 1]
    loaded.save(tmp_path / "again.npz")
    assert FeatureStatistics.load(tmp_path / "again.npz").count is None


def test_bad_files_are_refused(tmp_path):
    np.savez(tmp_path / "keys.npz", mean=np.ones(3))
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "text.npz").write_text("not an archive")
    for name in ("keys.npz", "pickle.npz", "array.npy", "text.npz"):
        with pytest.raises(DataError, match="mu and sigma"):
            FeatureStatistics.load(tmp_path / name)

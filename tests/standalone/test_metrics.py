import numpy as np
import pytest
import torch

from vrpo_plugin.errors import ConfigError, DataError, ShapeError
from vrpo_plugin.standalone.frechet import FeatureStatistics, frechet_distance
from vrpo_plugin.standalone.metrics import inception_score, kernel_distance
from vrpo_plugin.standalone.precision_recall import precision_recall


def features(seed, count, dim=24, shift=0.0):
    """Positive and correlated, as pooled features are."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((dim, dim)) / dim**0.5
    return torch.from_numpy(np.maximum(rng.standard_normal((count, dim)) @ mixing + shift, 0)).float()


def numpy_mmd2(x, y):
    x, y = (one.double().numpy() for one in (x, y))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    off_x, off_y = (~np.eye(len(one), dtype=bool) for one in (x, y))
    return kernel(x, x)[off_x].mean() + kernel(y, y)[off_y].mean() - 2 * kernel(x, y).mean()


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate():
    x, y = features(0, 60), features(1, 60, shift=0.3)
    got = kernel_distance(x, y, subsets=3, subset_size=60)
    assert got.mean == pytest.approx(numpy_mmd2(x, y), rel=1e-12)
    assert got.std == pytest.approx(0, abs=1e-12)  # every subset is the whole set


def test_kernel_distance_of_like_sets_is_zero_on_average():
    x, y = features(0, 2000), features(1, 2000)
    same, other = (kernel_distance(x, one, subset_size=200) for one in (y, y + 0.2))
    assert abs(same.mean) < 3 * same.std / 10  # 100 subsets
    assert other.mean > 10 * abs(same.mean)


def test_subsets_are_counted():
    counted = []
    kernel_distance(features(0, 20), features(1, 20), subsets=7, subset_size=5, on_subset=counted.append)
    assert counted == [1] * 7


@pytest.mark.parametrize(("subsets", "size"), [(0, 5), (1, 1), (1, 21)])
def test_kernel_distance_refuses_subsets_that_cannot_be(subsets, size):
    with pytest.raises(ConfigError, match=r"subset_size <= 20"):
        kernel_distance(features(0, 20), features(1, 30), subsets=subsets, subset_size=size)


def test_kernel_distance_refuses_other_features():
    with pytest.raises(ShapeError, match=r"\(20, 24\) and \(20, 12\)"):
        kernel_distance(features(0, 20), features(1, 20, dim=12), subset_size=5)
    with pytest.raises(DataError, match="finite"):
        kernel_distance(features(0, 20) * np.nan, features(1, 20), subset_size=5)


def test_inception_score_is_that_of_a_few_lines_of_numpy_in_order():
    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((103, 30)) * 3).float()
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    scores = []
    for i in range(10):
        part = p[i * 103 // 10 : (i + 1) * 103 // 10]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    got = inception_score(logits)
    assert (got.mean, got.std) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-10)
    assert inception_score(logits.flip(0)).mean != pytest.approx(got.mean, rel=1e-6)  # another order, other splits


def test_inception_score_is_the_number_of_classes_that_are_seen():
    sure = torch.eye(5).repeat(20, 1) * 1000  # every other probability is 0 in float64
    assert inception_score(sure, splits=2).mean == pytest.approx(5)
    assert inception_score(torch.zeros(100, 5)).mean == pytest.approx(1)


def test_inception_score_refuses_what_it_cannot_split():
    for logits, splits in ((torch.zeros(9, 5), 10), (torch.zeros(9), 1), (torch.zeros(9, 5), 0)):
        with pytest.raises(ShapeError, match="inception_score"):
            inception_score(logits, splits=splits)
    with pytest.raises(DataError, match="finite"):
        inception_score(torch.full((10, 5), np.inf))


class TestAgainstTorchFidelity:
    """Same features, their functions and ours."""

    generated, real = features(0, 400, shift=0.2), features(1, 300)

    def test_frechet_distance(self):
        theirs = pytest.importorskip("torch_fidelity.metric_fid")
        a, b = (theirs.fid_features_to_statistics(one) for one in (self.generated, self.real))
        a, b = ({key: value.astype(np.float64) for key, value in one.items()} for one in (a, b))
        expected = theirs.fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]
        ours = frechet_distance(*(FeatureStatistics.from_features(one) for one in (self.generated, self.real)))
        assert ours == pytest.approx(expected, rel=1e-4)

    def test_kernel_distance(self):
        theirs = pytest.importorskip("torch_fidelity.metric_kid")
        settings = {"kid_subsets": 20, "kid_subset_size": 100, "verbose": False}
        expected = theirs.kid_features_to_metric(self.generated, self.real, **settings)
        ours = kernel_distance(self.generated, self.real, subsets=20, subset_size=100)
        assert ours.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
        assert ours.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-4)

    def test_inception_score(self):
        theirs = pytest.importorskip("torch_fidelity.metric_isc")
        expected = theirs.isc_features_to_metric(4 * self.generated, splits=10, shuffle=False)
        ours = inception_score(4 * self.generated)
        assert ours.mean == pytest.approx(expected["inception_score_mean"], rel=1e-4)
        assert ours.std == pytest.approx(expected["inception_score_std"], rel=1e-4)

    def test_precision_and_recall(self):
        theirs = pytest.importorskip("torch_fidelity.metric_prc")
        expected = theirs.prc_features_to_metric(self.generated, self.real, prc_neighborhood=3, verbose=False)
        ours = precision_recall(self.real, self.generated, k=3)
        assert 0 < ours.recall < 1 and 0 < ours.precision < 1
        assert ours.precision == pytest.approx(expected["precision"], rel=1e-4)
        assert ours.recall == pytest.approx(expected["recall"], rel=1e-4)

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vrpo_plugin.errors import ConfigError, DataError, ShapeError
from vrpo_plugin.standalone.precision_recall import PrecisionRecall, precision_recall


def numpy_share_inside(queries, points, k):
    inside = 0
    for q in queries:
        radii = [np.sort(np.linalg.norm(points - p, axis=1))[k] for p in points]
        inside += any(np.linalg.norm(q - p) <= r for p, r in zip(points, radii, strict=True))
    return inside / len(queries)


def features(count, dim, seed, scale=1.0):
    return scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
def test_equals_the_double_loop(k, chunk_size):
    real, generated = features(23, 4, 0), features(30, 4, 1, 1.4)
    got = precision_recall(real, generated, k=k, chunk_size=chunk_size)
    r, g = real.double().numpy(), generated.double().numpy()
    assert got == PrecisionRecall(numpy_share_inside(g, r, k), numpy_share_inside(r, g, k))
    assert 0 < got.precision < 1
    assert 0 < got.recall < 1


def test_roles():
    real = features(200, 2, 0)
    collapsed = precision_recall(real, features(200, 2, 1, 0.1))
    assert collapsed.precision > 0.95
    assert collapsed.recall < 0.2
    swapped = precision_recall(features(200, 2, 1, 0.1), real)
    assert (swapped.precision, swapped.recall) == (collapsed.recall, collapsed.precision)


def test_identical_sets_and_far_sets():
    real = features(60, 40, 0)
    assert precision_recall(real, real.clone()) == PrecisionRecall(1.0, 1.0)
    assert precision_recall(real, real + 1e4) == PrecisionRecall(0.0, 0.0)


def test_the_edge_of_a_ball_belongs_to_it():
    # Two copies of each real sample: its ball is one point, and any rounding of distance 0 falls out of it.
    real = features(100, 300, 0).repeat(2, 1)
    generated = torch.cat([features(100, 300, 1), real])
    assert precision_recall(real, generated, k=1, chunk_size=7) == PrecisionRecall(2 / 3, 1.0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_order_does_not_matter(seed):
    real, generated = features(25, 3, seed), features(20, 3, seed + 1, 1.5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    plain = precision_recall(real, generated, chunk_size=6)
    assert plain == precision_recall(real.flip(0), generated[order], chunk_size=6)


def test_bad_input_is_refused():
    real = features(10, 3, 0)
    for k in (0, 4):
        with pytest.raises(ConfigError, match="k < 4"):
            precision_recall(real, real[:4], k=k)
    with pytest.raises(ConfigError, match="chunk_size"):
        precision_recall(real, real, chunk_size=0)
    with pytest.raises(ShapeError, match=r"\(10, 2\)"):
        precision_recall(real, real[:, :2])
    bad = real.clone()
    bad[3, 1] = torch.nan
    with pytest.raises(DataError, match="finite"):
        precision_recall(real, bad)

"""Noise levels and their memory, against numpy loops over samples."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vrpo_plugin.errors import ShapeError
from vrpo_plugin.functional.levels import (
    HORIZON,
    LEVELS,
    PRIOR,
    level_differs,
    level_moments,
    level_variance,
    merge_moments,
    noise_levels,
    remember,
)

examples = settings(deadline=None, derandomize=True, max_examples=40)


def random_batch(
    seed: int, size: int, *, rewards: int = 2, centre: float = 0.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, levels and a mask."""
    g = torch.Generator().manual_seed(seed)
    t = torch.rand(size, generator=g)
    values = centre + torch.randn(rewards, size, generator=g, dtype=torch.float64)
    return values.to(dtype), noise_levels(t), torch.rand(rewards, size, generator=g) < 0.7


def moments_loop(rewards: Tensor, level: Tensor, valid: Tensor) -> NDArray:
    moments = np.zeros((3, len(rewards), LEVELS))
    for k in range(len(rewards)):
        for b in range(LEVELS):
            chosen = np.array([rewards[k, i].item() for i in range(len(level)) if level[i] == b and valid[k, i]])
            if len(chosen):
                moments[:, k, b] = len(chosen), chosen.mean(), ((chosen - chosen.mean()) ** 2).sum()
    return moments


def empty(rewards: int = 2) -> Tensor:
    return torch.zeros(3, rewards, LEVELS, dtype=torch.float64)


@pytest.mark.parametrize(("t", "level"), [(0.0, 0), (0.05, 0), (0.15, 1), (0.95, 9), (1.0, 9), (1.1, 9), (-0.1, 0)])
def test_every_time_has_a_level(t: float, level: int) -> None:
    assert noise_levels(torch.tensor([t])).tolist() == [level]


@examples
@given(seed=st.integers(0, 1000), size=st.integers(0, 60), centre=st.sampled_from([0.0, -3.0, 1e3]))
def test_moments_are_the_loop_over_samples(seed: int, size: int, centre: float) -> None:
    batch = random_batch(seed, size, centre=centre)
    np.testing.assert_allclose(level_moments(*batch), moments_loop(*batch), rtol=1e-9, atol=1e-9)


@examples
@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_merged_parts_are_the_whole(seed: int, sizes: list[int]) -> None:
    rewards, level, valid = random_batch(seed, sum(sizes), centre=100.0)
    cut = [x.split(sizes, -1) for x in (rewards, level, valid)]
    parts = torch.stack([level_moments(*part) for part in zip(*cut, strict=True)])
    torch.testing.assert_close(merge_moments(parts), level_moments(rewards, level, valid), rtol=1e-9, atol=1e-9)


def test_a_large_mean_does_not_swallow_a_small_variance() -> None:
    """Sums of squares would: of rewards near 1000, float32 keeps none of a variance of 1e-4."""
    memory = torch.zeros(3, 1, LEVELS)
    seen = []
    for seed in range(20):
        rewards, level, _ = random_batch(seed, 64, rewards=1, dtype=torch.float64)
        rewards = (1000 + 0.01 * rewards).float()
        seen.append(rewards[0])
        memory = remember(memory, level_moments(rewards, level, torch.ones(1, 64, dtype=torch.bool)))
    exact = torch.cat(seen).double().var().item()
    assert level_variance(memory).mean().item() == pytest.approx(exact, rel=0.1)


def test_memory_is_the_weighted_mean_of_the_loop() -> None:
    memory = empty()
    weights: dict[tuple[int, int], list[list[float]]] = {}
    for seed in range(12):
        rewards, level, valid = random_batch(seed, 30)
        memory = remember(memory, level_moments(rewards, level, valid))
        for k in range(2):
            for b in range(LEVELS):
                chosen = [rewards[k, i].item() for i in range(30) if level[i] == b and valid[k, i]]
                known = weights.setdefault((k, b), [])
                for pair in known:
                    pair[0] *= (1 - 1 / HORIZON) ** len(chosen)
                known += [[1.0, value] for value in chosen]
    for (k, b), known in weights.items():
        w, values = np.array(known).T
        mean = (w * values).sum() / w.sum()
        expected = [w.sum(), mean, (w * (values - mean) ** 2).sum()]
        np.testing.assert_allclose(memory[:, k, b], expected, rtol=1e-9)


@pytest.mark.parametrize("sizes", [[256], [32] * 8, [4] * 64, [1] * 256, [200, 1, 55]])
def test_memory_does_not_depend_on_how_samples_are_split(sizes: list[int]) -> None:
    rewards, level, valid = random_batch(0, 256, centre=5.0)
    memory = empty()
    cut = [x.split(sizes, -1) for x in (rewards, level, valid)]
    for part in zip(*cut, strict=True):
        memory = remember(memory, level_moments(*part))
    at_once = remember(empty(), level_moments(rewards, level, valid))
    # Within a batch nothing is forgotten: by at most 26 samples of 1,024.
    torch.testing.assert_close(memory[0], at_once[0], rtol=0.03, atol=0)
    torch.testing.assert_close(memory[1], at_once[1], rtol=0, atol=0.01)
    torch.testing.assert_close(level_variance(memory), level_variance(at_once), rtol=0.03, atol=0)


def test_it_finds_the_mean_and_variance_of_each_level() -> None:
    g = torch.Generator().manual_seed(0)
    memory = empty(1)
    for call in range(600):
        t = torch.rand(64, generator=g)
        high = t >= 0.5
        rewards = 2 * high + (1 + 3 * high) * torch.randn(64, generator=g) + (2 if call < 20 else 0)
        memory = remember(memory, level_moments(rewards[None].double(), noise_levels(t), torch.ones(1, 64) > 0))
    variance = level_variance(memory)[0]
    # About 1,000 remembered samples: a relative deviation of 4%. What the first 20 calls said is forgotten.
    torch.testing.assert_close(variance[:5], torch.ones(5, dtype=torch.float64), rtol=0.2, atol=0)
    torch.testing.assert_close(variance[5:], torch.full((5,), 16.0, dtype=torch.float64), rtol=0.2, atol=0)
    torch.testing.assert_close(memory[1, 0, 5:], torch.full((5,), 2.0, dtype=torch.float64), rtol=0, atol=0.6)


def test_variance_leans_on_the_other_levels_where_little_was_seen() -> None:
    memory = empty(1)
    memory[:, 0, 0] = torch.tensor([11.0, 5.0, 10.0])  # variance 1
    memory[:, 0, 1] = torch.tensor([31.0, 7.0, 120.0])  # variance 4
    memory[:, 0, 2] = torch.tensor([1.0, 9.0, 0.0])
    pooled = 130 / 40
    variance = level_variance(memory)[0]
    assert variance[0].item() == pytest.approx((10 + PRIOR * pooled) / (10 + PRIOR))
    assert variance[1].item() == pytest.approx((120 + PRIOR * pooled) / (30 + PRIOR))
    assert variance[2:].tolist() == pytest.approx([pooled] * 8)


def test_what_was_never_compared_is_nan() -> None:
    level = torch.tensor([0, 3, 9])
    moments = level_moments(torch.rand(2, 3), level, torch.tensor([[True] * 3, [False] * 3]))
    assert torch.isnan(level_variance(moments)).all()


@pytest.mark.parametrize("constant", [0.0, 3.0, 0.1, 1e-6, -1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_no_variance_however_long(constant: float, dtype: torch.dtype) -> None:
    memory = torch.zeros(3, 1, LEVELS, dtype=dtype)
    for seed in range(50):
        _, level, _ = random_batch(seed, 33)
        added = level_moments(torch.full((1, 33), constant, dtype=dtype), level, torch.ones(1, 33) > 0)
        assert not level_differs(added).any()
        memory = remember(memory, added)
    assert level_variance(memory).eq(0).all()


def test_two_rewards_that_differ_are_told_apart() -> None:
    moments = level_moments(torch.tensor([[1.0, 1.001, 5.0]]), torch.tensor([2, 2, 4]), torch.ones(1, 3) > 0)
    assert level_differs(moments)[0].nonzero().tolist() == [[2]], "the one at level 4 has nothing to be compared with"


@examples
@given(seed=st.integers(0, 100))
def test_what_is_left_out_is_as_if_absent(seed: int) -> None:
    rewards, level, _ = random_batch(seed, 24)
    keep = torch.arange(24) < 10
    torn = torch.where(keep, rewards, torch.nan)
    torch.testing.assert_close(
        level_moments(torn, level, keep.expand(2, 24)),
        level_moments(rewards[:, :10], level[:10], torch.ones(2, 10) > 0),
    )


@pytest.mark.parametrize("shapes", [((2, 4), (3,), (2, 4)), ((2, 4), (4,), (4,)), ((4,), (4,), (4,))])
def test_other_shapes_are_an_error(shapes: tuple[tuple[int, ...], ...]) -> None:
    rewards, level, valid = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ShapeError, match="one level per sample"):
        level_moments(rewards, level, valid > 0)


def test_no_host_sync() -> None:
    with FakeTensorMode():
        added = level_moments(torch.rand(2, 8), noise_levels(torch.rand(8)), torch.rand(2, 8) > 0.5)
        memory = remember(torch.zeros(3, 2, LEVELS), merge_moments(torch.stack([added, added])))
        assert level_variance(memory).shape == level_differs(added).shape == (2, LEVELS)

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vrpo_plugin.errors import ConfigError, ShapeError
from vrpo_plugin.functional.advantages import (
    SCALES,
    Scale,
    combine_rewards,
    group_moments,
    group_relative_advantages,
    inverse_scale,
)
from vrpo_plugin.functional.groups import noise_strata

examples = settings(deadline=None, derandomize=True, max_examples=40)
every_scale = pytest.mark.parametrize("scale", SCALES)
# Whole numbers: a group then either has a spread that counts, or none at all.
numbers = st.integers(-1000, 1000).map(float)
broken = st.sampled_from([np.nan, np.inf, -np.inf])
shapes = array_shapes(min_dims=2, max_dims=2, max_side=6)
sound_rewards = arrays(np.float64, shapes, elements=numbers)
any_rewards = arrays(np.float64, shapes, elements=numbers | broken)


def scales_loop(rewards: NDArray, keep: NDArray, scale: str, eps: float) -> list[float]:
    """What the deviations of each group are multiplied by; rewards (S, G)."""
    groups = [row[k] for row, k in zip(rewards, keep, strict=True)]
    live = [g for g in groups if len(g) >= 2 and np.ptp(g) > 0]
    pooled = sum(((g - g.mean()) ** 2).sum() for g in live) / max(sum(len(g) - 1 for g in live), 1)
    factors = []
    for g in groups:
        if scale == "none":
            factors.append(1.0)
        elif len(g) < 2 or np.ptp(g) == 0:
            factors.append(0.0)
        else:
            factors.append(1 / ((g.std(ddof=1) if scale == "group" else np.sqrt(pooled)) + eps))
    return factors


def advantages_loop(rewards: NDArray, keep: NDArray, scale: str, eps: float) -> NDArray:
    advantages = np.zeros_like(rewards)
    for s, factor in enumerate(scales_loop(rewards, keep, scale, eps)):
        g = rewards[s][keep[s]]
        if len(g) >= 2:
            advantages[s][keep[s]] = (g - g.mean()) * factor
    return advantages


def advantages_of(rewards: NDArray, scale: Scale, eps: float = 1e-4) -> NDArray:
    return group_relative_advantages(torch.from_numpy(rewards), scale=scale, eps=eps).numpy()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_scale
@examples
@given(rewards=any_rewards, eps=st.sampled_from([0, 1e-4, 1.0]))
def test_advantages_are_the_loop_over_groups(scale: Scale, rewards: NDArray, eps: float) -> None:
    expected = advantages_loop(rewards, np.isfinite(rewards), scale, eps)
    np.testing.assert_allclose(advantages_of(rewards, scale, eps), expected, rtol=1e-9, atol=1e-11)


@every_scale
@examples
@given(data=st.data(), rewards=any_rewards)
def test_masked_slots_are_as_if_absent(scale: Scale, data: st.DataObject, rewards: NDArray) -> None:
    mask = data.draw(arrays(bool, rewards.shape))
    advantages = group_relative_advantages(torch.from_numpy(rewards), mask=torch.from_numpy(mask), scale=scale)
    expected = advantages_loop(rewards, np.isfinite(rewards) & mask, scale, 1e-4)
    np.testing.assert_allclose(advantages, expected, rtol=1e-9, atol=1e-11)
    assert advantages.numpy()[~mask].tolist() == [0] * int((~mask).sum())


@every_scale
@examples
@given(rewards=any_rewards, shift=st.integers(-(10**6), 10**6))
def test_a_shift_of_all_rewards_changes_nothing(scale: Scale, rewards: NDArray, shift: int) -> None:
    np.testing.assert_allclose(advantages_of(rewards + shift, scale), advantages_of(rewards, scale), atol=1e-8)


@every_scale
@examples
@given(rewards=any_rewards, seed=st.integers(0, 1000))
def test_permuting_inside_a_group_permutes_the_advantages(scale: Scale, rewards: NDArray, seed: int) -> None:
    order = np.random.default_rng(seed).permuted(np.indices(rewards.shape)[1], axis=1)
    permuted = np.take_along_axis(rewards, order, 1)
    expected = np.take_along_axis(advantages_of(rewards, scale), order, 1)
    np.testing.assert_allclose(advantages_of(permuted, scale), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scale", ["group", "batch"])
@examples
@given(rewards=any_rewards, factor=st.floats(1e-3, 1e3))
def test_positive_scaling_changes_nothing_without_eps(scale: Scale, rewards: NDArray, factor: float) -> None:
    expected = advantages_of(rewards, scale, eps=0)
    np.testing.assert_allclose(advantages_of(factor * rewards, scale, eps=0), expected, rtol=1e-9, atol=1e-9)


@examples
@given(rewards=sound_rewards, factors=st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6))
def test_group_scale_forgets_the_scale_of_each_group(rewards: NDArray, factors: list[float]) -> None:
    scaled = rewards * np.array(factors[: len(rewards)])[:, None]
    expected = advantages_of(rewards, "group", eps=0)
    np.testing.assert_allclose(advantages_of(scaled, "group", eps=0), expected, rtol=1e-9, atol=1e-9)


@every_scale
@examples
@given(
    rewards=st.lists(numbers, min_size=1, max_size=6),
    holes=st.lists(st.tuples(st.integers(0, 6), broken), max_size=4),
)
def test_nonfinite_rewards_are_as_if_absent(scale: Scale, rewards: list[float], holes: list[tuple[int, float]]) -> None:
    torn = list(rewards)
    for place, value in holes:
        torn.insert(place, value)
    advantages = advantages_of(np.array(torn), scale)
    finite = np.isfinite(torn)
    np.testing.assert_allclose(advantages[finite], advantages_of(np.array(rewards), scale), rtol=1e-9, atol=1e-11)
    assert (advantages[~finite] == 0).all()


@every_scale
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0, 1e-4])
def test_dead_groups_get_exactly_0(scale: Scale, dtype: torch.dtype, eps: float) -> None:
    one, step, nan = 1.0, torch.finfo(dtype).eps, torch.nan
    # The mean of 0.1 is off by a rounding, and a spread of one unit in the last place is noise.
    dead = torch.tensor([[0.1] * 5, [one, one + step, one, one, one], [nan] * 5, [nan, nan, 3, nan, nan]], dtype=dtype)
    alive = random(2, 5).to(dtype)
    advantages = group_relative_advantages(torch.cat([dead, alive]), scale=scale, eps=eps)
    assert advantages[:4].eq(0).all()
    assert advantages[4:].equal(group_relative_advantages(alive, scale=scale, eps=eps))
    assert advantages[4:].abs().gt(0).all()


@every_scale
def test_spreads_whose_square_float32_does_not_hold_are_dead(scale: Scale) -> None:
    # Without an epsilon they would be divided by a deviation of 0.
    rewards = torch.tensor([[1e-30, 3e-30], [0.0, 1.0]])
    advantages = group_relative_advantages(rewards, scale=scale, eps=0)
    assert torch.isfinite(advantages).all() and advantages[0].tolist() == [0, 0] and advantages[1, 1] > 0


def test_dead_groups_leave_the_batch_denominator() -> None:
    alive = random(1, 6)
    mixed = torch.cat([torch.full((3, 6), 7.0, dtype=torch.float64), alive])
    expected = (alive - alive.mean()) / alive.std()
    torch.testing.assert_close(group_relative_advantages(mixed, scale="batch", eps=0)[3:], expected)


@every_scale
def test_groups_of_one_are_dead(scale: Scale) -> None:
    assert group_relative_advantages(random(4, 1), scale=scale, eps=0).eq(0).all()


@every_scale
def test_more_dimensions_are_batches_of_their_own(scale: Scale) -> None:
    rewards = random(3, 2, 4, 5)
    advantages = group_relative_advantages(rewards, scale=scale)
    for i, j in np.ndindex(3, 2):
        torch.testing.assert_close(advantages[i, j], group_relative_advantages(rewards[i, j], scale=scale))


@every_scale
@examples
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 30), group_size=st.integers(1, 9))
def test_permuting_the_batch_leaves_each_samples_advantage(
    scale: Scale, seed: int, batch: int, group_size: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    t = torch.randperm(batch, generator=g) / batch
    rewards, permutation = random(batch, seed=seed), torch.randperm(batch, generator=g)

    def advantages(t: Tensor, rewards: Tensor) -> Tensor:
        groups = noise_strata(t, group_size)
        return groups.join(group_relative_advantages(groups.split(rewards), mask=groups.mask, scale=scale))

    assert advantages(t[permutation], rewards[permutation]).equal(advantages(t, rewards)[permutation])


def test_moments_are_numpys() -> None:
    rewards = random(3, 6).numpy()
    moments = group_moments(torch.from_numpy(rewards))
    np.testing.assert_allclose(moments.deviation, rewards - rewards.mean(1, keepdims=True), atol=1e-14)
    np.testing.assert_allclose(moments.variance, rewards.var(1, ddof=1, keepdims=True), rtol=1e-12)
    assert moments.count.tolist() == [[6]] * 3
    assert moments.live.all() and moments.valid.all()


def test_moments_of_a_dead_group_are_0() -> None:
    moments = group_moments(torch.tensor([[2.0, 2.0, torch.nan]]))
    assert moments.variance.tolist() == [[0]] and moments.deviation.tolist() == [[0, 0, 0]]
    assert moments.count.tolist() == [[2]] and moments.live.tolist() == [[False]]
    assert moments.valid.tolist() == [[True, True, False]]


@every_scale
@examples
@given(rewards=any_rewards)
def test_inverse_scale_is_the_loop(scale: Scale, rewards: NDArray) -> None:
    factors = inverse_scale(group_moments(torch.from_numpy(rewards)), scale=scale, eps=0.5)
    expected = scales_loop(rewards, np.isfinite(rewards), scale, 0.5)
    np.testing.assert_allclose(factors[:, 0], expected, rtol=1e-9)


def torn_rewards(seed: int) -> tuple[NDArray, NDArray]:
    """Three rewards of four groups of five, one of them dead, with holes; and weights per group."""
    rng = np.random.default_rng(seed)
    rewards = rng.standard_normal((3, 4, 5)) * np.array([1, 10, 0.1])[:, None, None]
    rewards[rng.random(rewards.shape) < 0.2] = np.nan
    rewards[1, 2] = 4
    rewards[:, 1, 3] = np.inf
    return rewards, rng.uniform(0.1, 1, (3, 4, 1))


@every_scale
@pytest.mark.parametrize("seed", range(4))
def test_sum_then_normalize_is_the_loop(scale: Scale, seed: int) -> None:
    rewards, weights = torn_rewards(seed)
    total = sum(w * advantages_loop(r, np.isfinite(r), "none", 0) for r, w in zip(rewards, weights, strict=True))
    keep = np.isfinite(rewards).any(0)
    advantages, coefficients = combine_rewards(
        group_moments(torch.from_numpy(rewards)), torch.from_numpy(weights), scale=scale, eps=1e-3
    )
    np.testing.assert_allclose(advantages, advantages_loop(total, keep, scale, 1e-3), rtol=1e-9, atol=1e-12)
    factors = np.array(scales_loop(total, keep, scale, 1e-3))[:, None]
    np.testing.assert_allclose(coefficients, weights * factors, rtol=1e-9)
    assert advantages[1, 3] == 0


@every_scale
@pytest.mark.parametrize("seed", range(4))
def test_normalize_then_sum_is_the_loop(scale: Scale, seed: int) -> None:
    rewards, weights = torn_rewards(seed)
    advantages, coefficients = combine_rewards(
        group_moments(torch.from_numpy(rewards)),
        torch.from_numpy(weights),
        scale=scale,
        aggregation="normalize_then_sum",
        eps=1e-3,
    )
    total = np.zeros((4, 5))
    for k, (r, w) in enumerate(zip(rewards, weights, strict=True)):
        total += w * advantages_loop(r, np.isfinite(r), scale, 1e-3)
        factors = np.array(scales_loop(r, np.isfinite(r), scale, 1e-3))[:, None]
        np.testing.assert_allclose(coefficients[k], w * factors, rtol=1e-9)
    np.testing.assert_allclose(advantages, total, rtol=1e-9, atol=1e-12)
    assert advantages[1, 3] == 0


@every_scale
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_one_reward_of_weight_1_is_its_own_advantage(scale: Scale, aggregation) -> None:  # type: ignore[no-untyped-def]
    rewards = random(1, 3, 4)
    advantages, _ = combine_rewards(
        group_moments(rewards), torch.ones(1, 1, 1, dtype=torch.float64), scale=scale, aggregation=aggregation
    )
    torch.testing.assert_close(advantages, group_relative_advantages(rewards[0], scale=scale))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    # The sum of a group overflows float16.
    rewards = (20_000 + 1000 * random(3, 8)).to(dtype)
    for scale in SCALES:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            advantages = group_relative_advantages(rewards, scale=scale)  # type: ignore[arg-type]
        assert advantages.dtype == torch.float32
        exact = group_relative_advantages(rewards.double(), scale=scale)  # type: ignore[arg-type]
        torch.testing.assert_close(advantages.double(), exact, atol=1e-4, rtol=1e-4)


def test_whole_numbers_are_rewards() -> None:
    passed = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(
        group_relative_advantages(passed, scale="none"), torch.tensor([[-0.5, 0.5, 0.5, -0.5], [0, 0, 0, 0]])
    )


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_rewards_without_groups_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"rewards: expected \(\.\.\., G\).*one reward per action"):
        group_relative_advantages(torch.zeros(shape))


def test_unknown_scale_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"scale: expected one of .*'group'.* got 'std'"):
        group_relative_advantages(torch.rand(2, 3), scale="std")  # type: ignore[arg-type]


def test_no_host_sync() -> None:
    with FakeTensorMode():
        moments = group_moments(torch.rand(2, 3, 4), mask=torch.rand(3, 4) > 0.5)
        for scale in SCALES:
            advantages, _ = combine_rewards(moments, torch.rand(2, 3, 1), scale=scale)  # type: ignore[arg-type]
            assert advantages.shape == (3, 4)

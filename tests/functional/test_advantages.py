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
    group_moments,
    group_relative_advantages,
    inverse_scale,
)

examples = settings(deadline=None, derandomize=True, max_examples=40)
every_scale = pytest.mark.parametrize("scale", SCALES)
# Whole numbers: a group then either has a spread that counts, or none at all.
numbers = st.integers(-1000, 1000).map(float)
broken = st.sampled_from([np.nan, np.inf, -np.inf])
shapes = array_shapes(min_dims=2, max_dims=2, max_side=6)
sound_rewards = arrays(np.float64, shapes, elements=numbers)
any_rewards = arrays(np.float64, shapes, elements=numbers | broken)


def scales_loop(rewards: NDArray, keep: NDArray, scale: str) -> list[float]:
    """What the deviations of each group are multiplied by; rewards (S, G)."""
    factors = []
    for row, k in zip(rewards, keep, strict=True):
        dead = k.sum() < 2 or np.ptp(row[k]) == 0
        factors.append(1.0 if scale == "none" else 0.0 if dead else 1 / row[k].std(ddof=1))
    return factors


def advantages_loop(rewards: NDArray, keep: NDArray, scale: str) -> NDArray:
    advantages = np.zeros_like(rewards)
    for s, factor in enumerate(scales_loop(rewards, keep, scale)):
        g = rewards[s][keep[s]]
        if len(g) >= 2:
            advantages[s][keep[s]] = (g - g.mean()) * factor
    return advantages


def advantages_of(rewards: NDArray, scale: Scale) -> NDArray:
    return group_relative_advantages(torch.from_numpy(rewards), scale=scale).numpy()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_scale
@examples
@given(rewards=any_rewards)
def test_advantages_are_the_loop_over_groups(scale: Scale, rewards: NDArray) -> None:
    expected = advantages_loop(rewards, np.isfinite(rewards), scale)
    np.testing.assert_allclose(advantages_of(rewards, scale), expected, rtol=1e-9, atol=1e-11)


@every_scale
@examples
@given(data=st.data(), rewards=any_rewards)
def test_masked_slots_are_as_if_absent(scale: Scale, data: st.DataObject, rewards: NDArray) -> None:
    mask = data.draw(arrays(bool, rewards.shape))
    advantages = group_relative_advantages(torch.from_numpy(rewards), mask=torch.from_numpy(mask), scale=scale)
    expected = advantages_loop(rewards, np.isfinite(rewards) & mask, scale)
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


@examples
@given(rewards=sound_rewards, factors=st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6))
def test_group_scale_forgets_the_scale_of_each_group(rewards: NDArray, factors: list[float]) -> None:
    scaled = rewards * np.array(factors[: len(rewards)])[:, None]
    expected = advantages_of(rewards, "group")
    np.testing.assert_allclose(advantages_of(scaled, "group"), expected, rtol=1e-9, atol=1e-9)


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
def test_dead_groups_get_exactly_0(scale: Scale, dtype: torch.dtype) -> None:
    one, step, nan = 1.0, torch.finfo(dtype).eps, torch.nan
    # The mean of 0.1 is off by a rounding, and a spread of one unit in the last place is noise.
    dead = torch.tensor([[0.1] * 5, [one, one + step, one, one, one], [nan] * 5, [nan, nan, 3, nan, nan]], dtype=dtype)
    alive = random(2, 5).to(dtype)
    advantages = group_relative_advantages(torch.cat([dead, alive]), scale=scale)
    assert advantages[:4].eq(0).all()
    assert advantages[4:].equal(group_relative_advantages(alive, scale=scale))
    assert advantages[4:].abs().gt(0).all()


@every_scale
def test_spreads_whose_square_float32_does_not_hold_are_dead(scale: Scale) -> None:
    # They would be divided by a deviation of 0.
    rewards = torch.tensor([[1e-30, 3e-30], [0.0, 1.0]])
    advantages = group_relative_advantages(rewards, scale=scale)
    assert torch.isfinite(advantages).all() and advantages[0].tolist() == [0, 0] and advantages[1, 1] > 0


@every_scale
def test_groups_of_one_are_dead(scale: Scale) -> None:
    assert group_relative_advantages(random(4, 1), scale=scale).eq(0).all()


@every_scale
def test_more_dimensions_are_batches_of_their_own(scale: Scale) -> None:
    rewards = random(3, 2, 4, 5)
    advantages = group_relative_advantages(rewards, scale=scale)
    for i, j in np.ndindex(3, 2):
        torch.testing.assert_close(advantages[i, j], group_relative_advantages(rewards[i, j], scale=scale))


def test_moments_are_numpys() -> None:
    rewards = random(3, 6).numpy()
    moments = group_moments(torch.from_numpy(rewards))
    np.testing.assert_allclose(moments.deviation, rewards - rewards.mean(1, keepdims=True), atol=1e-14)
    np.testing.assert_allclose(moments.variance, rewards.var(1, ddof=1, keepdims=True), rtol=1e-12)
    assert moments.count.tolist() == [[6]] * 3


def test_moments_of_a_dead_group_are_0() -> None:
    moments = group_moments(torch.tensor([[2.0, 2.0, torch.nan]]))
    assert moments.variance.tolist() == [[0]] and moments.deviation.tolist() == [[0, 0, 0]]
    assert moments.count.tolist() == [[2]]


@every_scale
@examples
@given(rewards=any_rewards)
def test_inverse_scale_is_the_loop(scale: Scale, rewards: NDArray) -> None:
    factors = inverse_scale(group_moments(torch.from_numpy(rewards)).variance, scale=scale)
    np.testing.assert_allclose(factors[:, 0], scales_loop(rewards, np.isfinite(rewards), scale), rtol=1e-9)


def test_what_is_not_known_has_no_scale() -> None:
    assert inverse_scale(torch.tensor([torch.nan, 0.0, 4.0])).tolist() == [0, 0, 0.5]


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
        rewards, mask = torch.rand(2, 3, 4), torch.rand(3, 4) > 0.5
        for scale in SCALES:
            advantages = group_relative_advantages(rewards, mask=mask, scale=scale)  # type: ignore[arg-type]
            assert advantages.shape == (2, 3, 4)

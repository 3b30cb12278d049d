import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vrpo_plugin.errors import ConfigError, ShapeError
from vrpo_plugin.functional.weights import inverse_variance_weights

examples = settings(deadline=None, derandomize=True, max_examples=50)
variances = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6)
caps = st.floats(0.05, 1)


def weights_of(variance: list[float] | NDArray, **options: float) -> NDArray:
    return inverse_variance_weights(torch.tensor(variance, dtype=torch.float64), **options).numpy()


def least_total_variance(variance: NDArray, cap: float) -> NDArray:
    """Minimises sum_k w_k^2 sigma_k^2 under sum_k w_k = 1 and 0 <= w_k <= cap."""
    unit, count = variance / variance.max(), len(variance)
    solution = minimize(
        lambda w: (w * w * unit).sum(),
        np.full(count, 1 / count),
        jac=lambda w: 2 * w * unit,
        bounds=[(0, cap)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(count)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert solution.success, solution.message
    return solution.x


@pytest.mark.parametrize("cap", [1.0, 0.9, 0.6, 0.4])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_weights_are_the_minimiser_that_scipy_finds(count: int, cap: float) -> None:
    rng = np.random.default_rng(count)
    for _ in range(10):
        variance = 10 ** rng.uniform(-2, 0, count)
        feasible = max(cap, 1 / count)
        weights, expected = weights_of(variance, cap=cap), least_total_variance(variance, feasible)
        np.testing.assert_allclose(weights, expected, atol=1e-5)
        assert (weights**2 * variance).sum() <= (expected**2 * variance).sum() * (1 + 1e-9)


@examples
@given(variances, caps)
def test_weights_meet_the_conditions_of_the_optimum(variance: list[float], cap: float) -> None:
    limit = max(cap, 1 / len(variance))
    weights = weights_of(variance, cap=cap)
    slope = weights * np.array(variance)
    capped = weights >= limit * (1 - 1e-9)
    assert weights.sum() == pytest.approx(1, rel=1e-12)
    assert (weights > 0).all() and (weights <= limit * (1 + 1e-12)).all()
    if not capped.all():
        # One price for all that are free, and none of the capped is worth less of it.
        np.testing.assert_allclose(slope[~capped], slope[~capped].mean(), rtol=1e-9)
        assert (slope[capped] <= slope[~capped].mean() * (1 + 1e-9)).all()


@examples
@given(variances)
def test_weights_without_a_cap_are_the_formula(variance: list[float]) -> None:
    inverse = [1 / v for v in variance]
    np.testing.assert_allclose(weights_of(variance), [i / sum(inverse) for i in inverse], rtol=1e-12)


@examples
@given(variances, caps, st.floats(1e-3, 1e3), st.randoms(use_true_random=False))
def test_units_and_order_do_not_matter(variance: list[float], cap: float, factor: float, random) -> None:  # type: ignore[no-untyped-def]
    weights = weights_of(variance, cap=cap, floor=1e-12)
    scaled = weights_of([factor * v for v in variance], cap=cap, floor=1e-12)
    np.testing.assert_allclose(scaled, weights, rtol=1e-9)
    order = random.sample(range(len(variance)), len(variance))
    permuted = weights_of([variance[i] for i in order], cap=cap, floor=1e-12)
    np.testing.assert_allclose(permuted, weights[order], rtol=1e-9)


@examples
@given(
    variances,
    caps,
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0, np.nan, np.inf])), min_size=1, max_size=3),
)
def test_rewards_without_variance_get_0_and_are_as_if_absent(
    variance: list[float], cap: float, holes: list[tuple[int, float]]
) -> None:
    torn, said = list(variance), [True] * len(variance)
    for place, value in holes:
        torn.insert(place, value)
        said.insert(place, False)
    weights = weights_of(torn, cap=cap)
    assert (weights[~np.array(said)] == 0).all()
    np.testing.assert_allclose(weights[said], weights_of(variance, cap=cap), rtol=1e-12)


@pytest.mark.parametrize("nothing", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("cap", [0.1, 1.0])
def test_all_get_the_same_where_none_has_any_variance(nothing: float, cap: float) -> None:
    np.testing.assert_allclose(weights_of([nothing] * 4, cap=cap), [0.25] * 4)


def test_floor_is_the_smallest_variance_that_is_believed() -> None:
    np.testing.assert_allclose(weights_of([1e-30, 1e-2, 3e-2], floor=1e-2), weights_of([1e-2, 1e-2, 3e-2]))
    assert weights_of([1e-30, 1e-2])[0] == pytest.approx(1e-2 / (1e-2 + 1e-8))


def test_cap_hands_the_rest_to_the_others_by_their_variance() -> None:
    np.testing.assert_allclose(weights_of([1e-4, 1.0, 2.0], cap=0.7), [0.7, 0.2, 0.1], rtol=1e-12)
    # The rest would lift the second over the cap in its turn.
    np.testing.assert_allclose(weights_of([1e-4, 1e-2, 1.0], cap=0.45), [0.45, 0.45, 0.1], rtol=1e-12)


def test_cap_is_raised_to_the_share_of_the_live() -> None:
    np.testing.assert_allclose(weights_of([1.0, 5.0, 0.0], cap=0.1), [0.5, 0.5, 0])
    np.testing.assert_allclose(weights_of([1.0, 0.0, 0.0], cap=0.1), [1, 0, 0])


def test_each_group_has_its_own_weights() -> None:
    g = torch.Generator().manual_seed(0)
    variance = torch.rand(3, 4, 5, generator=g, dtype=torch.float64)
    variance[:, 0, 0] = 0
    variance[1, 2, 3] = torch.nan
    weights = inverse_variance_weights(variance, cap=0.6)
    for s, i in np.ndindex(4, 5):
        np.testing.assert_allclose(weights[:, s, i], weights_of(variance[:, s, i].numpy(), cap=0.6), rtol=1e-12)


@pytest.mark.parametrize(
    "options", [{"cap": 0.0}, {"cap": 1.1}, {"cap": float("nan")}, {"floor": 0.0}, {"floor": -1.0}]
)
def test_options_out_of_range_are_a_config_error(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="0 < cap <= 1, floor > 0"):
        weights_of([1.0, 2.0], **options)


@pytest.mark.parametrize("variance", [[1e-42, 3e-42, 1.0], [1e-30, 3e-30, 1e38], [1e38, 3e38, 0.0]])
def test_variances_whose_inverse_float32_does_not_hold(variance: list[float]) -> None:
    weights = inverse_variance_weights(torch.tensor(variance), floor=1e-45)
    ratio = 0.5 if variance[0] < 1e-38 else 0.75  # below the smallest normal number all are alike
    np.testing.assert_allclose(weights, [ratio, 1 - ratio, 0], atol=1e-6)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3)])
def test_no_reward_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"variance: expected \(K, \.\.\.\), K >= 1"):
        inverse_variance_weights(torch.ones(shape))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    # 1 / 1e-6 is infinite in float16, and the default floor is 0 there.
    variance = torch.tensor([[1e-6, 2.0], [3e-6, 1.0], [1e-3, 5.0]]).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        weights: Tensor = inverse_variance_weights(variance, cap=0.7)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(
        weights.double(), inverse_variance_weights(variance.double(), cap=0.7), atol=1e-6, rtol=1e-5
    )


def test_no_host_sync() -> None:
    with FakeTensorMode():
        assert inverse_variance_weights(torch.rand(3, 4, 1), cap=0.6).shape == (3, 4, 1)

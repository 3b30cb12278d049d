import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vrpo_plugin.errors import ShapeError
from vrpo_plugin.functional.weights import inverse_variance_weights

examples = settings(deadline=None, derandomize=True, max_examples=50)
variances = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6)


def weights_of(variance: list[float] | NDArray) -> NDArray:
    return inverse_variance_weights(torch.tensor(variance, dtype=torch.float64)).numpy()


def least_total_variance(variance: NDArray) -> NDArray:
    """Minimises sum_k w_k^2 sigma_k^2 under sum_k w_k = 1 and w_k >= 0."""
    unit, count = variance / variance.max(), len(variance)
    solution = minimize(
        lambda w: (w * w * unit).sum(),
        np.full(count, 1 / count),
        jac=lambda w: 2 * w * unit,
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(count)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert solution.success, solution.message
    return solution.x


@pytest.mark.parametrize("count", [2, 3, 5])
def test_weights_are_the_minimiser_that_scipy_finds(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(10):
        variance = 10 ** rng.uniform(-2, 0, count)
        weights, expected = weights_of(variance), least_total_variance(variance)
        np.testing.assert_allclose(weights, expected, atol=1e-5)
        assert (weights**2 * variance).sum() <= (expected**2 * variance).sum() * (1 + 1e-9)


@examples
@given(variances)
def test_weights_are_the_formula(variance: list[float]) -> None:
    inverse = [1 / v for v in variance]
    np.testing.assert_allclose(weights_of(variance), [i / sum(inverse) for i in inverse], rtol=1e-12)


@examples
@given(variances, st.floats(1e-3, 1e3), st.randoms(use_true_random=False))
def test_units_and_order_do_not_matter(variance: list[float], factor: float, random) -> None:  # type: ignore[no-untyped-def]
    weights = weights_of(variance)
    scaled = weights_of([factor * v for v in variance])
    np.testing.assert_allclose(scaled, weights, rtol=1e-9)
    order = random.sample(range(len(variance)), len(variance))
    permuted = weights_of([variance[i] for i in order])
    np.testing.assert_allclose(permuted, weights[order], rtol=1e-9)


@examples
@given(
    variances,
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0, np.nan, np.inf])), min_size=1, max_size=3),
)
def test_rewards_without_variance_get_0_and_are_as_if_absent(
    variance: list[float], holes: list[tuple[int, float]]
) -> None:
    torn, said = list(variance), [True] * len(variance)
    for place, value in holes:
        torn.insert(place, value)
        said.insert(place, False)
    weights = weights_of(torn)
    assert (weights[~np.array(said)] == 0).all()
    np.testing.assert_allclose(weights[said], weights_of(variance), rtol=1e-12)


@pytest.mark.parametrize("nothing", [0.0, np.nan, np.inf])
def test_all_get_the_same_where_none_has_any_variance(nothing: float) -> None:
    np.testing.assert_allclose(weights_of([nothing] * 4), [0.25] * 4)


def test_each_group_has_its_own_weights() -> None:
    g = torch.Generator().manual_seed(0)
    variance = torch.rand(3, 4, 5, generator=g, dtype=torch.float64)
    variance[:, 0, 0] = 0
    variance[1, 2, 3] = torch.nan
    weights = inverse_variance_weights(variance)
    for s, i in np.ndindex(4, 5):
        np.testing.assert_allclose(weights[:, s, i], weights_of(variance[:, s, i].numpy()), rtol=1e-12)


@pytest.mark.parametrize("variance", [[1e-42, 3e-42, 1.0], [1e-30, 3e-30, 1e38], [1e38, 3e38, 0.0]])
def test_variances_whose_inverse_float32_does_not_hold(variance: list[float]) -> None:
    weights = inverse_variance_weights(torch.tensor(variance))
    ratio = 0.5 if variance[0] < 1e-38 else 0.75  # below the smallest normal number all are alike
    np.testing.assert_allclose(weights, [ratio, 1 - ratio, 0], atol=1e-6)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3)])
def test_no_reward_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"variance: expected \(K, \.\.\.\), K >= 1"):
        inverse_variance_weights(torch.ones(shape))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    # 1 / 1e-6 is infinite in float16.
    variance = torch.tensor([[1e-6, 2.0], [3e-6, 1.0], [1e-3, 5.0]]).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        weights: Tensor = inverse_variance_weights(variance)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), inverse_variance_weights(variance.double()), atol=1e-6, rtol=1e-5)


def test_no_host_sync() -> None:
    with FakeTensorMode():
        assert inverse_variance_weights(torch.rand(3, 4, 1)).shape == (3, 4, 1)

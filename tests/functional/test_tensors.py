import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vrpo_plugin.errors import ShapeError
from vrpo_plugin.functional.tensors import (
    cosines,
    direction_distances,
    directions,
    grid_like,
    promote,
    resample_tokens,
    square_grid,
)

Grid = tuple[int, int]


def tokens(grid: Grid, *, batch: int = 2, dim: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn((batch, grid[0] * grid[1], dim), generator=g, dtype=torch.float64).to(dtype)


def triangle(size: int, target: int) -> NDArray:
    """(target, size) weights of bilinear resampling: a tent as wide as the larger of the two pixels."""
    width = max(size / target, 1)
    weights = np.zeros((target, size))
    for i in range(target):
        centre = (i + 0.5) * size / target
        for j in range(size):
            weights[i, j] = max(0, 1 - abs(j + 0.5 - centre) / width)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
def test_promote_to_float32(dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1, 1]).to(dtype)
    assert promote(x).dtype == torch.float32
    assert promote(x).tolist() == [0, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_promote_leaves_full_precision(dtype: torch.dtype) -> None:
    x = torch.rand(3, dtype=dtype)
    assert promote(x) is x


@given(st.integers(1, 500))
def test_square_grid_of_a_square(side: int) -> None:
    assert square_grid(side * side) == (side, side)


@given(st.integers(1, 10_000).filter(lambda n: round(n**0.5) ** 2 != n) | st.integers(-9, 0))
def test_square_grid_of_another_number_is_an_error(tokens: int) -> None:
    with pytest.raises(ShapeError, match=f"got {tokens}. Drop cls"):
        square_grid(tokens)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(*[st.tuples(st.integers(1, 9), st.integers(1, 9))] * 2)
def test_resampling_is_the_loop_with_tents(grid: Grid, target: Grid) -> None:
    z = tokens(grid)
    maps = z.numpy().reshape(2, *grid, 3)
    expected = np.einsum("ih,jw,bhwd->bijd", triangle(grid[0], target[0]), triangle(grid[1], target[1]), maps)
    np.testing.assert_allclose(resample_tokens(z, grid, target), expected.reshape(2, -1, 3), atol=1e-12)


def test_same_grid_returns_the_tokens_themselves() -> None:
    z = tokens((2, 3))
    assert resample_tokens(z, (2, 3), (2, 3)) is z
    assert resample_tokens(z, (2, 3), (3, 2)) is not z


def test_resampling_gradcheck() -> None:
    for target in ((2, 2), (4, 5)):
        z = tokens((3, 4), dim=2).requires_grad_()
        assert torch.autograd.gradcheck(lambda z, target=target: resample_tokens(z, (3, 4), target), (z,))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_resampling_of_low_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    z = tokens((8, 8), dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        resampled = resample_tokens(z, (8, 8), (3, 3))
    assert resampled.dtype == torch.float32
    torch.testing.assert_close(resampled.double(), resample_tokens(z.double(), (8, 8), (3, 3)), atol=1e-6, rtol=1e-5)


def test_wrong_number_of_tokens_is_an_error() -> None:
    with pytest.raises(ShapeError, match=r"tokens: expected 2 x 2, got 6\."):
        resample_tokens(tokens((2, 3)), (2, 2), (2, 2))
    with pytest.raises(ShapeError, match=r"tokens: expected no empty grid"):
        resample_tokens(torch.zeros(2, 0, 3), (0, 0), (2, 2))


def test_no_host_sync() -> None:
    with FakeTensorMode():
        assert resample_tokens(promote(torch.randn(2, 4, 3).half()), (2, 2), (3, 3)).shape == (2, 9, 3)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_grid_like_has_the_aspect(times: int, height: int, width: int, scale: int) -> None:
    common = math.gcd(height, width)
    h, w = times * height // common, times * width // common
    assert grid_like(h * w, (height * scale, width * scale)) == (h, w)


@pytest.mark.parametrize(("tokens", "sides"), [(256, (16, 32)), (255, (16, 64)), (7, (2, 4)), (0, (2, 4)), (255, None)])
def test_tokens_of_another_aspect_are_an_error(tokens: int, sides: tuple[int, int] | None) -> None:
    with pytest.raises(ShapeError, match=f"got {tokens}. Drop cls"):
        grid_like(tokens, sides)


def test_cosines_and_distances_are_those_of_directions() -> None:
    x, y = (torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    x[0, 0], y[1, 1], x[1, 4], y[1, 4] = 0, 0, 0, 0
    x[2, 2] *= 1e-5
    y[2, 3] *= 1e-5
    weights = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def by_directions(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        one, other = directions(a, -1, eps=1e-6), directions(b, -1, eps=1e-6)
        return (one * other).sum(-1), (one - other).square().sum(-1)

    for index, function in enumerate((cosines, direction_distances)):
        found = []
        for of in (lambda a, b, f=function: f(a, b, -1, eps=1e-6), lambda a, b, i=index: by_directions(a, b)[i]):
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            value = of(a, b)
            (value * weights).sum().backward()
            found.append((value.detach(), a.grad, b.grad))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("function", [cosines, direction_distances])
def test_half_precision_is_kept_as_it_is_for_the_backward_pass(function: Callable[..., Tensor]) -> None:
    x, y = torch.randn(2, 40, 64).bfloat16().requires_grad_(), torch.randn(2, 40, 64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value = function(x, y, -1)
    large = {t.data_ptr() for t in kept if t.numel() == x.numel()}
    assert large == {x.data_ptr(), y.data_ptr()} and value.dtype == torch.float32
    value.sum().backward()
    exact = x.detach().double().requires_grad_()
    function(exact, y.double(), -1).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and F.cosine_similarity(x.grad.double(), exact.grad, dim=-1).min() > 0.999

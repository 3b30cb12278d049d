import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vrpo_plugin.errors import ShapeError
from vrpo_plugin.functional.alignment import cosine_alignment, spatial_normalize


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def projection_loss(z_tilde: NDArray, z: NDArray) -> tuple[float, NDArray]:
    """REPA's loss, one token at a time, and its gradient by hand."""
    loss, gradient = 0.0, np.zeros_like(z_tilde)
    batch, length = z.shape[:2]
    for i in range(batch):
        for n in range(length):
            a, b = z_tilde[i, n], z[i, n]
            a_norm, b_norm = np.sqrt((a * a).sum()), np.sqrt((b * b).sum())
            cosine = (a * b).sum() / (a_norm * b_norm)
            loss -= cosine / (batch * length)
            gradient[i, n] = -(b / b_norm - cosine * a / a_norm) / a_norm / (batch * length)
    return loss, gradient


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 16, 32)])
def test_cosine_is_minus_repas_loss_in_value_and_gradient(shape: tuple[int, ...]) -> None:
    z_tilde, z = tokens(*shape, seed=1).requires_grad_(), tokens(*shape, seed=2)
    loss, gradient = projection_loss(z_tilde.detach().numpy(), z.numpy())
    rewards = cosine_alignment(z_tilde, z)
    (computed,) = torch.autograd.grad(-rewards.mean(), z_tilde)
    assert rewards.shape == shape[:1]
    assert -rewards.mean().item() == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(computed, gradient, rtol=1e-10, atol=1e-15)


def test_cosine_of_each_sample_is_its_own() -> None:
    z_tilde, z = tokens(4, 3, 5, seed=1), tokens(4, 3, 5, seed=2)
    alone = torch.cat([cosine_alignment(z_tilde[i : i + 1], z[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(cosine_alignment(z_tilde, z), alone)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_cosine_ignores_lengths_and_stays_in_its_range(seed: int, a: float, b: float) -> None:
    z_tilde, z = tokens(2, 3, 4, seed=seed), tokens(2, 3, 4, seed=seed + 1)
    rewards = cosine_alignment(z_tilde, z)
    torch.testing.assert_close(cosine_alignment(a * z_tilde, b * z), rewards)
    assert rewards.abs().max() < 1
    torch.testing.assert_close(cosine_alignment(a * z, z), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(cosine_alignment(-b * z, z), -torch.ones(2, dtype=torch.float64))


def test_zero_tokens_count_0_with_a_finite_gradient() -> None:
    z_tilde = torch.zeros(2, 3, 4, requires_grad=True)
    rewards = cosine_alignment(z_tilde, torch.zeros(2, 3, 4))
    rewards.sum().backward()
    assert rewards.tolist() == [0, 0]
    assert z_tilde.grad is not None and z_tilde.grad.isfinite().all()


def test_cosine_gradcheck() -> None:
    pair = tuple(tokens(2, 3, 4, seed=i).requires_grad_() for i in (1, 2))
    assert torch.autograd.gradcheck(cosine_alignment, pair)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    # A squared length of 512 * 20^2 would overflow float16.
    z_tilde, z = 20 * tokens(2, 16, 512, seed=1, dtype=dtype), tokens(2, 16, 512, seed=2, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        cosine, normal = cosine_alignment(z_tilde, z), spatial_normalize(z)
    assert cosine.dtype == normal.dtype == torch.float32
    torch.testing.assert_close(cosine.double(), cosine_alignment(z_tilde.double(), z.double()), atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(normal.double(), spatial_normalize(z.double()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "shapes", [((2, 4, 3), (2, 9, 3)), ((2, 4, 3), (2, 4, 5)), ((2, 4, 3), (1, 4, 3)), ((4, 3), (4, 3))]
)
def test_cosine_of_other_shapes_is_an_error(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ShapeError, match=r"z: expected \(B, N, D\).*Resample"):
        cosine_alignment(torch.ones(shapes[0]), torch.ones(shapes[1]))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_spatial_normalize_is_the_loop_over_features(alpha: float) -> None:
    z = tokens(3, 6, 4).numpy()
    expected = np.zeros_like(z)
    for i in range(3):
        for d in range(4):
            column = z[i, :, d]
            expected[i, :, d] = (column - alpha * column.mean()) / (column.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(spatial_normalize(torch.from_numpy(z), alpha=alpha), expected, rtol=1e-12)


def test_spatial_normalize_takes_away_06_of_the_mean_by_default() -> None:
    z = tokens(2, 5, 3)
    assert spatial_normalize(z).equal(spatial_normalize(z, alpha=0.6, eps=1e-6))
    assert not torch.allclose(spatial_normalize(z), spatial_normalize(z, alpha=0.5))


def test_spatial_normalize_with_alpha_1_forgets_what_all_tokens_share() -> None:
    z, shared = tokens(2, 5, 3), tokens(2, 1, 3, seed=1)
    torch.testing.assert_close(spatial_normalize(z + shared, alpha=1), spatial_normalize(z, alpha=1))
    torch.testing.assert_close(spatial_normalize(z, alpha=1).mean(1), torch.zeros(2, 3, dtype=torch.float64))


def test_spatial_normalize_of_equal_tokens_is_finite() -> None:
    assert spatial_normalize(torch.full((1, 4, 2), 3.0), alpha=1).abs().max() == 0


def test_spatial_normalize_gradcheck() -> None:
    assert torch.autograd.gradcheck(spatial_normalize, (tokens(2, 4, 3).requires_grad_(),))


@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 3), (2, 3, 4, 4)])
def test_spatial_normalize_needs_two_tokens(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match='target_norm="none"'):
        spatial_normalize(torch.ones(shape))


def test_no_host_sync() -> None:
    with FakeTensorMode():
        z = torch.randn(2, 4, 3)
        assert cosine_alignment(spatial_normalize(z), z).shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [0.0, 1e-38, 1e-20, 1e-12, 1e-7, 1e-5, 1e-3])
def test_a_short_token_leaves_the_others_their_gradient(length: float, dtype: torch.dtype) -> None:
    z_tilde, z = tokens(4, 16, 32, seed=1).float(), tokens(4, 16, 32, seed=2).float()
    z_tilde[0, 5] *= length / z_tilde[0, 5].norm()
    z_tilde = z_tilde.to(dtype).requires_grad_()
    rewards = cosine_alignment(z_tilde, z)
    rewards.mean().backward()
    grad = z_tilde.grad.float()
    assert grad.isfinite().all() and grad[1:].norm() > 0.5 * grad.norm()
    if length == 0:
        assert grad[0, 5].eq(0).all()
        torch.testing.assert_close(rewards[0], cosine_alignment(z_tilde, z)[0])


def test_a_token_of_no_length_has_cosine_0_and_gradient_0() -> None:
    z_tilde, z = tokens(1, 2, 3, seed=1), tokens(1, 2, 3, seed=2)
    with_zero = torch.cat([z_tilde, torch.zeros(1, 1, 3, dtype=z.dtype)], 1).requires_grad_()
    rewards = cosine_alignment(with_zero, tokens(1, 3, 3, seed=2))
    rewards.sum().backward()
    torch.testing.assert_close(rewards * 3, cosine_alignment(z_tilde, tokens(1, 3, 3, seed=2)[:, :2]) * 2)
    assert with_zero.grad is not None and with_zero.grad[0, 2].eq(0).all() and with_zero.grad[0, :2].ne(0).all()


def test_a_short_target_moves_nothing_far() -> None:
    z = tokens(2, 8, 16, seed=1)
    z[0, 3] *= 1e-15
    z_tilde = tokens(2, 8, 16, seed=2).requires_grad_()
    cosine_alignment(z_tilde, z).mean().backward()
    assert z_tilde.grad is not None and z_tilde.grad.abs().max() < 1

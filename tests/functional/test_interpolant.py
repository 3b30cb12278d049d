import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vrpo_plugin.errors import ConfigError, ShapeError
from vrpo_plugin.functional.interpolant import (
    PATH_TYPES,
    PathType,
    clean_estimate,
    estimate_from_velocity,
    noisy_sample,
    path_coefficients,
)

TIMES = torch.tensor([0.0, 0.1, 0.5, 0.75, 0.999, 1.0], dtype=torch.float64)

both_paths = pytest.mark.parametrize("path_type", PATH_TYPES)


def pair(seed: int = 0, batch: int = len(TIMES)) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn((2, batch, 3, 4, 5), generator=g, dtype=torch.float64)
    return x0, noise


def mixing(t: float, path_type: str) -> tuple[float, float]:
    return (1 - t, t) if path_type == "linear" else (math.cos(math.pi * t / 2), math.sin(math.pi * t / 2))


def test_both_paths_are_known() -> None:
    assert PATH_TYPES == ("linear", "cosine")


@both_paths
def test_coefficients_are_the_formulas(path_type: PathType) -> None:
    alpha, sigma, _, _ = path_coefficients(TIMES, path_type)
    expected = np.array([mixing(t, path_type) for t in TIMES.tolist()])
    np.testing.assert_allclose(alpha, expected[:, 0], atol=1e-15)
    np.testing.assert_allclose(sigma, expected[:, 1], atol=1e-15)


@both_paths
def test_dotted_coefficients_are_the_derivatives(path_type: PathType) -> None:
    t = TIMES.clone().requires_grad_()
    alpha, sigma, alpha_dot, sigma_dot = path_coefficients(t, path_type)
    for value, dot in ((alpha, alpha_dot), (sigma, sigma_dot)):
        (derivative,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(dot.detach(), derivative)


@both_paths
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)])
def test_coefficients_have_the_shape_of_t(path_type: PathType, shape: tuple[int, ...]) -> None:
    for coefficient in path_coefficients(torch.full(shape, 0.3), path_type):
        assert coefficient.shape == shape


@both_paths
def test_noisy_sample_is_the_loop_over_samples(path_type: PathType) -> None:
    x0, noise = pair()
    x_t, _ = noisy_sample(x0, noise, TIMES, path_type)
    for i, t in enumerate(TIMES.tolist()):
        alpha, sigma = mixing(t, path_type)
        np.testing.assert_allclose(x_t[i], alpha * x0[i].numpy() + sigma * noise[i].numpy(), atol=1e-14)


@both_paths
def test_time_0_is_data_and_1_is_noise(path_type: PathType) -> None:
    x0, noise = pair(batch=2)
    x_t, _ = noisy_sample(x0, noise, torch.tensor([0.0, 1.0], dtype=torch.float64), path_type)
    torch.testing.assert_close(x_t[0], x0[0])
    torch.testing.assert_close(x_t[1], noise[1])


@both_paths
def test_velocity_is_the_slope_of_the_path(path_type: PathType) -> None:
    x0, noise = pair()
    h = 1e-5
    _, velocity = noisy_sample(x0, noise, TIMES, path_type)
    after, before = (noisy_sample(x0, noise, TIMES + step, path_type)[0] for step in (h, -h))
    torch.testing.assert_close(velocity, (after - before) / (2 * h), atol=1e-8, rtol=0)


def test_linear_velocity_points_from_data_to_noise() -> None:
    x0, noise = pair()
    torch.testing.assert_close(noisy_sample(x0, noise, TIMES)[1], noise - x0)


@both_paths
def test_clean_estimate_inverts_noisy_sample_at_every_time(path_type: PathType) -> None:
    x0, noise = pair()
    x_t, velocity = noisy_sample(x0, noise, TIMES, path_type)
    torch.testing.assert_close(clean_estimate(x_t, velocity, TIMES, path_type), x0)


def test_linear_clean_estimate_of_any_velocity() -> None:
    x_t, velocity = pair(seed=1)
    expected = np.stack([x_t[i].numpy() - t * velocity[i].numpy() for i, t in enumerate(TIMES.tolist())])
    np.testing.assert_allclose(clean_estimate(x_t, velocity, TIMES), expected, atol=1e-14)


@both_paths
def test_clean_estimate_gradcheck(path_type: PathType) -> None:
    x_t, velocity = (x[:, :1, :2, :2].clone().requires_grad_() for x in pair(batch=3))
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, v: clean_estimate(x, v, t, path_type), (x_t, velocity))


def test_unknown_path_is_a_config_error() -> None:
    x0, noise = pair()
    with pytest.raises(ConfigError, match=r"path_type: expected one of .*linear.*cosine.* got 'vp'"):
        path_coefficients(TIMES, "vp")  # type: ignore[arg-type]
    for function in (noisy_sample, clean_estimate):
        with pytest.raises(ConfigError, match="path_type"):
            function(x0, noise, TIMES, "vp")  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [noisy_sample, clean_estimate])
def test_nothing_is_broadcast(function) -> None:  # type: ignore[no-untyped-def]
    x0, noise = pair()
    with pytest.raises(ShapeError, match=r"expected .* Pass tensors of one batch"):
        function(x0, noise[:, :1], TIMES)


@both_paths
def test_no_host_sync(path_type: PathType) -> None:
    with FakeTensorMode():
        x0, t = torch.randn(4, 3, 2, 2), torch.rand(4)
        x_t, velocity = noisy_sample(x0, torch.randn_like(x0), t, path_type)
        assert clean_estimate(x_t, velocity, t, path_type).shape == x0.shape


def vp_coefficients(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """SiT's VP path (betas from 0.1 to 20), in its time: 0 is noise."""
    log_alpha = -0.25 * (1 - t) ** 2 * (20 - 0.1) - 0.5 * (1 - t) * 0.1
    slope = 0.5 * (1 - t) * (20 - 0.1) + 0.5 * 0.1
    alpha = log_alpha.exp()
    sigma = (1 - alpha**2).sqrt()
    return alpha, sigma, alpha * slope, -(alpha**2) * slope / sigma


def test_the_gradient_of_an_estimate_on_the_vp_path_is_bounded() -> None:
    t = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)[:, None]
    alpha, sigma, alpha_dot, sigma_dot = vp_coefficients(t)
    x0, noise = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    velocity = (alpha_dot * x0 + sigma_dot * noise).requires_grad_()
    estimate = estimate_from_velocity(alpha * x0 + sigma * noise, velocity, alpha, sigma, alpha_dot, sigma_dot)
    torch.testing.assert_close(estimate.detach(), x0, rtol=1e-8, atol=1e-8)
    (gradient,) = torch.autograd.grad(estimate.sum(), velocity)
    slope = -sigma / (alpha * sigma_dot - alpha_dot * sigma)
    torch.testing.assert_close(gradient, slope.clamp(-1, 1).expand(5, 3))
    assert slope.abs().max() > 10 and slope.abs().min() < 1

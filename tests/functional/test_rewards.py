from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vrpo_plugin.errors import ShapeError
from vrpo_plugin.functional.interpolant import clean_estimate, noisy_sample
from vrpo_plugin.functional.rewards import (
    RewardState,
    feature_distance,
    fidelity_reward,
    retrieval_reward,
    semantic_reward,
)

MAPS = ((3, 4, 2, 3), (3, 2, 1, 1), (3, 5, 4, 4))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def maps(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [random(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(MAPS)]


def distance_loop(features: list[NDArray], reference: list[NDArray], eps: float = 1e-6) -> NDArray:
    total = np.zeros(len(features[0]))
    for f, g in zip(features, reference, strict=True):
        for b, _, h, w in np.ndindex(len(f), 1, *f.shape[2:]):
            u = f[b, :, h, w] / max(np.linalg.norm(f[b, :, h, w]), eps)
            v = g[b, :, h, w] / max(np.linalg.norm(g[b, :, h, w]), eps)
            total[b] += ((u - v) ** 2).sum() / (f.shape[2] * f.shape[3]) / len(features)
    return total


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (3, 5), (2, 1)])
def test_fidelity_is_the_loop_over_samples(shape: tuple[int, ...]) -> None:
    x0_hat, x0 = random(*shape, seed=1), random(*shape, seed=2)
    expected = [-((a - b) ** 2).mean() for a, b in zip(x0_hat.numpy(), x0.numpy(), strict=True)]
    np.testing.assert_allclose(fidelity_reward(x0_hat, x0), expected, rtol=1e-12)
    assert fidelity_reward(x0, x0).eq(0).all()


def test_fidelity_is_minus_the_denoising_loss_times_t_squared() -> None:
    x0, noise, predicted = random(3, 5, 2, 4, 4)
    t = torch.tensor([0.01, 0.3, 0.6, 0.9, 1.0], dtype=torch.float64)
    x_t, velocity = noisy_sample(x0, noise, t)
    denoising = (predicted - velocity).square().mean((1, 2, 3))
    torch.testing.assert_close(fidelity_reward(clean_estimate(x_t, predicted, t), x0), -t.square() * denoising)


def test_semantic_is_the_mean_cosine_over_encoders_and_tokens() -> None:
    shapes = ((2, 3, 4), (2, 5, 6))
    tokens = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    z = [random(*shape, seed=10 + i) for i, shape in enumerate(shapes)]
    expected = np.zeros(2)
    for c, target in zip(tokens, z, strict=True):
        for b, n in np.ndindex(*c.shape[:2]):
            cosine = c[b, n] @ target[b, n] / (c[b, n].norm() * target[b, n].norm())
            expected[b] += cosine.item() / c.shape[1] / len(shapes)
    np.testing.assert_allclose(semantic_reward(tokens, z), expected, rtol=1e-12)


def test_semantic_of_other_shapes_is_an_error() -> None:
    with pytest.raises(ShapeError, match=r"z: expected \(B, N, D\)"):
        semantic_reward([torch.ones(2, 3, 4), torch.ones(2, 3, 4)], [torch.ones(2, 3, 4), torch.ones(2, 4, 4)])
    with pytest.raises(ValueError):
        semantic_reward([torch.ones(2, 3, 4)], [torch.ones(2, 3, 4)] * 2)


def test_feature_distance_is_the_loop_over_maps_and_positions() -> None:
    features, reference = maps(1), maps(11)
    features[0][0, :, 1, 2] = 0
    reference[2][1, :, 3, 3] *= 1e-7
    expected = distance_loop([f.numpy() for f in features], [g.numpy() for g in reference])
    np.testing.assert_allclose(feature_distance(features, reference), expected, rtol=1e-12)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(0, 10_000))
def test_feature_distance_ignores_the_length_at_each_position(seed: int) -> None:
    features, reference = maps(seed), maps(seed + 100)
    scaled = [f * random(len(f), 1, *f.shape[2:], seed=seed).exp() for f in features]
    distance = feature_distance(features, reference)
    torch.testing.assert_close(feature_distance(scaled, reference), distance)
    torch.testing.assert_close(feature_distance(reference, features), distance)
    assert ((distance > 0) & (distance < 4)).all()
    torch.testing.assert_close(feature_distance(features, [-f for f in features]), torch.full_like(distance, 4))
    assert feature_distance(features, features).eq(0).all()


def test_all_zero_features_give_distance_0_and_no_nan() -> None:
    f = torch.zeros(2, 3, 2, 2, requires_grad=True)
    distance = feature_distance([f], [torch.zeros(2, 3, 2, 2)])
    distance.sum().backward()
    assert distance.tolist() == [0, 0]
    assert f.grad is not None and f.grad.isfinite().all()


def test_feature_distance_of_lists_of_two_lengths_is_an_error() -> None:
    with pytest.raises(ValueError):
        feature_distance(maps(0), maps(1)[:2])


def test_nothing_is_broadcast() -> None:
    with pytest.raises(ShapeError, match=r"x0_hat: expected \(2, 3\), got \(1, 3\)"):
        fidelity_reward(torch.ones(1, 3), torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"features: expected"):
        feature_distance([f[:1] for f in maps(0)], maps(1))


def test_gradcheck() -> None:
    x, y = random(2, 3, 2, 2, seed=1).requires_grad_(), random(2, 3, 2, 2, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(fidelity_reward, (x, y))
    assert torch.autograd.gradcheck(lambda a, b: feature_distance([a, a[..., :1]], [b, b[..., :1]]), (x, y))
    tokens, z = x.detach().flatten(2).requires_grad_(), y.detach().flatten(2)
    assert torch.autograd.gradcheck(lambda a: semantic_reward([a, a[:, :1]], [z, z[:, 1:2]]), (tokens,))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    # 300 squared is infinite in float16.
    x, y = 300 * random(2, 4, 8, 8, seed=1, dtype=dtype), 300 * random(2, 4, 8, 8, seed=2, dtype=dtype)
    calls = (
        lambda a, b: fidelity_reward(a, b),
        lambda a, b: feature_distance([a], [b]),
        lambda a, b: semantic_reward([a.flatten(2)], [b.flatten(2)]),
    )
    for call in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = call(x, y)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), call(x.double(), y.double()), atol=1e-6, rtol=1e-5)


def test_reward_state_is_frozen_and_optional_where_hosts_pass_nothing() -> None:
    x = torch.zeros(1)
    state = RewardState(x0_hat=x, x0=x, x_t=x, t=x, z=(x,))
    assert state.y is None and state.step is None
    with pytest.raises(FrozenInstanceError):
        state.t = x  # type: ignore[misc]


def test_no_host_sync() -> None:
    with FakeTensorMode():
        x, z = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 5)
        for rewards in (fidelity_reward(x, x), semantic_reward([z], [z]), feature_distance([x], [x])):
            assert rewards.shape == (2,)


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-9, 1e-6, 1e-4])
def test_a_short_position_or_token_leaves_the_others_their_gradient(length: float) -> None:
    f, g = maps(1)[0], maps(11)[0]
    f[0, :, 1, 2] *= length
    g[1, :, 0, 0] = 0
    f.requires_grad_()
    feature_distance([f], [g]).sum().backward()
    assert f.grad is not None
    assert f.grad[:, :, 1, 2].norm() < 0.5 * f.grad.norm() and f.grad.isfinite().all()
    tokens, z = random(2, 9, 4, seed=1), random(2, 9, 4, seed=2)
    tokens[1, 4] *= length
    tokens.requires_grad_()
    semantic_reward([tokens, tokens], [z, z]).sum().backward()
    assert tokens.grad is not None and tokens.grad[0].norm() > 0.1 * tokens.grad.norm()


@pytest.mark.parametrize("queries", [1, 3, 8, 99])
def test_retrieval_is_the_loop_over_tokens(queries: int) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, 8, 6, generator=g)
    tokens = z + 0.8 * torch.randn(5, 8, 6, generator=g)
    picked = [i * 8 // min(queries, 8) for i in range(min(queries, 8))]
    for image in range(5):
        right = 0
        for query in picked:
            cosines = torch.cosine_similarity(tokens[image, query], z.flatten(0, 1), dim=-1)
            right += int(cosines.argmax()) // 8 == image
        assert retrieval_reward(tokens, z, queries=queries)[image].item() == pytest.approx(right / len(picked))


def test_retrieval_of_the_tokens_themselves_is_certain() -> None:
    z = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(retrieval_reward(3 * z, z), torch.ones(4))
    assert not retrieval_reward(z.roll(1, 0), z).any()
    with pytest.raises(ShapeError):
        retrieval_reward(z[:3], z)

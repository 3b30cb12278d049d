import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributions import Independent, Normal

from vrpo_plugin.errors import ConfigError, ShapeError
from vrpo_plugin.functional.advantages import (
    SCALES,
    Aggregation,
    Scale,
    combine_rewards,
    group_moments,
    group_relative_advantages,
)
from vrpo_plugin.functional.groups import noise_strata
from vrpo_plugin.functional.policy import gaussian_log_prob, pathwise_policy_loss, score_function_loss

every_scale = pytest.mark.parametrize("scale", SCALES)
every_aggregation = pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient


def pathwise_loop(rewards: Tensor, coefficients: Tensor, valid: Tensor) -> float:
    loss = 0.0
    for k in range(len(rewards)):
        scored = [i for i in range(rewards.shape[1]) if valid[k, i] and math.isfinite(rewards[k, i])]
        loss -= sum((coefficients[k, i] * rewards[k, i]).item() for i in scored) / max(len(scored), 1)
    return loss


def clipped_loop(log_probs: Tensor, old: Tensor, advantages: Tensor, epsilon: float) -> float:
    terms = []
    for p, q, a in zip(log_probs, old, advantages, strict=True):
        ratio = torch.exp(p - q)
        terms.append(min((ratio * a).item(), (torch.clamp(ratio, 1 - epsilon, 1 + epsilon) * a).item()))
    return -sum(terms) / len(terms)


def test_pathwise_is_the_loop_with_holes() -> None:
    rewards, coefficients = random(3, 8, seed=1), random(3, 8, seed=2)
    rewards[0, 2], rewards[1, 5], rewards[1, 6] = torch.nan, torch.inf, -torch.inf
    valid = random(3, 8, seed=3) > -0.5
    valid[2] = False
    everything = torch.ones_like(valid)
    assert pathwise_policy_loss(rewards, coefficients).item() == pytest.approx(
        pathwise_loop(rewards, coefficients, everything)
    )
    assert pathwise_policy_loss(rewards, coefficients, valid=valid).item() == pytest.approx(
        pathwise_loop(rewards, coefficients, valid)
    )


def test_pathwise_gradient_is_the_weighted_gradient_of_the_rewards() -> None:
    x, coefficients = random(6, 3).requires_grad_(), random(2, 6, seed=1).requires_grad_()
    loss = pathwise_policy_loss(torch.stack([-x.square().sum(1), x.sin().sum(1)]), coefficients)
    gradient, of_coefficients = torch.autograd.grad(loss, (x, coefficients), allow_unused=True)
    c, a = coefficients.detach().numpy(), x.detach().numpy()
    np.testing.assert_allclose(gradient, -(c[0, :, None] * -2 * a + c[1, :, None] * np.cos(a)) / 6, rtol=1e-12)
    assert of_coefficients is None


def test_pathwise_gradient_of_what_is_left_out_is_0() -> None:
    rewards = random(2, 5).index_fill(1, torch.tensor([3]), torch.nan).requires_grad_()
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[0, 0] = False
    coefficients = random(2, 5, seed=1)
    coefficients[0, 0] = torch.nan
    gradient = gradient_of(pathwise_policy_loss(rewards, coefficients, valid=valid), rewards)
    expected = -coefficients / torch.tensor([[3.0], [4.0]])
    expected[0, 0] = 0
    expected[:, 3] = 0
    torch.testing.assert_close(gradient, expected)


def test_pathwise_of_no_rewards_is_0() -> None:
    assert pathwise_policy_loss(torch.zeros(0, 4), torch.zeros(0, 4)).item() == 0


@pytest.mark.parametrize("shapes", [((2, 4), (2, 3)), ((2, 4), (4,)), ((4,), (4,))])
def test_pathwise_of_other_shapes_is_an_error(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ShapeError, match=r"coefficients: expected \(K, B\).*one coefficient per reward"):
        pathwise_policy_loss(torch.ones(shapes[0]), torch.ones(shapes[1]))


@pytest.mark.parametrize("shape", [(4,), (4, 3), (2, 3, 4, 5)])
@pytest.mark.parametrize("std", [0.1, 2.5])
def test_log_prob_is_torchs(shape: tuple[int, ...], std: float) -> None:
    action, mean = random(*shape, seed=1), random(*shape, seed=2)
    expected = Independent(Normal(mean, std), len(shape) - 1).log_prob(action)
    torch.testing.assert_close(gaussian_log_prob(action, mean, std), expected)
    torch.testing.assert_close(gaussian_log_prob(action, mean, torch.tensor(std, dtype=torch.float64)), expected)


@pytest.mark.parametrize("std", [0, -0.1, math.nan])
def test_log_prob_needs_a_deviation_and_one_shape(std: float) -> None:
    with pytest.raises(ConfigError, match=r"std: expected > 0, got"):
        gaussian_log_prob(torch.ones(2, 3), torch.ones(2, 3), std)
    with pytest.raises(ShapeError, match=r"action: expected \(2, 3\), got \(1, 3\)"):
        gaussian_log_prob(torch.ones(1, 3), torch.ones(2, 3), 1.0)


def test_log_prob_with_a_deviation_per_sample() -> None:
    action, mean, std = random(3, 2, 4, seed=1), random(3, 2, 4, seed=2), random(3, 1, 1, seed=3).exp()
    expected = Independent(Normal(mean, std.expand_as(mean)), 2).log_prob(action)
    torch.testing.assert_close(gaussian_log_prob(action, mean, std), expected)


@pytest.mark.parametrize("epsilon", [0.0, 0.2, 0.9])
def test_score_function_is_the_loop_with_clamps(epsilon: float) -> None:
    log_probs, old, advantages = random(3, 200)
    loss = score_function_loss(log_probs, old, advantages, epsilon=epsilon)
    assert loss.item() == pytest.approx(clipped_loop(log_probs, old, advantages, epsilon), rel=1e-12)
    grid = [x.reshape(10, 20) for x in (log_probs, old, advantages)]
    torch.testing.assert_close(score_function_loss(*grid, epsilon=epsilon), loss)


def test_clipped_actions_have_no_gradient() -> None:
    log_probs = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1, -0.1], dtype=torch.float64).requires_grad_()
    advantages = torch.tensor([2.0, -2, 2, -2, 3, -3], dtype=torch.float64)
    gradient = gradient_of(score_function_loss(log_probs, torch.zeros_like(log_probs), advantages), log_probs)
    moves = torch.tensor([0, 1, 1, 0, 1, 1])
    torch.testing.assert_close(gradient, -moves * advantages * log_probs.detach().exp() / 6)


def test_on_policy_ratio_is_1_and_its_gradient_reinforces() -> None:
    log_probs, advantages = random(2, 50)
    log_probs.requires_grad_()
    loss = score_function_loss(log_probs, log_probs.detach(), advantages)
    assert loss.item() == pytest.approx(-advantages.mean().item(), rel=1e-12)
    reinforce = -(advantages * log_probs).mean()
    torch.testing.assert_close(gradient_of(loss, log_probs), gradient_of(reinforce, log_probs))


def test_old_log_probs_and_advantages_are_detached() -> None:
    log_probs, old, advantages = (x.requires_grad_() for x in random(3, 5))
    loss = score_function_loss(log_probs, old, advantages)
    gradients = torch.autograd.grad(loss, (log_probs, old, advantages), allow_unused=True)
    assert [g is None for g in gradients] == [False, True, True]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_actions_left_out_are_as_if_absent(broken: float) -> None:
    log_probs, old, advantages = random(3, 6)
    valid = torch.tensor([True, False, True, True, False, True])
    alone = log_probs[valid].requires_grad_()
    expected = score_function_loss(alone, old[valid], advantages[valid])
    # Each of the two in another tensor: none of them may reach the loss or the gradient.
    advantages[1], log_probs[4] = broken, broken
    log_probs.requires_grad_()
    loss = score_function_loss(log_probs, old, advantages, valid=valid)
    gradient = gradient_of(loss, log_probs)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[valid], gradient_of(expected, alone))
    assert gradient[~valid].tolist() == [0, 0]
    nothing = score_function_loss(log_probs, old, advantages, valid=torch.zeros_like(valid))
    assert nothing.item() == 0


@pytest.mark.parametrize("which", [0, 1, 2])
def test_score_function_of_other_shapes_is_an_error(which: int) -> None:
    tensors = [torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)]
    tensors[which] = torch.ones(3)
    with pytest.raises(ShapeError, match=r"like log_probs.*one advantage"):
        score_function_loss(*tensors)


def test_gradcheck() -> None:
    rewards, coefficients = random(2, 4, seed=1).requires_grad_(), random(2, 4, seed=2)
    assert torch.autograd.gradcheck(lambda r: pathwise_policy_loss(r, coefficients), (rewards,))
    action, mean, std = random(2, 3, seed=3).requires_grad_(), random(2, 3).requires_grad_(), random(2, 1).exp()
    assert torch.autograd.gradcheck(gaussian_log_prob, (action, mean, std.requires_grad_()))
    log_probs, old, advantages = random(3, 12, seed=4)
    assert torch.autograd.gradcheck(
        lambda p: score_function_loss(p, old, advantages, epsilon=0.5), (log_probs.requires_grad_(),)
    )


def test_score_function_is_the_pathwise_gradient_in_expectation() -> None:
    """Both estimate the gradient of E[-|a - c|^2]; they must agree within 4 standard errors of their difference."""
    actions, std, centre = 100_000, 0.3, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    mean = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    noise = random(actions, 3, seed=5)
    reparameterised = mean + std * noise
    rewards = -(reparameterised - centre).square().sum(1)
    pathwise = gradient_of(pathwise_policy_loss(rewards[None], torch.ones(1, actions)), mean)
    advantages = group_relative_advantages(rewards.detach(), scale="none")
    log_probs = gaussian_log_prob(reparameterised.detach(), mean.expand(actions, 3), std)
    score = gradient_of(score_function_loss(log_probs, log_probs.detach(), advantages), mean)
    per_action = -(advantages[:, None] * noise / std) - 2 * (reparameterised.detach() - centre)
    standard_error = per_action.std(0) / actions**0.5
    assert ((score - pathwise).abs() < 4 * standard_error).all()
    # Narrow enough for a wrong factor to show.
    assert (standard_error < 0.03 * pathwise.abs()).all()
    torch.testing.assert_close(pathwise, -2 * centre, atol=0.01, rtol=0)


RewardFunction = Callable[[Tensor], Tensor]


def bowl(x: Tensor) -> Tensor:
    return -(x - 1).square().mean(1)


def wave(x: Tensor) -> Tensor:
    return x.sin().mean(1)


def step(
    functions: list[RewardFunction],
    x: Tensor,
    *,
    scale: Scale,
    aggregation: Aggregation,
    eps: float = 0,
) -> tuple[Tensor, Tensor]:
    """Advantages and gradient of a batch in strata of four, with weights 0.3 and 0.7."""
    x = x.clone().requires_grad_()
    rewards = torch.stack([function(x) for function in functions])
    groups = noise_strata(torch.linspace(1, 0, len(x)), 4)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)[: len(functions), None, None]
    moments = group_moments(groups.split(rewards.detach()), mask=groups.mask)
    advantages, coefficients = combine_rewards(moments, weights, scale=scale, aggregation=aggregation, eps=eps)
    coefficients = groups.join(coefficients.expand(-1, *groups.index.shape))
    return groups.join(advantages), gradient_of(pathwise_policy_loss(rewards, coefficients), x)


@every_scale
@every_aggregation
@pytest.mark.parametrize("eps", [0, 1e-4])
def test_constant_rewards_give_no_gradient(scale: Scale, aggregation: Aggregation, eps: float) -> None:
    constants: list[RewardFunction] = [lambda x: 0 * x.sum(1) + 3, lambda x: (0 * x).sum(1) - 0.1]
    advantages, gradient = step(constants, random(10, 3), scale=scale, aggregation=aggregation, eps=eps)
    assert advantages.eq(0).all()
    assert gradient.eq(0).all()


@every_aggregation
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_groups_whose_rewards_agree_give_no_gradient(scale: Scale, aggregation: Aggregation) -> None:
    x = random(10, 3)
    # The times fall: the last four samples are the first stratum.
    x[6:] = x[6]
    advantages, gradient = step([bowl, wave], x, scale=scale, aggregation=aggregation)
    assert advantages[6:].eq(0).all() and gradient[6:].eq(0).all()
    assert advantages[:6].ne(0).all() and gradient[:6].ne(0).all()


@every_aggregation
def test_without_a_scale_the_gradient_is_that_of_the_weighted_rewards(aggregation: Aggregation) -> None:
    x = random(10, 3)
    _, gradient = step([bowl, wave], x, scale="none", aggregation=aggregation)
    x.requires_grad_()
    torch.testing.assert_close(gradient, gradient_of(-(0.3 * bowl(x) + 0.7 * wave(x)).mean(), x))


@every_scale
@every_aggregation
def test_a_shift_of_one_reward_changes_nothing(scale: Scale, aggregation: Aggregation) -> None:
    x = random(10, 3)
    plain = step([bowl, wave], x, scale=scale, aggregation=aggregation)
    shifted = step([bowl, lambda x: wave(x) + 50], x, scale=scale, aggregation=aggregation)
    torch.testing.assert_close(shifted, plain, atol=1e-10, rtol=1e-10)


def test_tenfold_reward_changes_nothing_when_each_is_normalised_in_its_group() -> None:
    x, tenfold = random(10, 3), lambda x: 10 * bowl(x)
    plain = step([bowl, wave], x, scale="group", aggregation="normalize_then_sum")
    scaled = step([tenfold, wave], x, scale="group", aggregation="normalize_then_sum")
    torch.testing.assert_close(scaled, plain, atol=1e-12, rtol=1e-10)
    together = step([bowl, wave], x, scale="group", aggregation="sum_then_normalize")
    scaled = step([tenfold, wave], x, scale="group", aggregation="sum_then_normalize")
    assert not torch.allclose(scaled[0], together[0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    # Sums of squares and of rewards overflow float16.
    a, b = (300 * random(2, 4, 64)).to(dtype)
    rewards, coefficients = (20_000 * random(2, 3, 8)).to(dtype)
    log_probs, old, advantages = random(3, 40).to(dtype)
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda x, y: gaussian_log_prob(x, y, 2.0), (a, b)),
        (pathwise_policy_loss, (rewards, coefficients)),
        (score_function_loss, (log_probs, old, advantages)),
    ]
    for call, tensors in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = call(*tensors)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), call(*(x.double() for x in tensors)), atol=1e-6, rtol=1e-5)


def test_no_host_sync() -> None:
    with FakeTensorMode():
        rewards, x = torch.randn(2, 4), torch.randn(4, 3)
        log_probs = gaussian_log_prob(x, x, 0.1)
        valid = log_probs > 0
        losses = (
            pathwise_policy_loss(rewards, rewards, valid=valid),
            score_function_loss(log_probs, log_probs, log_probs, valid=valid),
        )
        assert all(loss.shape == () for loss in losses)

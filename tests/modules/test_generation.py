"""vrpo_plugin.modules.generation: rewards, groups, weights and the policy loss, seen through the aligner."""

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes.tiny_sit import Batch, TinySiT, align, gradients, make_batch, tiny_aligner
from torch import Tensor

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.errors import ConfigError, ShapeError
from vrpo_plugin.functional.policy import at_estimate
from vrpo_plugin.functional.rewards import RewardState
from vrpo_plugin.modules.aligner import VRPOAligner, VRPOOutput
from vrpo_plugin.modules.critic import LatentCritic, save_critic
from vrpo_plugin.modules.generation import GenerationReadout

# Sums of a few hundred float32 terms of order one: the order of summation moves the sixth digit.
FLOAT32: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7}


def mean_over_latent(x: Tensor) -> Tensor:
    return x.mean((1, 2, 3))


def linear_reward(seed: int, size: float = 1.0) -> tuple[Tensor, Callable[[RewardState], Tensor]]:
    """A reward <c, x0_hat> and its constant gradient c."""
    c = size * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return c, lambda state: (state.x0_hat * c).sum((1, 2, 3))


def generate(aligner: VRPOAligner, batch: Batch, velocity: Tensor, **kwargs: Any) -> VRPOOutput:
    return aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity, y=batch.y, **kwargs)


def velocity_like(batch: Batch) -> Tensor:
    return torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(9)).requires_grad_()


def reward_aligner(**overrides: Any) -> VRPOAligner:
    return tiny_aligner(**{"built_in": (), "features": "none", **overrides})


# ---- the policy loss against a loop ----


def oracle(
    r: np.ndarray, t: np.ndarray, *, scale: str, shares: list[float] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Advantages (B,), coefficients (K, B) and weights (K, B) by loops over levels, for a first step."""
    count, bins = len(r), np.minimum((t * 10).astype(int), 9)
    groups = [np.flatnonzero(bins == b) for b in range(10)]
    squares = np.array(
        [[((r[k, g] - r[k, g].mean()) ** 2).sum() if len(g) else 0 for g in groups] for k in range(count)]
    )
    freedom = np.array([max(len(g) - 1, 0) for g in groups])
    pooled = squares.sum(1) / freedom.sum()
    variance = (squares + 4 * pooled[:, None]) / (freedom + 4)
    weights, coefficients, advantages = np.zeros((count, len(t))), np.zeros_like(r), np.zeros(len(t))
    for b, g in enumerate(groups):
        inverse = 1 / variance[:, b] if scale == "none" else np.ones(count)
        w = inverse / inverse.sum() if shares is None else np.array(shares)
        for k in range(count):
            weights[k, g] = w[k]
            coefficients[k, g] = w[k] / (1 if scale == "none" else variance[k, b] ** 0.5)
            if len(g):
                advantages[g] += coefficients[k, g] * (r[k, g] - r[k, g].mean())
    return advantages, coefficients, weights


@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("shares", [None, [0.25, 0.75]])
@pytest.mark.parametrize("size", [12, 60])
def test_loss_advantages_and_weights_are_the_loops(scale: str, shares: list[float] | None, size: int) -> None:
    batch = make_batch(size)
    (c, first), (d, second) = linear_reward(1), linear_reward(2, size=0.6)
    aligner = reward_aligner(
        rewards={"first": first, "second": second},
        scale=scale,
        reward_weights="inverse_variance" if shares is None else {"first": shares[0], "second": shares[1]},
    )
    velocity = velocity_like(batch)
    out = generate(aligner, batch, velocity)
    out.generation_loss.backward()

    t = batch.t.numpy()
    x0_hat = (batch.x_t - batch.t[:, None, None, None] * velocity.detach()).numpy()
    r = np.stack([(x0_hat * c.numpy()).sum((1, 2, 3)), (x0_hat * d.numpy()).sum((1, 2, 3))])
    advantages, coefficients, weights = oracle(r, t, scale=scale, shares=shares)
    np.testing.assert_allclose(out.rewards["first"], r[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(torch.stack([*out.weights.values()]), weights, rtol=1e-4)
    np.testing.assert_allclose(out.advantages, advantages, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out.generation_loss.item(), -(coefficients * r).mean(1).sum(), rtol=1e-4, atol=1e-5)
    # x0_hat = x_t - t v, so the loss -mean_i sum_k c_ki <c_k, x0_hat_i> has the gradient + t c_ki c_k / B.
    pull = np.einsum("kb,kchw->bchw", coefficients, np.stack([c.numpy(), d.numpy()]))
    assert velocity.grad is not None
    np.testing.assert_allclose(velocity.grad, t[:, None, None, None] * pull / len(t), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weights", ["inverse_variance", "equal", {"first": 1, "second": 3}])
def test_the_groups_scale_makes_units_irrelevant(weights: Any) -> None:
    outs = []
    for size in (1.0, 100.0):
        aligner = reward_aligner(
            rewards={"first": linear_reward(1)[1], "second": linear_reward(2, size=size)[1]},
            scale="group",
            reward_weights=weights,
        )
        for seed in range(3):  # with a memory, too
            batch = make_batch(16, seed=seed)
            out = generate(aligner, batch, velocity_like(batch))
        outs.append(out)
    torch.testing.assert_close(outs[1].advantages, outs[0].advantages, rtol=1e-4, atol=1e-5)
    share = 0.75 if isinstance(weights, dict) else 0.5
    torch.testing.assert_close(outs[1].weights["second"], torch.full((16,), share))


# ---- the same samples, split in other ways ----


def stream(samples: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x0, noise, z = (torch.randn(samples, *shape, generator=g) for shape in ((4, 8, 8), (4, 8, 8), (16, 12)))
    return Batch(x0=x0, noise=noise, t=torch.rand(samples, generator=g), y=torch.zeros(samples), z=(z,))


@pytest.mark.parametrize("scale", ["none", "group"])
def test_weights_and_gradient_do_not_depend_on_the_local_batch(scale: str) -> None:
    """One stream of samples in batches of 256, 32 and 4; the weights' rewards differ in unit and by noise level."""
    found = {}
    for size in (256, 32, 4):
        aligner = tiny_aligner(built_in=("semantic", "perceptual"), features="none", scale=scale)
        for step in range(8):
            batch = stream(256, step)
            generator = torch.Generator().manual_seed(step)
            velocity = (batch.velocity + torch.randn(256, 4, 8, 8, generator=generator)).requires_grad_()
            weights = []
            for part in torch.arange(256).split(size):
                out = generate(aligner, batch[part], velocity[part])
                (out.generation_loss * len(part) / 256).backward()
                weights.append(out.weights["semantic"])
        assert velocity.grad is not None
        found[size] = (torch.cat(weights).mean(), velocity.grad.flatten())
    weight, gradient = found[256]
    assert 0.05 < weight < 0.95
    for size in (32, 4):
        assert abs(found[size][0] - weight) < 0.05
        assert torch.cosine_similarity(found[size][1], gradient, dim=0) > 0.98
        assert 0.95 < found[size][1].norm() / gradient.norm() < 1.05


def test_a_batch_of_one_learns_by_what_is_remembered() -> None:
    aligner = reward_aligner(rewards={"mine": linear_reward(1)[1]}, scale="group")
    for seed in range(60):
        batch = stream(1, seed)
        velocity = velocity_like(batch)
        out = generate(aligner, batch, velocity)
    out.generation_loss.backward()
    assert out.advantages.abs() > 0 and velocity.grad is not None and velocity.grad.norm() > 0


# ---- the critic learns from clean latents alone ----


def critic_gradients(aligner: VRPOAligner, loss: Tensor) -> list[Tensor | None]:
    assert aligner.critic is not None
    return list(torch.autograd.grad(loss, list(aligner.critic.parameters()), retain_graph=True, allow_unused=True))


def test_the_generation_loss_teaches_the_generator_and_not_the_critic() -> None:
    batch, aligner = make_batch(8), reward_aligner(built_in=("semantic", "perceptual", "fidelity"))
    velocity = velocity_like(batch)
    out = generate(aligner, batch, velocity)
    assert all(grad is None for grad in critic_gradients(aligner, out.generation_loss))
    (grad,) = torch.autograd.grad(out.generation_loss, velocity)
    assert (grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("reward", ["semantic", "perceptual"])
def test_each_reward_of_the_critic_teaches_the_generator(reward: str) -> None:
    batch, aligner = make_batch(8), reward_aligner(built_in=(reward,))
    velocity = velocity_like(batch)
    out = generate(aligner, batch, velocity)
    (grad,) = torch.autograd.grad(out.generation_loss, velocity)
    assert (grad.flatten(1).norm(dim=1) > 0).all()
    assert all(grad is None for grad in critic_gradients(aligner, out.generation_loss))


def test_the_critic_loss_teaches_the_critic_and_not_the_generator() -> None:
    model, batch = TinySiT(), make_batch(8)
    aligner = tiny_aligner().attach(model)
    out = align(model, aligner, batch)
    grads = critic_gradients(aligner, out.critic_loss)
    assert all(grad is not None for grad in grads)
    # Biases that a normalisation takes away again have no gradient.
    assert all(grad.abs().sum() > 0 for grad in grads if grad is not None and grad.ndim > 1)
    aligner_parameters = {id(p) for p in aligner.parameters()}
    backbone = [p for p in model.parameters() if id(p) not in aligner_parameters]
    from_critic = torch.autograd.grad(out.critic_loss, backbone, allow_unused=True, retain_graph=True)
    assert all(grad is None for grad in from_critic)
    from_policy = torch.autograd.grad(out.policy_loss, backbone, allow_unused=True)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in from_policy)


def test_the_critics_gradient_does_not_depend_on_what_is_generated() -> None:
    batch, aligner = make_batch(8), reward_aligner(built_in=("semantic", "perceptual"))
    total = [
        critic_gradients(aligner, generate(aligner, batch, velocity).loss)
        for velocity in (torch.zeros_like(batch.x0, requires_grad=True), velocity_like(batch))
    ]
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*total, strict=True))


def test_the_critic_loss_is_one_minus_its_mean_cosine() -> None:
    batch, aligner = make_batch(8), reward_aligner(built_in=("semantic",))
    assert aligner.critic is not None
    out = generate(aligner, batch, velocity_like(batch))
    cosine = torch.cosine_similarity(aligner.critic(batch.x0).tokens[0], batch.z[0], dim=-1).mean()
    torch.testing.assert_close(out.critic_loss, 1 - cosine, **FLOAT32)
    torch.testing.assert_close(out.loss, out.policy_loss + 0.1 * out.critic_loss, **FLOAT32)
    torch.testing.assert_close(out.metrics["vrpo/critic_cos"], cosine.detach(), **FLOAT32)


def test_the_critic_comes_to_predict_the_tokens() -> None:
    batch, aligner = make_batch(8), reward_aligner(built_in=("semantic",))
    target = torch.nn.functional.avg_pool2d(batch.x0, 2).flatten(2).mT  # tokens that a latent does determine
    batch = replace(batch, z=(target.repeat(1, 1, 3),))
    optimizer = torch.optim.Adam(aligner.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        out = generate(aligner, batch, batch.velocity)
        out.loss.backward()
        optimizer.step()
        losses.append(out.critic_loss.item())
    assert losses[0] > 0.7 and losses[-1] < 0.15


def test_a_frozen_critic_neither_learns_nor_counts(tmp_path: Path) -> None:
    path = tmp_path / "critic.safetensors"
    trained = LatentCritic((4, 8, 8), (12,), (4, 4), width=16)
    save_critic(trained, path)
    batch = make_batch(8)
    aligner = reward_aligner(built_in=("semantic", "perceptual"), critic_trainable=False, critic_checkpoint=str(path))
    assert aligner.critic is not None
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), aligner.critic.parameters(), strict=True))
    velocity = velocity_like(batch)
    out = generate(aligner, batch, velocity)
    assert not [p for p in aligner.parameters() if p.requires_grad]
    assert torch.equal(out.loss, out.policy_loss)
    assert out.critic_loss.item() == 0 and not out.critic_loss.requires_grad
    assert "vrpo/critic_cos" in out.metrics
    out.loss.backward()
    assert velocity.grad is not None and velocity.grad.abs().sum() > 0
    assert all(p.grad is None for p in aligner.parameters())


@pytest.mark.parametrize(
    ("rewards", "trainable", "views"),
    [(("semantic",), False, 1), (("semantic", "perceptual"), False, 2), (("semantic",), True, 2)],
)
def test_the_critic_looks_at_clean_latents_only_where_something_asks_for_it(
    rewards: tuple[str, ...], trainable: bool, views: int, tmp_path: Path
) -> None:
    path = tmp_path / "critic.safetensors"
    save_critic(LatentCritic((4, 8, 8), (12,), (4, 4), width=16), path)
    aligner = reward_aligner(built_in=rewards, critic_trainable=trainable, critic_checkpoint=str(path))
    assert aligner.critic is not None
    seen: list[Tensor] = []
    aligner.critic.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    batch = make_batch(8)
    out = generate(aligner, batch, velocity_like(batch))
    assert len(seen) == views and sum(torch.equal(x, batch.x0) for x in seen) == views - 1
    assert ("vrpo/critic_cos" in out.metrics) == (views == 2)
    assert out.rewards.keys() == {*rewards, "fidelity"}


@pytest.mark.parametrize("frozen", [True, False])
def test_the_critic_builds_a_graph_only_where_it_learns(tmp_path: Path, frozen: bool) -> None:
    path = tmp_path / "critic.safetensors"
    save_critic(LatentCritic((4, 8, 8), (12,), (4, 4), width=16), path)
    aligner, batch = (
        reward_aligner(built_in=("semantic", "perceptual"), critic_trainable=not frozen, critic_checkpoint=path),
        make_batch(8),
    )
    assert aligner.critic is not None
    seen: list[bool] = []
    aligner.critic.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    velocity = velocity_like(batch)
    generate(aligner, batch, velocity)
    assert seen == [not frozen, True]  # the clean latents, then the estimates
    with torch.no_grad():
        generate(aligner, batch, velocity)
    assert seen[2:] == [False, False]


def test_a_loaded_critic_keeps_learning(tmp_path: Path) -> None:
    path = tmp_path / "critic.safetensors"
    save_critic(LatentCritic((4, 8, 8), (12,), (4, 4), width=16), path)
    aligner, batch = reward_aligner(built_in=("semantic",), critic_checkpoint=str(path)), make_batch(8)
    generate(aligner, batch, velocity_like(batch)).loss.backward()
    assert aligner.critic is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in aligner.critic.parameters() if p.ndim > 1)


# ---- rewards of the user ----


def test_a_reward_sees_the_whole_state() -> None:
    seen: list[RewardState] = []

    def reward(state: RewardState) -> Tensor:
        seen.append(state)
        return mean_over_latent(state.x0_hat)

    batch, aligner = make_batch(8), reward_aligner(rewards={"mine": reward})
    velocity = velocity_like(batch)
    out = generate(aligner, batch, velocity, step=7)
    (state,) = seen
    torch.testing.assert_close(state.x0_hat, batch.x_t - batch.t[:, None, None, None] * velocity, **FLOAT32)
    assert torch.equal(state.x0, batch.x0) and torch.equal(state.x_t, batch.x_t) and torch.equal(state.t, batch.t)
    assert torch.equal(state.z[0], batch.z[0]) and state.y is batch.y and state.step == 7
    assert aligner.critic is None
    assert list(out.rewards) == ["mine", "fidelity"] and list(out.weights) == ["mine"]


def test_a_custom_reward_is_added_to_the_built_in_ones() -> None:
    batch = make_batch(8)
    aligner = reward_aligner(built_in=("semantic",), rewards={"mine": lambda s: mean_over_latent(s.x0_hat)})
    out = generate(aligner, batch, velocity_like(batch))
    assert list(out.weights) == ["semantic", "mine"]
    torch.testing.assert_close(sum(out.weights.values()), torch.ones(8))


@pytest.mark.parametrize("rewards", ["rewards", "black_box_rewards"])
@pytest.mark.parametrize("name", ["semantic", "perceptual", "fidelity"])
def test_a_built_in_name_is_taken(rewards: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"rewards: expected distinct names, got \['{name}'\]\. Rename"):
        reward_aligner(**{rewards: {name: lambda s: mean_over_latent(s.x0_hat)}})


def test_a_name_is_used_once() -> None:
    mine = {"mine": lambda s: mean_over_latent(s.x0_hat)}
    with pytest.raises(ConfigError, match=r"got \['mine'\]"):
        reward_aligner(rewards=mine, black_box_rewards=mine)


@pytest.mark.parametrize(
    "reward",
    [
        lambda s: s.x0_hat.mean(),
        lambda s: s.x0_hat.flatten(1),
        lambda s: mean_over_latent(s.x0_hat)[:-1],
        lambda s: (mean_over_latent(s.x0_hat), torch.ones(3, dtype=torch.bool)),
        lambda s: (mean_over_latent(s.x0_hat), torch.ones(8)),
        lambda s: (mean_over_latent(s.x0_hat), [True] * 8),
        lambda s: (mean_over_latent(s.x0_hat), None, None),
        lambda s: mean_over_latent(s.x0_hat).to(torch.complex64),
        lambda s: [1.0] * 8,
        lambda s: None,
    ],
)
@pytest.mark.parametrize("kind", ["rewards", "black_box_rewards"])
def test_a_reward_of_another_shape_is_an_error(kind: str, reward: Callable[[RewardState], Tensor]) -> None:
    batch = make_batch(8)
    with pytest.raises(ShapeError, match=r"reward 'mine': expected values \(B=8,\).*, got .*\. Return one"):
        generate(reward_aligner(**{kind: {"mine": reward}}), batch, velocity_like(batch), generator=torch.Generator())


def test_a_reward_whose_gradient_is_cut_is_an_error() -> None:
    batch = make_batch(8)
    aligner = reward_aligner(rewards={"mine": lambda s: mean_over_latent(s.x0_hat.detach())})
    with pytest.raises(ConfigError, match=r"reward 'mine': expected a value with a gradient .* black_box_rewards="):
        generate(aligner, batch, velocity_like(batch))
    with torch.no_grad():  # where nothing has a gradient, nothing is cut
        generate(aligner, batch, velocity_like(batch))


def test_shares_name_exactly_the_rewards() -> None:
    for shares in ({"semantic": 1}, {"mine": 1}, {"semantic": 1, "mine": 1, "other": 1}):
        with pytest.raises(ConfigError, match=r"reward_weights: expected one share for each of .* Name every reward"):
            reward_aligner(
                built_in=("semantic",), rewards={"mine": lambda s: mean_over_latent(s.x0_hat)}, reward_weights=shares
            )


@pytest.mark.parametrize("bad", ["nan", "inf", "masked"])
def test_a_reward_that_fails_for_one_sample_leaves_it_out(bad: str) -> None:
    batch, odd = make_batch(8), 3
    rest = torch.tensor([i for i in range(8) if i != odd])
    velocity = velocity_like(batch)
    is_odd = torch.arange(8) == odd

    def reward(state: RewardState) -> Tensor | tuple[Tensor, Tensor]:
        value = mean_over_latent(state.x0_hat.sin())
        if len(value) < 8:
            return value
        if bad == "masked":
            return value, ~is_odd
        return value * torch.where(is_odd, torch.nan if bad == "nan" else torch.inf, 1.0)

    def gradient(batch: Batch, velocity: Tensor) -> tuple[Tensor, VRPOOutput]:
        out = generate(reward_aligner(rewards={"mine": reward}), batch, velocity)
        return torch.autograd.grad(out.loss, velocity)[0], out

    grad, out = gradient(batch, velocity)
    expected, _ = gradient(batch[rest], velocity.detach()[rest].requires_grad_())
    torch.testing.assert_close(grad[rest], expected, **FLOAT32)
    assert torch.equal(grad[odd], torch.zeros_like(grad[odd]))
    assert torch.isnan(out.rewards["mine"][odd]) and torch.isfinite(out.rewards["mine"][rest]).all()
    assert out.metrics["vrpo/nonfinite"] == (bad != "masked")  # what was not scored is no failure
    assert out.advantages[odd] == 0 and torch.isfinite(out.loss)
    assert all(torch.isfinite(metric) for metric in out.metrics.values())


def test_a_reward_that_fails_takes_no_gradient_from_the_others() -> None:
    batch, odd = make_batch(8), 3
    velocity = velocity_like(batch)
    failing = torch.where(torch.arange(8) == odd, torch.nan, 1.0)
    sound = {"sound": lambda s: mean_over_latent(s.x0_hat.sin())}
    failing_too = {**sound, "failing": lambda s: failing * mean_over_latent(s.x0_hat)}
    with_failing = reward_aligner(rewards=failing_too, reward_weights={"sound": 1, "failing": 1})
    alone = reward_aligner(rewards=sound, reward_weights={"sound": 1})
    (grad,) = torch.autograd.grad(generate(with_failing, batch, velocity).loss, velocity)
    (expected,) = torch.autograd.grad(generate(alone, batch, velocity).loss, velocity)
    torch.testing.assert_close(grad[odd], 0.5 * expected[odd], **FLOAT32)


def test_a_mask_leaves_samples_out_of_the_mean() -> None:
    batch = make_batch(8)
    scored = torch.arange(8) < 3
    velocity = velocity_like(batch)
    aligner = reward_aligner(rewards={"mine": lambda s: (mean_over_latent(s.x0_hat), scored)}, scale="none")
    out = generate(aligner, batch, velocity)
    x0_hat = batch.x_t - batch.t[:, None, None, None] * velocity
    torch.testing.assert_close(out.generation_loss, -mean_over_latent(x0_hat)[:3].mean(), **FLOAT32)
    assert torch.isnan(out.rewards["mine"]).tolist() == (~scored).tolist()


def test_rewards_of_other_precision_are_taken() -> None:
    batch = make_batch(8)
    rewards = {
        "double": lambda s: mean_over_latent(s.x0_hat.double()),
        "half": lambda s: mean_over_latent(s.x0_hat.sin()).bfloat16(),
    }
    velocity = velocity_like(batch)
    out = generate(reward_aligner(built_in=("semantic",), rewards=rewards), batch, velocity)
    out.loss.backward()
    assert velocity.grad is not None and torch.isfinite(velocity.grad).all()


# ---- samples that are not finite ----


@pytest.mark.parametrize("shares", [{"semantic": 1, "perceptual": 2}, {"semantic": 1e-60, "perceptual": 2e-60}])
def test_shares_sum_to_one_in_any_unit_and_precision(shares: dict[str, float]) -> None:
    aligner = reward_aligner(built_in=tuple(shares), reward_weights=shares).bfloat16()
    batch = make_batch(8)
    weights = generate(aligner, batch, velocity_like(batch)).weights
    torch.testing.assert_close(weights["semantic"], torch.full((8,), 1 / 3))
    torch.testing.assert_close(weights["perceptual"], torch.full((8,), 2 / 3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("estimate", [False, True])
@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_a_sample_whose_time_is_not_finite_is_left_out(path_type: str, estimate: bool, value: float) -> None:
    batch, aligner = make_batch(8), reward_aligner(built_in=("semantic",), path_type=path_type)
    made = velocity_like(batch)
    t = torch.where(torch.arange(8) == 3, value, batch.t)
    name = "x0_hat" if estimate else "velocity"
    out = aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=t, **{name: made})
    out.loss.backward()
    assert made.grad is not None and torch.isfinite(made.grad).all()
    assert not made.grad[3].any() and made.grad[2].any()
    assert out.metrics["vrpo/nonfinite"] == 1 and out.advantages[3] == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x0", "x_t", "velocity", "z"])
def test_a_sample_that_is_not_finite_is_left_out(where: str, value: float) -> None:
    batch, odd = make_batch(8), 3
    rest = torch.tensor([i for i in range(8) if i != odd])
    velocity = velocity_like(batch)
    aligner = reward_aligner(
        built_in=("semantic", "perceptual", "fidelity"),
        reward_weights={"semantic": 1, "perceptual": 1, "fidelity": 1},
        scale="none",  # nothing of a call's memory acts on the next
    )

    def spoil(x: Tensor) -> Tensor:
        x = x.detach().clone()
        x.flatten(1)[odd, 5] = value
        return x

    spoiled = {"x0": batch.x0, "x_t": batch.x_t, "velocity": velocity, "z": batch.z[0]}
    spoiled[where] = spoil(spoiled[where])
    given = spoiled["velocity"].detach().requires_grad_()
    out = aligner(t=batch.t, **{**spoiled, "velocity": given})
    out.loss.backward()
    grads = gradients(aligner)
    aligner.zero_grad()
    sound = velocity.detach()[rest].requires_grad_()
    expected = generate(aligner, batch[rest], sound)
    expected.loss.backward()

    torch.testing.assert_close(out.loss, expected.loss, **FLOAT32)
    assert given.grad is not None
    torch.testing.assert_close(given.grad[rest], sound.grad, **FLOAT32)
    assert torch.equal(given.grad[odd], torch.zeros(4, 8, 8))
    torch.testing.assert_close(grads, gradients(aligner), rtol=1e-4, atol=1e-6)
    assert out.metrics["vrpo/nonfinite"] == 1 and out.advantages[odd] == 0
    assert all(torch.isnan(reward[odd]) for reward in out.rewards.values())


# ---- black boxes ----


def test_a_black_box_needs_a_generator() -> None:
    batch, aligner = make_batch(8), reward_aligner(black_box_rewards={"box": lambda s: mean_over_latent(s.x0_hat)})
    with pytest.raises(ConfigError, match=r"generator: expected a torch\.Generator, .*, got None\. Pass"):
        generate(aligner, batch, velocity_like(batch))


def test_a_black_box_scores_actions_around_the_mean() -> None:
    seen: list[Tensor] = []

    def box(state: RewardState) -> Tensor:
        seen.append(state.x0_hat)
        return mean_over_latent(state.x0_hat)

    batch = make_batch(64)
    velocity = velocity_like(batch)
    aligner = reward_aligner(black_box_rewards={"box": box}, action_std=0.3, actions=6, action_grid=0)
    out = generate(aligner, batch, velocity, generator=torch.Generator().manual_seed(3))
    assert len(seen) == 6 and not any(x.requires_grad for x in seen)
    actions = torch.stack(seen)
    generate(aligner, batch, velocity, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.stack(seen[6:]), actions)
    t = batch.t[:, None, None, None]
    difference = actions - (batch.x_t - t * velocity.detach())
    # Each direction has unit mean square; an estimate hardly errs, and is hardly varied, near the data.
    expected = (0.3 * batch.t.clamp(min=0.05)).square().expand(6, 64)
    torch.testing.assert_close(difference.square().mean((2, 3, 4)), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(out.rewards["box"], mean_over_latent(actions.flatten(0, 1)).view(6, 64).mean(0))


@pytest.mark.parametrize("scale", ["none", "group"])
def test_the_gradient_of_a_black_box_compares_the_actions_of_each_state(scale: str) -> None:
    seen: list[Tensor] = []

    def box(state: RewardState) -> Tensor:
        seen.append(state.x0_hat)
        return mean_over_latent(state.x0_hat.square())

    batch = make_batch(8)
    velocity = velocity_like(batch)
    aligner = reward_aligner(black_box_rewards={"box": box}, action_std=0.2, scale=scale)
    out = generate(aligner, batch, velocity, generator=torch.Generator().manual_seed(3))
    out.generation_loss.backward()
    x0_hat = (batch.x_t - batch.t[:, None, None, None] * velocity).detach()
    assert velocity.grad is not None
    for i in range(8):
        time = max(0.05, batch.t[i].item())
        difference = torch.stack([x[i] - x0_hat[i] for x in seen])  # rho t e
        r = torch.stack([x[i].square().mean() for x in seen])
        advantage = (r - r.mean()) / (1 if scale == "none" else r.std())
        gradient = sum(a * d for a, d in zip(advantage, difference, strict=True)) / ((0.2 * time) ** 2 * 7 * 4)
        torch.testing.assert_close(velocity.grad[i], batch.t[i] * gradient / 8, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_share_of_a_black_box_acts_under_every_scale(scale: str, size: float) -> None:
    batch, velocity = make_batch(16), velocity_like(make_batch(16))
    norms = []
    for share in (0.99, 0.01):
        aligner = reward_aligner(
            # It differs from sample to sample, and has no gradient: what there is comes from the box.
            rewards={"other": lambda s: 0 * mean_over_latent(s.x0_hat) + s.y.float()},
            black_box_rewards={"box": lambda s: size * mean_over_latent(s.x0_hat.square())},
            reward_weights={"other": 1 - share, "box": share},
            scale=scale,
        )
        out = generate(aligner, batch, velocity, generator=torch.Generator().manual_seed(0))
        norms.append(torch.autograd.grad(out.generation_loss, velocity)[0].norm().item())
    assert norms[0] > 50 * norms[1] > 0


def test_a_black_box_raises_its_reward() -> None:
    model, images = TinySiT(), make_batch(8)
    batch = images[torch.arange(8).repeat_interleave(8)]  # eight draws of each of eight images
    aligner = reward_aligner(
        black_box_rewards={"small": lambda s: -mean_over_latent(s.x0_hat.square())},
        scale="group",
    ).attach(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    rewards = []
    for _ in range(30):
        optimizer.zero_grad()
        out = align(model, aligner, batch, generator=generator)
        out.loss.backward()
        optimizer.step()
        rewards.append(out.rewards["small"].mean().item())
    assert rewards[-1] > 0.9 * rewards[0]  # rewards are negative: at least a tenth of the way to zero
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5])


def test_a_black_box_and_a_pathwise_reward_share_the_weights() -> None:
    batch = make_batch(8)
    aligner = reward_aligner(
        rewards={"path": linear_reward(1)[1]},
        black_box_rewards={"box": lambda s: mean_over_latent(s.x0_hat)},
        reward_weights={"path": 1, "box": 3},
        reward_coeff=0.8,
    )
    velocity = velocity_like(batch)
    out = generate(aligner, batch, velocity, generator=torch.Generator().manual_seed(0))
    assert out.weights["path"].tolist() == [0.25] * 8 and out.weights["box"].tolist() == [0.75] * 8
    (both,) = torch.autograd.grad(out.loss, velocity)
    path_alone = reward_aligner(rewards={"path": linear_reward(1)[1]}, reward_coeff=0.8 * 0.25)
    box_alone = reward_aligner(black_box_rewards={"box": lambda s: mean_over_latent(s.x0_hat)}, reward_coeff=0.8 * 0.75)
    (path,) = torch.autograd.grad(generate(path_alone, batch, velocity).loss, velocity)
    same = torch.Generator().manual_seed(0)
    (box,) = torch.autograd.grad(generate(box_alone, batch, velocity, generator=same).loss, velocity)
    torch.testing.assert_close(both, path + box, **FLOAT32)


def test_a_black_box_that_fails_for_one_sample_leaves_it_out() -> None:
    batch, odd = make_batch(8), 3
    failing = torch.where(torch.arange(8) == odd, torch.nan, 1.0)
    aligner = reward_aligner(black_box_rewards={"box": lambda s: failing * mean_over_latent(s.x0_hat)})
    velocity = velocity_like(batch)
    out = generate(aligner, batch, velocity, generator=torch.Generator().manual_seed(0))
    out.loss.backward()
    assert velocity.grad is not None and torch.isfinite(velocity.grad).all()
    assert (velocity.grad.flatten(1).norm(dim=1) > 0).tolist() == [i != odd for i in range(8)]


# ---- levels and memory ----


def test_weights_come_from_the_memory() -> None:
    batch = make_batch(8)
    rewards = {"a": linear_reward(1)[1], "b": linear_reward(2)[1]}
    aligner = reward_aligner(rewards=rewards, scale="none").eval()
    assert aligner.generation is not None
    moments = aligner.generation.statistics.moments
    moments[0], moments[2] = 1001, 1000.0
    moments[2, 0] *= 4
    out = generate(aligner, batch, velocity_like(batch))
    torch.testing.assert_close(out.weights["a"], torch.full((8,), 0.2))
    torch.testing.assert_close(out.weights["b"], torch.full((8,), 0.8))


def test_the_baseline_is_the_levels_mean() -> None:
    batch, (_, reward) = make_batch(8), linear_reward(1)
    aligner = reward_aligner(rewards={"a": reward}, scale="none").eval()
    assert aligner.generation is not None
    aligner.generation.statistics.moments[:, 0] = torch.stack(
        [torch.full((10,), 9.0), torch.arange(10.0), torch.ones(10)]
    )
    out = generate(aligner, batch, velocity_like(batch))
    torch.testing.assert_close(out.advantages, out.rewards["a"] - (10 * batch.t).floor(), **FLOAT32)


def test_without_a_memory_all_rewards_weigh_the_same() -> None:
    batch = make_batch(8)
    rewards = {"a": linear_reward(1)[1], "b": linear_reward(2, size=0.5)[1]}
    out = generate(reward_aligner(rewards=rewards).eval(), batch, velocity_like(batch))
    assert out.weights["a"].tolist() == out.weights["b"].tolist() == [0.5] * 8


def test_the_statistics_watch_fidelity_without_optimising_it() -> None:
    batch = make_batch(8)
    aligner = reward_aligner(built_in=("semantic",))
    out = generate(aligner, batch, velocity_like(batch))
    assert aligner.generation is not None
    assert aligner.generation.table.watched == ("semantic", "fidelity") and list(out.weights) == ["semantic"]
    assert aligner.generation.statistics.moments[0].sum(1).tolist() == [8] * 3  # and the critic's agreement
    x0_hat = batch.x_t - batch.t[:, None, None, None] * velocity_like(batch).detach()
    torch.testing.assert_close(out.rewards["fidelity"], -mean_over_latent((x0_hat - batch.x0).square()), **FLOAT32)


def test_a_rewards_network_stays_out_of_the_module() -> None:
    class Scorer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(256, 1)

        def forward(self, state: RewardState) -> Tensor:
            return self.linear(state.x0_hat.flatten(1))[:, 0]

    batch, aligner = make_batch(8), reward_aligner(rewards={"mine": Scorer()}, black_box_rewards={"box": Scorer()})
    out = generate(aligner, batch, velocity_like(batch), generator=torch.Generator().manual_seed(0))
    assert {"mine", "box"} < set(out.rewards)
    assert not list(aligner.parameters()) and not [name for name in aligner.state_dict() if "linear" in name]


class SavedBytes:
    """Bytes that autograd keeps for backward passes, while they are alive."""

    class _Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def __init__(self) -> None:
        self.kept: list[weakref.ref[SavedBytes._Kept]] = []

    def __enter__(self) -> "SavedBytes":
        def pack(tensor: Tensor) -> SavedBytes._Kept:
            kept = SavedBytes._Kept(tensor)
            self.kept.append(weakref.ref(kept))
            return kept

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def alive(self) -> int:
        tensors = [kept.tensor for kept in (reference() for reference in self.kept) if kept is not None]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


SHAPES = {"latent_shape": (4, 16, 16), "target_dims": (96,), "token_grid": (8, 8), "width": 64}


@pytest.mark.parametrize("frozen", [True, False])
def test_no_graph_of_the_rewards_outlives_the_forward_pass(frozen: bool) -> None:
    critic = LatentCritic(**SHAPES).requires_grad_(not frozen)
    file = {"critic_checkpoint": "somewhere"} if frozen else {}  # which is read by the aligner
    readout = GenerationReadout(VRPOConfig(critic_trainable=not frozen, **file), critic, {}, {})
    g = torch.Generator().manual_seed(0)
    x0, x_t = torch.randn(8, 4, 16, 16, generator=g), torch.randn(8, 4, 16, 16, generator=g)
    velocity, t = torch.randn(8, 4, 16, 16, generator=g).requires_grad_(), torch.rand(8, generator=g)
    z = (torch.randn(8, 64, 96, generator=g),)

    def saved(compiling: bool) -> tuple[int, Tensor]:
        velocity.grad = None
        with SavedBytes() as bytes_kept, pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
            x0_hat = x_t - t[:, None, None, None] * velocity
            out = copy.deepcopy(readout)(RewardState(x0_hat, x0, x_t, t, z, None, 0))
        alive = bytes_kept.alive()
        (out.loss + out.critic_loss).backward()
        assert velocity.grad is not None
        return alive, velocity.grad

    (early, gradient), (kept, same) = saved(False), saved(True)
    torch.testing.assert_close(gradient, same, rtol=1e-5, atol=1e-9)
    # What stays is a gradient and an estimate; beside a critic that learns, also its own regression.
    assert early < (0.05 if frozen else 0.65) * kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_small_gradient_does_not_underflow_in_a_half_precision_reward(dtype: torch.dtype) -> None:
    x0_hat = torch.randn(64, 4, 32, 32).requires_grad_()
    leaf = x0_hat.detach().requires_grad_()
    loss = (leaf.to(dtype) * 0.01).mean((1, 2, 3)).float().mean()  # 4e-8 by element: below float16's smallest
    (gradient,) = torch.autograd.grad(at_estimate(loss, leaf, x0_hat)[0], x0_hat)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 0.01 / x0_hat.numel()), rtol=0.01, atol=0)
    (lost,) = torch.autograd.grad((leaf.half() * 0.01).mean((1, 2, 3)).float().mean(), leaf)
    assert not torch.allclose(lost, gradient, rtol=0.01, atol=0), "what the test is for"


def test_a_loss_at_the_estimate_has_its_value_and_scales_with_what_multiplies_it() -> None:
    x0_hat = torch.randn(3, 2, dtype=torch.float64).requires_grad_()
    leaf = x0_hat.detach().requires_grad_()
    loss, formed = at_estimate(leaf.square().sum(), leaf, x0_hat)
    torch.testing.assert_close(formed, 2 * x0_hat.detach())
    assert loss.item() == x0_hat.square().sum().item()
    (gradient,) = torch.autograd.grad(5 * loss, x0_hat)
    torch.testing.assert_close(gradient, 10 * x0_hat.detach())
    leaf = x0_hat.detach().requires_grad_()
    nothing, _ = at_estimate(torch.ones((), dtype=torch.float64).requires_grad_() * 2, leaf, x0_hat)
    assert torch.autograd.grad(nothing, x0_hat)[0].abs().max() == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, lambda t: torch.ones_like(t)),
        ({"noise_gate": "linear"}, lambda t: 2 - 2 * t),
        ({"noise_gate": "cut"}, lambda t: (t <= 0.8).float()),
        ({"noise_gate": "cut", "noise_gate_end": 0.3}, lambda t: (t <= 0.3).float()),
        ({"noise_gate": "cut", "noise_gate_end": 1.0}, lambda t: torch.ones_like(t)),
    ],
)
@pytest.mark.parametrize("kind", ["rewards", "black_box_rewards"])
def test_the_noise_gate_weighs_each_samples_gradient(
    settings: dict[str, Any], expected: Callable[[Tensor], Tensor], kind: str
) -> None:
    _, reward = linear_reward(3)
    batch = make_batch(16)
    gradients_of = []
    for chosen in ({}, settings):
        aligner, velocity = reward_aligner(**{kind: {"mine": reward}}, **chosen), velocity_like(batch)
        out = generate(aligner, batch, velocity, generator=torch.Generator().manual_seed(0))
        out.generation_loss.backward()
        gradients_of.append(velocity.grad)
    plain, gated = gradients_of
    torch.testing.assert_close(gated, expected(batch.t)[:, None, None, None] * plain, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("own_counter", [True, False])
def test_the_schedule_ends_at_its_floor(own_counter: bool) -> None:
    aligner = tiny_aligner(features="none", reward_release_steps=4, reward_floor=0.2)
    model, batch = TinySiT(), make_batch(4)
    aligner.attach(model)
    shares = []
    for step in range(6):
        velocity = model(batch.x_t, batch.t, batch.y)
        out = generate(aligner, batch, velocity, **({} if own_counter else {"step": step}))
        shares.append(float(out.reward_release))
        assert float(out.metrics["vrpo/reward_share"]) == pytest.approx(shares[-1])
    assert shares == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2])


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_logged_ratio_is_that_of_the_gradients(weight: float) -> None:
    batch, aligner = make_batch(8), reward_aligner(built_in=("semantic",), reward_coeff=weight, reward_release="none")
    x0_hat = (batch.x0 + 0.3 * torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))).requires_grad_()
    out = aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, x0_hat=x0_hat)
    (ours,) = torch.autograd.grad(out.policy_loss, x0_hat)
    t = batch.t[:, None, None, None]
    # Of the linear path's velocity (x_t - x0_hat) / t, against (x_t - x0) / t.
    (theirs,) = torch.autograd.grad(((batch.x0 - x0_hat) / t).square().mean(), x0_hat)
    expected = (ours.flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)).mean()
    torch.testing.assert_close(out.metrics["vrpo/gradient_ratio"], expected, rtol=1e-4, atol=0)

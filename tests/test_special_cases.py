"""The special cases that docs/equations.md promises: what the objective is equal to, and what does not change it."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fakes.random_state import global_random_state
from fakes.tiny_sit import Batch, TinySiT, align, denoising_loss, gradients, make_batch, tiny_aligner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vrpo_plugin.functional.rewards import RewardState
from vrpo_plugin.modules.aligner import VRPOAligner, VRPOOutput

# Rewards are float32 means over hundreds of values, computed in another order or from shifted numbers: their relative
# error is a few times 1e-7, and deviations from a group's mean lose one more digit.
FLOAT32: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}


def smoothness(state: RewardState) -> Tensor:
    return -state.x0_hat.diff(dim=-1).square().mean((1, 2, 3))


def x0_hat_aligner(rewards: Any, **overrides: Any) -> VRPOAligner:
    return tiny_aligner(built_in=(), features="none", rewards=rewards, **overrides)


def generate(aligner: VRPOAligner, batch: Batch, velocity: Tensor) -> tuple[VRPOOutput, Tensor]:
    """The output and the generator's gradient."""
    velocity = velocity.clone().requires_grad_()
    out = aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity, y=batch.y)
    return out, torch.autograd.grad(out.generation_loss, velocity)[0]


def random_velocity(size: int) -> Tensor:
    return torch.randn(size, 4, 8, 8, generator=torch.Generator().manual_seed(2))


# ---- 1. the features alone are REPA ----


def repa_projection_loss(z_tildes: list[Tensor], zs: list[Tensor]) -> Tensor:
    """REPA's loss as its paper states it: minus the mean, over encoders and patches, of the patch-wise cosine."""
    total = torch.zeros(())
    for z_tilde, z in zip(z_tildes, zs, strict=True):
        for sample in range(len(z)):
            cosines = [
                F.normalize(z_tilde[sample, n], dim=0) @ F.normalize(z[sample, n], dim=0) for n in range(z.shape[1])
            ]
            total = total - torch.stack(cosines).mean()
    return total / (len(zs) * len(zs[0]))


@pytest.mark.parametrize("dims", [(12,), (12, 7)])
def test_features_alone_are_repa(dims: tuple[int, ...]) -> None:
    host, batch = TinySiT(), make_batch(6, dims=dims)
    model = copy.deepcopy(host)
    aligner = tiny_aligner(reward_coeff=0.0, proj_coeff=0.5, encoder_depth=2, target_dims=dims).attach(model)
    host.projectors = copy.deepcopy(aligner.projectors)

    tapped: list[Tensor] = []
    host.blocks[1].register_forward_hook(lambda _, __, output: tapped.append(output))
    velocity = host(batch.x_t, batch.t, batch.y)
    projection = repa_projection_loss([p(tapped[0]) for p in host.projectors], list(batch.z))
    expected = denoising_loss(velocity, batch) + 0.5 * projection
    expected.backward()

    velocity = model(batch.x_t, batch.t, batch.y)
    out = aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity)
    loss = denoising_loss(velocity, batch) + out.loss
    loss.backward()
    torch.testing.assert_close(out.features_loss, projection, rtol=0, atol=1e-6)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    ours = {name.removeprefix("vrpo."): grad for name, grad in gradients(model).items()}
    # Gradients of order 0.01 to 1 that are sums over 96 tokens, in another order.
    torch.testing.assert_close(ours, gradients(host), rtol=1e-5, atol=1e-6)
    assert aligner.critic is None


# ---- 2. with nothing to do, nothing is done ----


def train(model: nn.Module, aligner: VRPOAligner | None, steps: int) -> bytes:
    """A host's loop; its noise is drawn from the global generator, as hosts do."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        batch = make_batch(8, seed=step)
        batch = Batch(x0=batch.x0, noise=torch.randn_like(batch.x0), t=torch.rand(8), y=batch.y, z=batch.z)
        velocity = model(batch.x_t, batch.t, batch.y)
        loss = denoising_loss(velocity, batch)
        if aligner is not None:
            loss = loss + aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return global_random_state()


def test_nothing_to_optimise_is_bitwise_the_host() -> None:
    host = TinySiT()
    model = copy.deepcopy(host)
    state = global_random_state()
    aligner = tiny_aligner(reward_coeff=0.0, features="host").attach(model)
    assert global_random_state() == state
    names = [name for name, _ in host.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names

    assert train(model, aligner, steps=5) == train(host, None, steps=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), host.parameters(), strict=True))
    aligner.detach(model)
    assert list(model.state_dict()) == list(host.state_dict())


def test_the_trajectories_of_that_test_depend_on_the_loss() -> None:
    host = TinySiT()
    model = copy.deepcopy(host)
    train(model, tiny_aligner().attach(model), steps=1)
    train(host, None, steps=1)
    assert not torch.equal(model.final_layer.weight, host.final_layer.weight)


# ---- 3. constant rewards teach nothing ----


@pytest.mark.parametrize("scale", ["none", "group"])
def test_a_reward_that_is_constant_gives_exactly_no_gradient(scale: str) -> None:
    batch = make_batch(8)
    aligner = x0_hat_aligner({"constant": lambda s: 0 * s.x0_hat.mean((1, 2, 3)) + 3}, scale=scale)
    out, grad = generate(aligner, batch, random_velocity(8))
    assert torch.equal(grad, torch.zeros_like(grad))
    assert torch.equal(out.advantages, torch.zeros(8))


@pytest.mark.parametrize("constant", [0.0, 3.0, 1e-6, -1e6])
def test_a_level_whose_rewards_are_all_alike_gives_exactly_no_gradient(constant: float) -> None:
    # The value does not differ between samples, though its gradient does not vanish.
    def alike(state: RewardState) -> Tensor:
        value = smoothness(state)
        return value - value.detach() + constant

    out, grad = generate(x0_hat_aligner({"alike": alike}, scale="group"), make_batch(40), random_velocity(40))
    assert torch.equal(grad, torch.zeros_like(grad)) and torch.equal(out.advantages, torch.zeros(40))
    assert out.metrics["vrpo/frac_reward_zero_std"].item() == pytest.approx(1)


def test_a_constant_reward_takes_no_weight_from_the_others() -> None:
    batch, velocity = make_batch(40), random_velocity(40)
    constant = {"constant": lambda s: 0 * s.x0_hat.mean((1, 2, 3)) + 3}
    out, grad = generate(x0_hat_aligner({"smooth": smoothness, **constant}), batch, velocity)
    alone, expected = generate(x0_hat_aligner({"smooth": smoothness}), batch, velocity)
    torch.testing.assert_close(grad, expected, **FLOAT32)
    torch.testing.assert_close(out.advantages, alone.advantages, **FLOAT32)


# ---- 4. the order of a batch means nothing ----


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(24)), scale=st.sampled_from(["none", "group"]))
def test_permuting_the_batch_changes_nothing(order: list[int], scale: str) -> None:
    torch.manual_seed(0)
    model, batch, index = TinySiT(), make_batch(24), torch.tensor(order)
    aligner = tiny_aligner(scale=scale, rewards={"smooth": smoothness}).attach(model)
    other = copy.deepcopy(model)
    out = align(model, aligner, batch)
    out.loss.backward()
    twin = other.get_submodule("vrpo")
    assert isinstance(twin, VRPOAligner)
    permuted = align(other, twin, batch[index])
    permuted.loss.backward()
    for name in ("loss", "policy_loss", "features_loss", "generation_loss", "critic_loss", "metrics"):
        torch.testing.assert_close(getattr(permuted, name), getattr(out, name), **FLOAT32)
    torch.testing.assert_close(permuted.advantages, out.advantages[index], **FLOAT32)
    torch.testing.assert_close(permuted.weights, {name: w[index] for name, w in out.weights.items()}, **FLOAT32)
    torch.testing.assert_close(permuted.rewards, {name: r[index] for name, r in out.rewards.items()}, **FLOAT32)
    torch.testing.assert_close(gradients(other), gradients(model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), **FLOAT32)


# ---- 5. only differences of rewards count ----


@pytest.mark.parametrize("weighting", [{}, {"reward_weights": {"smooth": 1, "small": 3}}])
@pytest.mark.parametrize("scale", ["none", "group"])
def test_a_shift_of_all_rewards_changes_nothing(scale: str, weighting: dict[str, Any]) -> None:
    def small(state: RewardState) -> Tensor:
        return -state.x0_hat.abs().mean((1, 2, 3))

    batch, velocity = make_batch(30), random_velocity(30)
    shifted = {"smooth": lambda s: smoothness(s) + 5, "small": lambda s: small(s) + 5}
    out, grad = generate(
        x0_hat_aligner({"smooth": smoothness, "small": small}, scale=scale, **weighting), batch, velocity
    )
    moved, moved_grad = generate(x0_hat_aligner(shifted, scale=scale, **weighting), batch, velocity)
    # The shifted rewards are rounded to 5e-7, of deviations of about 0.3.
    torch.testing.assert_close(moved.advantages, out.advantages, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.weights, out.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved_grad, grad, rtol=1e-4, atol=1e-7)
    assert grad.abs().max() > 1e-4
    torch.testing.assert_close(moved.rewards["smooth"], out.rewards["smooth"] + 5)


# ---- 6. with the group's scale, the unit of a reward means nothing ----


@pytest.mark.parametrize("factor", [10.0, 1e-3])
def test_a_rewards_unit_changes_nothing_with_the_groups_scale(factor: float) -> None:
    batch, velocity = make_batch(30), random_velocity(30)
    settings_ = {"scale": "group"}
    out, grad = generate(x0_hat_aligner({"mine": smoothness}, **settings_), batch, velocity)
    scaled = {"mine": lambda s: factor * smoothness(s)}
    other, other_grad = generate(x0_hat_aligner(scaled, **settings_), batch, velocity)
    torch.testing.assert_close(other.advantages, out.advantages, **FLOAT32)
    torch.testing.assert_close(other_grad, grad, **FLOAT32)
    assert grad.abs().max() > 1e-3
    _, unscaled = generate(x0_hat_aligner(scaled, scale="none"), batch, velocity)
    _, unscaled_one = generate(x0_hat_aligner({"mine": smoothness}, scale="none"), batch, velocity)
    torch.testing.assert_close(unscaled, factor * unscaled_one, **FLOAT32)  # the factor did reach the loss

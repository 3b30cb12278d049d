"""vrpo_plugin.modules.aligner: what a training loop gives it and gets from it."""

import copy
import dataclasses
import logging
import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fakes.tiny_sit import TINY, Batch, TinySiT, align, denoising_loss, gradients, make_batch, tiny_aligner
from torch import Tensor, nn

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.errors import ConfigError, HostNotFoundError, ShapeError
from vrpo_plugin.modules.aligner import VRPOAligner, VRPOOutput
from vrpo_plugin.modules.projector import ConvProjector
from vrpo_plugin.standalone.sit import create_sit

FLOAT32: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
FIXED: dict[str, Any] = {
    "reward_weights": {"semantic": 1, "perceptual": 2},
    "scale": "none",
    "reward_coeff": 1.2,
}


def latents(batch: Batch) -> dict[str, Tensor]:
    return {"x0": batch.x0, "x_t": batch.x_t, "t": batch.t, "velocity": batch.velocity}


def everything(out: VRPOOutput) -> dict[str, Any]:
    return {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}


def mean_over_latent(x: Tensor) -> Tensor:
    return x.mean((1, 2, 3))


@pytest.fixture
def model() -> TinySiT:
    return TinySiT()


# ---- every trainable parameter gets a gradient on every step ----

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "group scale": {"scale": "group"},
    "fixed weights": FIXED,
    "all layers": {"layers": "all"},
    "conv": {"projector": "conv"},
    "spatial": {"target_norm": "spatial"},
    "released": {"release": "stop", "release_steps": 1},
    "features alone": {"reward_coeff": 0.0},
    "generation alone": {"features": "none"},
    "semantic alone": {"built_in": ("semantic",)},
    "perceptual alone": {"built_in": ("perceptual",)},
    "fidelity": {"built_in": ("fidelity",)},
    "own reward": {"built_in": (), "rewards": {"mine": lambda s: mean_over_latent(s.x0_hat)}},
    "black box": {"built_in": (), "black_box_rewards": {"box": lambda s: mean_over_latent(s.x0_hat)}},
    "two encoders": {"target_dims": (12, 7)},
}


@pytest.mark.parametrize("size", [1, 17])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_parameter_gets_a_gradient_on_every_step(model: TinySiT, setting: str, size: int) -> None:
    aligner = tiny_aligner(**SETTINGS[setting]).attach(model)
    batch = make_batch(size, dims=aligner.target_dims)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        model.zero_grad()
        align(model, aligner, batch, generator=generator).loss.backward()
        grads = gradients(aligner)
        assert all(grad is not None and torch.isfinite(grad).all() for grad in grads.values()), setting
    trained = {name.split(".")[0] for name in grads}
    expected = {"projectors"} if aligner.config.features == "policy" else set()
    assert trained == (expected | ({"generation"} if aligner.critic is not None else set()))


@pytest.mark.parametrize("where", ["z", "x_t"])
@pytest.mark.parametrize("setting", ["default", "group scale", "fixed weights", "features alone", "black box"])
def test_a_batch_without_one_finite_sample_changes_nothing(model: TinySiT, setting: str, where: str) -> None:
    aligner, batch = tiny_aligner(**SETTINGS[setting]).attach(model), make_batch(8)
    if where == "z":
        batch = dataclasses.replace(batch, z=(torch.full_like(batch.z[0], torch.nan),))
    else:
        batch = dataclasses.replace(batch, noise=torch.full_like(batch.noise, torch.nan))
    before = copy.deepcopy(aligner.state_dict())
    out = align(model, aligner, batch, generator=torch.Generator().manual_seed(0))
    out.loss.backward()
    grads = gradients(model if where == "z" else aligner)  # a transformer that made NaN cannot be helped
    touched = {name: grad for name, grad in grads.items() if grad is not None}
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in touched.values())
    assert {f"vrpo.{name}" for name, p in aligner.named_parameters()} <= {
        name if where == "z" else f"vrpo.{name}" for name in touched
    }
    assert torch.isfinite(out.loss) and out.metrics["vrpo/nonfinite"] == 8
    after = aligner.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name != "step")


@pytest.mark.parametrize("where", ["z", "hidden"])
def test_features_of_a_sample_that_is_not_finite_are_left_out(where: str) -> None:
    aligner, batch, odd = tiny_aligner(reward_coeff=0.0), make_batch(8), 3
    rest = torch.tensor([i for i in range(8) if i != odd])
    given = {"z": batch.z[0], "hidden": torch.randn(8, 16, 32)}
    expected_hidden = given["hidden"][rest].requires_grad_()
    expected = aligner(given["z"][rest], hidden=expected_hidden)
    expected.loss.backward()
    expected_grads = gradients(aligner)
    aligner.zero_grad()

    given[where][odd, 2, 3] = torch.nan
    given["hidden"].requires_grad_()
    out = aligner(given["z"], hidden=given["hidden"])
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss, **FLOAT32)
    torch.testing.assert_close(gradients(aligner), expected_grads, **FLOAT32)
    (grad,) = torch.autograd.grad(aligner(given["z"], hidden=given["hidden"]).loss, given["hidden"])
    torch.testing.assert_close(grad[rest], expected_hidden.grad, **FLOAT32)
    assert torch.equal(grad[odd], torch.zeros(16, 32))
    assert torch.isnan(out.rewards["semantic_features"]).nonzero().flatten().tolist() == [odd]
    assert out.metrics["vrpo/nonfinite"] == 1


# ---- outputs ----


def test_outputs_have_their_shapes_and_the_losses_add_up(model: TinySiT) -> None:
    aligner = tiny_aligner(proj_coeff=0.3, reward_coeff=0.7).attach(model)
    out = align(model, aligner, make_batch(10))
    for name in ("loss", "policy_loss", "features_loss", "generation_loss", "critic_loss"):
        assert getattr(out, name).shape == () and getattr(out, name).requires_grad, name
    assert list(out.rewards) == ["semantic_features", "semantic", "perceptual", "fidelity"]
    assert list(out.weights) == ["semantic", "perceptual"]
    assert all(value.shape == (10,) for value in (*out.rewards.values(), *out.weights.values(), out.advantages))
    free = (*out.rewards.values(), *out.weights.values(), out.advantages)
    assert not any(value.requires_grad for value in free)
    torch.testing.assert_close(out.policy_loss, 0.3 * out.features_loss + 0.7 * out.generation_loss, **FLOAT32)
    torch.testing.assert_close(out.loss, out.policy_loss + 0.1 * out.critic_loss, **FLOAT32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        out.loss = out.policy_loss  # type: ignore[misc]


def test_metrics_are_scalars_without_gradient(model: TinySiT) -> None:
    out = align(model, tiny_aligner().attach(model), make_batch(8))
    assert set(out.metrics) == {
        "vrpo/align_cos",
        "vrpo/critic_cos",
        "vrpo/advantage_abs",
        "vrpo/frac_reward_zero_std",
        "vrpo/fallback",
        "vrpo/reward_share",
        "vrpo/gradient_ratio",
        "vrpo/nonfinite",
        *(f"vrpo/{kind}/{name}" for kind in ("reward", "std") for name in ("semantic", "perceptual", "fidelity")),
        *(f"vrpo/weight/{name}" for name in ("semantic", "perceptual")),
    }
    assert all(isinstance(m, Tensor) and m.shape == () and not m.requires_grad for m in out.metrics.values())
    torch.testing.assert_close(out.metrics["vrpo/align_cos"], -out.features_loss.detach())
    for name in ("semantic", "perceptual", "fidelity"):
        torch.testing.assert_close(out.metrics[f"vrpo/reward/{name}"], out.rewards[name].mean())
    assert out.metrics["vrpo/frac_reward_zero_std"] == 0
    torch.testing.assert_close(out.metrics["vrpo/advantage_abs"], out.advantages.abs().mean())


def test_samples_whose_level_is_all_alike_are_counted() -> None:
    batch = make_batch(40)
    low = batch.t < 0.5
    flat = torch.where(low, 0.0, 1.0)
    aligner = tiny_aligner(built_in=(), features="none", rewards={"mine": lambda s: flat * mean_over_latent(s.x0_hat)})
    out = aligner(batch.z, **{**latents(batch), "velocity": torch.randn(40, 4, 8, 8).requires_grad_()})
    assert out.metrics["vrpo/frac_reward_zero_std"].item() == pytest.approx(0.5)
    assert (out.advantages[low] == 0).all() and out.advantages.count_nonzero() == 20


# ---- the features readout ----


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=-1).mean(1)


def test_features_average_over_taps_and_encoders() -> None:
    aligner = tiny_aligner(layers=(1, 3), target_dims=(12, 7), reward_coeff=0.0)
    batch = make_batch(4, dims=(12, 7))
    hidden = [torch.randn(4, 16, 32), torch.randn(4, 16, 32)]
    out = aligner(batch.z, hidden=hidden)
    assert [p.get_parameter("4.bias").shape[0] for p in aligner.projectors] == [12, 7, 12, 7]
    pairs = [(aligner.projectors[2 * i + j](hidden[i]), batch.z[j]) for i in range(2) for j in range(2)]
    expected = torch.stack([cosine(z_tilde, z) for z_tilde, z in pairs]).mean(0)
    torch.testing.assert_close(out.rewards["semantic_features"], expected.detach(), **FLOAT32)
    torch.testing.assert_close(out.features_loss, -expected.mean(), **FLOAT32)


def test_hidden_tokens_are_what_the_taps_keep(model: TinySiT) -> None:
    aligner, batch = tiny_aligner(layers=(1, 3)).attach(model), make_batch(4)
    kept: list[Tensor] = []
    for block in (model.blocks[0], model.blocks[2]):
        block.register_forward_hook(lambda _, __, output: kept.append(output))
    velocity = model(batch.x_t, batch.t, batch.y)
    tapped = aligner.eval()(batch.z, **{**latents(batch), "velocity": velocity})
    passed = aligner(batch.z, **{**latents(batch), "velocity": velocity}, hidden=tuple(kept))
    torch.testing.assert_close(everything(passed), everything(tapped), rtol=0, atol=0, equal_nan=True)


def test_spatial_normalisation_of_the_targets() -> None:
    aligner, batch = tiny_aligner(target_norm="spatial"), make_batch(4)
    hidden = torch.randn(4, 16, 32)
    z = batch.z[0]
    normalised = (z - 0.6 * z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-6)
    out = aligner(z, hidden=hidden, **latents(batch))
    torch.testing.assert_close(
        out.rewards["semantic_features"], cosine(aligner.projectors[0](hidden), normalised).detach(), **FLOAT32
    )
    assert aligner.critic is not None
    torch.testing.assert_close(out.critic_loss, 1 - cosine(aligner.critic(batch.x0).tokens[0], normalised).mean())


def test_spatial_normalisation_leaves_class_tokens_alone() -> None:
    aligner, batch = tiny_aligner(target_norm="spatial", prefix_tokens=1, features="none"), make_batch(4)
    plain = tiny_aligner(target_norm="spatial", features="none")
    plain.load_state_dict(aligner.state_dict())
    z, token = batch.z[0], 100 * torch.randn(4, 1, 12)
    with_token = aligner(torch.cat([token, z], 1), **latents(batch))
    torch.testing.assert_close(with_token.critic_loss, plain(z, **latents(batch)).critic_loss)
    aligner, hidden = tiny_aligner(target_norm="spatial", prefix_tokens=1, reward_coeff=0.0), torch.randn(4, 17, 32)
    normalised = torch.cat([token, (z - 0.6 * z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-6)], 1)
    out = aligner(torch.cat([token, z], 1), hidden=hidden)
    torch.testing.assert_close(out.features_loss, -cosine(aligner.projectors[0](hidden), normalised).mean(), **FLOAT32)


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, None),
        ({"scale": "none", "reward_coeff": 1.2}, None),
        ({"reward_coeff": 1.2}, "so 0.12 is like the default"),
        ({"scale": "none"}, "so 1.2 is like the default"),
    ],
)
def test_a_scale_that_changes_the_meaning_of_the_weight_is_said(
    settings: dict[str, Any], warned: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_aligner(**settings)
    said = [text for *_, text in caplog.record_tuples if "is like the default" in text]
    assert [warned is not None and warned in text for text in said] == [True] * (warned is not None)


def test_targets_on_another_grid_are_resampled() -> None:
    aligner, batch = tiny_aligner(token_grid=(4, 4)), make_batch(4, tokens=64)
    hidden = torch.randn(4, 16, 32)
    maps = F.interpolate(batch.z[0].mT.unflatten(2, (8, 8)), size=(4, 4), mode="bilinear", antialias=True)
    on_grid = maps.flatten(2).mT
    out = aligner(batch.z, hidden=hidden, **latents(batch))
    same = aligner(on_grid, hidden=hidden, **latents(batch))
    torch.testing.assert_close(out.rewards, same.rewards, **FLOAT32)
    torch.testing.assert_close(out.features_loss, -cosine(aligner.projectors[0](hidden), on_grid).mean(), **FLOAT32)


def test_latents_that_are_no_square() -> None:
    model = TinySiT(input_size=(8, 4))
    batch = make_batch(4, latent_shape=(4, 8, 4), tokens=8)
    aligner = VRPOAligner.from_model(model, (12,), projector_dim=16, critic_width=16).attach(model)
    assert aligner.grids.tokens == (4, 2)
    align(model, aligner, batch).loss.backward()
    assert all(p.grad is not None for p in aligner.parameters())


@pytest.mark.parametrize("token_grid", [(2, 8), (4, 16), (4, 4), (8, 2)])
@pytest.mark.parametrize("own_projectors", [True, False])
def test_tokens_of_oblong_images_meet_in_their_places(token_grid: tuple[int, int], own_projectors: bool) -> None:
    # 16 tokens are 4 x 4, 2 x 8 or 8 x 2: what decides is the latents' aspect, and the encoder's own grid.
    height, width = token_grid
    aligner = tiny_aligner(
        latent_shape=(4, 4, 16), token_grid=token_grid, reward_coeff=0.0, own_projectors=own_projectors
    )
    z = torch.randn(3, height * width, 12)
    maps = F.interpolate(
        z.mT.unflatten(2, token_grid), size=(2, 8), mode="bilinear", antialias=True, align_corners=False
    )
    expected = maps.flatten(2).mT
    if own_projectors:
        hidden = torch.randn(3, 16, 32)
        out, projected = aligner(z, hidden=hidden), aligner.projectors[0](hidden)
    else:
        projected = torch.randn(3, 16, 12)
        out = aligner(z, z_tilde=projected)
    torch.testing.assert_close(out.features_loss, -cosine(projected, expected).mean(), **FLOAT32)


def test_oblong_tokens_of_another_count_keep_their_aspect() -> None:
    aligner, batch = tiny_aligner(latent_shape=(4, 4, 16)), make_batch(4, latent_shape=(4, 4, 16), tokens=64)
    maps = F.interpolate(batch.z[0].mT.unflatten(2, (4, 16)), size=(2, 8), mode="bilinear", antialias=True)
    hidden = torch.randn(4, 16, 32)
    out = aligner(batch.z, hidden=hidden, **latents(batch))
    same = aligner(maps.flatten(2).mT, hidden=hidden, **latents(batch))
    torch.testing.assert_close(out.rewards, same.rewards, **FLOAT32)


def test_tokens_that_fit_no_grid_of_the_image_are_refused() -> None:
    aligner = tiny_aligner(latent_shape=(4, 4, 16), reward_coeff=0.0)
    with pytest.raises(ShapeError, match=r"as high to wide as 4 to 16 .* got 40"):
        aligner(torch.randn(3, 40, 12), hidden=torch.randn(3, 16, 32))
    with pytest.raises(ShapeError, match=r"as high to wide as 4 to 16 .* got 25"):
        aligner(torch.randn(3, 16, 12), hidden=torch.randn(3, 25, 32))


def test_tokens_of_odd_sides_are_left_as_they_are() -> None:
    aligner = tiny_aligner(latent_shape=(4, 9, 8), reward_coeff=0.0)
    z, hidden = torch.randn(3, 72, 12), torch.randn(3, 72, 32)  # of patch 1
    loss = aligner(z, hidden=hidden).features_loss
    torch.testing.assert_close(loss, -cosine(aligner.projectors[0](hidden), z).mean(), **FLOAT32)


def test_a_conv_projector(model: TinySiT) -> None:
    aligner = tiny_aligner(projector="conv").attach(model)
    assert isinstance(aligner.projectors[0], ConvProjector)
    align(model, aligner, make_batch(4)).loss.backward()
    weight = aligner.projectors[0].projection_layer.weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("features", ["host", "none"])
def test_features_of_others_have_no_projector(model: TinySiT, features: str) -> None:
    aligner, batch = tiny_aligner(features=features).attach(model), make_batch(4)
    assert not len(aligner.projectors)
    out = align(model, aligner, batch)
    assert out.features_loss == 0 and not out.features_loss.requires_grad
    assert "semantic_features" not in out.rewards and "vrpo/align_cos" not in out.metrics
    torch.testing.assert_close(out.policy_loss, aligner.config.reward_coeff * out.generation_loss)


def test_without_a_reward_coefficient_there_is_no_critic(model: TinySiT) -> None:
    aligner, batch = tiny_aligner(reward_coeff=0.0, latent_shape=None).attach(model), make_batch(4)
    assert aligner.critic is None and aligner.generation is None
    model(batch.x_t, batch.t, batch.y)
    out = aligner(batch.z)
    torch.testing.assert_close(out.loss, 0.5 * out.features_loss)
    assert out.weights == {} and torch.equal(out.advantages, torch.zeros(4))
    assert set(out.metrics) == {"vrpo/align_cos", "vrpo/nonfinite"}


# ---- releases ----

RELEASES = {"none": [1, 1, 1, 1, 1, 1], "linear": [1, 0.75, 0.5, 0.25, 0, 0], "stop": [1, 1, 1, 1, 0, 0]}


@pytest.mark.parametrize("own_counter", [True, False])
@pytest.mark.parametrize("release", RELEASES)
def test_release(release: str, own_counter: bool) -> None:
    aligner = tiny_aligner(reward_coeff=0.0, release=release, release_steps=4)
    batch, hidden = make_batch(4), torch.randn(4, 16, 32)
    shares = []
    for step in range(6):
        out = aligner(batch.z, hidden=hidden, step=None if own_counter else step)
        shares.append((out.policy_loss / (0.5 * out.features_loss)).item())
    assert shares == pytest.approx(RELEASES[release])
    assert aligner.step == 6


@pytest.mark.parametrize("own_counter", [True, False])
@pytest.mark.parametrize("release", RELEASES)
def test_reward_release(release: str, own_counter: bool) -> None:
    aligner = tiny_aligner(features="none", reward_release=release, reward_release_steps=4, reward_floor=0.0)
    batch = make_batch(8)
    velocity = batch.velocity.requires_grad_()
    gradients = []
    for step in range(6):
        # Fixed statistics: the gradient of every call differs by the schedule alone.
        before = copy.deepcopy(aligner.generation.statistics.state_dict())
        out = aligner(
            batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity, step=None if own_counter else step
        )
        aligner.generation.statistics.load_state_dict(before)
        assert float(out.reward_release) == pytest.approx(RELEASES[release][step])
        gradients.append(torch.autograd.grad(out.loss, velocity, retain_graph=True, materialize_grads=True)[0])
        torch.testing.assert_close(out.loss - out.policy_loss, 0.1 * out.critic_loss, rtol=1e-5, atol=1e-7)
    for gradient, share in zip(gradients, RELEASES[release], strict=True):
        torch.testing.assert_close(gradient, share * gradients[0], rtol=1e-5, atol=1e-9)
    assert gradients[0].abs().sum() > 0


def test_the_loops_own_step_goes_before_the_counter() -> None:
    aligner = tiny_aligner(reward_coeff=0.0, release="stop", release_steps=2)
    batch, hidden = make_batch(4), torch.randn(4, 16, 32)
    assert aligner(batch.z, hidden=hidden, step=5).policy_loss == 0
    assert aligner(batch.z, hidden=hidden, step=0).policy_loss != 0


def test_validation_does_not_move_the_schedule() -> None:
    aligner = tiny_aligner(reward_coeff=0.0, release="linear", release_steps=4)
    batch, hidden = make_batch(4), torch.randn(4, 16, 32)
    aligner.eval()
    out = aligner(batch.z, hidden=hidden)
    torch.testing.assert_close(out.policy_loss, 0.5 * out.features_loss)
    aligner.train()
    aligner(batch.z, hidden=hidden)
    aligner.eval()
    for _ in range(3):
        out = aligner(batch.z, hidden=hidden)
    torch.testing.assert_close(out.policy_loss, 0.5 * out.features_loss)


# ---- parametrisations ----


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_x0_hat_in_place_of_a_velocity(path_type: str) -> None:
    aligner = tiny_aligner(features="none", path_type=path_type).eval()
    batch = make_batch(8)
    t = batch.t[:, None, None, None]
    velocity = torch.randn(8, 4, 8, 8)
    angle = t * math.pi / 2
    x_t = batch.x_t if path_type == "linear" else angle.cos() * batch.x0 + angle.sin() * batch.noise
    x0_hat = x_t - t * velocity if path_type == "linear" else angle.cos() * x_t - 2 / math.pi * angle.sin() * velocity
    from_velocity = aligner(batch.z, x0=batch.x0, x_t=x_t, t=batch.t, velocity=velocity)
    from_estimate = aligner(batch.z, x0=batch.x0, x_t=x_t, t=batch.t, x0_hat=x0_hat)
    torch.testing.assert_close(everything(from_estimate), everything(from_velocity), rtol=1e-4, atol=1e-5)


def test_the_true_velocity_of_a_cosine_path_gives_the_clean_latent() -> None:
    aligner, batch = tiny_aligner(features="none", path_type="cosine"), make_batch(8)
    angle = batch.t[:, None, None, None] * math.pi / 2
    x_t = angle.cos() * batch.x0 + angle.sin() * batch.noise
    velocity = math.pi / 2 * (angle.cos() * batch.noise - angle.sin() * batch.x0)
    out = aligner(batch.z, x0=batch.x0, x_t=x_t, t=batch.t, velocity=velocity)
    torch.testing.assert_close(out.rewards["fidelity"], torch.zeros(8), atol=1e-10, rtol=0)
    torch.testing.assert_close(out.rewards["perceptual"], torch.zeros(8), atol=1e-6, rtol=0)


# ---- construction ----


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, True),
        ({"reward_release_steps": 400}, False),
        ({"reward_release": "none"}, False),
        ({"reward_coeff": 0.0}, False),
    ],
)
def test_rewards_that_nobody_lets_go_of_are_warned_of(
    settings: dict[str, Any], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vrpo_plugin"):
        tiny_aligner(**settings)
    shown = ["rewards have 0.1 of their weight from the start" in r.getMessage() for r in caplog.records]
    assert shown == [True] * said


@pytest.mark.parametrize(
    "encoder", [(12,), [12], SimpleNamespace(dims=(12,), grid=(4, 4)), SimpleNamespace(dim=12, grid=None)]
)
def test_from_model_reads_the_sizes(model: TinySiT, encoder: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vrpo_plugin"):
        aligner = VRPOAligner.from_model(model, encoder, projector_dim=16, critic_width=16)
    _, record = caplog.records  # the first: that the run's length is not known
    assert "'hidden_dim': 32" in record.getMessage() and "blocks (1,)" in record.getMessage()
    assert (aligner.hidden_dim, aligner.depth, aligner.target_dims) == (32, 4, (12,))
    assert aligner.grids.tokens == (4, 4)
    assert aligner.critic is not None and aligner.critic.latent_shape == (4, 8, 8)
    align(model, aligner.attach(model), make_batch(4)).loss.backward()


def test_from_model_takes_the_hosts_depth_and_the_callers_word(model: TinySiT) -> None:
    model.encoder_depth = 3  # type: ignore[assignment]
    assert VRPOAligner.from_model(model, (12,), critic_width=16).layers == (3,)
    assert VRPOAligner.from_model(model, (12,), critic_width=16, encoder_depth=2).layers == (2,)
    aligner = VRPOAligner.from_model(model, SimpleNamespace(dims=(12,), grid=(6, 6)), critic_width=16)
    assert aligner.grids.tokens == (6, 6)
    aligner = VRPOAligner.from_model(model, SimpleNamespace(dims=(12,), grid=(6, 6)), token_grid=(2, 2))
    assert aligner.grids.tokens == (2, 2)


@pytest.mark.parametrize("missing", ["blocks", "pos_embed", "in_channels", "x_embedder"])
def test_from_model_names_what_a_model_lacks(model: TinySiT, missing: str) -> None:
    delattr(model, missing)
    with pytest.raises(HostNotFoundError, match=rf"TinySiT: expected blocks, .*, got .*{missing}.*\. Call VRPO"):
        VRPOAligner.from_model(model, (12,))


def test_a_reference_sit_is_a_host() -> None:
    model = create_sit("SiT-Ti/2", input_size=8, num_classes=10)
    aligner = VRPOAligner.from_model(model, (12,), projector_dim=16, critic_width=16).attach(model)
    assert aligner.layers == (2,) and aligner.critic is not None and aligner.critic.token_grid == (4, 4)
    batch = make_batch(4)
    out = align(model, aligner, batch)
    (denoising_loss(model(batch.x_t, batch.t, batch.y), batch) + out.loss).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    grad = model.get_parameter("blocks.0.adaLN_modulation.1.weight").grad
    assert grad is not None and grad.abs().sum() > 0


def test_a_configuration_and_overrides() -> None:
    config = VRPOConfig(proj_coeff=0.3, critic_width=16)
    aligner = VRPOAligner(
        hidden_dim=32, target_dims=(12,), depth=4, latent_shape=(4, 8, 8), config=config, scale="none"
    )
    assert (aligner.config.proj_coeff, aligner.config.critic_width, aligner.config.scale) == (0.3, 16, "none")
    assert config.scale == "group"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"proj_coef": 0.5}, r"VRPOConfig key: expected one of .*, got 'proj_coef'\. Did you mean 'proj_coeff'\?"),
        ({"latent_shape": None}, r"latent_shape: expected \(C, H, W\), for the critic, got None"),
        ({"latent_shape": (8, 8)}, r"latent_shape: expected \(C, H, W\)"),
        ({"built_in": ()}, r"rewards: expected at least one, or reward_coeff=0"),
        ({"target_dims": ()}, r"hidden_dim, depth, target_dims: expected >= 1"),
        ({"hidden_dim": 0}, r"hidden_dim, depth, target_dims: expected >= 1, got \(0, 4, \(12,\)\)"),
        ({"hidden_dim": None}, r"hidden_dim, depth, target_dims: expected >= 1, got \(None, 4, \(12,\)\)"),
        ({"target_dims": 12}, r"hidden_dim, depth, target_dims: expected >= 1"),
        ({"latent_shape": (4, 8.0, 8)}, r"latent_shape: expected \(C, H, W\)"),
        ({"token_grid": (4,)}, r"token_grid: expected \(h, w\) or None, got \(4,\)"),
        ({"prefix_tokens": 1, "projector": "conv"}, r"projector: expected 'mlp' with 1 tokens before the grid, got"),
        ({"prefix_tokens": -1}, r"prefix_tokens: expected a whole number >= 0, got -1"),
        ({"encoder_depth": "1"}, r"encoder_depth: expected a block number, got '1'"),
        ({"layers": (5,)}, r"layers: expected distinct block numbers from 1 to 4, got \(5,\)"),
        ({"rewards": ("semantic",)}, r"rewards: expected a mapping .*, got \('semantic',\)\. Name built-in rewards"),
        ({"black_box_rewards": [len]}, r"black_box_rewards: expected a mapping"),
    ],
)
def test_contradictions_are_errors_at_construction(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_aligner(**given)


@pytest.mark.keeps_random_state
def test_construction_draws_nothing_from_the_global_generators() -> None:
    aligner = tiny_aligner(black_box_rewards={"box": lambda s: mean_over_latent(s.x0_hat)})
    assert len(list(aligner.parameters())) > 10


@pytest.mark.keeps_random_state
def test_a_step_draws_nothing_from_the_global_generators(model: TinySiT) -> None:
    aligner = tiny_aligner(black_box_rewards={"box": lambda s: mean_over_latent(s.x0_hat)}).attach(model)
    align(model, aligner, make_batch(8), generator=torch.Generator().manual_seed(0)).loss.backward()


def test_construction_depends_on_the_seed() -> None:
    one, same = tiny_aligner(), tiny_aligner()
    torch.manual_seed(1)
    other = tiny_aligner()
    weights = [next(a.projectors.parameters()) for a in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# ---- checks of what a step is given ----


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("z", torch.randn(4, 16, 13), r"z: expected one \(B, N, D\) per encoder, D in \(12,\), got \[\(4, 16, 13\)\]"),
        ("z", torch.randn(64, 12), r"z: expected .*, got \[\(64, 12\)\]"),
        ("z", [], r"z: expected .*, got \[\]"),
        ("z", [torch.randn(4, 16, 12)] * 2, r"z: expected .*, got \[\(4, 16, 12\), \(4, 16, 12\)\]"),
        ("x0", None, r"x0: expected \(B, C, H, W\) with B=4, got None"),
        ("x0", torch.randn(4, 4, 64), r"x0: expected \(B, C, H, W\) with B=4, got \(4, 4, 64\)"),
        ("x0", torch.randn(3, 4, 8, 8), r"x0: expected .* with B=4, got \(3, 4, 8, 8\)"),
        ("x_t", torch.randn(4, 4, 8, 4), r"x_t: expected \(4, 4, 8, 8\) with B=4, got \(4, 4, 8, 4\)"),
        ("x_t", None, r"x_t: expected .*, got None"),
        ("velocity", torch.randn(4, 8, 8, 8), r"velocity or x0_hat: expected \(4, 4, 8, 8\).*, got \(4, 8, 8, 8\)"),
        ("velocity", None, r"velocity or x0_hat: expected .*, got None"),
        ("x0_hat", torch.randn(4, 4, 8), r"velocity or x0_hat: expected .*, got \(4, 4, 8\)"),
        ("t", None, r"t: expected \(4,\), floating, .*, got None"),
        ("t", torch.rand(4, 1), r"t: expected \(4,\), .*, got \(\(4, 1\), torch\.float32\)"),
        ("t", torch.arange(4), r"t: expected \(4,\), floating, .*, got \(\(4,\), torch\.int64\)"),
        (
            "hidden",
            torch.randn(4, 16, 31),
            r"hidden: expected one \(B=4, N, 32\) for each .*, got \[\(4, 16, 31\)\]",
        ),
        ("hidden", torch.randn(3, 16, 32), r"hidden: expected one \(B=4, N, 32\).*, got \[\(3, 16, 32\)\]"),
        ("hidden", [torch.randn(4, 16, 32)] * 2, r"hidden: expected .* blocks \(1,\), got"),
        ("hidden", torch.randn(4, 16, 32).double(), r"hidden: expected torch\.float32 like .*, got \[torch\.float64\]"),
        ("hidden", torch.ones(4, 16, 32).long(), r"hidden: expected .* of torch\.int64, not floating"),
        ("hidden", torch.randn(4, 0, 32), r"hidden: expected .*, got \[\(4, 0, 32\)\]"),
        ("z", torch.tensor(1.0), r"z: expected .*, got \[\(\)\]"),
        ("z", torch.ones(4, 16, 12).long(), r"z: expected .* of torch\.int64, not floating"),
        ("z", [None], r"z: expected .*, got \[None\]"),
        ("z", "tokens", r"z: expected .*, got \['str'\]"),
        ("x0", torch.ones(4, 4, 8, 8).long(), r"x0: expected .* of torch\.int64, not floating"),
        ("velocity", [1.0], r"velocity or x0_hat: expected .*, got list"),
    ],
)
def test_shapes_that_do_not_fit_are_errors_on_the_first_call(name: str, given: Any, message: str) -> None:
    batch, aligner = make_batch(4), tiny_aligner()
    right: dict[str, Any] = {"z": batch.z[0], "hidden": torch.randn(4, 16, 32), **latents(batch)}
    with pytest.raises(ShapeError, match=message + r".*\. Pass the tensors of one batch\."):
        aligner(**{**right, name: given})
    assert torch.isfinite(aligner(**right).loss) and aligner.step == 1


LATER = {
    "more latents": lambda right: {"x0": torch.randn(8, 4, 8, 8)},
    "fewer encoder tokens": lambda right: {"z": right["z"][:2]},
    "another encoder": lambda right: {"z": torch.randn(4, 16, 13)},
    "one prediction": lambda right: {"velocity": right["velocity"][:1]},
    "one time": lambda right: {"t": right["t"][:1]},
    "hidden tokens of another batch": lambda right: {"hidden": torch.randn(3, 16, 32)},
    "tokens of no grid": lambda right: {"z": torch.randn(4, 15, 12)},
    "another dtype": lambda right: {"hidden": right["hidden"].double()},
}


@pytest.mark.parametrize("change", LATER.values(), ids=LATER)
@pytest.mark.parametrize("calls_before", [1, 3])
def test_what_does_not_fit_is_noticed_on_later_calls_too(change: Any, calls_before: int) -> None:
    batch, aligner = make_batch(4), tiny_aligner()
    right: dict[str, Any] = {"z": batch.z[0], "hidden": torch.randn(4, 16, 32), **latents(batch)}
    for _ in range(calls_before):
        aligner(**right)
    with pytest.raises(ShapeError):
        aligner(**{**right, **change(right)})
    larger = make_batch(8)
    assert torch.isfinite(aligner(larger.z, hidden=torch.randn(8, 16, 32), **latents(larger)).loss)


TIMES = {
    "whole timesteps": torch.tensor([0.0, 250.0, 500.0, 999.0]),
    "negative": torch.tensor([-0.2, 0.1, 0.2, 0.3]),
    "sigmas": torch.tensor([0.1, 0.5, 14.6, torch.nan]),
    "log-snr": torch.tensor([-4.0, 0.0, torch.inf, 1.0]),
}


@pytest.mark.parametrize("t", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("features", ["policy", "none"])
def test_times_of_another_convention_are_refused(t: torch.Tensor, features: str) -> None:
    batch, aligner = make_batch(4), tiny_aligner(features=features)
    hidden = torch.randn(4, 16, 32)
    for _ in range(2):  # as long as no call was right
        with pytest.raises(ConfigError, match=r"t: expected times in \[0, 1\], .* Divide timesteps by their number"):
            aligner(batch.z, hidden=hidden, **{**latents(batch), "t": t})
    assert aligner.step == 0
    assert torch.isfinite(aligner(batch.z, hidden=hidden, **latents(batch)).loss)


def test_times_at_the_ends_and_times_that_are_not_finite_are_left_to_the_objective() -> None:
    batch = make_batch(4)
    for t in ([0.0, 1.0, 1.0000001, -1e-7], [torch.nan, torch.inf, 0.5, -torch.inf]):
        tiny_aligner()(batch.z, hidden=torch.randn(4, 16, 32), **{**latents(batch), "t": torch.tensor(t)})


def test_the_remedy_fits() -> None:
    batch, aligner = make_batch(4), tiny_aligner()
    right: dict[str, Any] = {"z": batch.z[0], "hidden": torch.randn(4, 16, 32), **latents(batch)}
    for change, remedy in (
        ({"hidden": torch.randn(4, 16, 32).bfloat16()}, r"inside the model's torch\.autocast"),
        ({"velocity": torch.randn(4, 8, 8, 8)}, r"output\.chunk\(2, dim=1\)\[0\]"),
        ({"z": torch.randn(4, 16, 13)}, "target_dims="),
    ):
        with pytest.raises(ShapeError, match=remedy):
            aligner(**{**right, **change})
    with torch.autocast("cpu", torch.bfloat16):
        aligner(**{**right, "hidden": torch.randn(4, 16, 32).bfloat16()})


def test_latents_of_another_size_than_the_critics_are_an_error() -> None:
    batch, aligner = make_batch(4, latent_shape=(4, 16, 16)), tiny_aligner(features="none")
    with pytest.raises(ShapeError, match=r"latent: expected \(B, 4, 8, 8\), got \(4, 4, 16, 16\)"):
        aligner(batch.z, **latents(batch))


@pytest.mark.parametrize(("size", "settings"), [(8, {}), (1, {}), (10, {"reward_coeff": 0.0})])
def test_nothing_is_said_of_what_fits(size: int, settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    aligner, batch = tiny_aligner(reward_release="none", **settings), make_batch(size)
    with caplog.at_level(logging.WARNING, "vrpo_plugin"), warnings.catch_warnings():
        warnings.simplefilter("error")
        aligner(batch.z, hidden=torch.randn(size, 16, 32), **latents(batch))
    assert not caplog.records


# ---- training ----


def test_a_reloaded_aligner_goes_on_the_same(model: TinySiT) -> None:
    settings: dict[str, Any] = {"release": "linear", "release_steps": 10}
    aligner = tiny_aligner(**settings).attach(model)
    optimizer = torch.optim.Adam(model.parameters())
    for seed in range(3):
        optimizer.zero_grad()
        align(model, aligner, make_batch(8, seed=seed)).loss.backward()
        optimizer.step()
    torch.manual_seed(5)
    other = tiny_aligner(**settings)
    other.load_state_dict(copy.deepcopy(aligner.state_dict()), strict=True)
    batch, hidden = make_batch(8, seed=3), torch.randn(8, 16, 32)
    outs = [a(batch.z, hidden=hidden, **latents(batch)) for a in (aligner, other)]
    torch.testing.assert_close(everything(outs[1]), everything(outs[0]), rtol=0, atol=0)
    assert aligner.step == other.step == 4
    assert len(aligner.state_dict()) == len(list(aligner.parameters())) + 2 + 4  # step; moments; those of the watch


def test_validation_leaves_no_trace(model: TinySiT) -> None:
    aligner, batch = tiny_aligner().attach(model), make_batch(8)
    align(model, aligner, batch)
    before = copy.deepcopy(aligner.state_dict())
    model.eval()
    with torch.no_grad():
        velocity = model(batch.x_t, batch.t, batch.y)
        out = aligner(batch.z, **{**latents(batch), "velocity": velocity}, hidden=torch.randn(8, 16, 32))
    assert not out.loss.requires_grad and torch.isfinite(out.loss)
    after = aligner.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.train()
    align(model, aligner, batch)
    assert aligner.step == 2


def test_validation_with_taps_wants_hidden_tokens(model: TinySiT) -> None:
    aligner, batch = tiny_aligner().attach(model.eval()), make_batch(8)
    with torch.no_grad(), pytest.raises(HostNotFoundError, match="or pass hidden="):
        align(model, aligner, batch)


def accumulated(model: nn.Module, aligner: VRPOAligner, batch: Batch, parts: int) -> dict[str, Any]:
    model.zero_grad()
    for part in torch.arange(len(batch.x0)).chunk(parts):
        (align(model, aligner, batch[part]).loss / parts).backward()
    return gradients(model)


@pytest.mark.parametrize("parts", [2, 8])
# float32: gradients of order 0.1 out of sums in another order. float64: the same, nine digits further down.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_accumulation_equals_one_batch(model: TinySiT, dtype: torch.dtype, tolerance: float, parts: int) -> None:
    aligner = tiny_aligner(**FIXED).attach(model)
    model.to(dtype)
    batch = make_batch(8).to(dtype)
    at_once = accumulated(model, aligner, batch, 1)
    in_parts = accumulated(model, aligner, batch, parts)
    torch.testing.assert_close(in_parts, at_once, rtol=0, atol=tolerance)
    # Biases that a normalisation takes away again have no gradient.
    weights = [grad for name, grad in at_once.items() if name.endswith("weight")]
    assert all(grad is not None and grad.abs().max() > 10 * tolerance for grad in weights)


# ---- low precision ----


def test_autocast_computes_the_losses_in_float32(model: TinySiT) -> None:
    # Without a scale the memory of the first call does not act on the second.
    aligner, batch = tiny_aligner(scale="none", reward_coeff=1.2).attach(model), make_batch(16)
    exact = align(model, aligner, batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = align(model, aligner, batch)
    out.loss.backward()
    for name in ("loss", "policy_loss", "features_loss", "generation_loss", "critic_loss"):
        assert getattr(out, name).dtype == torch.float32, name
        # bfloat16 keeps 8 bits, a relative error of 0.4% per layer; these are means of cosines and distances of
        # order one over hundreds of tokens.
        torch.testing.assert_close(getattr(out, name), getattr(exact, name), rtol=0, atol=0.01)
    assert all(value.dtype == torch.float32 for value in (*out.rewards.values(), *out.metrics.values()))
    assert all(torch.isfinite(value).all() for value in (*out.rewards.values(), *out.metrics.values()))
    assert all(grad is not None and torch.isfinite(grad).all() for grad in gradients(model).values())


def test_a_model_in_bfloat16_trains(model: TinySiT) -> None:
    aligner, batch = tiny_aligner().attach(model), make_batch(16)
    exact = align(model, aligner, batch)
    model.bfloat16()
    velocity = model(batch.x_t.bfloat16(), batch.t, batch.y)
    out = aligner(batch.z, **{**latents(batch), "velocity": velocity})
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact.loss, rtol=0, atol=0.02)
    out.loss.backward()
    assert all(grad is not None and torch.isfinite(grad).all() for grad in gradients(model).values())


def test_tiny_sizes_fit_the_tiny_model(model: TinySiT) -> None:
    assert TINY["hidden_dim"] == model.pos_embed.shape[-1] and TINY["depth"] == len(model.blocks)

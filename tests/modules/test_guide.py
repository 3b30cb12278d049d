"""Guided sampling: what moves, what does not, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.tiny_sit import TinySiT, make_batch, tiny_aligner
from torch import Tensor, nn

from vrpo_plugin import CheckpointError, ConfigError, HostNotFoundError, RewardGuide, ShapeError
from vrpo_plugin.functional.guidance import estimate_error
from vrpo_plugin.functional.interpolant import clean_estimate
from vrpo_plugin.functional.rewards import semantic_reward
from vrpo_plugin.modules.critic import save_critic
from vrpo_plugin.modules.guide_parts import GuideParts, class_prototypes
from vrpo_plugin.modules.guided_model import GuidedModel
from vrpo_plugin.modules.parametrisation import of_path, of_sit_path
from vrpo_plugin.modules.projector import build_projector

BATCH = make_batch(6)
EVERYWHERE = {"interval": (0.0, 1.0)}


def trained(**overrides: Any) -> TinySiT:
    torch.manual_seed(0)
    model = TinySiT()
    tiny_aligner(**overrides).attach(model)
    return model.eval()


@torch.no_grad()
def guided(guide: RewardGuide, batch: Any = BATCH) -> tuple[Tensor, Tensor]:
    """The model's velocity of a batch, as it is and guided."""
    with guide.watch() as hidden:
        velocity = guide.model(batch.x_t, batch.t, batch.y)
    return velocity, guide.guide(velocity, batch.x_t, batch.t, batch.y, hidden, of_path())


def self_reward(model: TinySiT, velocity: Tensor, hidden: Tensor) -> Tensor:
    x0_hat = clean_estimate(BATCH.x_t, velocity, BATCH.t)
    return semantic_reward(model.vrpo.critic(x0_hat).tokens, [model.vrpo.projectors[0](hidden)])


def test_strength_0_is_the_model_s_own_output() -> None:
    velocity, moved = guided(RewardGuide(trained(), strength=0))
    assert moved is velocity


def test_the_reward_of_each_sample_rises() -> None:
    model = trained()
    guide = RewardGuide(model, strength=0.02, **EVERYWHERE)
    with torch.no_grad(), guide.watch() as hidden:
        velocity = model(BATCH.x_t, BATCH.t, BATCH.y)
        moved = guide.guide(velocity, BATCH.x_t, BATCH.t, BATCH.y, hidden, of_path())
        before, after = (self_reward(model, v, hidden[0]) for v in (velocity, moved))
    assert (after > before).all()


def test_the_estimate_moves_by_a_share_of_its_error() -> None:
    velocity, moved = guided(RewardGuide(trained(), strength=0.3, data_std=0.7, **EVERYWHERE))
    change = clean_estimate(BATCH.x_t, moved, BATCH.t) - clean_estimate(BATCH.x_t, velocity, BATCH.t)
    expected = 0.3 * estimate_error(BATCH.t, 0.7)
    torch.testing.assert_close(change.square().mean((1, 2, 3)).sqrt(), expected, rtol=1e-3, atol=1e-4)


def test_no_gradient_reaches_transformer_projector_or_critic() -> None:
    model = trained()
    guide = RewardGuide(model, strength=0.3, **EVERYWHERE)
    backwards: list[nn.Module] = []
    for module in (*model.blocks, model.final_layer, *model.vrpo.projectors[0]):
        module.register_full_backward_hook(lambda m, *_: backwards.append(m))
    with guide.watch() as hidden:
        velocity = model(BATCH.x_t, BATCH.t, BATCH.y)  # gradients are on
    guide.guide(velocity, BATCH.x_t, BATCH.t, BATCH.y, hidden, of_path())
    assert backwards == []
    assert all(p.grad is None for p in model.parameters())


def test_a_sample_is_guided_by_itself_alone() -> None:
    guide = RewardGuide(trained(), strength=0.3, **EVERYWHERE)
    _, together = guided(guide)
    alone = torch.cat([guided(guide, BATCH[i : i + 1])[1] for i in range(len(BATCH.t))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_outside_the_interval_nothing_moves() -> None:
    low, high = 0.3, 0.7
    velocity, moved = guided(RewardGuide(trained(), strength=0.3, interval=(low, high)))
    inside = (BATCH.t >= low) & (BATCH.t <= high)
    assert 0 < inside.sum() < len(inside)
    same = (velocity == moved).flatten(1).all(1)
    assert torch.equal(same, ~inside)


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
def test_bfloat16_model_under_any_mode_of_the_host(no_grad: Any) -> None:
    model = trained().to(torch.bfloat16)
    batch = BATCH.to(torch.bfloat16)
    guide = RewardGuide(model, strength=0.3, **EVERYWHERE)
    with no_grad(), guide.watch() as hidden:
        velocity = model(batch.x_t, batch.t, batch.y)
        moved = guide.guide(velocity, batch.x_t, batch.t, batch.y, hidden, of_path())
    assert moved.dtype == torch.bfloat16 and moved.isfinite().all()
    assert (moved != velocity).flatten(1).any(1).all()


def test_autocast_does_not_reach_the_critic() -> None:
    model, seen = trained(), []
    model.vrpo.critic.heads[0].register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        guided(RewardGuide(model, strength=0.3))
    assert seen == [torch.float32]


def test_a_sample_that_is_not_finite_leaves_the_others_alone() -> None:
    guide = RewardGuide(trained(), strength=0.3, **EVERYWHERE)
    _, expected = guided(guide)
    broken = BATCH[torch.arange(6)]
    broken.x0[2, 0, 0, 0] = torch.nan
    _, moved = guided(guide, broken)
    others = torch.arange(6) != 2
    torch.testing.assert_close(moved[others], expected[others])


def test_no_hook_stays_and_a_copy_of_the_model_is_not_read() -> None:
    model = trained()
    hooks = [len(block._forward_hooks) for block in model.blocks]
    guide = RewardGuide(model, strength=0.3)
    guided(guide)
    assert [len(block._forward_hooks) for block in model.blocks] == hooks
    copied = copy.deepcopy(model)
    with torch.no_grad(), guide.watch() as hidden:
        velocity = copied(BATCH.x_t, BATCH.t, BATCH.y)
    with pytest.raises(HostNotFoundError, match="the model that the guide"):
        guide.guide(velocity, BATCH.x_t, BATCH.t, BATCH.y, hidden, of_path())


def test_a_model_with_projectors_of_its_own_needs_only_a_critic(tmp_path: Path) -> None:
    """As REPA's: no aligner, ``projectors`` and ``encoder_depth``."""
    donor, model = trained(), TinySiT()
    model.load_state_dict({k: v for k, v in donor.state_dict().items() if not k.startswith("vrpo")})
    model.projectors, model.encoder_depth = donor.vrpo.projectors, donor.vrpo.layers[0]
    file = tmp_path / "critic.safetensors"
    save_critic(donor.vrpo.critic, file, record={"made_for": {"encoder": "e"}})
    own = RewardGuide(model, critic=file, strength=0.3)
    assert torch.equal(guided(own)[1], guided(RewardGuide(donor, strength=0.3))[1])
    assert own.parts.record == {"made_for": {"encoder": "e"}}
    with pytest.raises(ConfigError, match="train-critic"):
        RewardGuide(model)


@pytest.mark.parametrize("settings", [{}, {"layers": (1, 3)}, {"target_dims": (12, 20)}, {"projector": "conv"}])
def test_a_saved_guide_guides_alike(settings: dict[str, Any], tmp_path: Path) -> None:
    model, file = trained(**settings), tmp_path / "guide.safetensors"
    guide = RewardGuide(model, strength=0.3, **EVERYWHERE)
    guide.save(file)
    expected = guided(guide)[1]
    model.vrpo.detach(model)
    state = torch.get_rng_state()
    loaded = RewardGuide.load(file, model, strength=0.3, **EVERYWHERE)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(guided(loaded)[1], expected)


def test_prototypes_lead_to_their_class_and_null_labels_nowhere(tmp_path: Path) -> None:
    model = trained()
    labels = torch.arange(40) % 9
    tokens = torch.randn(40, 16, 12, generator=torch.Generator().manual_seed(0))
    prototypes = class_prototypes(zip(tokens.split(7), labels.split(7), strict=True), 9)
    torch.testing.assert_close(prototypes[4], tokens[labels == 4].mean(0))
    parts = GuideParts.of(model)
    parts = GuideParts(parts.critic, parts.projectors, parts.layers, prototypes=(prototypes,))
    guide = RewardGuide(model, parts, reward="prototype", strength=0.02, **EVERYWHERE)
    batch = BATCH[torch.arange(6)]
    batch.y[:] = torch.tensor([0, 1, 2, 3, 8, 9])  # 9 is the null label here
    velocity, moved = guided(guide, batch)
    assert torch.equal(velocity[5], moved[5])
    before, after = (
        semantic_reward(model.vrpo.critic(clean_estimate(batch.x_t, v, batch.t)[:5]).tokens, [prototypes[batch.y[:5]]])
        for v in (velocity, moved)
    )
    assert (after > before).all()
    guide.save(tmp_path / "guide.safetensors")
    loaded = RewardGuide.load(tmp_path / "guide.safetensors", model, reward="prototype", strength=0.02, **EVERYWHERE)
    assert torch.equal(guided(loaded, batch)[1], moved)


def test_a_callable_needs_nothing_else() -> None:
    torch.manual_seed(0)
    model = TinySiT().eval()
    seen: list[Tensor] = []

    def brightness(x0_hat: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen.append(t)
        return x0_hat.mean((1, 2, 3))

    velocity, moved = guided(RewardGuide(model, reward=brightness, strength=0.5, **EVERYWHERE))
    change = clean_estimate(BATCH.x_t, moved, BATCH.t) - clean_estimate(BATCH.x_t, velocity, BATCH.t)
    expected = 0.5 * estimate_error(BATCH.t, 1.0)  # 4 channels: latents
    torch.testing.assert_close(change, expected[:, None, None, None].expand_as(change), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(seen[0], BATCH.t)
    wrong = RewardGuide(model, reward=lambda x, t, y: x.mean(), strength=0.5)
    with pytest.raises(ShapeError, match="one reward per sample"):
        guided(wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "semantic"}, "self, prototype or a callable"),
        ({"strength": -1}, "at least 0"),
        ({"strength": float("nan")}, "at least 0"),
        ({"interval": (0.7, 0.2)}, "low <= high"),
        ({"interval": (0, 2)}, "low <= high"),
        ({"data_std": 0}, "above 0"),
        ({"reward": "prototype"}, "prototypes"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardGuide(trained(), **settings)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = trained()
    parts = GuideParts.of(model)
    with pytest.raises(ConfigError, match="one projector per layer"):
        RewardGuide(model, GuideParts(parts.critic, parts.projectors, (1, 2)))
    with pytest.raises(HostNotFoundError, match="blocks"):
        RewardGuide(model, GuideParts(parts.critic, parts.projectors, (7,)))
    with pytest.raises(HostNotFoundError, match="blocks"):
        RewardGuide(nn.Linear(1, 1), parts)
    with pytest.raises(ConfigError, match="none"):
        GuideParts.of(nn.Linear(1, 1), parts.critic)
    for content in (b"", b"no file of ours"):
        (tmp_path / "guide.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="vrpo export"):
            RewardGuide.load(tmp_path / "guide.safetensors", model)
    with pytest.raises(CheckpointError, match="vrpo export"):
        RewardGuide.load(tmp_path / "missing.safetensors", model)


class Combining(TinySiT):
    """As SiT's: combines the halves itself."""

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        first, second = self(torch.cat([half, half]), t, y).chunk(2)
        combined = second + cfg_scale * (first - second)
        return torch.cat([combined, combined])


def pair() -> tuple[TinySiT, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Combining()
    tiny_aligner().attach(model)
    x, t, y = BATCH.x_t, BATCH.t, BATCH.y % 9
    return model.eval(), x, torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 9)])


@torch.no_grad()
def test_halves_that_the_host_combines_give_the_guided_combination() -> None:
    """REPA's sampler combines what the model returns; the step is that on the combined estimate."""
    model, x, both, t, y = pair()
    guide, scale = RewardGuide(model, strength=0.3, **EVERYWHERE), 1.7
    first, second = guide.wrap(cfg_scale=scale, null_label=9)(both, t, y=y).chunk(2)
    with guide.watch() as hidden:
        conditional, unconditional = model(both, t, y).chunk(2)
    combined = unconditional + scale * (conditional - unconditional)
    expected = guide.guide(combined, x, t[:6], y[:6], hidden, of_path())
    torch.testing.assert_close(second + scale * (first - second), expected, rtol=1e-4, atol=1e-5)
    assert (expected - combined).abs().max() > 1e-3


@torch.no_grad()
def test_a_model_that_combines_itself() -> None:
    model, _, both, t, y = pair()
    guide = RewardGuide(model, strength=0.3, **EVERYWHERE)
    wrapped = guide.wrap(model)
    first, second = wrapped.forward_with_cfg(both, t, y, 1.7).chunk(2)
    halves = guide.wrap(cfg_scale=1.7, null_label=9)(both, t, y=y).chunk(2)
    torch.testing.assert_close(first, halves[1] + 1.7 * (halves[0] - halves[1]), rtol=1e-4, atol=1e-5)
    assert torch.equal(first, second)


@torch.no_grad()
def test_sit_s_time_and_direction_give_the_same_estimate() -> None:
    model, x, _, t, _ = pair()
    guide = RewardGuide(model, strength=0.3, **EVERYWHERE)
    y, t = BATCH.y, t[:6]

    class Reversed(nn.Module):
        """The same field in SiT's units."""

        blocks = model.blocks

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return -model(x, 1 - t, y)

    ours = guide.wrap()(x, t, y)
    theirs = RewardGuide(Reversed(), guide.parts, strength=0.3, **EVERYWHERE).wrap(host="sit")(x, 1 - t, y)
    torch.testing.assert_close(theirs, -ours, rtol=1e-4, atol=1e-5)
    for path, name in (("linear", "Linear"), ("cosine", "GVP")):
        a, b = of_path(path), of_sit_path(name)
        for one, other in zip(a.estimate(x, ours, t), b.estimate(x, -ours, 1 - t), strict=True):
            torch.testing.assert_close(one.abs(), other.abs(), rtol=1e-3, atol=1e-4)


def test_the_wrapper_is_the_model_in_all_else() -> None:
    model = trained()
    wrapped = RewardGuide(model, strength=0.0).wrap()
    assert wrapped.in_channels == 4 and wrapped.eval() is model
    with torch.no_grad():
        assert torch.equal(wrapped(BATCH.x_t, BATCH.t, y=BATCH.y), model(BATCH.x_t, BATCH.t, BATCH.y))
    assert copy.copy(wrapped).in_channels == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "flux"}, "repa, sit or dit"),
        ({"host": "dit"}, "create_diffusion"),
        ({"path_type": "VP", "host": "sit"}, "Linear"),
        ({"path_type": "Linear"}, "linear"),
        ({"cfg_scale": 0.5}, "at least 1"),
        ({"model": TinySiT()}, "own model"),
    ],
)
def test_wrappers_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardGuide(trained()).wrap(**settings)


def test_a_scale_without_a_null_label_is_refused() -> None:
    model, _, both, t, y = pair()
    with pytest.raises(ConfigError, match="null_label"), torch.no_grad():
        RewardGuide(model, strength=0.3).wrap(cfg_scale=1.5)(both, t, y)


def test_conv_projectors_of_a_file_are_built_for_the_latents(tmp_path: Path) -> None:
    parts = GuideParts.of(trained())
    conv = build_projector("conv", 32, 12, sides=(8, 8))
    GuideParts(parts.critic, (conv,), (2,)).save(tmp_path / "guide.safetensors")
    (loaded,) = GuideParts.load(tmp_path / "guide.safetensors").projectors
    hidden = torch.randn(2, 16, 32)
    assert torch.equal(loaded(hidden), conv(hidden))
    assert isinstance(GuidedModel(RewardGuide(trained())), GuidedModel)

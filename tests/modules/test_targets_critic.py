"""``targets="critic"``: the frozen critic's tokens of the clean latents are the targets of both readouts."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.tiny_sit import TINY, Batch, TinySiT, make_batch
from torch import Tensor

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.errors import CheckpointError, ConfigError, ShapeError
from vrpo_plugin.modules.aligner import VRPOAligner, VRPOOutput
from vrpo_plugin.modules.critic import LatentCritic, save_critic

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "one reward": {"rewards_of_config": ("semantic",)},
    "spatial": {"target_norm": "spatial"},
    "generation alone": {"features": "none"},
    "features alone": {"reward_coeff": 0.0},
    "no reward of the critic": {"rewards_of_config": ("fidelity",)},
    "all layers": {"layers": "all"},
}


@pytest.fixture
def critic_file(tmp_path: Path) -> Path:
    path = tmp_path / "critic.safetensors"
    save_critic(LatentCritic((4, 8, 8), (12,), (4, 4), width=16), path, record={"made_for": {"encoder": "any (0)"}})
    return path


def aligner_of_critic(path: Path, targets: str = "critic", **overrides: Any) -> VRPOAligner:
    if names := overrides.pop("rewards_of_config", None):
        overrides["config"] = VRPOConfig(rewards=names)
    torch.manual_seed(0)
    return VRPOAligner(**{**TINY, **overrides}, targets=targets, critic_checkpoint=str(path), critic_trainable=False)


def step(model: TinySiT, aligner: VRPOAligner, batch: Batch, z: Tensor | None) -> VRPOOutput:
    velocity = model(batch.x_t, batch.t, batch.y)
    return aligner(z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity, y=batch.y)


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_same_tokens_given_by_hand_bit_by_bit(name: str, critic_file: Path) -> None:
    critic = LatentCritic((4, 8, 8), (12,), (4, 4), width=16)
    other = aligner_of_critic(critic_file)
    assert other.critic is not None
    critic.load_state_dict(other.critic.state_dict())
    results = []
    for targets in ("critic", "encoder"):
        torch.manual_seed(1)
        model = TinySiT()
        aligner = aligner_of_critic(critic_file, targets, **SETTINGS[name]).attach(model)
        found: list[Any] = []
        for seed in range(3):
            batch = make_batch(8, seed=seed)
            with torch.no_grad():
                z = None if targets == "critic" else critic(batch.x0).tokens[0]
            out = step(model, aligner, batch, z)
            model.zero_grad()
            out.loss.backward()
            metrics = {k: v for k, v in out.metrics.items() if k != "vrpo/critic_cos"}
            grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
            found.append((out.loss.detach(), out.rewards, metrics, grads))
        results.append(found)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)
    assert any(grad.abs().sum() > 0 for grad in results[0][-1][-1].values())


@pytest.mark.parametrize(
    ("name", "views"), [("default", 2), ("one reward", 2), ("features alone", 1), ("no reward of the critic", 1)]
)
def test_the_critic_looks_once_at_clean_latents(name: str, views: int, critic_file: Path) -> None:
    model = TinySiT()
    aligner = aligner_of_critic(critic_file, **SETTINGS[name]).attach(model)
    assert aligner.critic is not None
    seen: list[Tensor] = []
    aligner.critic.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    batch = make_batch(8)
    out = step(model, aligner, batch, None)
    assert len(seen) == views and sum(torch.equal(x, batch.x0) for x in seen) == 1
    assert "vrpo/critic_cos" not in out.metrics
    out.loss.backward()
    assert all(p.grad is None for p in aligner.critic.parameters())


def test_the_targets_stay_when_the_rewards_are_over(critic_file: Path) -> None:
    model = TinySiT()
    aligner = aligner_of_critic(critic_file, reward_release_steps=10, reward_floor=0.0).attach(model)
    assert aligner.critic is not None
    seen: list[Tensor] = []
    aligner.critic.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    batch = make_batch(8)
    velocity = model(batch.x_t, batch.t, batch.y)
    out = aligner(x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity, step=10)
    assert len(seen) == 1 and out.features_loss.isfinite() and out.features_loss != 0
    assert out.generation_loss == 0 and "vrpo/critic_cos" not in out.metrics


def test_a_sample_that_is_not_finite_is_left_out(critic_file: Path) -> None:
    def loss_and_gradients(batch: Batch) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(1)
        model = TinySiT()
        aligner = aligner_of_critic(critic_file).attach(model)
        out = step(model, aligner, batch, None)
        out.loss.backward()
        return out.loss.detach(), [p.grad for p in aligner.parameters() if p.grad is not None]

    batch = make_batch(8)
    batch.x0[3, 0, 0, 0] = torch.nan
    rest = torch.arange(8) != 3
    (loss, gradients), expected = loss_and_gradients(batch), loss_and_gradients(batch[rest])
    assert gradients and all(g.isfinite().all() for g in gradients)
    torch.testing.assert_close((loss, gradients), expected, rtol=1e-4, atol=1e-6)


def test_no_collapse_is_seen_where_the_critic_has_nobody_to_agree_with(critic_file: Path) -> None:
    model = TinySiT()
    aligner = aligner_of_critic(critic_file).attach(model)
    step(model, aligner, make_batch(8), None)
    assert aligner.generation is not None
    watch = aligner.generation.watch
    assert watch.updates == 1 and watch.reason == 0 and watch.best[0] == 0


def test_sizes_come_from_the_critics_file(critic_file: Path) -> None:
    settings: dict[str, Any] = {"critic_checkpoint": str(critic_file), "critic_trainable": False, "critic_width": 16}
    aligner = VRPOAligner.from_model(TinySiT(), targets="critic", **settings)
    assert aligner.target_dims == (12,) and aligner.grids.tokens == (4, 4)
    assert VRPOAligner.from_model(TinySiT(), None, config=VRPOConfig(targets="critic", **settings)).target_dims == (12,)
    with pytest.raises(ConfigError, match=r"encoder: expected the frozen encoder, or targets='critic'"):
        VRPOAligner.from_model(TinySiT())


def test_what_is_refused(critic_file: Path, tmp_path: Path) -> None:
    for given in ({}, {"critic_checkpoint": str(critic_file)}):
        with pytest.raises(ConfigError, match=r"critic_trainable: expected False, .*targets='critic', got True"):
            VRPOConfig(targets="critic", **given)
    with pytest.raises(ConfigError, match=r"targets: expected one of .*got 'encodr'"):
        VRPOConfig(targets="encodr")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"none.safetensors"):
        aligner_of_critic(tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match=r"targets: expected 'encoder' with 1 tokens before the grid"):
        aligner_of_critic(critic_file, prefix_tokens=1)
    model, batch = TinySiT(), make_batch(8)
    aligner = aligner_of_critic(critic_file).attach(model)
    with pytest.raises(ConfigError, match=r"z: expected none with targets='critic', got 'Tensor'\. Leave it out"):
        step(model, aligner, batch, batch.z[0])
    with pytest.raises(ShapeError, match=r"x0: expected clean latents, for targets='critic', got None"):
        aligner(x_t=batch.x_t, t=batch.t, velocity=batch.velocity)
    other = TinySiT()
    of_encoder = aligner_of_critic(critic_file, "encoder").attach(other)
    with pytest.raises(ShapeError, match=r"z: expected one \(B, N, D\)"):
        step(other, of_encoder, batch, None)


@pytest.mark.parametrize("name", ["default", "features alone"])
def test_a_checkpoint_brings_the_critic_back(name: str, critic_file: Path) -> None:
    aligner = aligner_of_critic(critic_file, **SETTINGS[name])
    state = copy.deepcopy(aligner.state_dict())
    assert any("critic.stem" in key for key in state)
    aligner.load_state_dict(state)


def test_the_code_of_the_page_runs(critic_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(critic_file.parent)
    page = (Path(__file__).resolve().parents[2] / "docs" / "critic.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    attach, _, step_ = block.partition("out = ")
    batch, model = make_batch(8), TinySiT()
    # The critic here is narrower than the default.
    names: dict[str, Any] = {"model": model}
    exec(attach.replace("critic_trainable=False", "critic_trainable=False, critic_width=16"), names)
    names |= {"x0": batch.x0, "x_t": batch.x_t, "t": batch.t, "y": batch.y}
    names["velocity"] = model(batch.x_t, batch.t, batch.y)
    exec(f"out = {step_}", names)
    assert names["out"].loss.isfinite()

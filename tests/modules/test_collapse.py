"""Collapse of critic or rewards: seen where it happens, not where it does not, and then the rewards are let go of."""

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fakes.gloo import on_two_processes
from fakes.tiny_sit import TinySiT, align, denoising_loss, gradients, make_batch, tiny_aligner

from vrpo_plugin.functional import levels
from vrpo_plugin.functional.rewards import RewardState
from vrpo_plugin.hosts.metrics import Tracker
from vrpo_plugin.modules.collapse import SIGNALS, WARM_UP, CollapseWatch, describe_collapse
from vrpo_plugin.modules.standstill import END_LOOK

HEALTHY = {"agreement": 0.8, "spread": 0.2, "fidelity": -0.1, "reward": 0.5}
LONG = 400  # updates


def feed(watch: CollapseWatch, updates: int, **changed: float) -> int:
    for _ in range(updates):
        watch.update(**{name: torch.tensor(value) for name, value in (HEALTHY | changed).items()})
    return int(watch.reason)


@pytest.mark.parametrize(
    ("reason", "changed"),
    [(1, {"agreement": 0.3}), (2, {"spread": 0.0}), (3, {"fidelity": -0.2}), (3, {"fidelity": -0.2, "reward": 0.9})],
    ids=["critic", "no spread", "fidelity", "fidelity, while the reward rises"],
)
def test_a_collapse_is_found_and_stays(reason: int, changed: dict[str, float]) -> None:
    watch = CollapseWatch()
    assert feed(watch, LONG) == 0 and watch.share == 1
    assert feed(watch, LONG, **changed) == reason and watch.share == 0
    assert feed(watch, LONG) == reason, "healthy again, and too late"
    assert SIGNALS[reason - 1][2] in describe_collapse(reason)


@pytest.mark.parametrize("best", [0.02, 0.09])
def test_what_has_never_been_above_noise_cannot_collapse(best: float) -> None:
    watch = CollapseWatch()
    assert feed(watch, LONG, agreement=best) == 0
    assert feed(watch, LONG, agreement=best / 30) == 0, "an untrained critic, or a long warm-up"
    assert feed(watch, LONG, agreement=0.5) == 0, "it learns at last"
    assert feed(watch, LONG, agreement=best / 30) == 1


@pytest.mark.parametrize("fallback", [True, False])
def test_an_own_loop_is_told_once_in_words(fallback: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = TinySiT()
    aligner = tiny_aligner(fallback=fallback).attach(model)
    assert aligner.generation is not None
    for call in range(160):
        if call == 10:
            aligner.generation.watch.reason.fill_(1)
        align(model, aligner, make_batch(2, seed=call))
    said = [text for *_, text in caplog.record_tuples if "lost their weight" in text]
    assert said == ([f"vrpo_plugin: {describe_collapse(1)}"] if fallback else [])


@pytest.mark.parametrize(
    "changed",
    [
        {"agreement": 0.45},
        {"spread": 0.02},
        {"fidelity": -0.14},
        {"fidelity": -0.3, "reward": 0.4},  # training itself went wrong
        dict.fromkeys(HEALTHY, torch.nan),  # nothing was ever seen
        {"agreement": torch.nan, "fidelity": torch.nan},
    ],
    ids=["critic", "spread", "fidelity", "all worse", "nothing finite", "not measured"],
)
def test_less_than_a_collapse_is_none(changed: dict[str, float]) -> None:
    watch = CollapseWatch()
    feed(watch, LONG)
    assert feed(watch, LONG, **changed) == 0


def test_nothing_is_judged_at_the_start() -> None:
    watch = CollapseWatch()
    assert feed(watch, WARM_UP // 2) == 0
    assert feed(watch, WARM_UP // 2 - 1, agreement=0.0, spread=0.0, fidelity=-9.0) == 0
    assert watch.best.tolist() == [0, 0, 0], "the best of the warm-up is no yardstick either"


def train(model: TinySiT, aligner: Any, updates: int) -> Any:
    for seed in range(updates):
        out = align(model, aligner, make_batch(8, seed=seed))
    return out


@pytest.mark.parametrize("fallback", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_after_a_collapse_only_the_static_alignment_is_left(fallback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "HORIZON", 64)
    model = TinySiT()
    aligner = tiny_aligner(fallback=fallback, reward_release="none").attach(model)
    out = train(model, aligner, WARM_UP + 2)
    assert out.metrics["vrpo/fallback"] == 0 and out.reward_release == 1
    assert aligner.critic is not None
    sound = copy.deepcopy(aligner.critic.state_dict())
    aligner.critic.load_state_dict({name: 0 * value for name, value in sound.items()})  # agrees with nothing
    train(model, aligner, 600)  # until the memory has forgotten
    aligner.critic.load_state_dict(sound)
    batch = make_batch(8)
    out = align(model, aligner, batch)
    assert (float(out.metrics["vrpo/fallback"]) > 0) == fallback
    assert float(out.reward_release) == (0 if fallback else 1)
    out.policy_loss.backward()
    ours = gradients(model)
    model.zero_grad(set_to_none=False)
    (aligner.config.proj_coeff * align(model, aligner, batch).features_loss).backward()
    alone = gradients(model)
    assert fallback == all(a is None or torch.equal(a, alone[name]) for name, a in ours.items())


def test_a_reward_that_is_itself_optimised_is_not_watched() -> None:
    model = TinySiT()
    aligner = tiny_aligner(built_in=("semantic", "fidelity")).attach(model)
    train(model, aligner, 3)
    assert aligner.generation is not None
    train(model, aligner, WARM_UP)
    assert aligner.generation.watch.best[2] == 0 and aligner.generation.watch.best[1] > 0


def test_validation_is_not_watched() -> None:
    model = TinySiT()
    aligner = tiny_aligner().attach(model).eval()
    batch = make_batch(8)
    hidden = [torch.randn(8, 16, 32) for _ in aligner.layers]
    aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=batch.velocity, hidden=hidden)
    assert aligner.generation is not None and aligner.generation.watch.updates == 0


def constant(state: RewardState) -> torch.Tensor:
    return state.x0_hat.flatten(1).sum(1) * 0


def test_rewards_that_never_told_samples_apart_are_not_said_to_have_collapsed() -> None:
    model = TinySiT()
    aligner = tiny_aligner(built_in=(), rewards={"constant": constant}).attach(model)
    assert train(model, aligner, WARM_UP + 50).metrics["vrpo/fallback"] == 0


def test_a_hosts_log_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker()
    with caplog.at_level(logging.WARNING, logger="vrpo_plugin"):
        for reason in (0, 0, 3, 3):
            tracker.record({"vrpo/fallback": torch.tensor(float(reason))})
            tracker.latest()
    assert [text for *_, text in caplog.record_tuples] == [f"vrpo_plugin: {describe_collapse(3)}"]


def _one_rank_collapses(rank: int, world_size: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = TinySiT()
    aligner = tiny_aligner().attach(model)
    assert aligner.critic is not None and aligner.generation is not None
    aligner.generation.watch.updates.fill_(WARM_UP)
    batch = make_batch(8)
    target = F.adaptive_avg_pool2d(batch.x0, 4).flatten(2).mT.repeat(1, 1, 3)
    optimizer = torch.optim.Adam(aligner.critic.parameters(), lr=1e-2)
    for _ in range(60):  # until it agrees
        out = align(model, aligner, replace(batch, z=(target,)))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sign = 1 if rank else -1  # nothing is wrong on the other process
    for _ in range(200):
        align(model, aligner, replace(batch, z=(sign * target,)))
    return dict(aligner.generation.watch.state_dict())


@pytest.mark.slow
def test_all_processes_decide_alike(tmp_path: Path) -> None:
    first, second = on_two_processes(_one_rank_collapses, tmp_path)
    assert first["reason"] == 1
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# ---- nothing is run once the weight is 0 for good ----


def looks(aligner: Any) -> list[int]:
    """The critic's calls from here on, in a list that grows."""
    seen: list[int] = []
    aligner.critic.register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("how", ["own step", "counter", "stop", "collapse"])
def test_nothing_is_run_once_the_weight_is_0(how: str) -> None:
    schedule: dict[str, Any] = {"reward_release_steps": 0 if how == "collapse" else 5, "reward_floor": 0.0}
    if how == "stop":
        schedule["reward_release"] = "stop"
    model = TinySiT()
    aligner = tiny_aligner(**schedule).attach(model)
    assert aligner.generation is not None
    seen, batch = looks(aligner), make_batch(8)
    names: list[str] = []
    for call in range(2 * END_LOOK):
        if how == "collapse" and call == 5:
            aligner.generation.watch.reason.fill_(1)
        out = align(model, aligner, batch, **({} if how in ("counter", "collapse") else {"step": call}))
        names = names or list(out.metrics)
        assert list(out.metrics) == names, call
        model.zero_grad()
        out.loss.backward()
        assert all(p.grad is not None for p in aligner.parameters()), "as DDP wants it"
    known_at = 5 if how in ("own step", "stop") else END_LOOK + END_LOOK // 2 - 1
    assert len(seen) == 2 * known_at
    assert out.generation_loss == 0 and out.critic_loss == 0 and float(out.reward_release) == 0
    assert all(p.grad is not None and not p.grad.any() for p in aligner.critic.parameters())  # type: ignore[union-attr]
    assert torch.isnan(out.rewards["semantic"]).all() and out.metrics["vrpo/nonfinite"] == 0
    assert torch.isfinite(out.metrics["vrpo/align_cos"]) and out.features_loss != 0


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_a_floor_keeps_them_running(floor: float) -> None:
    model = TinySiT()
    aligner = tiny_aligner(reward_release_steps=2, reward_floor=floor).attach(model)
    seen = looks(aligner)
    for step in range(6):
        align(model, aligner, make_batch(8), step=step)
    assert len(seen) == (12 if floor else 4)


def test_validation_after_the_end_still_measures() -> None:
    model = TinySiT()
    aligner = tiny_aligner(reward_release_steps=1, reward_floor=0.0, features="none").attach(model)
    batch = make_batch(8)
    assert torch.isnan(align(model, aligner, batch, step=9).rewards["semantic"]).all()
    aligner.eval()
    assert torch.isfinite(align(model, aligner, batch, step=9).rewards["semantic"]).all()


def test_loaded_weights_begin_afresh() -> None:
    model = TinySiT()
    aligner = tiny_aligner(reward_release_steps=5, reward_floor=0.0).attach(model)
    early = copy.deepcopy(model.state_dict())
    for _ in range(2 * END_LOOK):
        align(model, aligner, make_batch(4))
    seen = looks(aligner)
    align(model, aligner, make_batch(4))
    assert not seen
    model.load_state_dict(early)
    align(model, aligner, make_batch(4))
    assert len(seen) == 2


def _after_the_end(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Two processes, of which each must leave the statistics' collective out at the same call."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = TinySiT()
    aligner = tiny_aligner(reward_release_steps=5, reward_floor=0.0).attach(model)
    seen = looks(aligner)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for call in range(2 * END_LOOK):
        batch = make_batch(4, seed=2 * call + rank)
        velocity = parallel(batch.x_t, batch.t, batch.y)
        out = aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity)
        (denoising_loss(velocity, batch) + out.loss).backward()
        model.zero_grad()
    return {"calls": torch.tensor(len(seen))}


@pytest.mark.slow
def test_processes_end_at_the_same_call(tmp_path: Path) -> None:
    first, second = on_two_processes(_after_the_end, tmp_path)
    assert first["calls"] == second["calls"] == 2 * (END_LOOK + END_LOOK // 2 - 1)

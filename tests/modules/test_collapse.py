"""Collapse of critic or rewards: seen where it happens, not where it does not, and then the rewards are let go of."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.gloo import on_two_processes
from fakes.tiny_sit import TinySiT, align, gradients, make_batch, tiny_aligner

from vrpo_plugin.functional.rewards import RewardState
from vrpo_plugin.hosts.metrics import Tracker
from vrpo_plugin.modules.collapse import SIGNALS, WARM_UP, CollapseWatch, describe_collapse

HEALTHY = {"agreement": 0.8, "live": 1.0, "fidelity": -0.1, "reward": 0.5}
LONG = 400  # updates; the means forget by 1% an update


def feed(watch: CollapseWatch, updates: int, **changed: float) -> int:
    for _ in range(updates):
        watch.update(**{name: torch.tensor(value) for name, value in (HEALTHY | changed).items()})
    return int(watch.reason)


@pytest.mark.parametrize(
    ("reason", "changed"),
    [(1, {"agreement": 0.3}), (2, {"live": 0.0}), (3, {"fidelity": -0.2}), (3, {"fidelity": -0.2, "reward": 0.9})],
    ids=["critic", "dead groups", "fidelity", "fidelity, while the reward rises"],
)
def test_a_collapse_is_found_and_stays(reason: int, changed: dict[str, float]) -> None:
    watch = CollapseWatch()
    assert feed(watch, LONG) == 0 and watch.share == 1
    assert feed(watch, LONG, **changed) == reason and watch.share == 0
    assert feed(watch, LONG) == reason, "healthy again, and too late"
    assert SIGNALS[reason - 1][2] in describe_collapse(reason)


@pytest.mark.parametrize("best", [0.02, 0.09])
@pytest.mark.parametrize("signal", ["agreement", "live"])
def test_what_has_never_been_above_noise_cannot_collapse(signal: str, best: float) -> None:
    watch = CollapseWatch()
    assert feed(watch, LONG, **{signal: best}) == 0
    assert feed(watch, LONG, **{signal: best / 30}) == 0, "an untrained critic, or a long warm-up"
    assert feed(watch, LONG, **{signal: 0.5}) == 0, "it learns at last"
    assert feed(watch, LONG, **{signal: best / 30}) == {"agreement": 1, "live": 2}[signal]


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
        {"live": 0.1},
        {"fidelity": -0.14},
        {"fidelity": -0.3, "reward": 0.4},  # training itself went wrong
        dict.fromkeys(HEALTHY, torch.nan),  # batches without one finite sample
        {"agreement": torch.nan, "fidelity": torch.nan},
    ],
    ids=["critic", "groups", "fidelity", "all worse", "nothing finite", "not measured"],
)
def test_less_than_a_collapse_is_none(changed: dict[str, float]) -> None:
    watch = CollapseWatch()
    feed(watch, LONG)
    assert feed(watch, LONG, **changed) == 0


def test_nothing_is_judged_at_the_start() -> None:
    watch = CollapseWatch()
    assert feed(watch, WARM_UP // 2) == 0
    assert feed(watch, WARM_UP // 2 - 1, agreement=0.0, live=0.0, fidelity=-9.0) == 0
    assert watch.best.tolist() == [0, 0, 0], "the best of the warm-up is no yardstick either"


def test_a_single_bad_batch_is_no_collapse() -> None:
    watch = CollapseWatch()
    feed(watch, LONG)
    assert feed(watch, 1, agreement=-1.0, live=0.0, fidelity=-3.0) == 0


def train(model: TinySiT, aligner: Any, updates: int) -> Any:
    for seed in range(updates):
        out = align(model, aligner, make_batch(8, seed=seed))
    return out


@pytest.mark.parametrize("fallback", [True, False])
def test_after_a_collapse_only_the_static_alignment_is_left(fallback: bool) -> None:
    model = TinySiT()
    aligner = tiny_aligner(fallback=fallback, reward_release="none").attach(model)
    out = train(model, aligner, WARM_UP + 2)
    assert out.metrics["vrpo/fallback"] == 0 and out.reward_release == 1
    assert aligner.critic is not None
    sound = copy.deepcopy(aligner.critic.state_dict())
    aligner.critic.load_state_dict({name: 0 * value for name, value in sound.items()})  # agrees with nothing
    train(model, aligner, 400)
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
    assert aligner.generation.watch.weight[2] == 0 and aligner.generation.watch.weight[1] > 0


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
    watch = CollapseWatch()
    feed(watch, LONG)
    feed(watch, LONG, agreement=0.8 if rank else -0.8)  # nothing is wrong on the other one
    return dict(watch.state_dict())


@pytest.mark.slow
def test_all_processes_decide_alike(tmp_path: Path) -> None:
    first, second = on_two_processes(_one_rank_collapses, tmp_path)
    assert first["reason"] == 1
    for name, value in first.items():
        assert torch.equal(value, second[name]), name

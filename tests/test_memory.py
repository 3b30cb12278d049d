"""Training for long: no tensor stays alive, and the process does not grow."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.tiny_sit import TinySiT, align, denoising_loss, make_batch, tiny_aligner
from torch import Tensor

from vrpo_plugin.functional.rewards import RewardState
from vrpo_plugin.hosts.metrics import Tracker

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "all layers, group scale": {"layers": "all", "scale": "group", "target_norm": "spatial"},
    "own rewards": {
        "rewards": {"mine": lambda s: smoothness(s)},
        "black_box_rewards": {"box": lambda s: smoothness(s)},
    },
}


def smoothness(state: RewardState) -> Tensor:
    return -state.x0_hat.diff(dim=-1).square().mean((1, 2, 3))


def tensors_alive() -> int:
    # What a finaliser lets go of is found by the next collection only.
    while gc.collect():
        pass
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def resident() -> int:
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(steps: int, **settings: Any) -> tuple[int, float]:
    """Tensors, and the share of memory, that training adds between its 50th step and its last."""
    model = TinySiT()
    aligner = tiny_aligner(**settings).attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tracker, generator = Tracker(log_every=10), torch.Generator().manual_seed(0)
    alive, memory = 0, 0
    for step in range(1, steps + 1):
        batch = make_batch(8, seed=step)
        batch_velocity = model(batch.x_t, batch.t, batch.y)
        out = aligner(
            batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=batch_velocity, y=batch.y, generator=generator
        )
        (denoising_loss(batch_velocity, batch) + out.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        tracker.record(out.metrics)
        if step % 7 == 0:
            assert tracker.latest()
        if step == 50:
            alive, memory = tensors_alive(), resident()
    return tensors_alive() - alive, resident() / memory - 1


@pytest.mark.slow
def test_a_step_leaves_nothing_alive() -> None:
    tensors, memory = growth(300, **SETTINGS["own rewards"])
    assert tensors == 0 and memory < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_thousand_steps_leave_nothing_alive(setting: str) -> None:
    tensors, memory = growth(1000, **SETTINGS[setting])
    assert tensors == 0 and memory < 0.01


def leaking(kept: list[Any], keep: Callable[[RewardState], Any]) -> Callable[[RewardState], Tensor]:
    def reward(state: RewardState) -> Tensor:
        kept.append(keep(state))
        return smoothness(state)

    return reward


@pytest.mark.slow
def test_it_sees_a_reward_that_keeps_its_state() -> None:
    tensors, _ = growth(60, rewards={"mine": leaking([], lambda state: state)})
    assert tensors >= 10 * 5  # x0_hat, x0, x_t, t and z of the last ten steps


@pytest.mark.slow
def test_it_sees_memory_that_no_tensor_holds() -> None:
    # 160 MiB, more than a hundredth of what any test session holds.
    _, memory = growth(60, rewards={"mine": leaking([], lambda state: bytearray(os.urandom(2**24)))})
    assert memory > 0.01


def test_validation_and_a_call_that_fails_leave_nothing_alive() -> None:
    model = TinySiT()
    aligner, batch = tiny_aligner().attach(model), make_batch(8)
    counts = []
    for _ in range(3):
        with torch.no_grad():
            model(batch.x_t, batch.t, batch.y)
        aligner._checks.seen.clear()
        with pytest.raises(ValueError):
            align(model, aligner, make_batch(8, dims=(13,)))
        counts.append(tensors_alive())
    assert counts[1] == counts[2]

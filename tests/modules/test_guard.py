"""Leaving out a step that is not finite: nothing of it stays, and the next one is as if it had not been."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.gloo import on_two_processes
from fakes.tiny_sit import Batch, TinySiT, denoising_loss, make_batch, tiny_aligner
from torch import nn

from vrpo_plugin import ConfigError, NonFiniteGuard
from vrpo_plugin.modules.aligner import VRPOOutput

BAD = {"nan": torch.nan, "inf": torch.inf, "negative inf": -torch.inf}


def fresh() -> tuple[TinySiT, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = TinySiT()
    tiny_aligner().attach(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def backward(model: TinySiT, batch: Batch) -> tuple[VRPOOutput, torch.Tensor]:
    velocity = model(batch.x_t, batch.t, batch.y)
    out = model.vrpo(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity, y=batch.y)
    (denoising_loss(velocity, batch) + out.loss).backward()
    return out, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def train_step(
    model: TinySiT, optimizer: torch.optim.Optimizer, guard: NonFiniteGuard, seed: int, bad: float | None = None
) -> float:
    batch = make_batch(16, seed=seed)
    if bad is not None:
        batch.x0[3, 0, 1, 1] = bad
    guard.keep()
    out, norm = backward(model, batch)
    skipped = guard.check([norm], [out.metrics["vrpo/nonfinite"]])
    optimizer.step()
    optimizer.zero_grad()
    return float(skipped)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    moments = {f"{i}/{k}": v for i, state in optimizer.state_dict()["state"].items() for k, v in state.items()}
    return {k: v.clone() for k, v in (model.state_dict() | moments).items()}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_step_left_out_changes_no_weight_moment_or_statistic(bad: float) -> None:
    model, optimizer = fresh()
    guard = NonFiniteGuard(optimizer, model)
    assert train_step(model, optimizer, guard, seed=0) == 0
    before = everything(model, optimizer)
    assert train_step(model, optimizer, guard, seed=1, bad=bad) == 1
    after = everything(model, optimizer)
    assert before.keys() == after.keys()
    assert not [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert train_step(model, optimizer, guard, seed=2) == 0
    later = everything(model, optimizer)
    assert all(later[name] == value + 1 for name, value in before.items() if name.endswith("step"))


def test_a_finite_step_is_bitwise_the_step_without_a_guard() -> None:
    guarded, plain = fresh(), fresh()
    guard = NonFiniteGuard(guarded[1], guarded[0])
    for seed in range(3):
        assert train_step(*guarded, guard, seed) == 0
        backward(plain[0], make_batch(16, seed=seed))
        plain[1].step()
        plain[1].zero_grad()
    ours, theirs = everything(*guarded), everything(*plain)
    assert not [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


def test_a_scaler_is_told_and_halves_its_scale() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    guard = NonFiniteGuard(optimizer, model, scaler=scaler)
    before = [p.clone() for p in model.parameters()]
    # The gradients are finite: the loss has left out a sample, and the guard leaves out its step.
    for count, scale in ((1.0, 4.0), (0.0, 4.0)):
        guard.keep()
        scaler.scale(model(torch.ones(3, 2)).sum()).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert float(guard.check([norm], [torch.tensor(count)])) == count
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == scale
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) == bool(count)


def test_an_optimizer_that_could_not_leave_a_step_out_is_refused() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ConfigError, match="expected a fused one, got AdamW"):
        NonFiniteGuard(torch.optim.AdamW(model.parameters()), model)


def _one_bad_rank(rank: int, world_size: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, optimizer = fresh()
    guard = NonFiniteGuard(optimizer, model)
    skipped = [
        train_step(model, optimizer, guard, seed=i, bad=torch.nan if (i, rank) == (1, 1) else None) for i in (0, 1)
    ]
    return {"skipped": skipped, "counter": model.vrpo.step.clone()}


@pytest.mark.slow
def test_all_processes_leave_out_the_step_that_one_of_them_must(tmp_path: Path) -> None:
    for found in on_two_processes(_one_bad_rank, tmp_path):
        assert found["skipped"] == [0, 1] and found["counter"] == 1

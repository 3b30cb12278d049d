"""What is never trained is noticed: zero gradients, an optimizer or DDP without the aligner, a schedule at its end."""

import copy
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.gloo import on_two_processes
from fakes.tiny_sit import TinySiT, align, denoising_loss, make_batch, tiny_aligner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vrpo_plugin import ConfigError, NonFiniteGuard, PatchConflictError, VRPOAligner
from vrpo_plugin.modules.standstill import ZERO_LOOK, ZERO_STEPS, LaterRead

STANDSTILL, NOT_UPDATED, NO_GRADIENT = "all gradients have been 0", "its aligner has not", "has no gradient"


def said(caught: list[warnings.WarningMessage], what: str) -> int:
    return sum(what in str(w.message) for w in caught)


# ---- zero gradients ----


def guarded_steps(gradients: list[float]) -> int:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    guard = NonFiniteGuard(optimizer, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for value in gradients:
            guard.check([torch.tensor(value), torch.tensor(2 * value)])
    return said(caught, STANDSTILL)


def test_zero_gradients_are_warned_of_once() -> None:
    assert guarded_steps([0.0] * 1000) == 1
    assert guarded_steps([0.0] * (ZERO_STEPS + ZERO_LOOK + 1)) == 1


@pytest.mark.parametrize("rare", [1.0, float("nan"), 1e-30])
def test_a_gradient_now_and_then_is_no_standstill(rare: float) -> None:
    assert guarded_steps(([0.0] * (ZERO_STEPS - 1) + [rare]) * 5) == 0


def test_one_part_without_gradient_is_no_standstill() -> None:
    model = nn.Linear(2, 1)
    guard = NonFiniteGuard(torch.optim.SGD(model.parameters(), lr=0.1, fused=True), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(400):
            guard.check([torch.tensor(0.0), torch.tensor(1.0)])


# ---- the optimizer ----


def train(model: TinySiT, aligner: VRPOAligner, optimizer: torch.optim.Optimizer, calls: int, every: int = 1) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in range(1, calls + 1):
            align(model, aligner, make_batch(4, seed=call)).loss.backward()
            if call % every == 0:
                optimizer.step()
                optimizer.zero_grad()
    return said(caught, NOT_UPDATED)


@pytest.mark.parametrize("settings", [{}, {"features": "none"}, {"reward_coeff": 0.0}, {"layers": "all"}])
@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_made_before_attach_is_noticed(settings: dict[str, Any], fused: bool) -> None:
    model = TinySiT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    aligner = tiny_aligner(**settings).attach(model)
    assert train(model, aligner, optimizer, 40) == 1


@pytest.mark.parametrize("every", [1, 24])
def test_an_optimizer_made_after_attach_is_not(every: int) -> None:
    model = TinySiT()
    aligner = tiny_aligner().attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    assert train(model, aligner, optimizer, 70, every) == 0


def test_accumulation_delays_the_notice() -> None:
    model = TinySiT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    aligner = tiny_aligner().attach(model)
    assert train(model, aligner, optimizer, 31, every=20) == 0  # the model itself had not changed at the first look
    assert train(model, aligner, optimizer, 2, every=20) == 1


def test_an_answer_is_read_when_the_device_has_it_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    there = False
    reads: list[bool] = []
    values = LaterRead.values
    monkeypatch.setattr(LaterRead, "is_there", lambda self: there)
    monkeypatch.setattr(LaterRead, "values", lambda self: reads.append(there) or values(self))
    model = TinySiT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    aligner = tiny_aligner(fallback=False).attach(model)  # whose notice is another answer
    assert train(model, aligner, optimizer, 40) == 0 and not reads
    there = True
    assert train(model, aligner, optimizer, 1) == 1 and reads == [True]
    assert train(model, aligner, optimizer, 100) == 0 and reads == [True]


def test_nothing_to_train_is_no_mistake() -> None:
    model = TinySiT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    aligner = tiny_aligner(features="none").attach(model)
    aligner.requires_grad_(False)
    assert train(model, aligner, optimizer, 40) == 0


def test_copies_and_pickles_watch_nothing() -> None:
    model = TinySiT()
    aligner = tiny_aligner().attach(model)
    align(model, aligner, make_batch(4)).loss.backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.vrpo._watch._model is None
        align(other, other.vrpo, make_batch(4)).loss.backward()
    assert aligner._watch._model is not None


# ---- a prediction without gradient ----


@pytest.mark.parametrize("estimate", ["velocity", "x0_hat"])
@pytest.mark.parametrize("attached", [True, False])
def test_a_prediction_without_gradient_is_warned_of_once(estimate: str, attached: bool) -> None:
    model, aligner, batch = TinySiT(), tiny_aligner(), make_batch(8)
    if attached:
        aligner.attach(model)
    hidden = None if attached else torch.randn(8, 16, 32, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            prediction = model(batch.x_t, batch.t, batch.y).detach()
            aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, hidden=hidden, **{estimate: prediction})
    assert said(caught, NO_GRADIENT) == 1


def test_a_measurement_needs_no_gradient() -> None:
    model, batch = TinySiT(), make_batch(8)
    aligner = tiny_aligner().attach(model)
    aligner.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        velocity = model(batch.x_t, batch.t, batch.y).detach()
        aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity)


# ---- schedules ----


@pytest.mark.parametrize("schedule", ["linear", "stop"])
@pytest.mark.parametrize("part", ["release", "reward_release"])
@pytest.mark.parametrize("counted", [False, True])
def test_a_schedule_that_is_over_is_said(
    schedule: str, part: str, counted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"reward_release": "none", part: schedule, f"{part}_steps": 50, "reward_floor": 0.0}
    for done, expected in ((49, 0), (50, 1), (400_000, 1)):
        caplog.clear()
        aligner, batch = tiny_aligner(**settings), make_batch(8)
        given = {} if counted else {"step": done}
        if counted:
            aligner.step.fill_(done)
        with caplog.at_level(logging.WARNING, "vrpo_plugin"):
            for _ in range(2):
                hidden = torch.randn(8, 16, 32)
                aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=batch.velocity, hidden=hidden, **given)
        messages = [r.getMessage() for r in caplog.records if "over before the first call" in r.getMessage()]
        assert len(messages) == expected and all(m.startswith(f"{part}_steps=50") for m in messages)


# ---- processes ----


def test_a_wrapper_is_not_attached_to(tmp_path: Path) -> None:
    for found in on_two_processes(_attach_to_ddp, tmp_path):
        assert "expected a call before DistributedDataParallel wraps the model" in found


def _attach_to_ddp(rank: int, world_size: int) -> str:
    try:
        tiny_aligner().attach(DistributedDataParallel(TinySiT()))
    except PatchConflictError as error:
        return str(error)
    return ""


class Together(nn.Module):
    """What DDP is to wrap: model and aligner in one forward."""

    def __init__(self, model: TinySiT, aligner: VRPOAligner) -> None:
        super().__init__()
        self.model = model
        self.aligner = [aligner]

    def forward(self, batch: Any) -> torch.Tensor:
        velocity = self.model(batch.x_t, batch.t, batch.y)
        out = self.aligner[0](batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity, y=batch.y)
        return denoising_loss(velocity, batch) + out.loss


def _distributed(rank: int, world_size: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for settings in ({}, {"features": "none"}):
        for when in ("before", "after"):
            for find_unused in (False, True):
                for inside in (False, True):
                    name = f"{settings.get('features', 'policy')} {when} {find_unused} {inside}"
                    found[name] = _two_steps(rank, settings, when, find_unused, inside)
    return found


def _two_steps(rank: int, settings: dict[str, Any], when: str, find_unused: bool, inside: bool) -> str:
    torch.manual_seed(0)
    model, aligner = TinySiT(), tiny_aligner(**settings)
    if when == "before":
        aligner.attach(model)
    whole: nn.Module = Together(model, aligner) if inside else model
    wrapped = DistributedDataParallel(whole, find_unused_parameters=find_unused)
    if when == "after":
        aligner.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    try:
        for step in range(2):
            batch = make_batch(8, seed=2 * step + rank)
            if inside:
                loss = wrapped(batch)
            else:
                velocity = wrapped(batch.x_t, batch.t, batch.y)
                out = aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity, y=batch.y)
                loss = denoising_loss(velocity, batch) + out.loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    except (PatchConflictError, ConfigError) as error:
        return type(error).__name__
    sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
    mine = sums.clone()
    torch.distributed.all_reduce(sums)
    return "alike" if torch.allclose(sums, 2 * mine) else "apart"


@pytest.mark.slow
def test_ddp_trains_the_aligner_alike_or_says_why_not(tmp_path: Path) -> None:
    for found in on_two_processes(_distributed, tmp_path):
        for name, result in found.items():
            _, when, find_unused, inside = name.split()
            if when == "after":
                assert result == "PatchConflictError", name
            elif find_unused == "True" and inside == "False":
                assert result == "ConfigError", name
            else:
                assert result == "alike", name
        assert len(found) == 16

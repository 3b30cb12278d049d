"""Optimizer steps of a host that are not finite: left out, counted, and after too many the run ends."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.host_folders import PROJECTING, SCRIPTS, FakeHost, RecordingTracker, Run, fake_host
from torch import nn

from vrpo_plugin import NonFiniteError, apply_vrpo
from vrpo_plugin.errors import ConfigError
from vrpo_plugin.hosts.guard import check_skipped, make_fused
from vrpo_plugin.hosts.options import HostOptions
from vrpo_plugin.patching.handle import PatchHandle

STEPS = 4


def spoil(*steps: int) -> Callable[..., None]:
    """A NaN in one gradient of these steps, counted from 1."""
    seen: dict[str, Any] = {"step": 0}

    def watch(when: str, **state: Any) -> None:
        if when == "start":
            seen["model"] = state["model"]
        if when == "gradients" and state["sync"]:
            seen["step"] += 1
            if seen["step"] in steps:
                next(p for p in seen["model"].parameters() if p.grad is not None).grad.view(-1)[0] = torch.nan

    return watch


def train(host: FakeHost, watch: Callable[..., None], **arguments: Any) -> Run:
    count = "--steps" if host.name in ("sit", "dit", "lightningdit") else "--max-train-steps"
    return host.train(count, STEPS, watch=watch, **arguments)


def with_limit(host: FakeHost, folder: Path, limit: int, **more: Any) -> PatchHandle:
    with host.apply(folder) as handle:
        config, options = handle.config
    return apply_vrpo(host.spec, config, options=replace(options, max_skipped_steps=limit, **more))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_that_is_not_finite_is_left_out(name: str, tmp_path: Path) -> None:
    tracker = RecordingTracker()
    with fake_host(name) as host, host.apply(tmp_path):
        run = train(host, spoil(2), **({"report_to": tracker} if name in PROJECTING else {}))
    first, second, third, fourth = run.parameters
    assert first == second and len({second, third, fourth}) == 3
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())
    (aligner,) = (module for module in run.model.modules() if hasattr(module, "taps"))
    assert aligner.step == STEPS - 1, "the schedule of the step left out is used again"
    if name in PROJECTING:
        # Counts go with the metrics of a forward pass: they stand one row later, except where those wait for the log.
        assert [row["vrpo/skipped"] for row in tracker.logged] == ([0, 1, 1, 1] if name == "repae" else [0, 0, 1, 1])
        assert "vrpo/skipped_in_a_row" not in tracker.logged[0]


@pytest.mark.parametrize("name", ["repa", "sit"])
def test_without_the_guard_the_host_is_lost(name: str, tmp_path: Path) -> None:
    with fake_host(name) as host:
        with host.apply(tmp_path) as handle:
            assert "torch.optim step hooks" in handle.hooks
        with with_limit(host, tmp_path, 0) as handle:
            assert "torch.optim step hooks" not in handle.hooks
            run = train(host, spoil(2))
    assert not all(torch.isfinite(p).all() for p in run.model.parameters())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["repa", "dit"])
def test_the_optimizer_stays_the_hosts_kind_unless_asked(name: str, fused: bool, tmp_path: Path) -> None:
    with fake_host(name) as host, with_limit(host, tmp_path, 100, fused_optimizer=fused):
        method = torch.optim.AdamW.step
        run = train(host, spoil(2))
    assert torch.optim.AdamW.step is method  # torch's own hooks are used, and nothing is replaced
    assert {bool(group["fused"]) for group in run.optimizer.param_groups} == {fused}
    first, second, third, fourth = run.parameters
    assert first == second and len({second, third, fourth}) == 3
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())


def test_a_run_with_no_step_left_out_is_the_optimizers_own_to_the_bit(tmp_path: Path) -> None:
    with fake_host("repa") as host:
        with host.apply(tmp_path):
            guarded = train(host, spoil())
        with with_limit(host, tmp_path, 0):
            alone = train(host, spoil())
    assert guarded.parameters == alone.parameters and len({*alone.parameters}) == STEPS


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    message = r"expected at most 1 optimizer steps in a row .* got 2; .*checkpoint"
    with fake_host("repa") as host, with_limit(host, tmp_path, 1), pytest.raises(NonFiniteError, match=message):
        train(host, spoil(2, 3, 4), report_to=RecordingTracker())


def test_steps_that_are_not_in_a_row_do_not(tmp_path: Path) -> None:
    with fake_host("repa") as host, with_limit(host, tmp_path, 1):
        train(host, spoil(1, 3), report_to=RecordingTracker())


def test_other_optimizers_step_as_they_did(tmp_path: Path) -> None:
    with fake_host("repa") as host, host.apply(tmp_path):
        other = nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(other.parameters())
        other(torch.ones(3, 2)).sum().backward()
        optimizer.step()
        assert not optimizer.param_groups[0]["fused"] and not hasattr(optimizer, "found_inf")


def test_moments_from_before_the_plugin_go_on() -> None:
    models = [nn.Linear(2, 1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    for step in range(4):
        if step == 2:
            make_fused(optimizers[1])
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(torch.tensor([[1.0, step]])).square().sum().backward()
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # one kernel rounds otherwise than several


def test_the_message_names_what_was_not_finite() -> None:
    values = {"vrpo/nonfinite": 2.0, "vrpo/critic_cos": float("nan"), "vrpo/a": 1.0, "vrpo/skipped_in_a_row": 9.0}
    with pytest.raises(NonFiniteError, match=r"got 9; not finite in the last batch: vrpo/nonfinite, vrpo/critic_cos\."):
        check_skipped(values, 8)


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_a_limit_that_is_no_count_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_skipped_steps: expected an int >= 0"):
        HostOptions(max_skipped_steps=value)

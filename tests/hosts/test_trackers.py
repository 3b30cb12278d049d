"""Our metrics where the host's own losses go, and nowhere else."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.host_folders import ENCODER, SMALL, FakeHost, RecordingTracker, critic_file, encoder_file, fake_host
from torch import Tensor

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.hosts.apply import apply_vrpo
from vrpo_plugin.hosts.metrics import Tracker
from vrpo_plugin.hosts.options import HostOptions
from vrpo_plugin.patching.handle import PatchHandle

FEW = {"vrpo/reward/semantic", "vrpo/weight/perceptual", "vrpo/advantage_abs", "vrpo/norm/x0_hat"}
LINE = re.compile(r"vrpo \(call=(\d{7})\) (.*)")


def metrics(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(()) for name in ("vrpo/a", "vrpo/reward/b", "vrpo/c")}


def floats(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in values.items()}


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """(call, text) of each line of text."""
    found = [LINE.fullmatch(text) for name, _, text in caplog.record_tuples if name == "vrpo_plugin"]
    return [(one[1], one[2]) for one in found if one is not None]


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("RANK", raising=False)
    caplog.set_level(logging.INFO, logger="vrpo_plugin")


# ---- the tracker itself ----


def test_before_a_call_there_is_nothing() -> None:
    assert Tracker().latest() == {} == Tracker(1).latest()


@pytest.mark.parametrize("method", ["record", "keep"])
def test_the_newest_call_is_what_is_told(method: str) -> None:
    tracker = Tracker()
    for seed in range(3):
        getattr(tracker, method)(metrics(seed))
        assert tracker.latest() == floats(metrics(seed)) == tracker.latest()
    assert list(tracker.latest()) == list(metrics(2))


def test_kept_and_recorded_are_equal(caplog: pytest.LogCaptureFixture) -> None:
    kept, recorded = Tracker(2), Tracker(2)
    said = []
    for tracker, method in ((kept, kept.keep), (recorded, recorded.record)):
        caplog.clear()
        for seed in range(7):
            method(metrics(seed))
            assert tracker.latest() == floats(metrics(seed))
        said.append(lines(caplog))
    assert said[0] == said[1] and len(said[0]) == 3
    assert kept.calls == recorded.calls == 7


def test_of_calls_that_nobody_asked_for_the_last_is_kept() -> None:
    tracker = Tracker()
    for seed in range(3):
        tracker.keep(metrics(seed))
    assert tracker.latest() == floats(metrics(2)) and tracker.calls == 1


def test_metrics_may_come_and_go_and_are_told_in_float32() -> None:
    tracker = Tracker()
    tracker.record({"vrpo/a": torch.tensor(1.5, dtype=torch.bfloat16), "vrpo/b": torch.tensor(2)})
    assert tracker.latest() == {"vrpo/a": 1.5, "vrpo/b": 2.0}
    leaf = torch.tensor(3.0, requires_grad=True)
    tracker.record({"vrpo/c": leaf * 2})
    leaf.data.zero_()
    assert tracker.latest() == {"vrpo/c": 6.0}


@pytest.mark.parametrize(("log_every", "expected"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6]), (7, [])])
def test_a_line_of_text_every_so_many_calls(log_every: int, expected: list[int], caplog: Any) -> None:
    tracker = Tracker(log_every)
    for seed in range(7):
        tracker.record(metrics(seed))
    assert [int(call) for call, _ in lines(caplog)] == expected
    for call, text in lines(caplog):  # of the call before: it is long done
        values = floats(metrics(int(call) - 1))
        assert text == ", ".join(f"{name.removeprefix('vrpo/')}: {value:.4f}" for name, value in values.items())


@pytest.mark.parametrize(("rank", "expected"), [("0", 2), ("1", 0), ("7", 0)])
def test_text_is_rank_zeros(rank: str, expected: int, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    tracker = Tracker(2)
    for seed in range(5):
        tracker.record(metrics(seed))
    assert len(lines(caplog)) == expected
    assert tracker.latest() == floats(metrics(4))  # which a host may gather


def apply_with_text(host: FakeHost, folder: Path, **settings: Any) -> PatchHandle:
    """A line of text every two calls."""
    options = {"log_every": 2}
    if host.name == "lightningdit":
        settings |= {"critic_checkpoint": str(critic_file(folder)), "critic_trainable": False}
    elif host.spec.encoder == "pixels":
        options |= {"encoder": ENCODER, "encoder_checkpoint": str(encoder_file(folder))}
    return apply_vrpo(host.spec, VRPOConfig(**{**SMALL, **settings}), options=HostOptions(**options))


# ---- accelerate's ----


class Stepped(RecordingTracker):
    """Keeps the steps too."""

    def log(self, values: dict[str, float], step: int | None = None, **more: Any) -> None:
        super().log({**values, "step": step}, step, **more)


def test_accelerates_tracker_gets_ours_beside_the_losses_alone(tmp_path: Path, caplog: Any) -> None:
    own = {"samples": 1.0, "loss": 2.0}  # a loss, and not REPA's own row

    def also(when: str, **state: Any) -> None:
        if when == "step":
            state["loss_fn"].accelerator.log(own, step=7)
            state["loss_fn"].accelerator.log({}, step=8)

    with fake_host("repa") as host, apply_with_text(host, tmp_path):
        tracker = Stepped()
        run = host.train("--max-train-steps", 4, report_to=tracker, watch=also)
    rows, samples, empty = tracker.logged[::3], tracker.logged[1::3], tracker.logged[2::3]
    assert samples == [{"samples": 1.0, "loss": 2.0, "step": 7}] * 4 and empty == [{"step": 8}] * 4
    assert own == {"samples": 1.0, "loss": 2.0}
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row.keys() >= FEW for row in rows)
    assert not any(key.startswith("vrpo/") for log in run.logs for key in log)  # the host's own dict is its own
    assert lines(caplog) == []


def test_accelerates_tracker_gets_none_of_ours_where_nothing_is_changed(tmp_path: Path) -> None:
    with fake_host("repa") as host, host.apply(tmp_path, reward_coeff=0.0, features="host"):
        tracker = RecordingTracker()
        run = host.train("--max-train-steps", 2, report_to=tracker)
    assert tracker.logged == run.logs


# ---- of the hosts without accelerate's ----


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What each call of an aligner told."""
    calls: list[dict[str, float]] = []
    record = Tracker.record

    def recorded(self: Tracker, values: dict[str, Tensor]) -> None:
        calls.append(floats(values) | {"vrpo/skipped": 0.0})
        record(self, values)

    monkeypatch.setattr(Tracker, "record", recorded)
    return calls


def test_wandb_utils_of_sit(tmp_path: Path, told: list[dict[str, float]]) -> None:
    with fake_host("sit") as host:
        logged, original = host.module("wandb").LOGGED, host.module("wandb_utils").log
        with apply_with_text(host, tmp_path):
            run = host.train("--steps", 3, "--wandb")
        assert [(step, values["train loss"]) for step, values in logged] == [
            (step, log["loss"]) for step, log in enumerate(run.logs, 1)
        ]
        ours = [{key: value for key, value in values.items() if key != "train loss"} for _, values in logged]
        assert ours == told and len(told) == 3
        assert all(one.keys() >= FEW for one in ours)
        logged.clear()
        assert host.module("wandb_utils").log is original
        host.train("--steps", 1, "--wandb")
        assert [values.keys() for _, values in logged] == [{"train loss"}]


def test_summary_writer_of_lightningdit(tmp_path: Path, told: list[dict[str, float]]) -> None:
    with fake_host("lightningdit") as host:
        writer = host.script.SummaryWriter

        def also(when: str, **state: Any) -> None:
            if when == "step":
                writer.last.add_scalar("Loss/validation", 1.0, 9, walltime=2.0)

        with apply_with_text(host, tmp_path):
            host.train("--steps", 2, watch=also)
        written = writer.last.written
        host.train("--steps", 1)
        assert [tag for tag, _, _ in writer.last.written] == ["Loss/train"]
    assert len(told) == 2 and all(one.keys() >= FEW for one in told)
    for step, one in enumerate(told, 1):
        assert {tag: value for tag, value, at in written if at == step and tag != "Loss/train"} == one
    assert sorted(at for tag, _, at in written if tag == "Loss/train") == [1, 2]
    assert [(tag, value) for tag, value, at in written if at == 9] == [("Loss/validation", 1.0)] * 2


@pytest.mark.parametrize("name", ["sit", "dit", "lightningdit"])
def test_text_of_a_host_without_a_tracker_of_its_own(name: str, tmp_path: Path, told: Any, caplog: Any) -> None:
    with fake_host(name) as host, apply_with_text(host, tmp_path):
        host.train("--steps", 5)
    (second, fourth) = lines(caplog)
    assert (second[0], fourth[0]) == ("0000002", "0000004") and len(told) == 5
    for (_, text), values in ((second, told[1]), (fourth, told[3])):
        assert text == ", ".join(f"{key.removeprefix('vrpo/')}: {value:.4f}" for key, value in values.items())


def test_other_processes_of_such_a_host_say_nothing(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    with fake_host("dit") as host, apply_with_text(host, tmp_path):
        monkeypatch.setenv("RANK", "1")
        host.train("--steps", 5)
    assert lines(caplog) == []

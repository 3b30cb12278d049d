"""Checkpoints of the fake hosts: of patched runs, of runs before the plugin, and of runs after it."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.host_folders import SCRIPTS, FakeHost, Run, fake_host, reset_accelerate
from fakes.hosts.accelerate_loop import Images
from torch import Tensor, nn

from vrpo_plugin.errors import CheckpointError
from vrpo_plugin.hosts.checkpoint import export_checkpoint

RESUMING = ("repa", "reg", "irepa")  # whose scripts resume; upstream's SiT and DiT cannot
STEP_FLAGS = {"sit": "--steps", "dit": "--steps", "lightningdit": "--steps"}
BATCH = 8
NO_ALIGNER = "the checkpoint holds no aligner (it was saved without vrpo_plugin): ours starts afresh"
Tensors = dict[str, Tensor]


class Watch:
    """Seeds each step by its number, for the hosts restore no random state, and keeps what a run starts from."""

    def __init__(self, first: int) -> None:
        self.step = first
        self.model: Tensors = {}
        self.ema: Tensors = {}
        self.moments: dict[str, Tensors] = {}

    def __call__(self, when: str, **state: Any) -> None:
        if when == "start":
            self.model, self.ema = copies(state["model"].state_dict()), copies(state["ema"].state_dict())
            self.moments = moments(state["model"], state["optimizer"])
        if when == "step":
            self.step += 1
        if when in ("start", "step"):
            torch.manual_seed(self.step)


def train(host: FakeHost, folder: Path, last: int, *, first: int = 0, every: int = 3) -> tuple[Run, Watch]:
    """Steps ``first`` + 1 to ``last``, and a checkpoint ``every`` so many where the host's loop is accelerate's."""
    argv: tuple[object, ...] = (STEP_FLAGS.get(host.name, "--max-train-steps"), last, "--batch-size", BATCH)
    if host.name in RESUMING:
        argv = (*argv, "--output-dir", folder, "--resume-step", first, "--checkpointing-steps", every)
    watch = Watch(first)
    return host.train(*argv, watch=watch), watch


def train_unpatched(host: FakeHost, folder: Path, last: int, *, first: int = 0) -> tuple[Run, Watch]:
    """As upstream does on torch 2.6 and later, and on more than one process: it loads all, and saves nothing here."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # fake_host puts the environment back
    try:
        return train(host, folder, last, first=first, every=10_000)
    finally:
        del os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"]


def save(host: FakeHost, run: Run, path: Path) -> None:
    """As the hosts save."""
    saved = {"model": run.model.state_dict(), "ema": run.ema.state_dict(), "opt": run.optimizer.state_dict()}
    torch.save({**saved, "args": host.arguments(), "steps": 3}, path)


def load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path)


def copies(state: Tensors) -> Tensors:
    return {key: value.detach().clone() for key, value in state.items()}


def moments(model: nn.Module, optimizer: Any) -> dict[str, Tensors]:
    """The optimizer's state by the names of its parameters."""
    named = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
    return {name: copies(state) for name, state in named.items() if state}


def of_host(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.startswith("vrpo.")}


def assert_same(ours: Any, theirs: Any) -> None:
    """To the bit, names included."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(autouse=True)
def _one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch is one step, in an order that the seed gives: the hosts do not restore theirs."""
    monkeypatch.setattr(Images.__init__, "__defaults__", (BATCH,))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


# ---- what is in them ----


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_ema_loads_strictly_into_the_unpatched_host(name: str, tmp_path: Path) -> None:
    with fake_host(name) as host:
        with host.apply(tmp_path):
            run, _ = train(host, tmp_path, 2)
        torch.save({"model": run.model.state_dict(), "ema": run.ema.state_dict()}, tmp_path / "saved.pt")
        saved = torch.load(tmp_path / "saved.pt")
        reset_accelerate()
        plain = train_unpatched(host, tmp_path, 1)[0].model
    assert list(saved["ema"]) == list(plain.state_dict())
    assert plain.load_state_dict(saved["ema"], strict=True)
    assert_same(dict(plain.named_parameters()), of_host(dict(run.ema.named_parameters())))
    assert any(not torch.equal(saved["ema"][key], value) for key, value in of_host(saved["model"]).items())
    ours = {"vrpo." + key for key in run.model.vrpo.state_dict()}
    assert saved["model"].keys() == saved["ema"].keys() | ours and ours.isdisjoint(saved["ema"])
    assert {"vrpo." + name for name, _ in run.model.vrpo.named_parameters()} < ours


# ---- a patched run goes on ----


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in RESUMING),
        ("repa", {"release": "linear", "release_steps": 8}),
        ("repa", {"layers": "all"}),
    ],
    ids=str,
)
def test_resumed_is_uninterrupted(
    name: str, settings: dict[str, Any], checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with fake_host(name) as host, host.apply(tmp_path, **settings):
        straight, _ = train(host, checkpoints, 6)
        resumed, start = train(host, checkpoints, 6, first=3)
    assert len(straight.logs) == 6 and len(resumed.logs) == 3
    for what in ("logs", "gradients", "parameters", "emas", "random_states"):
        assert getattr(resumed, what) == getattr(straight, what)[3:], what
    assert resumed.random_state == straight.random_state
    assert_same(dict(resumed.model.state_dict()), dict(straight.model.state_dict()))
    assert_same(dict(resumed.ema.state_dict()), dict(straight.ema.state_dict()))
    assert_same(moments(resumed.model, resumed.optimizer), moments(straight.model, straight.optimizer))
    assert start.model["vrpo.step"] == 3 and resumed.model.vrpo.step == 6
    assert start.moments.keys() == {key for key, p in resumed.model.named_parameters() if p.requires_grad}
    resumed.ema.load_state_dict(resumed.model.state_dict())  # the model's own, where a host begins anew from it
    assert not any("checkpoint" in message.partition("compat")[0] for message in messages(caplog))


# ---- a run without the plugin goes on with it ----


@pytest.mark.parametrize("name", RESUMING)
def test_a_run_from_before_the_plugin_goes_on_with_it(
    name: str, checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints.mkdir()
    with fake_host(name) as host:
        before, _ = train_unpatched(host, checkpoints, 3)
        model, ema = copies(before.model.state_dict()), copies(before.ema.state_dict())
        state = moments(before.model, before.optimizer)
        save(host, before, checkpoints / "0000003.pt")
        with host.apply(tmp_path):
            _, fresh = train(host, checkpoints, 0)
            caplog.clear()
            run, start = train(host, checkpoints, 6, first=3)
    assert sorted(message.partition(": ")[0] for message in messages(caplog)) == [
        "the checkpoint holds no aligner (it was saved without vrpo_plugin)",
        "vrpo_plugin compat fresh_optimizer",
        "vrpo_plugin compat one_process",
    ]
    assert NO_ALIGNER in messages(caplog)
    assert_same(of_host(start.model), model)
    assert_same(start.ema, ema)
    assert_same(start.moments, state)  # and none of the aligner's
    ours = start.model.keys() - model.keys()
    assert ours
    # Its schedules go on where the run is, so that they end with it.
    assert start.model["vrpo.step"] == 3 and fresh.model["vrpo.step"] == 0 and run.model.vrpo.step == 6
    new = ours - {"vrpo.step"}
    assert_same({key: start.model[key] for key in new}, {key: fresh.model[key] for key in new})
    end = moments(run.model, run.optimizer)
    assert {key: int(one["step"]) for key, one in end.items()} == {key: 3 if key in ours else 6 for key in end}
    assert end.keys() >= {key for key, _ in run.model.named_parameters() if key in ours}
    assert not any(torch.equal(run.model.state_dict()[key], start.model[key]) for key in end if key in ours)


def test_an_optimizer_that_lacks_something_of_the_host_is_torchs_to_refuse(tmp_path: Path) -> None:
    with fake_host("repa") as host, host.apply(tmp_path):
        run, _ = train(host, tmp_path, 1)
        parameters = dict(run.model.named_parameters())
        old = torch.optim.AdamW(of_host(parameters).values()).state_dict()
        torch.optim.AdamW(parameters.values()).load_state_dict(old)  # this one lacks the aligner alone
        old["param_groups"][0]["params"].pop()
        with pytest.raises(ValueError, match="doesn't match the size"):
            torch.optim.AdamW(parameters.values()).load_state_dict(old)


# ---- a patched run goes on without the plugin ----


@pytest.mark.parametrize("name", RESUMING)
def test_an_exported_run_goes_on_without_the_plugin(name: str, checkpoints: Path, tmp_path: Path) -> None:
    with fake_host(name) as host:
        with host.apply(tmp_path):
            patched, _ = train(host, checkpoints, 3)
        model, state = copies(patched.model.state_dict()), moments(patched.model, patched.optimizer)
        raw = checkpoints / "0000003.pt"
        removed = export_checkpoint(raw, tmp_path / "exported.pt")
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .vrpo\.step"):
            train_unpatched(host, checkpoints, 6, first=3)
        os.replace(tmp_path / "exported.pt", raw)
        reset_accelerate()
        run, start = train_unpatched(host, checkpoints, 6, first=3)
    assert removed == len(model) - len(of_host(model)) > 0
    assert_same(start.model, of_host(model))
    assert_same(start.ema, copies(dict(patched.ema.state_dict())))
    assert_same(start.moments, of_host(state))
    assert len(run.logs) == 3 and len({*run.parameters}) == 3
    assert {int(one["step"]) for one in moments(run.model, run.optimizer).values()} == {6}


def test_weight_zero_refuses_a_checkpoint_with_an_aligner_and_says_the_way_out(
    checkpoints: Path, tmp_path: Path
) -> None:
    nothing = {"reward_coeff": 0.0, "features": "host"}
    with fake_host("repa") as host:
        with host.apply(tmp_path):
            train(host, checkpoints, 3)
        raw = checkpoints / "0000003.pt"
        with host.apply(tmp_path, **nothing):
            with pytest.raises(CheckpointError, match=r"expected one without an aligner.*'vrpo export CKPT OUT\.pt'"):
                train(host, checkpoints, 6, first=3)
            export_checkpoint(raw, tmp_path / "exported.pt")
            os.replace(tmp_path / "exported.pt", raw)
            run, _ = train(host, checkpoints, 6, first=3)
            save(host, run, raw)  # one of its own loads as ever
            train(host, checkpoints, 6, first=3)
    assert len(run.logs) == 3 and "vrpo.step" not in run.model.state_dict()


# ---- another aligner ----


@pytest.mark.parametrize("settings", [{"critic_width": 24}, {"rewards": ("semantic",)}], ids=str)
def test_an_aligner_of_other_sizes_is_refused_with_advice_that_works(
    settings: dict[str, Any], checkpoints: Path, tmp_path: Path
) -> None:
    with fake_host("repa") as host:
        with host.apply(tmp_path):
            train(host, checkpoints, 3)
        with host.apply(tmp_path, **settings):
            with pytest.raises(
                CheckpointError, match=r"expected the aligner .*, got .*vrpo\.generation\..*'vrpo export'"
            ):
                train(host, checkpoints, 6, first=3)
            raw = checkpoints / "0000003.pt"
            export_checkpoint(raw, tmp_path / "exported.pt")
            os.replace(tmp_path / "exported.pt", raw)
            run, start = train(host, checkpoints, 6, first=3)
    assert len(run.logs) == 3 and start.model["vrpo.step"] == 3  # where the run is


def test_an_aligner_of_other_parts_is_refused_by_torch_and_we_say_what_to_do(
    checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with fake_host("repa") as host:
        with host.apply(tmp_path):
            train(host, checkpoints, 3)
        missing = r"Missing key\(s\) in state_dict: .vrpo\.projectors"
        with host.apply(tmp_path, layers="all"), pytest.raises(RuntimeError, match=missing):
            train(host, checkpoints, 6, first=3)
    assert sum("vrpo.projectors" in message and "'vrpo export'" in message for message in messages(caplog)) == 1

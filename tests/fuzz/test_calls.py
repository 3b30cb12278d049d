"""The random calls of tests/fuzz/calls.py: they pass, and they find what is wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fuzz.calls
import vrpo_plugin.functional.advantages
import vrpo_plugin.modules.checks
from fuzz.__main__ import PARTS
from fuzz.calls import PROPERTIES, calls
from vrpo_plugin.functional.advantages import GroupMoments, group_moments
from vrpo_plugin.modules.generation import GenerationReadout


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(fuzz.calls, "PROPERTIES", {name: PROPERTIES[name] for name in names})


@pytest.mark.slow
def test_a_few_calls_of_everything(tmp_path: Path) -> None:
    part = calls(tmp_path, 250, seed=0)
    assert not part.failures
    assert sum(part.outcomes.values()) >= 250
    assert {"computed", "computed a step in train mode", "refused with ShapeError"} < set(part.outcomes)


@pytest.mark.slow
def test_many_calls_of_everything(tmp_path: Path) -> None:
    part = calls(tmp_path, 5_000, seed=1)
    assert not part.failures and sum(part.outcomes.values()) >= 5_000


def test_it_is_a_part_of_100000_calls() -> None:
    assert PARTS["calls"] == (calls, 100_000)


def live_everywhere(rewards: Tensor, **options: Any) -> GroupMoments:
    """Moments that give dead groups a deviation."""
    moments = group_moments(rewards, **options)
    return replace(moments, deviation=moments.deviation + 1e-3, variance=moments.variance + 1)


def test_it_finds_a_dead_group_with_an_advantage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "advantages")
    monkeypatch.setattr(vrpo_plugin.functional.advantages, "group_moments", live_everywhere)
    part = calls(tmp_path, 50, seed=0)
    assert len(part.failures) == 1
    assert part.failures[0].startswith("advantages: AssertionError") and "case=" in part.failures[0]


@pytest.mark.slow
def test_it_finds_one_in_the_aligner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "aligner steps")
    right = GenerationReadout._levels

    def shifted(readout: GenerationReadout) -> Any:
        levels, variance = right(readout)
        return replace(levels, mean=torch.nan_to_num(levels.mean) + 1e-3), variance

    monkeypatch.setattr(GenerationReadout, "_levels", shifted)
    (failure,) = calls(tmp_path, 100, seed=0).failures
    assert "advantage" in failure and "case=Case(" in failure


@pytest.mark.slow
def test_it_finds_an_error_that_is_not_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "wrong calls")
    monkeypatch.setattr(vrpo_plugin.modules.checks, "check_latents", lambda *args, **given: None)
    (failure,) = calls(tmp_path, 100, seed=0).failures
    assert "case=(Case(" in failure


@pytest.mark.slow
def test_it_finds_what_is_left_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "memories")
    monkeypatch.setattr(fuzz.calls, "CHUNK", 20)
    right, kept = PROPERTIES["memories"], []

    def leaks(case: object) -> str:
        kept.append(torch.zeros(1))
        return right.check(case)

    fuzz.calls.PROPERTIES["memories"] = right._replace(check=leaks)
    (failure,) = calls(tmp_path, 60, seed=0).failures
    assert "20 tensors more are alive" in failure

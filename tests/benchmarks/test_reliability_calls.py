"""The random calls of benchmarks/reliability_calls.py: they pass, and they find what is wrong."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import reliability_calls
from reliability import PARTS
from reliability_calls import PROPERTIES, calls

import vrpo_plugin.functional.advantages
import vrpo_plugin.modules.aligner
import vrpo_plugin.modules.generation
from vrpo_plugin.functional.advantages import GroupMoments, group_moments


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(reliability_calls, "PROPERTIES", {name: PROPERTIES[name] for name in names})


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
    return replace(moments, deviation=moments.deviation + 1e-3, live=torch.ones_like(moments.live))


@pytest.mark.parametrize("name", ["advantages", "several rewards"])
def test_it_finds_a_dead_group_with_an_advantage(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, name)
    monkeypatch.setattr(vrpo_plugin.functional.advantages, "group_moments", live_everywhere)
    part = calls(tmp_path, 50, seed=0)
    assert len(part.failures) == 1
    assert part.failures[0].startswith(f"{name}: AssertionError") and "case=" in part.failures[0]


def test_it_finds_one_in_the_aligner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "aligner steps")
    right = vrpo_plugin.modules.generation.combine_rewards

    def shifted(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        advantages, coefficients = right(*args, **options)
        return advantages + 1e-3, coefficients

    monkeypatch.setattr(vrpo_plugin.modules.generation, "combine_rewards", shifted)
    (failure,) = calls(tmp_path, 100, seed=0).failures
    assert "has an advantage" in failure and "case=Case(" in failure


def test_it_finds_an_error_that_is_not_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "wrong calls")
    monkeypatch.setattr(vrpo_plugin.modules.aligner, "check_latents", lambda *args, **given: None)
    (failure,) = calls(tmp_path, 100, seed=0).failures
    assert "case=(Case(" in failure


def test_it_finds_what_is_left_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "noise strata")
    monkeypatch.setattr(reliability_calls, "CHUNK", 20)
    right, kept = PROPERTIES["noise strata"], []

    def leaks(case: object) -> str:
        kept.append(torch.zeros(1))
        return right.check(case)

    reliability_calls.PROPERTIES["noise strata"] = right._replace(check=leaks)
    (failure,) = calls(tmp_path, 60, seed=0).failures
    assert "20 tensors more are alive" in failure

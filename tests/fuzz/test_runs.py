"""Killed runs, faults and damaged checkpoints: the parts hold, and can fail."""

import json
from pathlib import Path
from typing import Any

import harness
import pytest
from safetensors.torch import load_file

from fuzz import files, runs

pytestmark = pytest.mark.slow


def test_killed_runs_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    part = runs.kills(tmp_path, 2, seed=1)
    assert not part.failures
    assert part.outcomes == {"while training": 1, "while writing a checkpoint": 1}


def test_a_run_that_goes_on_otherwise_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = harness.run

    def from_the_start(output: Path, name: str, *options: str, **kwargs: Any) -> Path:
        if "--resume" not in options:
            return run(output, name, *options, **kwargs)
        return run(output, f"{name}-again", "--seed", "5", **kwargs)

    monkeypatch.setattr(harness, "run", from_the_start)
    assert len(runs.kills(tmp_path, 1, seed=0).failures) == 1


def unchecked(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors = {file.stem: load_file(file) for file in folder.glob("*.safetensors")}
    return tensors, json.loads((folder / "state.json").read_text())


def test_damaged_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = files.mutations(tmp_path / "as it is", 60, seed=0)
    assert not part.failures and part.outcomes["refused"] > 50
    monkeypatch.setattr(files, "load_checkpoint", unchecked)
    assert files.mutations(tmp_path / "unchecked", 60, seed=0).failures


def test_a_fault_leaves_its_step_out(tmp_path: Path) -> None:
    part = runs.faults(tmp_path, 1, seed=0)
    assert not part.failures and part.outcomes == {"in a latent, 1 process": 1}

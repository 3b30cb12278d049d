"""Signals in real runs: the step is finished, a checkpoint is written, and the resumed run is the undisturbed one."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.run(tmp_path_factory.mktemp("straight"), "run", encoder=encoder)


def alone(script: Path, output: Path, *options: str) -> list[str]:
    """Without a launcher: the exit status is the run's own."""
    command = harness.command(output, "run", *options, script=script)
    return [sys.executable, *command[command.index(str(script)) :]]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_in_the_middle_of_a_step_ends_it_with_a_checkpoint(
    name: str, encoder: Path, straight: Path, tmp_path: Path
) -> None:
    options = ("--enc-checkpoint", str(encoder), "--checkpointing-steps", "12")
    environment = harness.environment(f"{name}:6:0")
    result = subprocess.run(
        alone(harness.FAULTY, tmp_path, *options), env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 128 + getattr(signal, name), result.stderr
    assert f"{name}: the run ends after this step, with a checkpoint" in result.stderr
    said = f"stopped by {name} after step 7, with a checkpoint; resume with --resume"
    assert said in result.stdout and "Traceback" not in result.stderr
    assert len(harness.metrics(tmp_path / "run")) == 7
    resumed = harness.run(tmp_path, "run", "--resume", "--checkpointing-steps", "12", encoder=encoder)
    harness.assert_same(resumed, straight, 12)


def test_ctrl_c_twice_stops_at_once(encoder: Path, tmp_path: Path) -> None:
    command = alone(harness.FAULTY, tmp_path, "--enc-checkpoint", str(encoder))
    result = subprocess.run(
        command, env=harness.environment("SIGINT+SIGINT:6:0"), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == -signal.SIGINT, result.stderr
    assert not (tmp_path / "run" / "checkpoints" / "0000007").exists()


def test_processes_stop_at_one_step_when_one_gets_the_signal(encoder: Path, tmp_path: Path) -> None:
    whole = harness.run(tmp_path, "whole", processes=2, encoder=encoder)
    result = harness.launch(tmp_path, "run", processes=2, encoder=encoder, fault="SIGUSR1:4:1")
    assert result.returncode != 0
    (stopped,) = re.findall(r"stopped by SIG\w+ after step (\d+), with a checkpoint", result.stdout)
    assert 5 <= int(stopped) <= 8  # at most --flush-steps later
    assert len(harness.metrics(tmp_path / "run")) == int(stopped)
    harness.assert_same(harness.run(tmp_path, "run", "--resume", processes=2, encoder=encoder), whole, 12)


def test_a_signal_to_the_whole_job_spares_the_workers(encoder: Path, tmp_path: Path) -> None:
    """As SLURM sends it: to the loader's processes too, whose end would end the run with an error."""
    options = ("--enc-checkpoint", str(encoder), "--max-train-steps", "100000", "--checkpointing-steps", "100000")
    process = subprocess.Popen(
        alone(harness.SCRIPT, tmp_path, *options, "--num-workers", "2"),
        env=harness.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Error" not in errors, errors
    (stopped,) = re.findall(r"stopped by SIGTERM after step (\d+)", said)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"{int(stopped):07d}"]

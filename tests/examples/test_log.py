"""A run's log file: a line for each phase, lines at intervals, no carriage returns, the files at the end."""

import subprocess
import time
from pathlib import Path

import harness
import pytest

from vrpo_plugin.standalone.progress import INTERVAL

pytestmark = pytest.mark.slow


def test_a_log_is_never_silent_and_ends_with_the_files(tmp_path: Path) -> None:
    options = ("--sampling-steps", "12", "--eval-samples", "64", "--solver-steps", "4")
    process = subprocess.Popen(
        harness.command(tmp_path, "run", *options),
        env=harness.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    lines, times = [], []
    for line in process.stdout:
        lines.append(line.decode())
        times.append(time.monotonic())
    assert process.wait() == 0, lines
    text = "".join(lines)
    assert "\r" not in text
    order = ["data: 1,797 images in 10 classes, 1x8x8", "small encoder: 200/200 (100%)", "targets: small, 64 features"]
    order += ["model: vrpo: SiT-Ti/2 with heads", "run: 12/12 (100%)", "vrpo: Frechet distance"]
    order += [f"run: {tmp_path / 'run'}", "  checkpoints  checkpoints/0000012 and 2 more"]
    order += ["  samples      samples/0000012.png", "  metrics      metrics.jsonl, curves.png"]
    order += ["  evaluation   evaluation.json", f"next: vrpo sample {tmp_path / 'run'} -o DIR", "      vrpo plot"]
    assert [one for one in order if one not in text] == []
    assert sorted(map(text.index, order)) == [*map(text.index, order)]
    # After Python has imported torch; five seconds, and as much again for a machine that is shared.
    first = next(i for i, line in enumerate(lines) if line.startswith("data: "))
    gaps = {lines[i]: round(times[i] - times[i - 1], 1) for i in range(first + 1, len(lines))}
    assert max(gaps.values()) < 2 * INTERVAL, gaps

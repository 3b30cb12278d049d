"""The method in one file, as a newcomer runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "minimal_loop.py"


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--reward-coeff", "0"]])
def test_it_trains_and_draws(options: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "digits.png"
    command = [sys.executable, str(SCRIPT), "--steps", "12", "--output", str(picture), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    denoising = [
        float(line.split("denoising ")[1].split(",")[0]) for line in done.stdout.splitlines() if "step" in line
    ]
    assert denoising[-1] < denoising[0]
    assert ("perceptual" in done.stdout) == (not options)
    assert Image.open(picture).size == (640, 512)


def test_it_stays_one_short_file() -> None:
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 90

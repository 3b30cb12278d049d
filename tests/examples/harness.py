"""Runs the example trainer in this process or in its own, with tiny settings on real digits."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "examples" / "train_repa_vrpo.py"
TINY = shlex.split("""
--batch-size 16 --max-train-steps 12 --checkpointing-steps 4 --sampling-steps 0 --eval-samples 0 --flush-steps 3
--projector-dim 32 --critic-width 16 --num-workers 0 --ema-decay 0.9
""")


def environment() -> dict[str, str]:
    """One thread and no GPU: the same numbers everywhere."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
    return variables | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPO)}


def command(output: Path, name: str, *options: str, processes: int = 1) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    if processes > 1:
        port = 29500 + os.getpid() % 2000
        launcher += ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", str(port)]
    else:
        launcher += ["--num_processes", "1"]
    return [*launcher, str(SCRIPT), "--output-dir", str(output), "--exp-name", name, *TINY, *options]


def run(output: Path, name: str, *options: str, processes: int = 1, encoder: Path | None = None) -> Path:
    """Runs to the end under ``accelerate launch``; returns the run's folder."""
    if encoder is not None:
        options = ("--enc-checkpoint", str(encoder), *options)
    result = subprocess.run(
        command(output, name, *options, processes=processes),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return output / name


def metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without their times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Model, EMA and optimizer tensors of a checkpoint, by group and name."""
    files = (folder / "checkpoints" / f"{step:07d}").glob("*.safetensors")
    return {f"{file.stem}/{k}": v for file in files for k, v in load_file(file).items()}


def assert_same(a: Path, b: Path, step: int) -> None:
    """Bitwise equal metrics and weights."""
    assert metrics(a) == metrics(b)
    ours, theirs = weights(a, step), weights(b, step)
    assert ours.keys() == theirs.keys()
    unlike = [k for k in ours if not torch.equal(ours[k], theirs[k])]
    assert not unlike, unlike

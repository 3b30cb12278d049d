"""Runs the example trainer in this process or in its own, with tiny settings on real digits."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "examples" / "train_repa_vrpo.py"
TINY = shlex.split("""
--batch-size 16 --max-train-steps 12 --checkpointing-steps 4 --sampling-steps 0 --eval-samples 0 --flush-steps 3
--projector-dim 32 --critic-width 16 --num-workers 0 --ema-decay 0.9
""")


FAULTY = Path(__file__).with_name("faulty.py")


def environment(fault: str | None = None) -> dict[str, str]:
    """One thread and no GPU: the same numbers everywhere."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
    path = os.pathsep.join([str(REPO), str(REPO / "examples")])
    variables |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
    return variables | ({"VRPO_FAULT": fault} if fault else {})


def command(output: Path, name: str, *options: str, processes: int = 1, script: Path = SCRIPT) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    if processes > 1:
        port = 29500 + os.getpid() % 2000
        launcher += ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", str(port)]
    else:
        launcher += ["--num_processes", "1"]
    return [*launcher, str(script), "--output-dir", str(output), "--exp-name", name, *TINY, *options]


def launch(
    output: Path,
    name: str,
    *options: str,
    processes: int = 1,
    encoder: Path | None = None,
    fault: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs under ``accelerate launch``, with a fault as ``faulty.py`` says."""
    if encoder is not None:
        options = ("--enc-checkpoint", str(encoder), *options)
    return subprocess.run(
        command(output, name, *options, processes=processes, script=FAULTY if fault else SCRIPT),
        env=environment(fault),
        capture_output=True,
        text=True,
        timeout=600,
    )


def run(output: Path, name: str, *options: str, **kwargs: Any) -> Path:
    """As :func:`launch`, to the end; returns the run's folder."""
    result = launch(output, name, *options, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return output / name


def cut(folder: Path, copy: Path, *, step: int) -> Path:
    """A copy of a run's folder as if it had been killed some steps after the checkpoint of ``step``."""
    shutil.copytree(folder, copy)
    for later in (path for path in (copy / "checkpoints").iterdir() if int(path.name) > step):
        shutil.rmtree(later)
    return copy


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

"""Whole runs of the example that are killed, and go on."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from reliability_parts import Part

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "examples"))

import harness

from vrpo_plugin.evaluation.small_training import train_small_features
from vrpo_plugin.reference.checkpoint import SAVING
from vrpo_plugin.reference.sources import DigitsSource, all_images

STEPS = 12  # of harness.TINY


def straight_run(output: Path) -> tuple[Path, Path]:
    """An encoder and a run that nothing disturbed."""
    output.mkdir(parents=True, exist_ok=True)
    encoder = output / "encoder.safetensors"
    train_small_features(*all_images(DigitsSource()), seed=0, steps=40).save(encoder)
    return encoder, harness.run(output, "straight", encoder=encoder)


def kills(output: Path, count: int, seed: int) -> Part:
    """``kill -9`` of a whole run, in turn at a random moment of training and while a checkpoint is being written."""
    part, generator = Part("kill -9"), random.Random(seed)
    encoder, straight = straight_run(output)
    for i in range(count):
        name, moment = f"killed{i}", ("training", "writing a checkpoint")[i % 2]
        shutil.rmtree(output / name, ignore_errors=True)
        step = kill_once(output, name, encoder, moment, generator)
        where = f"{moment}, after step {step}"
        if step >= STEPS:
            part.add("too late")
            continue
        part.add(f"while {moment}")
        print(f"{part.name} {i}: {where}", flush=True)
        try:
            harness.assert_same(harness.run(output, name, "--resume", encoder=encoder), straight, STEPS)
        except AssertionError as error:
            part.fail(f"{where}: {str(error)[:2000]}")
    return part


def kill_once(output: Path, name: str, encoder: Path, moment: str, generator: random.Random) -> int:
    """Starts a run and kills it with all its processes; gives the lines that its log then held."""
    folder = output / name
    log, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    process = subprocess.Popen(
        harness.command(output, name, "--enc-checkpoint", str(encoder), "--flush-steps", "1"),
        env=harness.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def lines() -> int:
        return len(log.read_bytes().splitlines()) if log.exists() else 0

    wanted = generator.randrange(1, STEPS)
    which = generator.randrange(4, STEPS, 4)

    def reached() -> bool:
        if moment == "training":
            return lines() >= wanted
        return (checkpoints / f"{SAVING}{which:07d}").exists()

    wait_until(reached, process)
    time.sleep(generator.uniform(0, 0.02))  # anywhere within the step, or within the writing
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return lines()


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not reached() and process.poll() is None:
        time.sleep(0.0005)

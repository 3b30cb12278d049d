"""Whole runs of the example: killed and resumed, or with a fault in one step."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import harness

from fuzz.part import Part
from vrpo_plugin.standalone.checkpoint import SAVING
from vrpo_plugin.standalone.small_training import train_small_features
from vrpo_plugin.standalone.sources import DigitsSource, all_images

STEPS = 12  # of harness.TINY
FAULTS = ("latent", "target", "reward", "gradient")  # of tests/examples/faulty.py
TOLERANCE = 1e-6  # on several processes, sums may be ordered otherwise


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
    done = 0
    while done < count:
        name, moment = f"killed{done}", ("training", "writing a checkpoint")[done % 2]
        shutil.rmtree(output / name, ignore_errors=True)
        step = kill_once(output, name, encoder, moment, generator)
        if step >= STEPS:  # it was over before the signal came
            continue
        done += 1
        where = f"{moment}, after step {step}"
        part.add(f"while {moment}")
        print(f"{part.name} {done}: {where}", flush=True)
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

    wanted = generator.randrange(1, STEPS - 1)
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


def faults(output: Path, count: int, seed: int) -> Part:
    """A NaN in a random place, step and process: the run ends where one ends that left that step out."""
    part, generator = Part("faults"), random.Random(seed)
    encoder, _ = straight_run(output)
    skipped: dict[tuple[int, int], Path] = {}
    for i in range(count):
        processes, what = 1 + i % 2, FAULTS[i // 2 % len(FAULTS)]
        # Not the first: the run that leaves a step out takes the names of its metrics from the one before.
        step, rank = generator.randrange(1, STEPS), generator.randrange(processes)
        if (step, processes) not in skipped:
            skipped[step, processes] = harness.run(
                output, f"skip{step}of{processes}", processes=processes, encoder=encoder, fault=f"skip:{step}:0"
            )
        where = f"{what}, step {step}, process {rank} of {processes}"
        found = harness.run(output, f"fault{i}", processes=processes, encoder=encoder, fault=f"{what}:{step}:{rank}")
        part.add(f"in a {what}, {processes} process{'es' if processes > 1 else ''}")
        print(f"{part.name} {i + 1}: {where}", flush=True)
        if [row["skipped"] for row in harness.metrics(found)] != [float(j == step) for j in range(STEPS)]:
            part.fail(f"{where}: another step was left out, or none")
        ours, theirs = harness.weights(found, STEPS), harness.weights(skipped[step, processes], STEPS)
        furthest = max(float((value - theirs[name]).abs().max()) for name, value in ours.items() if value.numel())
        if not furthest <= TOLERANCE:  # NaN too
            part.fail(f"{where}: weights differ by {furthest}")
    return part

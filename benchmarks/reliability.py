"""Injects faults into real runs and files, and counts what came of it.

    python benchmarks/reliability.py --output exps/reliability                 # all parts
    python benchmarks/reliability.py --output exps/reliability --parts kills   # 20 times kill -9

Each part prints one line: what was tried, how often, and how often it failed. Any failure ends it with status 1.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "examples"))

import harness  # noqa: E402

from vrpo_plugin import CheckpointError  # noqa: E402
from vrpo_plugin.evaluation.small_training import train_small_features  # noqa: E402
from vrpo_plugin.reference.checkpoint import SAVING, load_checkpoint  # noqa: E402
from vrpo_plugin.reference.sources import DigitsSource, all_images  # noqa: E402

STEPS = 12  # of harness.TINY


class Part:
    """Counts what was tried and what failed, and says so."""

    def __init__(self, name: str) -> None:
        self.name, self.outcomes, self.failures = name, {}, []

    def add(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def fail(self, text: str) -> None:
        self.failures.append(text)
        print(f"{self.name}: FAILED: {text}", flush=True)

    def __str__(self) -> str:
        done = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        return f"{self.name}: {sum(self.outcomes.values())} tried ({done}), {len(self.failures)} failed"


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


def mutations(output: Path, count: int, seed: int) -> Part:
    """Loads a run's checkpoint with one file damaged: a typed error that names it, or the right bytes."""
    part, generator = Part("damaged checkpoints"), random.Random(seed)
    whole = straight_run(output)[1] / "checkpoints" / f"{STEPS:07d}"
    right, state = load_checkpoint(whole)
    folder = output / "damaged"
    for i in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        file = generator.choice(sorted(path for path in folder.iterdir() if path.is_file()))
        kind = generator.choice(sorted(DAMAGES))
        DAMAGES[kind](file, generator)
        try:
            tensors, found = load_checkpoint(folder)
        except CheckpointError as error:
            part.add("refused")
            if file.name not in str(error) and str(folder) not in str(error):
                part.fail(f"{i}: {kind} in {file.name}: the error does not name it: {error}")
            continue
        except Exception as error:  # any other is what this looks for
            part.fail(f"{i}: {kind} in {file.name}: {error!r}")
            continue
        part.add("loaded, the damage had changed nothing")
        same = found == state and all(
            torch.equal(value, right[group][name]) for group, named in tensors.items() for name, value in named.items()
        )
        if not same or tensors.keys() != right.keys():
            part.fail(f"{i}: {kind} in {file.name}: other values were loaded")
    return part


def _flip(file: Path, generator: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(generator.choice((1, 1, 8, 64))):
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    file.write_bytes(data)


def _cut(file: Path, generator: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: generator.randrange(file.stat().st_size)])


def _grow(file: Path, generator: random.Random) -> None:
    file.write_bytes(file.read_bytes() + generator.randbytes(generator.randrange(1, 100)))


def _overwrite(file: Path, generator: random.Random) -> None:
    data, start = bytearray(file.read_bytes()), generator.randrange(file.stat().st_size)
    data[start : start + 64] = generator.randbytes(len(data[start : start + 64]))
    file.write_bytes(data)


def _zero(file: Path, generator: random.Random) -> None:
    data, start = bytearray(file.read_bytes()), generator.randrange(file.stat().st_size)
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))  # a block that never reached the disk
    file.write_bytes(data)


def _foreign(file: Path, generator: random.Random) -> None:
    others = [path for path in file.parent.iterdir() if path != file and path.is_file()]
    shutil.copy(generator.choice(sorted(others)), file)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped bits": _flip,
    "a truncation": _cut,
    "bytes at the end": _grow,
    "random bytes": _overwrite,
    "a block of zeros": _zero,
    "another file's content": _foreign,
    "a missing file": lambda file, generator: file.unlink(),
}

PARTS: dict[str, tuple[Callable[[Path, int, int], Part], int]] = {
    "kills": (kills, 20),
    "mutations": (mutations, 1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--count", type=int, help="instead of each part's own")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    done = []
    for name in arguments.parts:
        run, count = PARTS[name]
        done.append(run(arguments.output / name, arguments.count or count, arguments.seed))
    print(*done, sep="\n")
    sys.exit(any(part.failures for part in done))


if __name__ == "__main__":
    main()

"""Checkpoints with damaged files."""

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fuzz.part import Part
from fuzz.runs import STEPS, straight_run
from vrpo_plugin import CheckpointError
from vrpo_plugin.standalone.checkpoint import load_checkpoint


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
        if found != state or not alike(tensors, right):
            part.fail(f"{i}: {kind} in {file.name}: other values were loaded")
    return part


def alike(a: Mapping[str, Mapping[str, Tensor]], b: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """The same groups of the same tensors, to the bit."""
    return a.keys() == b.keys() and all(
        named.keys() == b[group].keys() and all(torch.equal(value, b[group][name]) for name, value in named.items())
        for group, named in a.items()
    )


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

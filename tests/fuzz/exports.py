"""``vrpo export`` on damaged and odd checkpoints."""

import argparse
import io
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuzz.command import run, snapshot
from fuzz.part import Part


def export(part: Part, folder: Path, draw: random.Random) -> None:
    """Exports one checkpoint: written whole, or refused with no file left."""
    folder.mkdir(parents=True)
    source, out = folder / "0000100.pt", folder / ("plain" + draw.choice((".pt", ".safetensors")))
    data, kind = _checkpoint(draw)
    source.write_bytes(data)
    before = snapshot(folder)
    ended = run("export", source, out)
    part.add("export refused" if ended.refused else "exported")
    left = [path for path in snapshot(folder).changed(before) if path != "."]
    text = f"{part.prefix}: {kind}: export to {out.suffix}"
    if ended.fault:
        part.fail(f"{text}: {ended.fault}")
    if left != ([] if ended.refused else [out.name]):
        part.fail(f"{text}: left {left}")
    if not ended.refused and out.suffix == ".pt":
        again = run("export", out, folder / "again.pt")
        if again.refused or "held no aligner" not in again.out:
            part.fail(f"{text}: what it wrote is no checkpoint without the aligner: {again}")


def _checkpoint(draw: random.Random) -> tuple[bytes, str]:
    weights = OrderedDict((name, torch.ones(2, 3)) for name in ("a.weight", "b.weight", "vrpo.critic.weight"))
    weights["vrpo.step"] = torch.tensor(3)
    state = {i: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 3)} for i in range(3)}
    checkpoint: dict[str, Any] = {
        "model": weights,
        "ema": OrderedDict(weights),
        "opt": {"state": state, "param_groups": [{"lr": 1e-4, "params": [0, 1, 2]}]},
        "args": argparse.Namespace(resume_step=0),
    }
    kind = "whole"
    for _ in range(draw.choice((0, 1, 1, 2))):
        kind = draw.choice(sorted(ODD))
        ODD[kind](checkpoint, draw)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, _use_new_zipfile_serialization=draw.random() < 0.5)
    data = buffer.getvalue()
    if draw.random() < 0.6:
        kind, damaged = f"{kind}, damaged", bytearray(data)
        for _ in range(draw.choice((1, 2, 16))):
            # The pickle comes first in both formats; what follows is the tensors.
            damaged[draw.randrange(min(len(data), draw.choice((400, 2000, 1 << 20))))] = draw.randrange(256)
        data = bytes(damaged[: draw.randrange(len(damaged))] if draw.random() < 0.2 else damaged)
    return data, kind


def _tensor(make: Callable[[], Tensor]) -> Callable[[dict[str, Any], random.Random], None]:
    def work(checkpoint: dict[str, Any], draw: random.Random) -> None:
        checkpoint[draw.choice(("model", "ema"))] = {"a.weight": torch.ones(2), "b.weight": make()}

    return work


def _value(key: str, *values: Any) -> Callable[[dict[str, Any], random.Random], None]:
    def work(checkpoint: dict[str, Any], draw: random.Random) -> None:
        checkpoint[key] = draw.choice(values)

    return work


def _versions(checkpoint: dict[str, Any], draw: random.Random) -> None:
    """What a model's state holds beside its tensors."""
    checkpoint["ema"]._metadata = draw.choice((5, [1], {1: 2}, OrderedDict(a={"version": 1})))


ODD: dict[str, Callable[[dict[str, Any], random.Random], None]] = {
    "a missing part": lambda checkpoint, draw: checkpoint.pop(draw.choice(("model", "ema", "opt", "args")), None),
    "odd weights": _value("ema", None, 1, [], {}, {1: torch.ones(1)}, {"a": 1}, {"": torch.ones(1)}),
    "an odd optimizer": _value(
        "opt",
        None,
        [],
        {},
        {"state": {}, "param_groups": []},
        {"state": [], "param_groups": [{"params": [0, 1, 2]}]},
        {"state": {2: 5}, "param_groups": [{"params": [0, 1, 2]}]},
        {"state": {2: {"exp_avg": "x"}}, "param_groups": [{"params": [0, 1, 2]}]},
        {"state": {}, "param_groups": [{"params": [[0], [1], [2]]}]},
        {"state": {}, "param_groups": [{"params": "abc"}]},
        {"state": {}, "param_groups": {"params": [0, 1, 2]}},
    ),
    "odd versions": lambda checkpoint, draw: (
        _versions(checkpoint, draw) if isinstance(checkpoint.get("ema"), OrderedDict) else None
    ),
    "a sparse tensor": _tensor(lambda: torch.eye(3).to_sparse()),
    "a complex tensor": _tensor(lambda: torch.ones(3, dtype=torch.complex128)),
    "a tensor without memory": _tensor(lambda: torch.ones(3, device="meta")),
    "a tensor larger than memory": _tensor(lambda: torch.ones(1).expand(1 << 46)),
    "a quantized tensor": _tensor(lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
    "an empty tensor": _tensor(lambda: torch.ones(0, 3)),
}

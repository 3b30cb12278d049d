"""Curves of a host's run, from what its own script writes: TensorBoard's event files, or its log.txt."""

import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.standalone.series import Metrics, Series, collect, final_rows

EVENTS = "*tfevents*"
LOG = "log.txt"
_ANY = re.compile(r"vrpo \(call=|\(step=\d+\) Train Loss")
_NUMBER = r"(-?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf))"
# Of DiT, SiT and LightningDiT: "(step=0000100) Train Loss: 0.1234, Train Steps/Sec: 2.10".
_HOST_LINE = re.compile(rf"\(step=(\d+)\) Train Loss: {_NUMBER}(?:, Train Steps/Sec: {_NUMBER})?")
# Ours: "vrpo (call=0000100) align_cos: 0.1234, ...".
_OUR_LINE = re.compile(r"vrpo \(call=(\d+)\) (.*)")
_PAIR = re.compile(rf"([\w/]+): {_NUMBER}")


def is_host_log(path: Path) -> bool:
    """A text that holds lines of ours, or of a host's losses."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return any(_ANY.search(line) for line in file)
    except OSError:
        return False


def read_log(path: Path) -> Metrics:
    """Losses and ``vrpo/`` metrics of a ``log.txt``. Where the script was started again, later lines count.

    Steps of ``vrpo/`` metrics are calls of the aligner since the last start: one per micro step.
    """
    host: list[dict[str, Any]] = []
    ours: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if found := _HOST_LINE.search(line):
                speed = float(found[3] or "nan")
                host.append(
                    {"step": int(found[1]), "loss": float(found[2]), "seconds": 1 / speed if speed > 0 else None}
                )
            elif found := _OUR_LINE.search(line):
                values = {f"vrpo/{name}": float(value) for name, value in _PAIR.findall(found[2])}
                ours.append({"step": int(found[1]), **values})
    series: dict[str, Series] = {}
    left_out, spent = 0, []
    for rows in (host, ours):
        final = final_rows(np.array([row["step"] for row in rows], np.int64))
        left_out += len(rows) - int(final.sum())
        kept = [row for row, stays in zip(rows, final, strict=True) if stays]
        series |= collect(kept, len(kept))
        spent += [row["seconds"] for row in kept if row.get("seconds")]
    last = next((rows[-1]["step"] for rows in (host, ours) if rows), 0)
    notes = [f"{path}: {left_out} lines are of an earlier start: the later lines count"] if left_out else []
    if not ours:
        notes.append(f"{path}: no vrpo/ metrics; the host logs them to its tracker (see docs/hosts.md, In the logs)")
    return Metrics({k: v for k, v in series.items() if k != "seconds"}, len(host), last, np.array(spent), tuple(notes))


def can_read_events() -> bool:
    """TensorBoard is installed."""
    return importlib.util.find_spec("tensorboard") is not None


def event_folders(folder: Path) -> list[Path]:
    """Folders with TensorBoard's event files: this one and those at most two levels below it."""
    return sorted({path.parent for depth in ("", "*/", "*/*/") for path in folder.glob(depth + EVENTS)})


def read_events(folder: Path) -> Metrics:
    """Scalars of TensorBoard's event files in :func:`event_folders`.

    Raises:
        ConfigError: two folders hold the same metric, so that there are several runs.
    """
    series: dict[str, Series] = {}
    found: dict[str, Path] = {}
    for part in event_folders(folder):
        for name, one in _scalars(part):
            if name in found:
                do, got = "Give one of them.", f"{name} in {found[name]} and in {part}"
                raise ConfigError(str(folder), expected="the event files of one run", got=got, do=do)
            series[name], found[name] = one, part
    last = max((int(one.steps[-1]) for one in series.values()), default=0)
    rows = max((int(one.count.sum()) for one in series.values()), default=0)
    return Metrics(series, rows, last, np.empty(0))


def _scalars(folder: Path) -> Iterator[tuple[str, Series]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 keeps every scalar, those too that a restart has written again.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    for name in events.Tags()["scalars"]:
        scalars = events.Scalars(name)
        final = final_rows(np.array([one.step for one in scalars], np.int64))
        kept = itertools.compress(scalars, final)
        yield from collect(({"step": one.step, name: one.value} for one in kept), int(final.sum())).items()

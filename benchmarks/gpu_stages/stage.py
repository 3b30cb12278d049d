"""What a stage is given, and how it keeps what it has measured."""

import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vrpo_plugin.files import write_file


@dataclass
class Stage:
    """One stage of one run of the command.

    Attributes:
        name: of the stage; its results are ``output/gpu_NAME.json``.
        output: folder of results.
        scratch: folder of what is not a result: unpacked data, checkpoints.
        device: ``cuda`` or ``cpu``.
        toy: sizes that a CPU finishes in seconds; such numbers mean nothing.
        seconds: that the stage may take; it stops starting work when they are spent.
        stamp: card, versions, commit and command, written with every result.
        hosts: folder of checkouts (``REPA/``, ``SiT/``), or None.
        data: folder with ``train/`` and ``test/``, an archive of one, or None.
        networks: folder with one folder per recipe of feature networks and critics, or None.
        record: what was measured so far.
    """

    name: str
    output: Path
    scratch: Path
    device: torch.device
    toy: bool
    seconds: float
    stamp: dict[str, Any]
    hosts: Path | None = None
    data: Path | None = None
    networks: Path | None = None
    record: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def keep(self, **entries: Any) -> None:
        """Adds entries to the record and writes it at once, so that a run that is cut keeps what it has."""
        self.record |= entries
        spent = round(time.monotonic() - self.started, 1)
        content = {"stage": self.name, **self.stamp, "stage_seconds": spent, **self.record}
        self.output.mkdir(parents=True, exist_ok=True)
        write_file(self.output / f"gpu_{self.name}.json", json.dumps(content, indent=1) + "\n")

    def skip(self, part: str, reason: str) -> None:
        """Records that a part was not measured, and why."""
        self.keep(skipped={**self.record.get("skipped", {}), part: reason})
        print(f"{self.name}: {part}: skipped: {reason}", flush=True)

    def attempt(self, part: str, work: Callable[[], Any]) -> Any:
        """Runs a part; what it raises is recorded and printed, and the other parts go on."""
        try:
            return work()
        except Exception as error:
            text = traceback.format_exc()
            self.keep(errors={**self.record.get("errors", {}), part: f"{type(error).__name__}: {error}"})
            print(f"{self.name}: {part}: failed\n{text}", flush=True)
            return None


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

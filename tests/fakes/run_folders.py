"""Run folders as the example writes them, by its own RunFolder, without training."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vrpo_plugin.standalone.evaluate import EvalProtocol, EvalResult
from vrpo_plugin.standalone.run_folder import RunFolder

PROTOCOL = EvalProtocol("euler", 50, 100, "small-1", "training images", 100)


def row(step: int, **metrics: Any) -> dict[str, Any]:
    """A row of metrics.jsonl as the example writes it."""
    decay = math.exp(-step / 10)
    named = {"vrpo/reward/semantic": 1 - decay, "vrpo/weight/semantic": 0.5, "vrpo/critic_cos": 0.9, "grad_norm": 1.0}
    return {"step": step, "loss": decay, **named, "skipped": 0.0, "seconds": 0.5, **metrics}


def make_run(
    path: Path,
    rows: Iterable[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    result: EvalResult | None = None,
    grid: bytes | None = None,
) -> Path:
    folder = RunFolder(path, {"method": "vrpo", "seed": 0, **(settings or {})})
    folder.start()
    folder.append_metrics([dict(one) for one in rows])
    if result is not None:
        folder.write_evaluation(result)
    if grid is not None:
        (path / "samples" / "0000010.png").write_bytes(grid)
    return path

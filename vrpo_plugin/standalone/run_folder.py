"""The files of one run: config.json, metrics.jsonl, curves.png, samples/, checkpoints/."""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vrpo_plugin._version import __version__
from vrpo_plugin.errors import CheckpointError, ConfigError, NonFiniteError
from vrpo_plugin.files import write_file
from vrpo_plugin.standalone.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from vrpo_plugin.standalone.evaluate import EvalProtocol, EvalResult
from vrpo_plugin.standalone.stopping import Agreement

DATA = "data_fingerprint"  # the setting that no option gives
ENCODER_PREFIX = "encoder-"  # of the file in the run's folder that keeps a small encoder


class RunFolder:
    """Owns the files of one run; refuses another run's folder before anything is written.

    Args:
        path: of the folder.
        settings: of the run, as config.json holds them.
        free: names of settings that may differ when the run is resumed.
        resume: go on with a run that is there.
        resume_step: from this checkpoint, in place of the newest.
        keep_last: checkpoints that are kept; None keeps all.

    Raises:
        ConfigError: the folder holds a run and ``--resume`` is not given, or the run had other settings.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        free: Collection[str] = (),
        resume: bool = False,
        resume_step: int | None = None,
        keep_last: int | None = None,
    ) -> None:
        self.path, self.settings, self.free = path, dict(settings), free
        self.resume, self.resume_step, self.keep_last = resume, resume_step, keep_last
        self._check_owner()

    def _check_owner(self) -> None:
        recorded = self.path / "config.json"
        found = self.path.iterdir() if self.path.exists() else ()
        if all(entry.name.startswith(ENCODER_PREFIX) for entry in found):
            return
        former = json.loads(recorded.read_text(encoding="utf-8"))["settings"] if recorded.exists() else None
        unlike = {} if former is None else {key: former.get(key) for key in self.settings if self._changed(key, former)}
        options = " ".join(as_option(key, value) for key, value in unlike.items() if key != DATA)
        if not self.resume or former is None:
            do = f"pass --resume {options}".rstrip() + " to go on with that run"
            raise ConfigError(
                str(self.path),
                expected="a new or empty folder",
                got="another run's files",
                do=f"Choose another --exp-name{'' if former is None or DATA in unlike else f', or {do}'}.",
            )
        if unlike:
            got = "; ".join(f"{key}: {value!r} then, {self.settings[key]!r} now" for key, value in unlike.items())
            do = f"Pass {options}." if options else "Point --data-dir at the data that the run began with."
            raise ConfigError(str(self.path), expected="the settings that the run began with", got=got, do=do)

    def _changed(self, key: str, former: Mapping[str, Any]) -> bool:
        return key not in self.free and bool(former.get(key) != self.settings[key])

    def start(self) -> None:
        """Makes the folder and writes config.json; called when all parts are built, so a failed start leaves none."""
        (self.path / "samples").mkdir(parents=True, exist_ok=True)
        record = {
            "settings": self.settings,
            "versions": {"vrpo_plugin": __version__, "torch": torch.__version__},
        }
        write_file(self.path / "config.json", json.dumps(record, indent=2) + "\n")

    def latest(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """The newest complete checkpoint, or None; metrics beyond it are cut off by :meth:`cut_metrics`.

        Raises:
            CheckpointError: it is damaged, or ``--resume-step`` names one that is not there. Another one is taken only
                if it is asked for.
        """
        root, step = self.path / "checkpoints", self.resume_step
        found = root / f"{step:07d}" if step is not None else latest_checkpoint(root) if self.resume else None
        return None if found is None else load_checkpoint(found)

    def cut_metrics(self, step: int) -> None:
        """Drops the lines after ``step``: steps between the checkpoint and the kill are trained again."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if lines:
            write_file(path, "".join(lines[:step]))
        if len(lines) < step:
            raise CheckpointError(
                str(path), expected=f"{step} lines", got=len(lines), do="Restore it, or start a new run."
            )

    def append_metrics(self, rows: list[dict[str, float | int | None]]) -> None:
        """Adds lines, one per step."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Writes a checkpoint."""
        return save_checkpoint(self.path / "checkpoints", step, tensors, state, keep_last=self.keep_last)

    def write_evaluation(self, result: EvalResult) -> Path:
        """Writes evaluation.json, or where that is of another protocol, a file named after this one."""
        path = self.path / "evaluation.json"
        if path.exists() and not _has_protocol(path, result.protocol):
            digest = hashlib.sha256(json.dumps(result.protocol.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
            path = self.path / f"evaluation-{result.protocol.name}-{digest}.json"
        write_file(path, result.to_json() + "\n")
        return path

    def draw_curves(self) -> None:
        """Draws metrics.jsonl into curves.png."""
        from vrpo_plugin.standalone.plots import draw
        from vrpo_plugin.standalone.runs import read_runs

        write_file(self.path / "curves.png", draw(read_runs([self.path])))


def as_option(key: str, value: Any) -> str:
    """A setting of config.json as it is written on the command line."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    if value is None:
        return f"(no --{name})"
    if isinstance(value, Mapping):
        value = [f"{one}={share}" for one, share in value.items()]
    return f"--{name} {','.join(map(str, value)) if isinstance(value, list) else value}"


def _has_protocol(path: Path, protocol: EvalProtocol) -> bool:
    try:
        return EvalResult.from_json(path.read_text(encoding="utf-8")).protocol == protocol
    except ConfigError:  # of another version: not ours to replace
        return False


class MetricBuffer:
    """Keeps every step's metrics on the device and brings them to the host in one transfer per flush."""

    def __init__(self, agreement: Agreement) -> None:
        self.agreement = agreement
        self.rows: list[tuple[int, float, Tensor]] = []
        self.names: tuple[str, ...] = ()

    def add(self, step: int, metrics: Mapping[str, Tensor], seconds: float) -> None:
        """Takes 0-dim tensors of one step; all steps have the same names."""
        self.names = tuple(metrics)
        self.rows.append((step, seconds, torch.stack([m.detach().float() for m in metrics.values()])))

    def flush(self) -> list[dict[str, float | int | None]]:
        """The rows since the last flush, averaged over processes, which agree on the way whether to stop.

        NaN becomes None.
        """
        if not self.rows:
            return []
        values = torch.stack([v for _, _, v in self.rows])
        means = self.agreement.exchange(self.rows[-1][0], values, [seconds for _, seconds, _ in self.rows])
        rows: list[dict[str, float | int | None]] = []
        for (step, seconds, _), row in zip(self.rows, means.tolist(), strict=True):
            numbers = {n: v if math.isfinite(v) else None for n, v in zip(self.names, row, strict=True)}
            rows.append({"step": step, **numbers, "seconds": round(seconds, 4)})
        self.rows.clear()
        return rows


class SkippedSteps:
    """Ends a run that leaves out step after step.

    Args:
        limit: so many in a row are let pass.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0
        self.first: Mapping[str, float | int | None] = {}  # of those

    def add(self, rows: Sequence[Mapping[str, float | int | None]]) -> None:
        """Takes the rows of metrics.jsonl, in order.

        Raises:
            NonFiniteError: more steps in a row than the limit; names the first of them, and what was not finite.
        """
        for row in rows:
            self.in_a_row = self.in_a_row + 1 if row["skipped"] else 0
            if self.in_a_row == 1:
                self.first = row
            if self.in_a_row > self.limit:
                counted = [name for name, value in self.first.items() if "nonfinite" in name and value]
                unknown = [name for name, value in self.first.items() if value is None]
                raise NonFiniteError(
                    f"step {self.first['step']}",
                    expected=f"at most {self.limit} steps in a row that are not finite",
                    got=f"{self.in_a_row}, beginning with {', '.join(counted + unknown)}",
                    do="Weights and moments are those before that step: look at what is named there.",
                )

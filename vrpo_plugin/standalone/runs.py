"""What finished and unfinished runs left on disk: settings, curves, sample grids, evaluations."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.standalone.host_logs import LOG, can_read_events, event_folders, is_host_log, read_events, read_log
from vrpo_plugin.standalone.series import Metrics, read_metrics

CONFIG, METRICS, SAMPLES = "config.json", "metrics.jsonl", "samples"
HELD_OUT = "held_out.jsonl"  # looks of the monitor against reward hacking
RESULTS = "*evaluations.jsonl"  # of vrpo eval, in a folder of samples or beside their file
BENCHMARK = "convergence.json"  # of benchmarks/convergence
_WHICH = ("step", "checkpoint")  # say what was measured, and not how


@dataclass(frozen=True)
class Evaluation:
    """Numbers of one evaluation.

    Attributes:
        step: of the weights; None where it is not known.
        protocol: how it was measured; only numbers of one protocol are compared.
        metrics: name to number.
        file: where it stands.
    """

    step: int | None
    protocol: Mapping[str, Any]
    metrics: Mapping[str, float]
    file: Path

    @property
    def conditions(self) -> dict[str, Any]:
        """The protocol without what does not tell two apart: unknown values, and a reference's name beside its hash."""
        known = {k: v for k, v in self.protocol.items() if v not in (None, "unknown") and (k, v) != ("guide", "none")}
        return {k: v for k, v in known.items() if k != "reference" or "reference_hash" not in known}


@dataclass(frozen=True, eq=False)
class Run:
    """One run.

    Attributes:
        name: of the folder; with its parents' where another run has the same.
        path: of the folder.
        settings: of config.json; empty for a host's run.
        versions: likewise.
        metrics: curves and times.
        evaluations: in the order of their steps.
        grid: the newest picture of samples.
        notes: in words, what was left out.
    """

    name: str
    path: Path
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    metrics: Metrics
    evaluations: tuple[Evaluation, ...]
    grid: Path | None
    notes: tuple[str, ...]

    @property
    def seconds_a_step(self) -> float | None:
        """Median, so that pauses for samples and checkpoints do not count; None where no time is written down."""
        seconds = self.metrics.seconds
        return float(np.median(seconds)) if len(seconds) else None

    @property
    def seconds(self) -> float | None:
        """Of all steps that count, pauses between them included; None where not every step has a time."""
        seconds = self.metrics.seconds
        return float(seconds.sum()) if len(seconds) and len(seconds) == self.metrics.last_step else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads run folders of the example, or what a host's script has written.

    Args:
        paths: of the example's run folders, of folders with a host's TensorBoard files or log.txt, or of folders of
            samples that ``vrpo eval`` has measured.

    Raises:
        ConfigError: a path is none of these, or is given twice.
    """
    resolved = [path.resolve() for path in paths]
    for path, full in zip(paths, resolved, strict=True):
        if resolved.count(full) > 1:
            raise ConfigError(str(path), expected="every run once", got="the same folder twice", do="Name it once.")
    return [_read(path, name) for path, name in zip(paths, _names(resolved), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len({*names}) == len(names):
            return names
    return [str(path) for path in paths]


def _read(path: Path, name: str) -> Run:
    notes: list[str] = []
    record = _mapping(path / CONFIG, notes)
    settings = _inner(record, "settings")
    metrics = _metrics(path, notes)
    evaluations = sorted(_evaluations(path, settings, metrics, notes), key=lambda e: (e.step is None, e.step or 0))
    if metrics is None and not evaluations and not settings:
        _refuse(path)
    notes += _repeated(evaluations)
    metrics = metrics or Metrics({}, 0, 0, np.empty(0))
    grids = sorted((path / SAMPLES).glob("*.png"), key=lambda file: (len(file.stem), file.stem))
    versions = {key: str(value) for key, value in _inner(record, "versions").items()}
    return Run(
        name, path, settings, versions, metrics, tuple(evaluations), grids[-1] if grids else None,
        (*notes, *metrics.notes),
    )  # fmt: skip


def _repeated(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    latest: dict[tuple[str, int | None], Evaluation] = {}
    for one in evaluations:
        key = (json.dumps(one.conditions, sort_keys=True), one.step)
        if key in latest and latest[key].file != one.file:
            step = "an unknown step" if one.step is None else f"step {one.step}"
            yield f"{latest[key].file}: an evaluation of {step} is in {one.file} too, which counts"
        latest[key] = one


def _refuse(path: Path) -> None:
    found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    got = (
        f"a folder of {', '.join(found[:6]) or 'nothing'}"
        if path.is_dir()
        else "a file"
        if path.exists()
        else "no folder"
    )
    do = "Give the folder that holds config.json and metrics.jsonl (exps/NAME of the example)."
    if LOG in found:
        do = (
            "Its log.txt holds no metrics: this host logs them to its tracker. Train with --report-to tensorboard and "
            "give the folder of its event files; Weights & Biases' own files cannot be read."
        )
    expected = "a run's folder: metrics.jsonl, TensorBoard's event files, or a log.txt with metrics"
    raise ConfigError(str(path), expected=expected, got=got, do=do)


def _metrics(path: Path, notes: list[str]) -> Metrics | None:
    if (path / METRICS).exists():
        found = read_metrics(path / METRICS)
        if not (path / HELD_OUT).exists():
            return found
        looks = read_metrics(path / HELD_OUT)
        return replace(found, series={**found.series, **looks.series}, notes=(*found.notes, *looks.notes))
    log = path if path.is_file() else path / LOG
    has_log = is_host_log(log)
    if event_folders(path):
        if can_read_events():
            return read_events(path)
        if not has_log:
            raise ConfigError(
                str(path), expected="tensorboard, to read its event files", got="not installed",
                do="pip install tensorboard.",
            )  # fmt: skip
        notes.append(f"{path}: TensorBoard's event files are left out: pip install tensorboard to read them")
    return read_log(log) if has_log else None


def _evaluations(
    path: Path, settings: Mapping[str, Any], metrics: Metrics | None, notes: list[str]
) -> Iterator[Evaluation]:
    # evaluation.json is written at the end of a run, and does not say of which step it is.
    done = metrics is not None and metrics.last_step == settings.get("max_train_steps", metrics.last_step)
    last = metrics.last_step if metrics is not None and done and metrics.last_step else None
    for file in sorted(path.glob("evaluation*.json")):
        yield from _evaluation(_mapping(file, notes), file, notes, last)
    for file in sorted({found for depth in ("", "*/", "*/*/") for found in path.glob(depth + RESULTS)}):
        for number, line in enumerate(_text(file, notes).splitlines(), start=1):
            if line.strip():
                yield from _evaluation(_parsed(line, f"{file}: line {number}", notes), file, notes, None)
    yield from _benchmark_points(path / BENCHMARK, notes)


def _benchmark_points(file: Path, notes: list[str]) -> Iterator[Evaluation]:
    record = _mapping(file, notes)
    shared, points = _inner(record, "judging"), record.get("points")
    for point in points if isinstance(points, list) else ():
        for network in (by_network := _inner(point, "judges")):
            protocol = {**shared, "network": network, "guidance_scale": point.get("guidance")}
            numbers = _inner(by_network, network)
            named = {"frechet_distance" if name == "fd" else name: value for name, value in numbers.items()}
            yield from _evaluation({"protocol": protocol, "step": point.get("step"), **named}, file, notes, None)


def _evaluation(record: Mapping[str, Any], file: Path, notes: list[str], step: int | None) -> Iterator[Evaluation]:
    if not record:
        return
    protocol = record.get("protocol")
    if not isinstance(protocol, Mapping):
        notes.append(f"{file}: an evaluation without its protocol: skipped")
        return
    metrics = {k: float(v) for k, v in record.items() if _is_number(v) and k not in _WHICH}
    how = {key: value for key, value in protocol.items() if key not in _WHICH}
    yield Evaluation(_step(record, protocol, file, step), how, metrics, file)


def _step(record: Mapping[str, Any], protocol: Mapping[str, Any], file: Path, default: int | None) -> int | None:
    for given in (_inner(record, "origin").get("step"), record.get("step"), protocol.get("step")):
        if isinstance(given, int):
            return given
    for name in (record.get("checkpoint"), protocol.get("checkpoint"), file.parent.name):
        parts = Path(str(name)).with_suffix("").parts if name else ()
        digits = [part for part in parts if part.isdigit() and len(part) == 7]  # checkpoints/0000800
        if digits:
            return int(digits[-1])
    return default


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300  # as float can hold


def _mapping(file: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON file's mapping; empty where the file is missing, or cannot be read, which is noted."""
    text = _text(file, notes) if file.exists() else ""
    return _parsed(text, str(file), notes) if text else {}


def _text(file: Path, notes: list[str]) -> str:
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError as error:
        notes.append(f"{file}: {error}: skipped")
        return ""


def _inner(record: object, name: str) -> Mapping[str, Any]:
    """A mapping inside a mapping; empty where either is something else."""
    found = record.get(name) if isinstance(record, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _parsed(text: str, subject: str, notes: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        notes.append(f"{subject}: no JSON ({error}): skipped")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{subject}: no JSON object: skipped")
        return {}
    return content

"""Curves of a run's metrics: read in one go, kept small however long the run was."""

import itertools
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vrpo_plugin.errors import ConfigError

POINTS = 2000  # of a curve: more than a picture has pixels
CHUNK = 4096  # rows that are in memory at a time
NAMED = 3  # unreadable lines that are named one by one
_STEP = re.compile(rb'"step":\s*(\d+)')

Row = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Series:
    """One metric over a run; a point stands for one row, or in a long run for several rows in a row.

    Attributes:
        steps: float64 (P,), mean step of the point's rows.
        mean, low, high: float64 (P,), over the point's finite values; NaN where there is none.
        count: float64 (P,), how many finite values.
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def total(self) -> float:
        """Sum of all finite values."""
        return float(np.nansum(self.mean * self.count))

    @property
    def last(self) -> float:
        """Value of the last point that has one; NaN without."""
        finite = self.mean[self.count > 0]
        return float(finite[-1]) if len(finite) else float("nan")

    def smoothed(self, window: float) -> np.ndarray:
        """Mean over ``window`` steps around each point, (P,); at the ends over what is there. NaN stays NaN."""
        order = self.steps
        totals = np.concatenate([[0.0], np.cumsum(np.where(self.count > 0, self.mean * self.count, 0))])
        counts = np.concatenate([[0.0], np.cumsum(self.count)])
        first = np.searchsorted(order, order - window / 2, side="left")
        end = np.searchsorted(order, order + window / 2, side="right")
        number = counts[end] - counts[first]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.count > 0, (totals[end] - totals[first]) / number, np.nan)


def collect(rows: Iterable[Row], total: int, points: int = POINTS) -> dict[str, Series]:
    """Reads a stream of rows into one :class:`Series` per metric.

    Args:
        rows: with ``step`` and any metrics; None, NaN and what is no number count as missing.
        total: how many rows there are at most.
        points: of a series, at most.

    Returns:
        Metric name to series, in the order of their first appearance; memory depends on ``points``, not on ``total``.
    """
    width = max(1, -(-total // points))
    stream = iter(rows)
    parts: list[tuple[int, dict[str, np.ndarray]]] = []
    while chunk := list(itertools.islice(stream, width * max(1, CHUNK // width))):
        names = dict.fromkeys(name for row in chunk for name in row)
        size = -(-len(chunk) // width)
        parts.append((size, {name: _buckets([row.get(name) for row in chunk], size, width) for name in names}))
    if not parts:
        return {}
    names = dict.fromkeys(name for _, part in parts for name in part)
    whole = {
        name: np.concatenate([part.get(name, _buckets([None] * n, n, 1)) for n, part in parts], 1) for name in names
    }
    steps = whole.pop("step")[0]
    return {name: Series(steps, *values) for name, values in whole.items() if values[3].any()}


def _buckets(values: list[Any], size: int, width: int) -> np.ndarray:
    """(4, size): mean, lowest, highest and number of the finite values of ``width`` rows each."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
        if numbers.ndim != 1:
            raise TypeError("a list among them")
    except (TypeError, ValueError, OverflowError):
        numbers = np.asarray([_number(value) for value in values])
    padded = np.full(size * width, np.nan)
    padded[: len(values)] = numbers
    table = padded.reshape(size, width)
    finite = np.isfinite(table)
    count = finite.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(finite, table, 0).sum(1) / count
    low, high = np.where(finite, table, np.inf).min(1), np.where(finite, table, -np.inf).max(1)
    nothing = count == 0
    return np.stack([np.where(nothing, np.nan, mean), *(np.where(nothing, np.nan, v) for v in (low, high)), count])


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else float("nan")


@dataclass(frozen=True, eq=False)
class Metrics:
    """What a run wrote down of its steps.

    Attributes:
        series: metric name to curve.
        rows: how many rows count.
        last_step: the highest step; 0 without rows.
        seconds: float64 (N,), of every row that has them.
        notes: in words, what was left out.
    """

    series: Mapping[str, Series]
    rows: int
    last_step: int
    seconds: np.ndarray
    notes: tuple[str, ...] = ()


def read_metrics(path: Path) -> Metrics:
    """Reads a ``metrics.jsonl``: one JSON object per line.

    A step that was trained again after a resume counts once, as its last row says. Lines that cannot be read are
    skipped and named in the notes.

    Raises:
        ConfigError: the file cannot be opened.
    """
    try:
        steps = np.fromiter(_steps(path), np.int64)
    except OSError as error:
        raise ConfigError(str(path), expected="a file of metrics", got=error, do="Check the path.") from error
    valid = np.flatnonzero(steps >= 0)
    kept = np.zeros(len(steps), bool)
    kept[valid] = final_rows(steps[valid])
    broken = [int(i) + 1 for i in np.flatnonzero(steps == UNREADABLE)]
    seconds = array("d")
    series = collect(_rows(path, kept, broken, seconds), int(kept.sum()))
    notes = _notes(path, sorted(broken), len(valid) - int(kept.sum()))
    return Metrics(
        {name: one for name, one in series.items() if name != "seconds"},
        int(kept.sum()),
        int(steps[kept].max(initial=0)),
        np.array(seconds),
        notes,
    )


def _notes(path: Path, broken: list[int], rewritten: int) -> tuple[str, ...]:
    notes = []
    if broken:
        named = ", ".join(map(str, broken[:NAMED])) + (f" and {len(broken) - NAMED} more" * (len(broken) > NAMED))
        notes.append(f"{path}: no row of metrics in line {named}: skipped")
    if rewritten:
        notes.append(f"{path}: {rewritten} rows are of steps that were trained again: the later rows count")
    return tuple(notes)


UNREADABLE, BLANK = -1, -2


def _steps(path: Path) -> Iterator[int]:
    """Step of every line, without parsing the line."""
    with path.open("rb") as file:
        for line in file:
            line = line.strip()
            found = _STEP.search(line) if line.startswith(b"{") and line.endswith(b"}") else None
            yield int(found[1]) if found and len(found[1]) < 16 else UNREADABLE if line else BLANK


def _rows(path: Path, kept: np.ndarray, broken: list[int], seconds: array) -> Iterator[Row]:
    with path.open("rb") as file:
        # A run that is still going on may have written more lines since they were counted.
        for number, (line, wanted) in enumerate(zip(file, kept, strict=False), start=1):
            if not wanted:
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                broken.append(number)
                continue
            if isinstance(spent := row.get("seconds"), (int, float)) and np.isfinite(spent):
                seconds.append(spent)
            yield row


def final_rows(steps: np.ndarray) -> np.ndarray:
    """Which rows no later row replaces, bool (N,): a resumed run writes its steps again from its checkpoint on."""
    if not len(steps):
        return np.zeros(0, bool)
    lowest_from_here = np.minimum.accumulate(steps[::-1])[::-1]
    return np.append(steps[:-1] < lowest_from_here[1:], True)

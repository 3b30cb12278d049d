"""Pictures of runs' metrics: one small axis per metric, one colour per run."""

import importlib.util
import io
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.standalone.runs import Run

MARK = "vrpo plot"  # in every file that is written here, so that it may be written again
# What is drawn, in this order; * stands for anything.
METRICS = (
    "loss",
    "*_loss",
    "loss/*",
    "vrpo/reward/*",
    "held_out/reward/*",
    "vrpo/weight/*",
    "vrpo/*_cos",
    "grad_norm*",
    "vrpo/gradient_ratio",
    "vrpo/reward_share",
)
LOGARITHMIC = ("grad_norm*", "vrpo/gradient_ratio")
COLUMNS = 4
CELL = (3.7, 2.5)  # inches of an axis with its numbers and title
SHARE = 50  # the default window is this part of the run


def check_matplotlib() -> None:
    """Says what to install before anything is read.

    Raises:
        ConfigError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        do = "pip install matplotlib, or pip install 'vrpo-plugin[examples]'."
        raise ConfigError("pictures of curves", expected="matplotlib", got="not installed", do=do)


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Refuses to replace a file that ``vrpo plot`` has not written.

    Raises:
        ConfigError: such a file is there, or there is no folder for it.
    """
    if path.is_dir() or not path.parent.is_dir():
        got = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise ConfigError(str(path), expected="a file in an existing folder", got=got, do="Correct -o.")
    if overwrite or not path.exists():
        return
    with path.open("rb") as file:
        if MARK.encode() in file.read(1024):
            return
    do = "Choose another -o, or pass --overwrite."
    raise ConfigError(str(path), expected="a new file, or one of vrpo plot", got="another file", do=do)


def chosen_metrics(runs: Sequence[Run], patterns: Sequence[str] = METRICS) -> list[str]:
    """Names of metrics that at least one run has, in the order of the patterns.

    Raises:
        ConfigError: there is none.
    """
    present = list(dict.fromkeys(name for run in runs for name in run.metrics.series))
    chosen = [name for pattern in patterns for name in present if fnmatchcase(name.lower(), pattern.lower())]
    if not chosen:
        got = ", ".join(present[:30]) or "no metrics"
        raise ConfigError("metrics", expected=" or ".join(patterns), got=got, do="Name some of these by --metric.")
    return list(dict.fromkeys(chosen))


def default_window(runs: Sequence[Run]) -> int:
    """Steps over which curves are smoothed where nothing is asked for: 1/50 of the longest run."""
    return max(1, max(run.metrics.last_step for run in runs) // SHARE)


def draw(runs: Sequence[Run], *, metrics: Sequence[str] = METRICS, window: int | None = None) -> bytes:
    """A PNG of the runs' curves.

    Args:
        runs: each has a colour of its own, in every axis the same.
        metrics: names or patterns with ``*``.
        window: steps over which a line is the mean; 1 does not smooth. None: :func:`default_window`.

    Returns:
        The PNG's bytes. The line is the smoothed metric; pale behind it, its values, or in a long run the range from
        the lowest to the highest value of the rows that share a point.

    Raises:
        ConfigError: matplotlib is missing, or no run has such a metric.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names, window = chosen_metrics(runs, metrics), window or default_window(runs)
    figure, axes = _axes(len(names), _legend_rows(runs, len(names)))
    FigureCanvasAgg(figure)
    colours = _colours(len(runs))
    lines: dict[str, Any] = {}
    for axis, name in zip(axes, names, strict=True):
        for run, colour in zip(runs, colours, strict=True):
            if name in run.metrics.series:
                lines[run.name] = _curve(axis, run, name, window, colour)
        axis.set_title(name.removeprefix("vrpo/"), fontsize=9, pad=4)
        axis.tick_params(labelsize=7, which="both")
        axis.set_xlabel("step", fontsize=7, labelpad=1)
        axis.grid(alpha=0.2)
    figure.suptitle(_caption(runs, window), fontsize=9, y=1 - 0.05 / figure.get_figheight(), va="top")
    number = -(-len(lines) // _legend_rows(runs, len(names)))
    figure.legend(lines.values(), lines.keys(), loc="lower left", ncols=number, fontsize=8, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png", metadata={"Software": MARK})
    return picture.getvalue()


def _axes(number: int, legend_rows: int) -> tuple[Any, list[Any]]:
    """A figure and its axes. Their places are set in inches: matplotlib's own layouts take twice the time to draw."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, number)
    rows = math.ceil(number / columns)
    legend = 0.15 + 0.2 * legend_rows
    width, height = CELL[0] * columns, CELL[1] * rows + legend + 0.1
    figure = Figure(figsize=(width, height))
    axes = []
    for i in range(number):
        left, above = CELL[0] * (i % columns) + 0.55, CELL[1] * (i // columns) + 0.45
        inner = CELL[0] - 0.7, CELL[1] - 0.75
        bottom = height - above - inner[1]
        axes.append(figure.add_axes((left / width, bottom / height, inner[0] / width, inner[1] / height)))
    return figure, axes


def _legend_rows(runs: Sequence[Run], axes: int) -> int:
    """Rows of the legend in which the longest name fits."""
    width = CELL[0] * min(COLUMNS, axes)
    needed = 0.6 + 0.075 * max(len(run.name) for run in runs)  # inches
    return math.ceil(len(runs) / max(1, int(width / needed)))


def _curve(axis: Any, run: Run, name: str, window: int, colour: Any) -> Any:
    series = run.metrics.series[name]
    axis.fill_between(series.steps, series.low, series.high, color=colour, alpha=0.15, linewidth=0)
    axis.plot(series.steps, series.mean, color=colour, alpha=0.3 if window > 1 else 1, linewidth=0.6)
    alone = "." if (series.count > 0).sum() == 1 else None  # a line of one point is not seen
    (line,) = axis.plot(series.steps, series.smoothed(window), color=colour, linewidth=1.2, marker=alone)
    positive = np.all(series.mean[series.count > 0] > 0)
    if positive and any(fnmatchcase(name, pattern) for pattern in LOGARITHMIC):
        axis.set_yscale("log")
    return line


def _caption(runs: Sequence[Run], window: int) -> str:
    line = f"mean over {window} steps" if window > 1 else "not smoothed"
    rows = int(max(one.count.max() for run in runs for one in run.metrics.series.values()))
    pale = f"pale: lowest to highest of {rows} rows" if rows > 1 else "pale: every row"
    return f"lines: {line}; {pale}" if window > 1 or rows > 1 else f"lines: {line}"


def _colours(number: int) -> list[Any]:
    from matplotlib import colormaps

    if number <= 10:
        return [colormaps["tab10"](i) for i in range(number)]
    return [colormaps["turbo"](0.05 + 0.9 * i / (number - 1)) for i in range(number)]

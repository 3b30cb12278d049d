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
    from matplotlib.figure import Figure

    names, window = chosen_metrics(runs, metrics), window or default_window(runs)
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.7 * columns, 2.5 * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    lines: dict[str, Any] = {}
    for axis, name in zip(axes, names, strict=False):
        for run, colour in zip(runs, _colours(len(runs)), strict=True):
            if name in run.metrics.series:
                lines[run.name] = _curve(axis, run, name, window, colour)
        axis.set_title(name.removeprefix("vrpo/"), fontsize=9)
        axis.tick_params(labelsize=7, which="both")
        axis.set_xlabel("step", fontsize=7)
        axis.grid(alpha=0.2)
    for axis in list(figure.axes)[len(names) :]:
        axis.remove()
    figure.suptitle(_caption(runs, window), fontsize=9)
    figure.legend(
        lines.values(),
        lines.keys(),
        loc="outside lower left",
        ncols=max(1, min(4, len(lines))),
        fontsize=8,
        frameon=False,
    )
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png", metadata={"Software": MARK})
    return picture.getvalue()


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

"""An HTML page of runs: one file, which needs no network and no other file."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vrpo_plugin._version import __version__
from vrpo_plugin.errors import ConfigError, VRPOError
from vrpo_plugin.files import write_file
from vrpo_plugin.standalone.comparison import (
    MISSING,
    Table,
    cell,
    describe,
    facts,
    group_evaluations,
    setting_rows,
    unlike_settings,
)
from vrpo_plugin.standalone.plots import MARK, METRICS, check_matplotlib, check_output, draw
from vrpo_plugin.standalone.runs import Run, read_runs

PNG = b"\x89PNG\r\n\x1a\n"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1400px; padding: 0 1em; color: #222;
  background: #fff }
img { max-width: 100%; height: auto }
figure { display: inline-block; margin: 0 1em 1em 0; max-width: 640px; vertical-align: top }
table { border-collapse: collapse; margin: 0.5em 0 1.5em }
th, td { border-bottom: 1px solid #ddd; padding: 0.2em 0.8em; text-align: left; overflow-wrap: anywhere }
td { font-variant-numeric: tabular-nums }
.note { color: #555 }
"""


def write_plot(
    paths: Sequence[Path],
    output: Path | None = None,
    *,
    metrics: Sequence[str] = METRICS,
    window: int | None = None,
    overwrite: bool = False,
) -> tuple[Path, list[str]]:
    """Writes a picture or a report of runs; what is wrong is refused before a run is read.

    Args:
        paths: of the runs.
        output: ends in ``.png`` or ``.html``; None: ``report.html``, of one run in its folder, else in the current one.
        metrics, window: as :func:`vrpo_plugin.standalone.plots.draw`.
        overwrite: replace a file that was not written here.

    Returns:
        The file, and in words what of the runs was left out.

    Raises:
        ConfigError: another ending, a foreign file, no run, no such metric, or no matplotlib.
        VRPOError: the disk's refusal.
    """
    check_matplotlib()
    if output is None:
        folder = paths[0] if len(paths) == 1 and paths[0].is_dir() else Path()
        output = folder / "report.html"
    if output.suffix.lower() not in (".png", ".html"):
        do = "Name the file so."
        raise ConfigError("-o", expected="a file that ends in .png or .html", got=str(output), do=do)
    if window is not None and window < 1:
        raise ConfigError("--smooth", expected=">= 1 step", got=window, do="Correct it.")
    check_output(output, overwrite=overwrite)
    runs = read_runs(paths)
    chosen: dict[str, Any] = {"metrics": metrics, "window": window}
    content = draw(runs, **chosen) if output.suffix.lower() == ".png" else report(runs, **chosen)
    try:
        write_file(output, content)
    except OSError as error:
        do = "Name a file by -o in a folder that you may write."
        raise VRPOError(str(output), expected="a file that can be written", got=error, do=do) from error
    return output, [note for run in runs for note in run.notes]


def report(runs: Sequence[Run], *, metrics: Sequence[str] = METRICS, window: int | None = None) -> str:
    """The page: curves, newest sample grids, times, evaluations by protocol, settings.

    Args:
        runs: one or more.
        metrics, window: as :func:`vrpo_plugin.standalone.plots.draw`.

    Raises:
        ConfigError: as :func:`vrpo_plugin.standalone.plots.draw`.
    """
    title = ", ".join(run.name for run in runs)
    notes: list[str] = [note for run in runs for note in run.notes]
    grids = _grids(runs, notes)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        _table((["", *(run.name for run in runs)], [[name, *values] for name, values in facts(runs).items()])),
        f'<h2>Curves</h2>\n<p><img alt="curves" src="{_embedded(draw(runs, metrics=metrics, window=window))}"></p>',
        *(["<h2>Newest samples</h2>", *grids] if grids else []),
        *_evaluations(runs),
        *_settings(runs),
        *(["<h2>Left out</h2>", _list(notes)] if notes else []),
    ]
    # The mark comes first: it says that this file may be written again.
    head = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{MARK} {__version__}">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(body) + "\n</body>\n</html>\n"


def _grids(runs: Sequence[Run], notes: list[str]) -> list[str]:
    figures = []
    for run in runs:
        if run.grid is None:
            continue
        content = _read(run.grid)
        if not content.startswith(PNG):
            notes.append(f"{run.grid}: no PNG: left out")
            continue
        step = run.grid.stem.lstrip("0") or "0"
        caption = html.escape(f"{run.name}, step {step}" if step.isdigit() else f"{run.name}, {run.grid.name}")
        picture = f'<img alt="samples of {html.escape(run.name)}" src="{_embedded(content)}">'
        figures.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    return figures


def _evaluations(runs: Sequence[Run]) -> list[str]:
    groups = group_evaluations(runs)
    parts = ["<h2>Evaluations</h2>"] if groups else []
    for group in groups:
        parts += [f'<p class="note">{html.escape(describe(group.protocol))}</p>', _table(group.table())]
    return parts


def _settings(runs: Sequence[Run]) -> list[str]:
    known = [run for run in runs if run.settings]
    if not known:
        return []
    names, parts = [run.name for run in known], ["<h2>Settings</h2>"]
    if len(known) > 1:
        rows = setting_rows(unlike_settings(known))
        parts.append(_table((["those that differ", *names], rows)) if rows else "<p>They are the same.</p>")
    every = dict.fromkeys(name for run in known for name in run.settings)
    rows = setting_rows({name: [run.settings.get(name, MISSING) for run in known] for name in every})
    return [*parts, f"<details><summary>All settings</summary>{_table((['setting', *names], rows))}</details>"]


def _table(table: Table) -> str:
    head, rows = table
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = ["".join(f"<td>{html.escape(cell(value))}</td>" for value in row) for row in rows]
    return f"<table>\n<tr>{top}</tr>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def _list(texts: Sequence[Any]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(str(text))}</li>" for text in texts) + "</ul>"


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""

"""``vrpo plot``."""

import argparse
import sys
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", *, wanted: bool) -> None:
    """Adds the command; its own imports wait until it runs."""
    command = commands.add_parser(
        "plot",
        help="draw the curves of runs",
        description="Draws losses, rewards, weights, agreement, gradient norms and the schedule of one or several "
        "runs into one picture, or writes an HTML report with the curves, the newest sample grids, the evaluations "
        "and the settings: one file, which needs no network. Needs matplotlib.",
    )
    command.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a run: the example's (metrics.jsonl), or a host's with TensorBoard's event files or a log.txt "
        "that holds metrics; each run gets a colour",
    )
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write: .png for the curves alone, .html for the report (default: report.html in the folder of "
        "the run, or with several runs in the current folder)",
    )
    command.add_argument(
        "--smooth",
        type=int,
        metavar="STEPS",
        help="each point of a line is the mean over so many steps around it; 1 does not smooth (default: 1/50 of the "
        "longest run)",
    )
    command.add_argument(
        "--metric",
        action="append",
        dest="metrics",
        metavar="NAME",
        help="draw this metric in place of the usual ones, as metrics.jsonl names it; * stands for anything, as in "
        "'vrpo/std/*'; may be given several times",
    )
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="replace FILE even if vrpo plot did not write it; its own files it always replaces",
    )
    command.set_defaults(run=_plot)


def _plot(
    runs: list[Path], output: Path | None, smooth: int | None, metrics: list[str] | None, overwrite: bool
) -> None:
    from vrpo_plugin.standalone.plots import METRICS
    from vrpo_plugin.standalone.report import write_plot

    wanted = tuple(metrics or METRICS)
    written, notes = write_plot(runs, output, metrics=wanted, window=smooth, overwrite=overwrite)
    for note in notes:
        print(note, file=sys.stderr)
    print(f"wrote {written} ({written.stat().st_size / 1e6:.1f} MB)")

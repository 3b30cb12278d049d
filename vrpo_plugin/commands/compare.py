"""``vrpo compare``."""

import argparse
import sys
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", *, wanted: bool) -> None:
    """Adds the command; its own imports wait until it runs."""
    command = commands.add_parser(
        "compare",
        help="put runs side by side",
        description="Prints, in markdown: steps and seconds of each run, the settings that differ, and every metric "
        "of their evaluations by step. Evaluations are compared only if they were measured under the same protocol "
        "(sampler, steps, guidance, number of images, feature network, reference, ...); of others it names the fields "
        "that differ. Ends with status 1 if the runs were evaluated, but no two of them alike.",
    )
    command.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folders of at least two runs, as for vrpo plot; or folders of samples that vrpo eval has measured",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    command.set_defaults(run=_compare)


def _compare(runs: list[Path], json: bool) -> int:
    from json import dumps

    from vrpo_plugin.errors import ConfigError
    from vrpo_plugin.standalone.comparison import compare_runs
    from vrpo_plugin.standalone.runs import read_runs

    if len(runs) < 2:
        raise ConfigError("compare", expected="at least two runs", got=len(runs), do="Name another run.")
    found = compare_runs(read_runs(runs))
    if json:
        print(dumps(found.to_dict(), indent=2, allow_nan=False, default=str))
    else:
        for note in found.notes:
            print(note, file=sys.stderr)
        print(found.to_markdown())
    return int(found.nothing_alike)

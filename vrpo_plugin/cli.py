"""The ``vrpo`` command."""

import argparse
import os
import sys
from collections.abc import Sequence

from vrpo_plugin._version import __version__
from vrpo_plugin.commands import cache_features, compare, evaluate, hosts, plot, sample, train_critic
from vrpo_plugin.errors import VRPOError

# In the order of --help.
COMMANDS = {
    "train-critic": train_critic,
    "cache-features": cache_features,
    "sample": sample,
    "eval": evaluate,
    "plot": plot,
    "compare": compare,
    "check": hosts,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a subcommand; errors of the user's making end it with one line and exit status 1.

    ``check`` ends with status 1 too where VRPO could not be applied.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="vrpo", description="VRPO for REPA codebases.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add(commands, wanted=name in argv)
    arguments = vars(parser.parse_args(argv))
    arguments.pop("command")
    try:
        status = arguments.pop("run")(**arguments)
        sys.stdout.flush()
    except VRPOError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except BrokenPipeError:  # of "vrpo ... | head", which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()

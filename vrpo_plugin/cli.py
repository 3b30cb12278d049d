"""The ``vrpo`` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields

from vrpo_plugin._version import __version__
from vrpo_plugin.errors import VRPOError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a subcommand; errors of the user's making end it with one line and exit status 1."""
    parser = argparse.ArgumentParser(prog="vrpo", description="VRPO for REPA codebases.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train_critic(commands)
    arguments = vars(parser.parse_args(argv))
    arguments.pop("command")
    try:
        arguments.pop("run")(**arguments)
    except VRPOError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _add_train_critic(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from vrpo_plugin.pretrain import CriticTraining

    command = commands.add_parser(
        "train-critic",
        help="train a critic beforehand",
        description="Trains a critic from images or REPA's cached latents and a frozen encoder. On several GPUs: "
        "accelerate launch -m vrpo_plugin.cli train-critic ... Use it by critic_checkpoint=, frozen by "
        "critic_trainable=False.",
    )
    for f in fields(CriticTraining):
        kind = {int: int, float: float}.get(f.type, str)  # type: ignore[arg-type]
        required = f.default is MISSING
        text = "file to write" if required else f"default: {f.default}"
        command.add_argument(
            "--" + f.name.replace("_", "-"),
            type=kind,
            required=required,
            default=None if required else f.default,
            help=text,
        )
    command.set_defaults(run=_train_critic)


def _train_critic(**settings: object) -> None:
    from vrpo_plugin.pretrain import CriticTraining, train_critic

    record = train_critic(CriticTraining(**settings))  # type: ignore[arg-type]
    if os.environ.get("RANK", "0") == "0":  # one line, however many processes accelerate launched
        print(f"wrote {record['output']}: mean cosine {record['held_out_cosine']:.4f} on held-out images")


if __name__ == "__main__":
    main()

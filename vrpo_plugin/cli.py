"""The ``vrpo`` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from vrpo_plugin._version import __version__
from vrpo_plugin.errors import VRPOError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a subcommand; errors of the user's making end it with one line and exit status 1.

    ``check`` ends with status 1 too where VRPO could not be applied.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="vrpo", description="VRPO for REPA codebases.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train_critic(commands, with_settings="train-critic" in argv)
    _add_check(commands)
    _add_patch(commands)
    _add_export(commands)
    arguments = vars(parser.parse_args(argv))
    arguments.pop("command")
    try:
        status = arguments.pop("run")(**arguments)
    except VRPOError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if status:
        sys.exit(status)


def _add_train_critic(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", *, with_settings: bool) -> None:
    command = commands.add_parser(
        "train-critic",
        help="pretrain a critic",
        description="Pretrains a critic from images or REPA's cached latents and a frozen encoder. On several GPUs: "
        "accelerate launch -m vrpo_plugin.cli train-critic ... Use it by critic_checkpoint=, frozen by "
        "critic_trainable=False.",
    )
    command.set_defaults(run=_train_critic)
    if not with_settings:  # they are torch's to import, which the other commands do without
        return
    from vrpo_plugin.standalone.train_critic import CriticTraining

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


def _train_critic(**settings: object) -> None:
    from vrpo_plugin.standalone.train_critic import CriticTraining, train_critic

    record = train_critic(CriticTraining(**settings))  # type: ignore[arg-type]
    if os.environ.get("RANK", "0") == "0":  # one line, however many processes accelerate launched
        print(f"wrote {record['output']}: mean cosine {record['held_out_cosine']:.4f} on held-out images")


def _add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "check",
        help="say which host a checkout is, and what would be done to it",
        description="Says first whether VRPO can be applied; then compares a checkout's seams and scripts with the "
        "verified commits, and lists what is replaced process-wide. Writes nothing. Exit status 0 where VRPO can be "
        "applied to every host found, else 1.",
    )
    _add_host_options(command)
    _add_allow_unverified(command)
    command.set_defaults(run=_check)


def _check(root: Path, host: str | None, allow_unverified: bool) -> int:
    from vrpo_plugin.hosts.report import describe_host, describe_result, say, why_not
    from vrpo_plugin.hosts.tree import hosts_in

    allow_unverified = allow_unverified or _unverified_by_environment()
    found = [(one.spec, one.folder) for one in hosts_in(root, host)]
    refusals = [why_not(spec, folder, allow_unverified=allow_unverified) for spec, folder in found]
    for (spec, folder), refusal in zip(found, refusals, strict=True):
        say(describe_result(spec, folder, root, refusal, host))
    for spec, folder in found:
        say(describe_host(spec, folder))
    return 1 if any(refusals) else 0


def _add_patch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    patch = commands.add_parser(
        "patch",
        help="put the one line into a checkout's scripts",
        description="Verifies the seams, then puts one line into each training script, or into none.",
    )
    _add_host_options(patch)
    patch.add_argument("--script", metavar="FILE", help="one script of them; by default all")
    _add_allow_unverified(patch)
    patch.set_defaults(run=_patch)
    unpatch = commands.add_parser(
        "unpatch",
        help="take the line out again",
        description="Takes our line out of a checkout's scripts, which then hold the bytes that they held before.",
    )
    _add_host_options(unpatch)
    unpatch.add_argument("--script", metavar="FILE", help="one script; by default all that hold the line")
    unpatch.set_defaults(run=_unpatch)


def _patch(root: Path, host: str | None, script: str | None, allow_unverified: bool) -> None:
    from vrpo_plugin.hosts.report import describe_states, say
    from vrpo_plugin.hosts.tree import patch_tree

    allow_unverified = allow_unverified or _unverified_by_environment()
    states = patch_tree(root, host=host, script=script, allow_unverified=allow_unverified)
    say(describe_states(states, "patched"))


def _unpatch(root: Path, host: str | None, script: str | None) -> None:
    from vrpo_plugin.hosts.report import describe_states, say
    from vrpo_plugin.hosts.tree import unpatch_tree

    say(describe_states(unpatch_tree(root, host=host, script=script), "unpatched"))


def _add_host_options(command: argparse.ArgumentParser) -> None:
    from vrpo_plugin.hosts.known import HOSTS

    command.add_argument("root", type=Path, metavar="ROOT", help="folder of the checkout")
    command.add_argument(
        "--host",
        metavar="NAME",
        help=f"{', '.join(HOSTS)}; or a HostSpec of yours, file.py:NAME or module:NAME; by default all that ROOT holds",
    )


def _add_allow_unverified(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allow-unverified",
        action="store_true",
        help="accept other method bodies than those of the verified commits (training needs VRPO_ALLOW_UNVERIFIED=1)",
    )


def _unverified_by_environment() -> bool:
    from vrpo_plugin.hosts.options import resolve_settings

    return resolve_settings()[1].allow_unverified


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "export",
        help="write a checkpoint without the aligner",
        description="Reads a checkpoint of a host's training script, without running code from it, and writes one "
        "that the unpatched host resumes from (OUT.pt), or its EMA weights alone (OUT.safetensors).",
    )
    command.add_argument("checkpoint", type=Path, metavar="CKPT", help="the host's .pt file")
    command.add_argument("out", type=Path, metavar="OUT", help="file to write, .pt or .safetensors")
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    command.set_defaults(run=_export)


def _export(checkpoint: Path, out: Path, overwrite: bool) -> None:
    from vrpo_plugin.hosts.checkpoint import export_checkpoint
    from vrpo_plugin.hosts.report import say

    removed = export_checkpoint(checkpoint, out, overwrite=overwrite)
    say([f"wrote {out}: left out {removed} tensors of the aligner" if removed else f"wrote {out}: it held no aligner"])


if __name__ == "__main__":
    main()

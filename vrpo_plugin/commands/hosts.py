"""``vrpo check``, ``patch``, ``unpatch`` and ``export``: a host's checkout, and what its training wrote."""

import argparse
from pathlib import Path

from vrpo_plugin.errors import ConfigError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", *, wanted: bool) -> None:
    """Adds the commands."""
    _add_check(commands)
    _add_patch(commands)
    _add_export(commands)


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
    command.add_argument("--overwrite", action="store_true", help="replace OUT, and the guide's file, if they exist")
    command.add_argument(
        "--guide",
        type=Path,
        metavar="FILE",
        help="also write projectors and critic of the EMA to FILE (.safetensors), which guided sampling needs "
        "(RewardGuide.load, vrpo sample --guide)",
    )
    command.add_argument(
        "--guide-critic",
        type=Path,
        metavar="FILE",
        help="the guide's critic, a file of 'vrpo train-critic'; by default the checkpoint's own",
    )
    command.add_argument(
        "--guide-layers",
        metavar="N,N",
        help="blocks that the projectors read, 1 is the first; by default the script's --encoder-depth, else the block "
        "at a third of the depth",
    )
    command.set_defaults(run=_export)


def _export(
    checkpoint: Path,
    out: Path,
    overwrite: bool,
    guide: Path | None,
    guide_critic: Path | None,
    guide_layers: str | None,
) -> None:
    from vrpo_plugin.hosts.checkpoint import check_new_file, export_checkpoint
    from vrpo_plugin.hosts.guide import export_guide
    from vrpo_plugin.hosts.report import say

    if guide is None and (guide_critic or guide_layers):
        do = "Give --guide FILE too."
        raise ConfigError("--guide-critic, --guide-layers", expected="--guide", got="none", do=do)
    if guide is not None:
        # Both are refused before one is written.
        check_new_file(checkpoint, out, (".pt", ".safetensors"), overwrite=overwrite)
        parts = export_guide(checkpoint, guide, critic=guide_critic, layers=_layers(guide_layers), overwrite=overwrite)
        say([f"wrote {guide}: critic, {len(parts.projectors)} projector(s) of block(s) {_words(parts.layers)}"])
    removed = export_checkpoint(checkpoint, out, overwrite=overwrite)
    say([f"wrote {out}: left out {removed} tensors of the aligner" if removed else f"wrote {out}: it held no aligner"])


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        do = "Give them as 4,8."
        raise ConfigError("--guide-layers", expected="block numbers", got=repr(text), do=do) from error


def _words(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))

"""Runs a host's training script with VRPO and without a changed line.

``accelerate launch -m vrpo_plugin.launch [--vrpo-KEY VALUE ...] train.py <the script's own arguments>``
"""

import os
import runpy
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from vrpo_plugin._version import __version__
from vrpo_plugin.config import VRPOConfig, check_keys, describe_fields
from vrpo_plugin.errors import ConfigError, HostNotFoundError, PatchConflictError, VRPOError
from vrpo_plugin.hosts.apply import apply_vrpo
from vrpo_plugin.hosts.base import HostSpec
from vrpo_plugin.hosts.checks import changes_nothing, check_settings
from vrpo_plugin.hosts.known import find_spec, host_of_script
from vrpo_plugin.hosts.metrics import is_main_process
from vrpo_plugin.hosts.no_encoder import settle
from vrpo_plugin.hosts.options import FLAGS, KEYS, HostOptions, parse_value, resolve_settings
from vrpo_plugin.hosts.report import describe_host, describe_result, describe_settings, say, why_not
from vrpo_plugin.hosts.wrap import patch_bypassed
from vrpo_plugin.patching.handle import PatchHandle

PREFIX = "--vrpo-"
USAGE = "usage: accelerate launch -m vrpo_plugin.launch [--vrpo-KEY VALUE ...] train.py [the script's own arguments]"

HINT = f"{USAGE}; --help explains the options."


def help_text() -> str:
    """What ``--help`` prints: every option in words, from the docstrings of the two settings classes."""
    described = {name: text for owner in (VRPOConfig, HostOptions) for name, text in _described(owner)}
    lines = [f"  --vrpo-{name.replace('_', '-')}\n{_wrapped(text)}" for name, text in described.items()]
    return f"""{USAGE}

Runs a training script of REPA, SiT, DiT or another supported codebase with VRPO, without a changed line: it finds
the host by its files, checks that they are at a known version, applies VRPO and runs the script.

example:
  accelerate launch -m vrpo_plugin.launch --vrpo-dry-run --vrpo-reward-coeff 0.08 train.py --data-dir ../data
  (without --vrpo-dry-run to train)

options:
  --vrpo-config FILE
{_wrapped("YAML or JSON with any of the keys below; VRPO_CONFIG names one too.")}
  --vrpo-host NAME
{_wrapped("The host, where its files do not tell; or a HostSpec of yours: file.py:NAME or module:NAME.")}
  --vrpo-dry-run
{_wrapped("Say what would be patched, and stop; exit status 1 where applying would be refused.")}
  -h, --help
{_wrapped("This text. Behind the script, the script's own.")}

keys of VRPOConfig and HostOptions; --vrpo-no-KEY for False:
{chr(10).join(lines)}

The command line goes before the environment (VRPO_KEY=VALUE), that before the file, that before the defaults."""


def _described(owner: type) -> list[tuple[str, str]]:
    defaults = {f.name: f.default for f in fields(owner)}
    texts = {name: text for group in describe_fields(owner).values() for name, text in group.items()}
    return [(name, f"{texts.get(name, '').replace('``', '')} (default: {defaults[name]})") for name in defaults]


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 110, initial_indent="      ", subsequent_indent="      ")


@dataclass
class Command:
    """A parsed command line: our settings, the script, and its own arguments."""

    script: Path
    arguments: list[str]
    settings: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    host: str | None = None
    dry_run: bool = False


def parse_command(argv: Sequence[str]) -> Command:
    """Splits our options, which come first, from the script and its arguments, which are left as they are.

    Raises:
        ConfigError: no script, an unknown key (the nearest is named), a key without a value, or one of our options
            behind the script.
    """
    rest, found = list(argv), {}
    while rest and rest[0].startswith(PREFIX):
        key, has_value, value = rest.pop(0).removeprefix(PREFIX).replace("-", "_").partition("=")
        if has_value:
            value = argv[len(argv) - len(rest) - 1].partition("=")[2]  # as it was written, with its dashes
        elif key == "dry_run" or key.removeprefix("no_") in FLAGS:
            value = "false" if key.startswith("no_") else "true"
            if key in FLAGS and rest and rest[0].lower() in ("true", "false"):
                value = rest.pop(0)
            key = key.removeprefix("no_")
        elif rest:
            value = rest.pop(0)
        else:
            raise ConfigError(PREFIX + key, expected="a value", got="none", do=HINT)
        check_keys([key], {*KEYS, "config", "host", "dry_run"}, subject="command line: VRPO setting")
        found[key] = value
    if not rest or rest[0].startswith("-"):
        raise ConfigError("script", expected="train.py", got=rest[0] if rest else "nothing", do=HINT)
    late = next((one for one in rest[1:] if one.startswith(PREFIX)), None)
    if late is not None:
        raise ConfigError(late, expected="our options before the script", got="behind it", do="Move it.")
    dry_run = parse_value(found.pop("dry_run", "false"))
    if dry_run not in (True, False):
        raise ConfigError(f"{PREFIX}dry-run", expected="true or false", got=dry_run, do=HINT)
    config, host = found.pop("config", None), found.pop("host", None)
    return Command(Path(rest[0]), rest[1:], found, config, host, bool(dry_run))


def main(argv: Sequence[str] | None = None) -> None:
    """Applies VRPO to the script's host and runs the script as ``python train.py`` would; ``--help`` explains."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        if is_main_process():
            print(help_text())
        return
    try:
        command = parse_command(argv)
        prepared = prepare(command)
    except VRPOError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if prepared is None:
        return
    try:
        runpy.run_path(str(command.script), run_name="__main__")
    except VRPOError as error:
        do = ""
        if isinstance(error, PatchConflictError):  # the one line is in the script, with settings of its own
            do = f" {command.script} may hold the one line: give all settings there, or take it out by 'vrpo unpatch'."
        sys.exit(f"{type(error).__name__}: {error}{do}")
    check_fired(*prepared)


def prepare(command: Command) -> tuple[HostSpec, PatchHandle] | None:
    """Patches the host of a command, and makes ``sys.argv`` and ``sys.path`` those of its script.

    Returns:
        The host and the handle, or None after a dry run.

    Raises:
        VRPOError: the script, its host or the settings are not right; after a dry run too.
    """
    if not os.path.isfile(command.script):
        raise HostNotFoundError(
            "script", expected="a training script", got=f"no file {command.script}", do="Correct its path."
        )
    config, options = resolve_settings(command.settings, file=command.config)
    host = command.host or os.environ.get("VRPO_HOST")
    folder = command.script.resolve().parent
    spec = find_spec(host, folder) if host else host_of_script(command.script)
    if command.dry_run:
        refusal = _refusal(spec, folder, config, options)
        if is_main_process():
            say(describe_result(spec, folder, folder, refusal, host))
            say([*describe_host(spec, folder), *describe_settings(config, options)])
            if refusal is not None:
                raise refusal
        if refusal is not None:
            sys.exit(1)  # said by the main process
        return None
    sys.argv = [str(command.script), *command.arguments]
    # As for 'python train.py': the script's folder, and not the current one, which '-m' puts there.
    if sys.path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]
    sys.path.insert(0, str(folder))
    handle = apply_vrpo(spec, config, options=options)
    handle.launched = True
    if is_main_process():
        what = ", ".join([*handle.seams, *handle.hooks])
        print(f"vrpo_plugin {__version__}: {spec.repository}: {what}", file=sys.stderr)
    return spec, handle


def _refusal(spec: HostSpec, folder: Path, config: VRPOConfig, options: HostOptions) -> VRPOError | None:
    """What applying would raise; imports nothing of the host."""
    try:
        check_settings(spec, config, options)
        if not changes_nothing(spec, config):
            spec, _, _ = settle(spec, config)
    except VRPOError as error:
        return error
    return why_not(spec, folder, allow_unverified=options.allow_unverified)


def check_fired(spec: HostSpec, handle: PatchHandle) -> None:
    """A script that ended without passing through the patched methods was not trained with VRPO.

    Raises:
        HostChangedError: so it was.
    """
    silent = [label for label in spec.must_run if not handle.fired[label]]
    if silent:
        raise patch_bypassed(spec, ", ".join(silent))


if __name__ == "__main__":
    main()

"""What a checkout is, and what would be done to it, as lines of text."""

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.errors import VRPOError
from vrpo_plugin.hosts.base import HostSpec
from vrpo_plugin.hosts.libraries import inspect_library, libraries_of, verify_libraries
from vrpo_plugin.hosts.options import HostOptions
from vrpo_plugin.hosts.tree import outside
from vrpo_plugin.patching.fingerprint import Finding, inspect_point, verify_points
from vrpo_plugin.patching.source import SourceState, read_state

SAID = {
    "known": "as at {commit}",
    "changed": "CHANGED: another body than at {commits}; allow_unverified=true accepts it",
    "signature": "REFUSED: parameters ({got}), expected ({expected})",
    "missing": "REFUSED: {reason}",
}


def say(lines: Iterable[str]) -> None:
    """Prints lines; what the terminal cannot encode, as a folder's name in another encoding, is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write("".join(f"{line}\n" for line in lines).encode(encoding, "backslashreplace").decode(encoding))


def describe_host(spec: HostSpec, folder: Path) -> Iterator[str]:
    """The host, its definitions against the known commits, what is replaced in libraries, its scripts, and what breaks
    in them upstream.

    Args:
        spec: the host.
        folder: of its scripts.
    """
    findings = [inspect_point(folder, point) for point in spec.points]
    commits = {finding.commit for finding in findings}
    at = f"@{commits.pop()}" if len(commits) == 1 and None not in commits else ""
    yield f"host        {spec.name} ({spec.repository}{at}) in {folder}"
    for finding in findings:
        yield f"seam        {finding.point.file}: {finding.point.name}: {_said(finding)}"
    for one in libraries_of(spec, spec.shims):
        library = inspect_library(one)
        state = "not installed" if library is None else "as expected"
        if library is not None and library.status in ("signature", "missing"):
            state = _said(library)
        yield f"process     {one.label}: {state}; {one.why}"
    yield "process     torch.optim step hooks (added, nothing replaced): a step that is not finite is left out"
    for script in spec.insertions:
        yield f"script      {script.file}: {_place(read_state(folder, script))}"
    for shim in spec.shims:
        yield f"compat      {shim.name}: {shim.reason} ({shim.issue}; until {shim.until})"
    for note in spec.notes:
        yield f"breaks      {note.file}: {note.when}. {note.do} ({note.issue})"


def why_not(spec: HostSpec, folder: Path, *, allow_unverified: bool) -> VRPOError | None:
    """What applying to this folder would raise; None where its definitions and libraries are accepted."""
    try:
        verify_points(folder, spec.points, allow_unverified=allow_unverified)
        verify_libraries([*libraries_of(spec, spec.shims)])
    except VRPOError as error:
        return error
    return None


def describe_result(
    spec: HostSpec, folder: Path, root: Path, refusal: VRPOError | None, host: str | None = None
) -> list[str]:
    """Whether VRPO could be applied, and how.

    Args:
        spec: the host.
        folder: of its scripts.
        root: of the checkout, as the user wrote it.
        refusal: why not.
        host: as the user named it, for the commands.
    """
    if refusal is not None:
        return [f"result      {spec.name}: cannot be applied: {refusal}"]
    states = [read_state(folder, one) for one in spec.insertions]
    name = ["--vrpo-host", host] if host is not None and ":" in host else []
    script = next((str(state.path) for state in states if state.path.is_file()), "YOUR_SCRIPT.py")
    launch = shlex.join(["accelerate", "launch", "-m", "vrpo_plugin.launch", *name, script])
    lines = [f"result      {spec.name}: can be applied with no line: {launch} ..."]
    command = [str(root), *(["--host", host] if host is not None and ":" in host else [])]
    refused = [state for state in states if state.error is not None]
    away = [f"{state.path.name}: a link to {real}" for state in states if (real := outside(root, state.path))]
    if away:
        lines.append(f"result      no line can be put into {away[0]}")
    elif refused:
        lines.append(f"result      no line can be put into {refused[0].path.name}: {refused[0].detail}")
    elif not states:
        lines.append("result      or by one line, put in by hand: the spec names no script")
    elif all(state.status == "patched" for state in states):
        undo = shlex.join(["vrpo", "unpatch", *command])
        lines.append(f"result      is patched: start it as ever; '{undo}' takes the line out")
    else:
        lines.append(f"result      or by one line: '{shlex.join(['vrpo', 'patch', *command])}', then start it as ever")
    return lines


def describe_states(states: Sequence[SourceState], done: str) -> Iterator[str]:
    """One line per script that was patched or unpatched.

    Args:
        states: of the scripts, afterwards.
        done: said of those that were changed: ``patched``.
    """
    for state in states:
        yield f"{done if state.changed else 'unchanged':11} {state.path}: {_place(state)}"


def describe_settings(config: VRPOConfig, options: HostOptions) -> Iterator[str]:
    """The settings that are not the defaults."""
    for given, default in ((config, VRPOConfig()), (options, HostOptions())):
        usual = asdict(default)
        for name, value in asdict(given).items():
            if value != usual[name]:
                yield f"setting     {name} = {value!r} (default {usual[name]!r})"


def _said(finding: Finding) -> str:
    return SAID[finding.status].format(
        commit=finding.commit,
        commits=", ".join(finding.point.fingerprints) or "any known commit",
        got=" ".join(finding.parameters),
        expected=" ".join(finding.point.parameters),
        reason=finding.reason,
    )


def _place(state: SourceState) -> str:
    return f"REFUSED: {state.detail}" if state.error is not None else f"{state.status}, line {state.line_number}"

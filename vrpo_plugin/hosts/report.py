"""What a checkout is, and what would be done to it, as lines of text."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.errors import VRPOError
from vrpo_plugin.hosts.base import HostSpec
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
    """The host, its seams against the known commits, its scripts, and what breaks in them upstream.

    Args:
        spec: the host.
        folder: of its scripts.
    """
    findings = [inspect_point(folder, point) for point in spec.all_points]
    commits = {finding.commit for finding in findings}
    at = f"@{commits.pop()}" if len(commits) == 1 and None not in commits else ""
    yield f"host        {spec.name} ({spec.repository}{at}) in {folder}"
    for finding in findings:
        yield f"seam        {finding.point.file}: {finding.point.name}: {_said(finding)}"
    for one in spec.insertions:
        yield f"script      {one.file}: {_place(read_state(folder, one))}"
    for shim in spec.shims:
        yield f"compat      {shim.name}: {shim.reason} ({shim.issue}; until {shim.until})"
    for note in spec.notes:
        yield f"breaks      {note.file}: {note.when}. {note.do} ({note.issue})"


def describe_result(
    spec: HostSpec, folder: Path, root: Path, *, allow_unverified: bool = False
) -> tuple[bool, list[str]]:
    """Whether VRPO could be applied, and how.

    Args:
        spec: the host.
        folder: of its scripts.
        root: of the checkout, as the user wrote it.
        allow_unverified: as in ``apply_vrpo``.

    Returns:
        True where its seams are accepted, and the lines that say so.
    """
    try:
        verify_points(folder, spec.all_points, allow_unverified=allow_unverified)
    except VRPOError as error:
        return False, [f"result      cannot be applied: {error}"]
    states = [read_state(folder, one) for one in spec.insertions]
    script = states[0].path if states else "train.py"
    lines = [f"result      can be applied with no line: accelerate launch -m vrpo_plugin.launch {script} ..."]
    refused = [state for state in states if state.line_number is None or state.status == "read-only"]
    away = [f"{state.path.name}: a link to {real}" for state in states if (real := outside(root, state.path))]
    if away:
        lines.append(f"result      no line can be put into {away[0]}")
    elif all(state.status == "patched" for state in states):
        lines.append(f"result      is patched: start it as ever; 'vrpo unpatch {root}' takes the line out")
    elif refused:
        lines.append(f"result      no line can be put into {refused[0].path.name}: {refused[0].detail}")
    else:
        lines.append(f"result      or by one line: 'vrpo patch {root}', then start it as ever")
    return True, lines


def describe_states(states: Sequence[SourceState], done: str) -> Iterator[str]:
    """One line per script that was patched or unpatched.

    Args:
        states: of the scripts, afterwards.
        done: said of those that were changed: ``patched``.
    """
    for state in states:
        yield f"{done if state.changed else 'unchanged':11} {state.path}: {_place(state)}"


def describe_settings(spec: HostSpec, config: VRPOConfig, options: HostOptions) -> Iterator[str]:
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
    commit = f" ({state.commit})" if state.commit else ""
    if state.status in ("clean", "moved", "patched"):
        return f"{state.status}{commit}, line {state.line_number}"
    return f"REFUSED: {state.status}: {state.detail}"

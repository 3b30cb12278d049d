"""One line put into a host's script, and taken out again: bytes in, the same bytes and one line out.

The place is found by the syntax tree, never by a line number: on a script that has moved by one line,
``git apply --unidiff-zero`` "applies cleanly" into the middle of a call. Nothing is written unless the result compiles
and its tree is the old tree with our statements right after the anchor.
"""

import ast
import difflib
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vrpo_plugin.errors import HostChangedError, HostNotFoundError, PatchConflictError, VRPOError, explain
from vrpo_plugin.patching.atomic import replace_bytes, why_read_only
from vrpo_plugin.patching.fingerprint import NOT_PYTHON
from vrpo_plugin.patching.lines import insert_line, newline_of, remove_line

Status = Literal[
    "clean",  # a known version: the line can go in
    "moved",  # another version, or edited, but the anchor is unique: the line can go in
    "patched",  # our line stands after the anchor
    "missing file",
    "broken",  # does not compile, as it is or with our line
    "missing anchor",
    "ambiguous",  # the anchor stands there twice
    "shared line",  # the anchor's line goes on with another statement
    "foreign patch",  # another version of our line, ours twice, or ours before the anchor
    "read-only",
]

_IMPORTS = (ast.Import, ast.ImportFrom)
# An import of ours, commented out or not, and any call; a sentence that names the package is neither.
_OTHER_VERSION = re.compile(rb"(?:^|;)[\s#]*(?:import\b[^#]*|from\s+)\bvrpo_plugin\b|\bvrpo_plugin\.apply")

_REFUSALS: Mapping[Status, tuple[type[VRPOError], str, str]] = {
    "missing file": (HostNotFoundError, "a script of the host", "Name the root of the host's repository."),
    "broken": (HostChangedError, "code that compiles", "Repair the script, or put the line in by hand: {line}"),
    "missing anchor": (HostChangedError, "'{anchor}'", "Check out {known}, or put the line in by hand: {line}"),
    "ambiguous": (HostChangedError, "'{anchor}' once", "Check out {known}, or put the line in by hand: {line}"),
    "shared line": (HostChangedError, "'{anchor}' to end its line", "Give it a line of its own, then run again."),
    "foreign patch": (PatchConflictError, "at most '{line}'", "Remove vrpo_plugin's lines by hand, then run again."),
    "read-only": (VRPOError, "a file that may be changed", "Give write permission (chmod u+w), then run again."),
}


@dataclass(frozen=True)
class Insertion:
    """One additive line in a host's script.

    Attributes:
        file: the script, relative to the host's root, as ``train.py``.
        anchor: the top-level import statement that our line follows, as ``ast.unparse`` writes it.
        line: the statements to insert, without a newline.
        blobs: commit (7 hex digits) -> git's blob id (40 hex digits) of the file.
    """

    file: str
    anchor: str
    line: str
    blobs: Mapping[str, str]


@dataclass(frozen=True)
class SourceState:
    """A host's script as it stands.

    Attributes:
        path: the script.
        status: what it is; ``clean`` and ``moved`` can be patched.
        detail: the same in words, with line numbers.
        commit: the known commit of the script without our line; None if it is no known version.
        blob: git's id of the bytes as they stand; empty if the file could not be read.
        line_number: 1-based, where our line stands, or after which it goes; None if it has no place.
        newline: what ends our line; empty if it has no place.
        changed: True if the call that returned this wrote the file.
    """

    path: Path
    status: Status
    detail: str
    commit: str | None = None
    blob: str = ""
    line_number: int | None = None
    newline: str = ""
    changed: bool = False


def blob_id(data: bytes) -> str:
    """The id that ``git hash-object`` gives these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def read_state(root: Path, insertion: Insertion) -> SourceState:
    """Says what :func:`patch_file` would meet; raises nothing, whatever the tree holds."""
    return _inspect(root / insertion.file, insertion)[0]


def patch_file(root: Path, insertion: Insertion) -> SourceState:
    """Inserts our line after the anchor; a script that has it already stays as it is.

    Args:
        root: the host's root.
        insertion: what goes where.

    Returns:
        The state afterwards; ``changed`` is False if the line was there before.

    Raises:
        HostNotFoundError: there is no such file.
        HostChangedError: the anchor is not there exactly once, or the result would not compile.
        PatchConflictError: the script holds another version of our line, or was edited at the same moment.
        VRPOError: the file cannot be written.
    """
    state, data = _inspect(root / insertion.file, insertion)
    if state.status == "patched":
        return state
    if state.status not in ("clean", "moved") or state.line_number is None:
        raise _refusal(state, insertion)
    replace_bytes(state.path, data, insert_line(data, state.line_number, insertion.line.encode()))
    return replace(read_state(root, insertion), changed=True)


def unpatch_file(root: Path, insertion: Insertion) -> SourceState:
    """Removes our line and nothing else, wherever it stands at top level; a script without it stays as it is.

    Args:
        root: the host's root.
        insertion: what went where.

    Returns:
        The state afterwards; ``changed`` is False if there was nothing to remove.

    Raises:
        HostNotFoundError: there is no such file.
        HostChangedError: the script does not compile, so that nobody can tell whether the line is code.
        PatchConflictError: the script holds our line twice, or another version of it only.
        VRPOError: the file cannot be written.
    """
    state, data = _inspect(root / insertion.file, insertion)
    try:
        tree = _compiled(data)
    except NOT_PYTHON:
        raise _refusal(state, insertion) from None
    ours = _our_lines(data, tree, insertion)
    if len(ours) > 1 or (not ours and state.status in ("missing file", "foreign patch")):
        raise _refusal(state, insertion)
    if not ours:
        return state
    if why := why_read_only(state.path):
        raise _refusal(replace(state, status="read-only", detail=why), insertion)
    new = remove_line(data, ours[0])
    if why := _misfit(new, [node for node in tree.body if node.lineno != ours[0]]):
        raise _refusal(replace(state, status="broken", detail=f"without our line {why}"), insertion)
    replace_bytes(state.path, data, new)
    return replace(read_state(root, insertion), changed=True)


def format_patch(insertion: Insertion, *, repository: str, commit: str, line_number: int) -> str:
    """The text of a patch file that adds our line to one known commit, for those who cannot run ``vrpo patch``.

    Args:
        insertion: what goes where.
        repository: ``owner/name``, for the header.
        commit: a key of ``insertion.blobs``.
        line_number: the 1-based line of that version after which our line goes; not its last line.
    """
    name = insertion.file
    return f"""\
# vrpo-plugin: one added line
# repository: {repository}
# commit: {commit}
# blob: {insertion.blobs[commit]}
#
# Better: "vrpo patch ROOT". By hand, only if "git hash-object {name}" prints the blob above:
#     git apply --unidiff-zero THIS_FILE
# git does not check it: the patch has no context, so that it also "applies" to any other version of the file, at this
# line number, be it the middle of a call.
diff --git a/{name} b/{name}
--- a/{name}
+++ b/{name}
@@ -{line_number},0 +{line_number + 1} @@
+{insertion.line}
"""


def _refusal(state: SourceState, insertion: Insertion) -> VRPOError:
    kind, expected, do = _REFUSALS[state.status]
    words = {
        "anchor": insertion.anchor,
        "line": insertion.line,
        "known": " or ".join(insertion.blobs) or "a known version",
    }
    return kind(explain(str(state.path), expected=expected.format(**words), got=state.detail, do=do.format(**words)))


def _inspect(path: Path, insertion: Insertion) -> tuple[SourceState, bytes]:
    """The state, and the bytes that it is of."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be read for ever
            return SourceState(path, "missing file", "something else than a file"), b""
        data, read_only = path.read_bytes(), why_read_only(path)
    except OSError as error:
        return SourceState(path, "missing file", error.strerror or str(error)), b""
    status, detail, number = _look(data, insertion)
    # A Windows checkout differs from git's blob by its line endings alone.
    original = remove_line(data, number) if status == "patched" and number else data
    ids = {blob_id(original), blob_id(original.replace(b"\r\n", b"\n"))}
    commit = next((commit for commit, blob in insertion.blobs.items() if blob in ids), None)
    if status == "clean" and commit is None:
        status, detail = "moved", f"{detail}, in no version that was verified (blob {blob_id(data)[:7]})"
    if status in ("clean", "moved") and read_only:
        status, detail = "read-only", read_only
    newline = newline_of(data, number).decode() if number else ""
    return SourceState(path, status, detail, commit, blob_id(data), number, newline), data


def _look(data: bytes, insertion: Insertion) -> tuple[Status, str, int | None]:
    """Status (``clean`` for all that can be patched), what was seen, and the line of :class:`SourceState`."""
    try:
        tree = _compiled(data)
    except NOT_PYTHON as error:
        return "broken", f"{type(error).__name__}: {error}", None
    lines = data.splitlines()
    ours = _our_lines(data, tree, insertion)
    others = [n for n, line in enumerate(lines, 1) if n not in ours and _OTHER_VERSION.search(line)]
    if len(ours) > 1:
        return "foreign patch", f"it at lines {ours}", None
    if others:
        return "foreign patch", f"at line {others[0]} {lines[others[0] - 1].strip()!r}", None
    anchors = [node for node in tree.body if isinstance(node, _IMPORTS) and ast.unparse(node) == insertion.anchor]
    if not anchors:
        return "missing anchor", _nearest(tree, insertion.anchor), None
    last = anchors[0].end_lineno or 0
    if len(anchors) > 1:
        return "ambiguous", f"it at lines {[node.lineno for node in anchors]} (ambiguous)", None
    if ours and ours[0] < last:
        return "foreign patch", f"it at line {ours[0]}, before '{insertion.anchor}' at line {last}", None
    if ours:
        return "patched", f"our line at line {ours[0]}", ours[0]
    index = tree.body.index(anchors[0]) + 1
    if any(node.lineno == last for node in tree.body[index:]) or lines[last - 1].endswith(b"\\"):
        return "shared line", f"more on line {last}", None
    expected = [*tree.body[:index], *ast.parse(insertion.line).body, *tree.body[index:]]
    new = insert_line(data, last, insertion.line.encode())
    if why := _misfit(new, expected):
        return "broken", f"with our line {why}", None
    if _our_lines(new, _compiled(new), insertion) != [last + 1]:  # it could not be found again to take it out
        return "broken", "an encoding whose lines are not those of the bytes", None
    return "clean", f"'{insertion.anchor}' ends at line {last}", last


def _compiled(data: bytes) -> ast.Module:
    """The syntax tree of bytes that compile; raises ``NOT_PYTHON`` for others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the host's own "\d" is no error, whatever -W says
        compile(data, "<host>", "exec", dont_inherit=True)  # sees what the parser does not: a late __future__ import
        return ast.parse(data)


def _misfit(data: bytes, expected: list[ast.stmt]) -> str:
    """How bytes differ from the expected statements; empty if they do not."""
    try:
        same = _dumps(_compiled(data).body) == _dumps(expected)
    except NOT_PYTHON as error:
        return f"{type(error).__name__}: {error}"
    return "" if same else "other code"


def _dumps(statements: list[ast.stmt]) -> list[str]:
    return [ast.dump(statement) for statement in statements]


def _our_lines(data: bytes, tree: ast.Module, insertion: Insertion) -> list[int]:
    """The 1-based numbers of the lines that are ours to the byte, and code at top level, not text in a string."""
    wanted, line = _dumps(ast.parse(insertion.line).body), insertion.line.encode()
    same = [n for n, text in enumerate(data.splitlines(), 1) if text == line]
    return [n for n in same if _dumps([node for node in tree.body if node.lineno == n]) == wanted]


def _nearest(tree: ast.Module, anchor: str) -> str:
    """What a script without the anchor has in its place."""
    nested = [node.lineno for node in ast.walk(tree) if isinstance(node, _IMPORTS) and ast.unparse(node) == anchor]
    if nested:
        return f"it inside another statement only, at line {nested[0]}"
    imports = {ast.unparse(node): node.lineno for node in tree.body if isinstance(node, _IMPORTS)}
    nearest = difflib.get_close_matches(anchor, imports, n=1, cutoff=0.0)
    return f"the nearest import '{nearest[0]}' at line {imports[nearest[0]]}" if nearest else "no import at top level"

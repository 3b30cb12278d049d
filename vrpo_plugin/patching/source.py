"""One line put into a host's script, and taken out again: bytes in, the same bytes and one line out.

The place is found by the syntax tree, never by a line number: on a script that has moved by one line,
``git apply --unidiff-zero`` "applies cleanly" into the middle of a call. Nothing is written unless the result compiles
and its tree is the old tree with our statements right after the anchor.
"""

import ast
import difflib
import os
import re
import stat
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vrpo_plugin.errors import HostChangedError, HostNotFoundError, PatchConflictError, VRPOError, explain
from vrpo_plugin.files import replace_bytes, why_read_only
from vrpo_plugin.patching.fingerprint import NOT_PYTHON
from vrpo_plugin.patching.lines import insert_line, remove_line

_IMPORTS = (ast.Import, ast.ImportFrom)
# An import of ours, commented out or not, and any call; a sentence that names the package is neither.
_OTHER_VERSION = re.compile(rb"(?:^|;)[\s#]*(?:import\b[^#]*|from\s+)\bvrpo_plugin\b|\bvrpo_plugin\.apply")


@dataclass(frozen=True)
class Insertion:
    """One additive line in a host's script.

    Attributes:
        file: the script, relative to the host's root, as ``train.py``.
        anchor: the top-level import statement that our line follows, as ``ast.unparse`` writes it.
        line: the statements to insert, without a newline: an import of this package, and a call that applies it.
    """

    file: str
    anchor: str
    line: str


@dataclass(frozen=True)
class SourceState:
    """A host's script as it stands.

    Attributes:
        path: the script.
        status: ``ready``: the line can go in; ``patched``: it is there, with any settings; ``refused``.
        detail: the same in words, with line numbers.
        line_number: 1-based, where our line stands, or after which it goes; None if it has no place.
        changed: True if the call that returned this wrote the file.
        error: why it is refused.
    """

    path: Path
    status: Literal["ready", "patched", "refused"]
    detail: str
    line_number: int | None = None
    changed: bool = False
    error: VRPOError | None = None


def read_state(root: Path, insertion: Insertion) -> SourceState:
    """Says what :func:`patch_file` would meet; raises nothing, whatever the tree holds."""
    return _inspect(root / insertion.file, insertion)[0]


def patch_file(root: Path, insertion: Insertion) -> SourceState:
    """Inserts our line after the anchor; a script that has it already, with any settings, stays as it is.

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
    if state.error is not None or state.line_number is None:
        raise state.error or AssertionError(state)
    replace_bytes(state.path, data, insert_line(data, state.line_number, insertion.line.encode()))
    return replace(read_state(root, insertion), changed=True)


def unpatch_file(root: Path, insertion: Insertion) -> SourceState:
    """Removes our line and nothing else, wherever it stands at top level; a script without it stays as it is.

    Args:
        root: the host's root.
        insertion: what went where; the line may have been given settings since.

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
        raise state.error or AssertionError(state) from None
    ours = _our_lines(data, tree, insertion)
    if len(ours) != 1:
        if isinstance(state.error, (HostNotFoundError, PatchConflictError)):
            raise state.error
        return state
    if why := why_read_only(state.path):
        raise _read_only(state.path, why).error or AssertionError()
    new = remove_line(data, ours[0])
    if why := _misfit(new, [node for node in tree.body if node.lineno != ours[0]]):
        raise _broken(state.path, insertion, f"without our line {why}").error or AssertionError()
    replace_bytes(state.path, data, new)
    return replace(read_state(root, insertion), changed=True)


def our_lines(path: Path, insertion: Insertion) -> list[int]:
    """The 1-based numbers of the lines of a script that are ours, with any settings; none where it cannot be read."""
    data = _inspect(path, insertion)[1]
    try:
        return _our_lines(data, _compiled(data), insertion)
    except NOT_PYTHON:
        return []


def _refused(path: Path, kind: type[VRPOError], expected: str, got: str, do: str) -> SourceState:
    return SourceState(path, "refused", got, error=kind(explain(str(path), expected=expected, got=got, do=do)))


def _missing(path: Path, error: OSError) -> SourceState:
    got, do = error.strerror or str(error), "Name the root of the host's repository."
    return _refused(path, HostNotFoundError, "a script of the host", got, do)


def _broken(path: Path, insertion: Insertion, got: str) -> SourceState:
    do = f"Repair the script, or put the line in by hand: {insertion.line}"
    return _refused(path, HostChangedError, "code that compiles", got, do)


def _foreign(path: Path, insertion: Insertion, got: str) -> SourceState:
    do = "Remove vrpo_plugin's lines by hand, then run again."
    return _refused(path, PatchConflictError, f"at most '{insertion.line}'", got, do)


def _read_only(path: Path, got: str) -> SourceState:
    do = "Give write permission (chmod u+w), then run again."
    return _refused(path, VRPOError, "a file that may be changed", got, do)


def _inspect(path: Path, insertion: Insertion) -> tuple[SourceState, bytes]:
    """The state, and the bytes that it is of."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be read for ever
            raise OSError(0, "something else than a file")
        data, read_only = path.read_bytes(), why_read_only(path)
    except OSError as error:
        return _missing(path, error), b""
    state = _look(path, data, insertion)
    return _read_only(path, read_only) if state.status == "ready" and read_only else state, data


def _look(path: Path, data: bytes, insertion: Insertion) -> SourceState:
    try:
        tree = _compiled(data)
    except NOT_PYTHON as error:
        return _broken(path, insertion, f"{type(error).__name__}: {error}")
    lines, ours = data.splitlines(), _our_lines(data, tree, insertion)
    others = [n for n, line in enumerate(lines, 1) if n not in ours and _OTHER_VERSION.search(line)]
    if len(ours) > 1:
        return _foreign(path, insertion, f"it at lines {ours}")
    if others:
        return _foreign(path, insertion, f"at line {others[0]} {lines[others[0] - 1].strip()!r}")
    anchors = [node for node in tree.body if isinstance(node, _IMPORTS) and ast.unparse(node) == insertion.anchor]
    if len(anchors) != 1:
        found = [node.lineno for node in anchors]
        got = f"it at lines {found} (ambiguous)" if found else _nearest(tree, insertion.anchor)
        expected, do = f"'{insertion.anchor}'{' once' * bool(found)}", f"Put the line in by hand: {insertion.line}"
        return _refused(path, HostChangedError, expected, got, do)
    last = anchors[0].end_lineno or 0
    if ours and ours[0] < last:
        return _foreign(path, insertion, f"it at line {ours[0]}, before '{insertion.anchor}' at line {last}")
    if ours:
        return SourceState(path, "patched", f"our line at line {ours[0]}", ours[0])
    index = tree.body.index(anchors[0]) + 1
    if any(node.lineno == last for node in tree.body[index:]) or lines[last - 1].endswith(b"\\"):
        expected, do = f"'{insertion.anchor}' to end its line", "Give it a line of its own, then run again."
        return _refused(path, HostChangedError, expected, f"more on line {last}", do)
    expected_tree = [*tree.body[:index], *ast.parse(insertion.line).body, *tree.body[index:]]
    new = insert_line(data, last, insertion.line.encode())
    if why := _misfit(new, expected_tree):
        return _broken(path, insertion, f"with our line {why}")
    if _our_lines(new, _compiled(new), insertion) != [last + 1]:  # it could not be found again to take it out
        return _broken(path, insertion, "an encoding whose lines are not those of the bytes")
    return SourceState(path, "ready", f"'{insertion.anchor}' ends at line {last}", last)


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
    """The 1-based numbers of the lines that are ours, with any settings: code at top level, not text in a string."""
    (first, wanted), start = ast.parse(insertion.line).body, insertion.line.partition(";")[0].encode()
    found = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.startswith(start):
            continue
        there = [node for node in tree.body if node.lineno <= number <= (node.end_lineno or 0)]
        whole = len(there) == 2 and all(node.lineno == node.end_lineno for node in there)
        if whole and _dumps(there[:1]) == _dumps([first]) and _same_call(there[1], wanted):
            found.append(number)
    return found


def _same_call(node: ast.stmt, wanted: ast.stmt) -> bool:
    """Whether a statement is the wanted call, or ``vrpo_plugin.apply_vrpo``, with any arguments."""
    if not all(isinstance(one, ast.Expr) and isinstance(one.value, ast.Call) for one in (node, wanted)):
        return _dumps([node]) == _dumps([wanted])
    function, expected = (ast.unparse(one.value.func) for one in (node, wanted))  # type: ignore[attr-defined]
    return function in (expected, "vrpo_plugin.apply_vrpo")


def _nearest(tree: ast.Module, anchor: str) -> str:
    """What a script without the anchor has in its place."""
    nested = [node.lineno for node in ast.walk(tree) if isinstance(node, _IMPORTS) and ast.unparse(node) == anchor]
    if nested:
        return f"it inside another statement only, at line {nested[0]}"
    imports = {ast.unparse(node): node.lineno for node in tree.body if isinstance(node, _IMPORTS)}
    nearest = difflib.get_close_matches(anchor, imports, n=1, cutoff=0.0)
    return f"the nearest import '{nearest[0]}' at line {imports[nearest[0]]}" if nearest else "no import at top level"

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
from vrpo_plugin.patching.atomic import replace_bytes, why_read_only
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


class _RefusedError(Exception):
    """Why a script cannot take the line: the kind of error, and its three parts."""

    def __init__(self, kind: type[VRPOError], expected: str, got: str, do: str) -> None:
        self.kind, self.expected, self.got, self.do = kind, expected, got, do

    def state(self, path: Path) -> SourceState:
        error = self.kind(explain(str(path), expected=self.expected, got=self.got, do=self.do))
        return SourceState(path, "refused", self.got, error=error)


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
    path = root / insertion.file
    try:
        data = _read(path)
        tree = _parse(data, insertion)
        ours = _our_lines(data, tree, insertion)
        if len(ours) != 1:
            _refuse_others(data, ours, insertion)
            return read_state(root, insertion)
        if why := why_read_only(path):
            raise _read_only(why)
        new = remove_line(data, ours[0])
        if why := _misfit(new, [node for node in tree.body if node.lineno != ours[0]]):
            raise _broken(insertion, f"without our line {why}")
    except _RefusedError as refused:
        raise refused.state(path).error or AssertionError() from None
    replace_bytes(path, data, new)
    return replace(read_state(root, insertion), changed=True)


def our_lines(path: Path, insertion: Insertion) -> list[int]:
    """The 1-based numbers of the lines of a script that are ours, with any settings; none where it cannot be read."""
    try:
        data = _read(path)
        return _our_lines(data, _parse(data, insertion), insertion)
    except _RefusedError:
        return []


def _read(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be read for ever
            raise OSError(0, "something else than a file")
        return path.read_bytes()
    except OSError as error:
        got, do = error.strerror or str(error), "Name the root of the host's repository."
        raise _RefusedError(HostNotFoundError, "a script of the host", got, do) from error


def _parse(data: bytes, insertion: Insertion) -> ast.Module:
    try:
        return _compiled(data)
    except NOT_PYTHON as error:
        raise _broken(insertion, f"{type(error).__name__}: {error}") from error


def _broken(insertion: Insertion, got: str) -> _RefusedError:
    do = f"Repair the script, or put the line in by hand: {insertion.line}"
    return _RefusedError(HostChangedError, "code that compiles", got, do)


def _read_only(got: str) -> _RefusedError:
    do = "Give write permission (chmod u+w), then run again."
    return _RefusedError(VRPOError, "a file that may be changed", got, do)


def _refuse_others(data: bytes, ours: list[int], insertion: Insertion) -> None:
    """Raises where the script holds our line twice, or another use of this package."""
    lines = data.splitlines()
    others = [n for n, line in enumerate(lines, 1) if n not in ours and _OTHER_VERSION.search(line)]
    if len(ours) > 1 or others:
        got = f"it at lines {ours}" if len(ours) > 1 else f"at line {others[0]} {lines[others[0] - 1].strip()!r}"
        do = "Remove vrpo_plugin's lines by hand, then run again."
        raise _RefusedError(PatchConflictError, f"at most '{insertion.line}'", got, do)


def _inspect(path: Path, insertion: Insertion) -> tuple[SourceState, bytes]:
    """The state, and the bytes that it is of."""
    try:
        data = _read(path)
        state = _look(path, data, insertion)
        if state.status == "ready" and (why := why_read_only(path)):
            raise _read_only(why)
    except OSError as error:  # it went away meanwhile
        return _RefusedError(HostNotFoundError, "a script of the host", str(error), "Run again.").state(path), b""
    except _RefusedError as refused:
        return refused.state(path), b""
    return state, data


def _look(path: Path, data: bytes, insertion: Insertion) -> SourceState:
    tree, lines = _parse(data, insertion), data.splitlines()
    ours = _our_lines(data, tree, insertion)
    _refuse_others(data, ours, insertion)
    anchors = [node for node in tree.body if isinstance(node, _IMPORTS) and ast.unparse(node) == insertion.anchor]
    by_hand = f"Put the line in by hand: {insertion.line}"
    if not anchors:
        got = _nearest(tree, insertion.anchor)
        raise _RefusedError(HostChangedError, f"'{insertion.anchor}'", got, by_hand)
    last = anchors[0].end_lineno or 0
    if len(anchors) > 1:
        got = f"it at lines {[node.lineno for node in anchors]} (ambiguous)"
        raise _RefusedError(HostChangedError, f"'{insertion.anchor}' once", got, by_hand)
    if ours and ours[0] < last:
        got = f"it at line {ours[0]}, before '{insertion.anchor}' at line {last}"
        do = "Remove vrpo_plugin's lines by hand, then run again."
        raise _RefusedError(PatchConflictError, f"at most '{insertion.line}'", got, do)
    if ours:
        return SourceState(path, "patched", f"our line at line {ours[0]}", ours[0])
    index = tree.body.index(anchors[0]) + 1
    if any(node.lineno == last for node in tree.body[index:]) or lines[last - 1].endswith(b"\\"):
        do = "Give it a line of its own, then run again."
        raise _RefusedError(HostChangedError, f"'{insertion.anchor}' to end its line", f"more on line {last}", do)
    expected = [*tree.body[:index], *ast.parse(insertion.line).body, *tree.body[index:]]
    new = insert_line(data, last, insertion.line.encode())
    if why := _misfit(new, expected):
        raise _broken(insertion, f"with our line {why}")
    if _our_lines(new, _compiled(new), insertion) != [last + 1]:  # it could not be found again to take it out
        raise _broken(insertion, "an encoding whose lines are not those of the bytes")
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

"""Which known version of a host a definition is, read from the syntax tree of its source."""

import ast
import errno
import hashlib
import os
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from vrpo_plugin.errors import HostChangedError, HostNotFoundError, VRPOError

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Status = Literal["known", "changed", "signature", "missing"]

# What ast.parse and compile raise for bytes that are no Python; the last two for deep nesting.
NOT_PYTHON = (SyntaxError, ValueError, LookupError, RecursionError, MemoryError)
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_NESTING = (ast.stmt, ast.ExceptHandler, ast.match_case)
# They repeat what the place in the tree says, or tell only how a literal was spelt.
_SKIPPED_FIELDS = {"ctx", "kind"}


@dataclass(frozen=True)
class SourcePoint:
    """A class, method or function of a host, by file and qualified name.

    Attributes:
        file: relative to the host's root, with forward slashes: ``models/sit.py``.
        name: ``SiT.forward``; ``SiT`` for a class; ``euler_sampler`` for a function.
        parameters: names in order as ``parameters_of`` gives them; of a class, those of its own ``__init__``.
        fingerprints: commit (7 hex digits) to ``fingerprint`` of the definition there.
    """

    file: str
    name: str
    parameters: tuple[str, ...]
    fingerprints: Mapping[str, str]

    @property
    def module(self) -> str:
        """Dotted name of the file, as it is imported from the host's root."""
        return self.file.removesuffix(".py").replace("/", ".")


@dataclass(frozen=True)
class Finding:
    """What stands at a point of a checkout.

    Attributes:
        point: what was looked for.
        path: the file it was looked for in.
        status: ``known``: the source of a known commit; ``changed``: another body behind the same parameters, or
            behind the same and more that have defaults; ``signature``: other parameters; ``missing``: no such file or
            definition.
        commit: the first known commit with this source; None unless ``known``.
        parameters: those found; empty where ``missing``.
        fingerprint: that found; empty where ``missing``.
        reason: where ``missing``, why, with the most similar name of the file; else empty.
    """

    point: SourcePoint
    path: Path
    status: Status
    commit: str | None = None
    parameters: tuple[str, ...] = ()
    fingerprint: str = ""
    reason: str = ""


def read_tree(path: Path) -> ast.Module:
    """Parses a Python file, in the encoding that its first lines declare.

    Raises:
        HostNotFoundError: the file cannot be read.
        HostChangedError: it is no Python source.
    """
    try:
        if not os.path.isfile(path):
            os.stat(path)  # raises where there is nothing
            raise OSError(errno.EINVAL, "something else than a file")  # a pipe would be read for ever
        source = path.read_bytes()
    except OSError as error:
        raise HostNotFoundError(
            str(path),
            expected="a readable file of the host",
            got=error.strerror or type(error).__name__,
            do="Give the root folder of a supported checkout.",
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the host's own "\d", of which newer Pythons warn
            return ast.parse(source, filename=str(path))
    except NOT_PYTHON as error:
        raise _no_source(path, error) from error


def find_definition(tree: ast.Module, name: str) -> Definition | None:
    """Finds a class, method or function by its qualified name, or None.

    Of several the last one counts, as when Python runs the file; those under ``if``, ``try`` and the like too.
    """
    node = None
    definitions = _definitions_in(tree)
    for part in name.split("."):
        node = definitions.get(part)
        definitions = {} if node is None else _definitions_in(node)
    return node


def parameters_of(node: Definition) -> tuple[str, ...]:
    """Names of the parameters in order, with ``/``, ``*``, ``*args`` and ``**kwargs`` as they are written.

    Of a class: those of the ``__init__`` that it defines itself, else none.
    """
    if isinstance(node, ast.ClassDef):
        constructor = _definitions_in(node).get("__init__")
        return () if constructor is None else parameters_of(constructor)
    a = node.args
    names = [arg.arg for arg in a.posonlyargs] + ["/"] * bool(a.posonlyargs) + [arg.arg for arg in a.args]
    if a.vararg is not None:
        names.append(f"*{a.vararg.arg}")
    elif a.kwonlyargs:
        names.append("*")
    names += [arg.arg for arg in a.kwonlyargs]
    if a.kwarg is not None:
        names.append(f"**{a.kwarg.arg}")
    return tuple(names)


def fingerprint(node: ast.AST) -> str:
    """sha256 of a definition's syntax tree, in hex.

    Comments, layout, docstrings and the spelling of literals do not count, nor does the Python version
    (3.10 to 3.14) that reads the file. Decorators, annotations and defaults do count.
    """
    return hashlib.sha256(_canonical(node).encode("ascii")).hexdigest()


def inspect_point(root: Path, point: SourcePoint) -> Finding:
    """Compares one point of a checkout with its known versions.

    Raises:
        HostChangedError: the file is no Python source.
    """
    path = root / point.file
    try:
        tree = read_tree(path)
    except HostNotFoundError:
        return Finding(point, path, "missing", reason="no readable file")
    try:
        return _compare(tree, path, point)
    except RecursionError as error:  # deeper than this can follow, though Python's own parser could
        raise _no_source(path, error) from error


def _compare(tree: ast.Module, path: Path, point: SourcePoint) -> Finding:
    node = find_definition(tree, point.name)
    if node is None:
        nearest = _nearest_name(tree, point.name)
        hint = f"; the nearest is {nearest}" if nearest else ""
        return Finding(point, path, "missing", reason=f"no such definition{hint}")
    parameters, found = parameters_of(node), fingerprint(node)
    commit = next((commit for commit, known in point.fingerprints.items() if known == found), None)
    if parameters != point.parameters:
        status: Status = "changed" if _only_appends(node, point.parameters) else "signature"
        return Finding(point, path, status, None, parameters, found)
    return Finding(point, path, "changed" if commit is None else "known", commit, parameters, found)


def _only_appends(node: Definition, expected: Sequence[str]) -> bool:
    """Whether a definition takes every call that fits the expected parameters: it has these, and optional ones after.

    Who passes arguments by place passes them to the same names; who passes them by name leaves the new ones out.
    """
    if isinstance(node, ast.ClassDef):
        constructor = _definitions_in(node).get("__init__")
        return constructor is not None and _only_appends(constructor, expected)
    a = node.args
    by_place = [arg.arg for arg in a.posonlyargs + a.args]
    optional = {*by_place[len(by_place) - len(a.defaults) :]}
    optional |= {arg.arg for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True) if default is not None}
    found = parameters_of(node)
    added = [name for name in found if name not in expected]
    wanted = [name for name in expected if name in by_place]
    takes_any = a.vararg is not None and f"*{a.vararg.arg}" in expected  # a new name would take one of these
    return (
        all(name in optional or name.startswith("*") for name in added)
        and [name for name in found if name not in added] == list(expected)
        and by_place[: len(wanted)] == wanted
        and not (takes_any and len(by_place) > len(wanted))
    )


def verify_points(root: Path, points: Sequence[SourcePoint], *, allow_unverified: bool = False) -> list[Finding]:
    """Checks every point of a checkout before anything is changed.

    Args:
        root: the host's root folder.
        points: each may match any of its known commits.
        allow_unverified: accepts a changed body, and further parameters with defaults; never other parameters.

    Returns:
        One finding per point, ``known`` or, where allowed, ``changed``.

    Raises:
        HostNotFoundError: a file or a definition is missing.
        HostChangedError: other parameters or an unknown body, or a file that is no Python source.
    """
    findings = [inspect_point(root, point) for point in points]
    refused = [one for one in findings if one.status != "known" and not (allow_unverified and one.status == "changed")]
    if refused:
        # The worst first: who is told of a changed body may waive it, only to meet a changed signature.
        order = ("missing", "signature", "changed")
        raise _refusal(root, min(refused, key=lambda one: order.index(one.status)))
    return findings


def _definitions_in(scope: ast.AST) -> dict[str, Definition]:
    """Definitions that running a module's or class's body leaves, by name; a function's own stay inside it."""
    is_namespace = isinstance(scope, (ast.Module, ast.ClassDef))
    return {node.name: node for node in _walk_statements(scope)} if is_namespace else {}


def _walk_statements(parent: ast.AST) -> Iterator[Definition]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, _DEFINITIONS):
            yield node
        elif isinstance(node, _NESTING):
            yield from _walk_statements(node)


def _nearest_name(tree: ast.Module, name: str) -> str | None:
    """The name with its first missing part replaced by the most similar one there is, up to that part."""
    scope: ast.AST = tree
    parts = name.split(".")
    for i, part in enumerate(parts):
        there = _definitions_in(scope)
        if part not in there:
            is_last = i == len(parts) - 1
            similar = [other for other, node in there.items() if is_last or isinstance(node, ast.ClassDef)]
            close = get_close_matches(part, similar, n=1, cutoff=0.5)
            return ".".join([*parts[:i], *close]) if close else None
        scope = there[part]
    return None


def _canonical(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_canonical, value))}]"
    if not isinstance(value, ast.AST):
        return ascii(value)  # not repr: what it escapes follows the Unicode tables of the running Python
    fields = {name: field for name, field in ast.iter_fields(value) if name not in _SKIPPED_FIELDS}
    if isinstance(value, _DEFINITIONS) and ast.get_docstring(value, clean=False) is not None:
        fields["body"] = value.body[1:]
    if isinstance(value, ast.JoinedStr):  # Python 3.12 puts empty strings between the parts of a format
        fields["values"] = [part for part in value.values if not (isinstance(part, ast.Constant) and part.value == "")]
    # Newer versions add fields that are None or empty for all source that older ones can read.
    kept = (f"{name}={_canonical(field)}" for name, field in fields.items() if field is not None and field != [])
    return f"{type(value).__name__}({','.join(kept)})"


def _no_source(path: Path, error: Exception) -> HostChangedError:
    got = f"{type(error).__name__}: {error}"
    do = "Check the file out again, or use the Python version that it is written for."
    return HostChangedError(str(path), expected="Python source", got=got, do=do)


def _refusal(root: Path, finding: Finding) -> VRPOError:
    point = finding.point
    subject = f"{finding.path}: {point.name}"
    commits = " or ".join(point.fingerprints) or "(none named)"
    do = f"Check out a known commit, or run '{shlex.join(['vrpo', 'check', str(root)])}'"
    if finding.status == "missing":
        return HostNotFoundError(subject, expected=f"it as in commit {commits}", got=finding.reason, do=f"{do}.")
    if finding.status == "signature":
        expected = f"parameters ({', '.join(point.parameters)}) as in commit {commits}"
        got = f"({', '.join(finding.parameters)})"
        do = f"{do}; allow_unverified does not waive a changed signature."
        return HostChangedError(subject, expected=expected, got=got, do=do)
    added = [name for name in finding.parameters if name not in point.parameters]
    got = f"another body (fingerprint {finding.fingerprint[:12]})"
    if added:
        got += f" with more parameters, which have defaults ({', '.join(added)})"
    do = f"{do}; allow_unverified=True (VRPO_ALLOW_UNVERIFIED=1) accepts it."
    return HostChangedError(subject, expected=f"the source of commit {commits}", got=got, do=do)

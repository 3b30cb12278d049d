"""One line goes into a script and comes out again; whatever is odd is refused with every byte in place."""

import ast
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vrpo_plugin.errors import HostChangedError, HostNotFoundError, PatchConflictError, VRPOError
from vrpo_plugin.patching.source import (
    Insertion,
    patch_file,
    read_state,
    unpatch_file,
)

LINE = "import vrpo_plugin; vrpo_plugin.apply_vrpo_to_toy()  # vrpo-plugin"
OURS = LINE.encode()
ANCHOR = "from loss import ToyLoss"
SCRIPT = (
    b'"""A toy host."""\nimport os\n\nfrom models.toy import Toy\nfrom loss import ToyLoss\n\nprint(Toy, ToyLoss, os)\n'
)
PATCHED = SCRIPT.replace(b"ToyLoss\n\n", b"ToyLoss\n" + OURS + b"\n\n")
INSERTION = Insertion("train.py", ANCHOR, LINE)

Snapshot = dict[str, tuple[int, str]]


def tree_of(root: Path, data: bytes) -> Path:
    (root / "train.py").write_bytes(data)
    return root


def snapshot(root: Path) -> Snapshot:
    """Every path below a folder with its mode and a hash of its bytes."""
    files = sorted(root.rglob("*"))
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mode,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in files
    }


def refused(call: Callable[[Path, Insertion], object], root: Path, kind: type[VRPOError], *words: str) -> None:
    """Asserts a typed three-part refusal that leaves the tree byte for byte, with no file more."""
    before = snapshot(root)
    with pytest.raises(kind) as caught:
        call(root, INSERTION)
    assert caught.type is kind
    assert snapshot(root) == before
    text = str(caught.value)
    assert re.search(r"train\.py: expected .+, got .+\. [A-Z].+", text), text
    for word in words:
        assert word in text


def test_a_script_is_patched_and_restored(tmp_path: Path) -> None:
    root = tree_of(tmp_path, SCRIPT)
    ready = read_state(root, INSERTION)
    assert (ready.status, ready.line_number) == ("ready", 5)
    assert ready.path == root / "train.py" and not ready.changed and ready.error is None

    patched = patch_file(root, INSERTION)
    assert (root / "train.py").read_bytes() == PATCHED
    assert (patched.status, patched.line_number, patched.changed) == ("patched", 6, True)
    assert PATCHED.splitlines()[patched.line_number - 1] == OURS

    restored = unpatch_file(root, INSERTION)
    assert (root / "train.py").read_bytes() == SCRIPT
    assert restored == replace(ready, changed=True)
    assert sorted(os.listdir(root)) == ["train.py"]


def test_second_patch_and_second_unpatch_do_nothing(tmp_path: Path) -> None:
    root = tree_of(tmp_path, SCRIPT)
    patch_file(root, INSERTION)
    stamp = (root / "train.py").stat()
    again = patch_file(root, INSERTION)
    assert again.status == "patched" and not again.changed
    after = (root / "train.py").stat()
    assert (after.st_ino, after.st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)
    unpatch_file(root, INSERTION)
    again = unpatch_file(root, INSERTION)
    assert again.status == "ready" and not again.changed


def test_read_state_writes_nothing(tmp_path: Path) -> None:
    root = tree_of(tmp_path, SCRIPT)
    before = snapshot(root)
    read_state(root, INSERTION)
    assert snapshot(root) == before


@pytest.mark.parametrize(
    ("data", "line_number"),
    [
        pytest.param(b"\n" + SCRIPT, 6, id="shifted"),
        pytest.param(SCRIPT + b"# mine\n", 5, id="dirty"),
        pytest.param(SCRIPT.replace(b"\n\nfrom", b"\nfrom"), 4, id="shifted-up"),
    ],
)
def test_another_version_with_the_anchor_is_patched(tmp_path: Path, data: bytes, line_number: int) -> None:
    root = tree_of(tmp_path, data)
    state = read_state(root, INSERTION)
    assert (state.status, state.line_number) == ("ready", line_number)
    assert patch_file(root, INSERTION).line_number == line_number + 1
    lines = (root / "train.py").read_bytes().splitlines(keepends=True)
    assert lines.pop(line_number) == OURS + b"\n" and b"".join(lines) == data
    unpatch_file(root, INSERTION)
    assert (root / "train.py").read_bytes() == data


def test_a_sentence_that_names_the_package_is_no_patch(tmp_path: Path) -> None:
    data = SCRIPT + b"# logs from vrpo_plugin\nnote = 'import it from vrpo_plugin, or vrpo_plugin_2'\n"
    assert patch_file(tree_of(tmp_path, data), INSERTION).changed


CRLF = SCRIPT.replace(b"\n", b"\r\n")


def test_a_windows_checkout_keeps_its_newlines(tmp_path: Path) -> None:
    root = tree_of(tmp_path, CRLF)
    assert patch_file(root, INSERTION).changed
    assert (root / "train.py").read_bytes() == PATCHED.replace(b"\n", b"\r\n")
    assert unpatch_file(root, INSERTION).changed
    assert (root / "train.py").read_bytes() == CRLF


AFTER = ANCHOR.encode() + b"\n"
HERE = b"<here>"  # where our line must go, with its newline
LATIN = "# -*- coding: latin-1 -*-\nnäme = 'ß'; from loss import ToyLoss\n<here>print(näme)\n".encode("latin-1")
PRESERVED = {
    "byte-order-mark": b"\xef\xbb\xbf" + AFTER + HERE,
    "latin-1": LATIN,
    "no-final-newline": AFTER.strip() + HERE,
    "no-final-newline-after-blank-lines": b"\n\n\n" + AFTER.strip() + HERE,
    "no-final-newline-of-windows": b"a = 1\r\n" + AFTER.strip() + HERE,
    "mixed-newlines": b"a = 1\r\n" + AFTER + HERE + b"b = 2\r\n",
    "carriage-returns": b"a = 1\r" + AFTER.strip() + b"\r" + HERE,
    "form-feed": b"a = 1\n\x0c\n" + AFTER + HERE + b"\x0c\n",
    "what-str.splitlines-splits-at": "t = '\x0b\x1c\x85\u2028'\n".encode() + AFTER + HERE + b"b = 2\n",
    "tabs": b"if 1:\n\ta = 1\n" + AFTER + HERE,
    "parentheses": b"from loss import (\n    ToyLoss,  # (\n)\n" + HERE + b"b = 2\n",
    "continued-inside": b"from loss \\\n    import ToyLoss\n" + HERE + b"b = 2\n",
    "last-of-its-line": b"import os; from loss import ToyLoss;  # both\n" + HERE + b"b = 2\n",
    "warned-about": b"p = '\\d'\n" + AFTER + HERE,
    "from-future": b"from __future__ import annotations\n" + AFTER + HERE,
}
NEWLINE = {"carriage-returns": b"\r"}
AT_END = {
    "no-final-newline": b"\n",
    "no-final-newline-after-blank-lines": b"\n",
    "no-final-newline-of-windows": b"\r\n",
}


@pytest.mark.filterwarnings("error")  # as under python -W error: the host's invalid escapes are not ours to refuse
@pytest.mark.parametrize("name", PRESERVED)
def test_every_byte_around_the_line_stays(tmp_path: Path, name: str) -> None:
    data = PRESERVED[name].replace(HERE, b"")
    added = AT_END[name] + OURS if name in AT_END else OURS + NEWLINE.get(name, b"\n")
    root = tree_of(tmp_path, data)
    patch_file(root, INSERTION)
    assert (root / "train.py").read_bytes() == PRESERVED[name].replace(HERE, added)
    unpatch_file(root, INSERTION)
    assert (root / "train.py").read_bytes() == data


REFUSED = {
    "renamed": (SCRIPT.replace(b"ToyLoss", b"Loss2"), HostChangedError, "'from loss import Loss2' at line 5"),
    "renamed-as": (SCRIPT.replace(b"ToyLoss\n", b"ToyLoss as T\n"), HostChangedError, "import ToyLoss as T' at line 5"),
    "no-import": (b"a = 1\n", HostChangedError, "no import at top level"),
    "empty": (b"", HostChangedError, "no import at top level"),
    "docstring": (b"'''\n" + AFTER + b"'''\n", HostChangedError, "no import at top level"),
    "comment": (b"# " + AFTER, HostChangedError, "no import at top level"),
    "if": (b"if 1:\n    " + AFTER, HostChangedError, "inside another statement only, at line 2"),
    "try": (b"try:\n " + AFTER + b"finally:\n pass\n", HostChangedError, "inside another statement only, at line 2"),
    "function": (b"def f():\n    " + AFTER, HostChangedError, "inside another statement only, at line 2"),
    "twice": (SCRIPT + AFTER, HostChangedError, "it at lines [5, 8] (ambiguous)"),
    "twice-on-a-line": (AFTER[:-1] + b"; " + AFTER, HostChangedError, "it at lines [1, 1] (ambiguous)"),
    "semicolon": (AFTER[:-1] + b"; a = (1,\n2)\n", HostChangedError, "more on line 1"),
    "continued": (AFTER[:-1] + b"; \\\na = 1\n", HostChangedError, "more on line 1"),
    "syntax-error": (SCRIPT + b"def f(:\n", HostChangedError, "line 8"),
    "null-byte": (SCRIPT + b"\0", HostChangedError, "null bytes"),
    "not-utf-8": (SCRIPT + b"a = '\xe9'\n", HostChangedError, "SyntaxError"),
    "unknown-encoding": (b"# coding: klingon\n" + SCRIPT, HostChangedError, "klingon"),
    "compiler-error": (SCRIPT + b"return\n", HostChangedError, "outside function"),
    "too-deep": (SCRIPT + b"a = " + b"(" * 5000 + b")" * 5000, HostChangedError, "too many nested parentheses"),
    "other-host's-line": (
        OURS.replace(b"toy", b"repa") + b"\n" + SCRIPT,
        PatchConflictError,
        "line 1 b'import vrpo_plugin",
    ),
    "not-a-call-of-ours": (PATCHED.replace(b"apply_vrpo_to_toy()", b"config"), PatchConflictError, "line 6"),
    "two-calls": (PATCHED.replace(b"toy()", b"toy(); f()"), PatchConflictError, "line 6"),
    "kept-handle": (PATCHED.replace(b"; vrpo", b"; handle = vrpo"), PatchConflictError, "line 6"),
    "over-two-lines": (PATCHED.replace(b"toy()", b"toy(\n)"), PatchConflictError, "line 6"),
    "split-in-two": (PATCHED.replace(b"; vrpo", b"\nvrpo"), PatchConflictError, "line 6"),
    "import-list": (SCRIPT + b"import os, vrpo_plugin\n", PatchConflictError, "line 8"),
    "nested-from": (SCRIPT + b"if os:\n    from vrpo_plugin import a\n", PatchConflictError, "line 9"),
    "after-a-semicolon": (SCRIPT + b"a = 1; import vrpo_plugin\n", PatchConflictError, "line 8"),
    "commented-out": (SCRIPT + b"# import vrpo_plugin\n", PatchConflictError, "line 8"),
    "call": (SCRIPT + b"a = lambda: vrpo_plugin.apply_vrpo_to_toy()\n", PatchConflictError, "line 8"),
    "nested": (SCRIPT + b"if os:\n    " + OURS, PatchConflictError, "line 9"),
    "in-a-string": (SCRIPT + b"'''\n" + OURS + b"\n'''\n", PatchConflictError, "line 9"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_odd_is_refused(tmp_path: Path, name: str) -> None:
    data, error, words = REFUSED[name]
    root = tree_of(tmp_path, data)
    state = read_state(root, INSERTION)
    assert (state.status, state.line_number) == ("refused", None) and words in state.detail
    refused(patch_file, root, error, words)


SETTINGS = {
    "settings": (b"apply_vrpo_to_toy()", b"apply_vrpo_to_toy(reward_coeff=0.5, layers='middle')"),
    "another comment": (b"  # vrpo-plugin", b"  # mine"),
    "no comment": (b"  # vrpo-plugin", b""),
    "finds its host": (b"apply_vrpo_to_toy()", b"apply_vrpo()"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_our_line_with_settings_is_ours(tmp_path: Path, name: str) -> None:
    """The docs offer such edits; a tool that leaves the line there would say that the script is as it was."""
    root = tree_of(tmp_path, PATCHED.replace(*SETTINGS[name]))
    assert read_state(root, INSERTION).status == "patched" and not patch_file(root, INSERTION).changed
    assert unpatch_file(root, INSERTION).changed
    assert (root / "train.py").read_bytes() == SCRIPT


def test_refusal_names_the_line_to_put_in(tmp_path: Path) -> None:
    root = tree_of(tmp_path, b"import loss\n")
    words = ["expected 'from loss import ToyLoss', got the nearest import 'import loss' at line 1.", LINE]
    refused(patch_file, root, HostChangedError, *words)


def test_place_before_a_future_import_is_refused(tmp_path: Path) -> None:
    # The parser takes it; only the compiler knows that nothing but other __future__ imports may come before.
    insertion = replace(INSERTION, anchor="from __future__ import division")
    root = tree_of(tmp_path, b"from __future__ import division\nfrom __future__ import annotations\n")
    assert read_state(root, insertion).status == "refused"
    before = snapshot(root)
    with pytest.raises(HostChangedError, match="with our line SyntaxError: from __future__"):
        patch_file(root, insertion)
    assert snapshot(root) == before
    assert not unpatch_file(root, insertion).changed  # nothing of ours is in it


def test_line_that_the_scripts_encoding_makes_another_is_refused(tmp_path: Path) -> None:
    insertion = replace(INSERTION, line="import toy; toy.apply('ß')")  # two letters in latin-1
    root = tree_of(tmp_path, LATIN.replace(HERE, b""))
    before = snapshot(root)
    with pytest.raises(HostChangedError, match="with our line other code"):
        patch_file(root, insertion)
    assert snapshot(root) == before
    assert patch_file(tree_of(tmp_path, SCRIPT), insertion).changed


@pytest.mark.parametrize("head", [b"# coding: utf-7\n# +AAo-\n", b"# coding: unicode_escape\n# \\n\n"])
def test_line_that_could_not_be_found_again_is_refused(tmp_path: Path, head: bytes) -> None:
    """The text has a line more than the bytes, so that ours would go in one line late."""
    root = tree_of(tmp_path, head + ANCHOR.encode() + b"\n# one\n# more\n")
    refused(patch_file, root, HostChangedError, "an encoding whose lines are not those of the bytes")


@pytest.mark.parametrize("call", [patch_file, unpatch_file])
def test_our_line_twice_is_a_conflict(tmp_path: Path, call: Callable[[Path, Insertion], object]) -> None:
    root = tree_of(tmp_path, PATCHED + OURS + b"\n")
    assert read_state(root, INSERTION).status == "refused"
    refused(call, root, PatchConflictError, "[6, 9]")


def test_our_line_before_the_anchor_is_a_conflict_that_unpatch_solves(tmp_path: Path) -> None:
    root = tree_of(tmp_path, OURS + b"\n" + SCRIPT)
    refused(patch_file, root, PatchConflictError, "at line 1", "at line 6")
    assert unpatch_file(root, INSERTION).status == "ready"
    assert (root / "train.py").read_bytes() == SCRIPT


def test_our_line_further_down_counts_as_patched(tmp_path: Path) -> None:
    root = tree_of(tmp_path, SCRIPT + OURS + b"\n")
    state = patch_file(root, INSERTION)
    assert (state.status, state.line_number, state.changed) == ("patched", 8, False)
    unpatch_file(root, INSERTION)
    assert (root / "train.py").read_bytes() == SCRIPT


def test_unpatch_needs_no_anchor_and_leaves_edits(tmp_path: Path) -> None:
    edited = PATCHED.replace(b"import ToyLoss", b"import NewLoss as ToyLoss") + b"'''\n" + OURS + b"\n'''\n"
    root = tree_of(tmp_path, edited)
    state = unpatch_file(root, INSERTION)
    assert state.changed and (root / "train.py").read_bytes() == edited.replace(OURS + b"\n", b"", 1)


def test_unpatch_refuses_another_version_of_our_line(tmp_path: Path) -> None:
    root = tree_of(tmp_path, PATCHED.replace(b"to_toy", b"to_repa"))
    refused(unpatch_file, root, PatchConflictError, "apply_vrpo_to_repa")


def test_unpatch_refuses_a_script_that_does_not_compile(tmp_path: Path) -> None:
    refused(unpatch_file, tree_of(tmp_path, PATCHED + b"def f(:\n"), HostChangedError, "SyntaxError")


def test_unpatch_refuses_when_the_rest_would_be_other_code(tmp_path: Path) -> None:
    root = tree_of(tmp_path, b"a = 1; \\\n" + OURS + b"\nif a:\n    pass\n")  # without it: a = 1; if a:
    refused(unpatch_file, root, HostChangedError, "without our line SyntaxError")


@pytest.mark.parametrize("call", [patch_file, unpatch_file])
@pytest.mark.parametrize("name", ["absent", "folder", "dangling", "loop", "no-root", "pipe"])
def test_no_file_is_no_host(tmp_path: Path, call: Callable[[Path, Insertion], object], name: str) -> None:
    path = tmp_path / "train.py"
    if name == "folder":
        path.mkdir()
    elif name in ("dangling", "loop"):
        path.symlink_to("elsewhere.py" if name == "dangling" else "train.py")
    elif name == "pipe":
        os.mkfifo(path)
    root = tmp_path / "nowhere" if name == "no-root" else tmp_path
    assert isinstance(read_state(root, INSERTION).error, HostNotFoundError)
    refused(call, root, HostNotFoundError, "Name the root")


@pytest.mark.parametrize(("call", "data"), [(patch_file, SCRIPT), (unpatch_file, PATCHED)])
@pytest.mark.parametrize("locked", ["train.py", "."])
def test_read_only_tree_stays(
    tmp_path: Path, call: Callable[[Path, Insertion], object], data: bytes, locked: str
) -> None:
    root = tmp_path / "host"
    root.mkdir()
    tree_of(root, data)
    place = root / locked
    mode = place.stat().st_mode & 0o777
    place.chmod(mode & ~0o222)
    try:
        assert read_state(root, INSERTION).status == ("refused" if data is SCRIPT else "patched")
        refused(call, root, VRPOError, "write permission on the " + ("folder" if locked == "." else "file"))
    finally:
        place.chmod(mode)


def test_patch_of_a_patched_read_only_tree_has_nothing_to_do(tmp_path: Path) -> None:
    root = tree_of(tmp_path, PATCHED)
    (root / "train.py").chmod(0o444)
    assert not patch_file(root, INSERTION).changed


@pytest.mark.parametrize(("call", "data"), [(patch_file, SCRIPT), (unpatch_file, PATCHED)])
@pytest.mark.parametrize("function", ["replace", "fsync", "fdopen", "chmod"])
def test_failed_write_leaves_the_tree(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[Path, Insertion], object],
    data: bytes,
    function: str,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    root = tree_of(tmp_path, data)
    monkeypatch.setattr(os, function, full)
    refused(call, root, VRPOError, "No space left")


def test_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "host").mkdir()
    (tmp_path / "store" / "real.py").write_bytes(SCRIPT)
    link = tmp_path / "host" / "train.py"
    link.symlink_to("../store/real.py")
    patch_file(tmp_path / "host", INSERTION)
    assert os.readlink(link) == "../store/real.py"
    assert (tmp_path / "store" / "real.py").read_bytes() == PATCHED
    unpatch_file(tmp_path / "host", INSERTION)
    assert link.is_symlink() and link.read_bytes() == SCRIPT
    assert os.listdir(tmp_path / "store") == ["real.py"] and os.listdir(tmp_path / "host") == ["train.py"]


SURROUNDING = st.sampled_from(
    [
        "",
        "x = 1",
        "# a comment",
        "if x:\n\ty = 2",
        "\x0c",
        "s = '''\nfrom loss import ToyLoss\n'''",
        "import loss",
        " ",
    ],
)
SURROUNDING |= st.sampled_from(
    ["def f():\n    from loss import ToyLoss", "z = (1,\n  2)", "t = 'ß\u2028'", "a = 1; b = \\\n  2", "# \\"]
)
ANCHORS = st.sampled_from(
    [ANCHOR, "from loss import (ToyLoss)", "from loss import (\n  ToyLoss,\n)", ANCHOR + ";  # x"]
)
NEWLINES = st.sampled_from(["\n", "\r\n", "\r"])


@st.composite
def scripts(draw: st.DrawFn) -> bytes:
    """A script with one anchor, any newlines, with or without a byte order mark, an encoding and a final newline."""
    before, after = draw(st.lists(SURROUNDING, max_size=5)), draw(st.lists(SURROUNDING, max_size=5))
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "cp1252"]))
    head = ["# coding: cp1252"] if encoding == "cp1252" else []
    pieces = [*head, "x = 0", *before, draw(ANCHORS), *after]
    text = "\n".join(piece.replace("\u2028", "") if head else piece for piece in pieces)
    mixed = draw(st.booleans())
    newline = draw(NEWLINES)
    lines = [line + (draw(NEWLINES) if mixed else newline) for line in text.split("\n")]
    text = "".join(lines)
    if draw(st.booleans()):
        text = text.rstrip("\r\n")
    return text.encode(encoding)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property: each writes its script anew."""
    return tmp_path_factory.mktemp("tree")


@given(data=scripts())
@settings(max_examples=150, deadline=None)
def test_unpatch_inverts_patch(shared: Path, data: bytes) -> None:
    root = tree_of(shared, data)
    before = [ast.dump(node) for node in ast.parse(data).body]
    index = [ast.unparse(node) for node in ast.parse(data).body].index(ANCHOR) + 1
    state = patch_file(root, INSERTION)
    patched = (root / "train.py").read_bytes()
    after = [ast.dump(node) for node in ast.parse(patched).body]
    assert after == [*before[:index], *(ast.dump(node) for node in ast.parse(LINE).body), *before[index:]]
    assert patched.splitlines()[(state.line_number or 0) - 1] == OURS
    assert len(patched) - len(data) - len(OURS) in (1, 2)  # the newline
    assert unpatch_file(root, INSERTION).changed
    assert (root / "train.py").read_bytes() == data


@given(
    edits=st.lists(st.tuples(st.integers(0, len(SCRIPT)), st.integers(0, 3), st.binary(max_size=3)), max_size=4),
    piece=st.sampled_from([b"", b"\\\n", b";", b"'''", b"\r", AFTER, OURS, OURS + b"\n", b"    ", b"\x0c", b"#"]),
    at=st.integers(0, len(SCRIPT)),
)
@settings(max_examples=400, deadline=None)
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_mutated_script_is_patched_right_or_left_alone(
    shared: Path, edits: list[tuple[int, int, bytes]], piece: bytes, at: int
) -> None:
    data = SCRIPT[:at] + piece + SCRIPT[at:]
    for start, length, new in edits:
        data = data[:start] + new + data[start + length :]
    root = tree_of(shared, data)
    status = read_state(root, INSERTION).status
    try:
        state = patch_file(root, INSERTION)
    except VRPOError:
        assert status == "refused"
        assert (root / "train.py").read_bytes() == data
    else:
        assert status in ("ready", "patched") and state.changed == (status != "patched")
        patched = (root / "train.py").read_bytes()
        compile(patched, "train.py", "exec")
        statements = [ast.unparse(node) for node in ast.parse(patched).body]
        ours = [ast.unparse(node) for node in ast.parse(LINE).body]
        place = statements.index(ours[0])
        assert statements.count(ANCHOR) == 1 and statements.index(ANCHOR) < place
        assert statements[place : place + 2] == ours and statements.count(ours[1]) == 1
        if state.changed:
            assert statements[place - 1] == ANCHOR
            unpatch_file(root, INSERTION)
            assert (root / "train.py").read_bytes() == data
    assert os.listdir(root) == ["train.py"]

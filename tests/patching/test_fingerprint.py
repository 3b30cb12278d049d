import argparse
import ast
import dataclasses
import inspect
import os
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrpo_plugin import HostChangedError, HostNotFoundError
from vrpo_plugin.patching.fingerprint import (
    SourcePoint,
    find_definition,
    fingerprint,
    inspect_point,
    parameters_of,
    read_tree,
    verify_points,
)

MODEL = '''
import functools

class Model(Base):
    """A model."""

    scale = 1.5

    def __init__(self, width=8, *, depth: int = 2):
        """Builds it."""
        self.width = width
        self.depth = depth

    @functools.lru_cache(maxsize=None)
    def forward(self, x, t, y=None):
        """Runs it."""
        hidden = x * self.scale + 1  # a comment
        if t > 0.5 and y is not None:
            return f"{hidden:.{self.depth}f}", "text", b"bytes", ...
        return hidden


def sample(model, *args, steps=50, **kwargs):
    return model(*args, **kwargs)
'''
# Taken once, on Python 3.10, 3.11, 3.12 and 3.13 alike: whichever runs the tests must agree.
MANY_FORMS = '''
@decorator(1, *rest, key=None, **more)
async def f(a, /, b: "int" = 0x10, *c, d=..., e, **g) -> dict[str, int]:
    """Docstring."""
    global state
    text = f"{a!r:>{b}} {{}} {c=}" u"x" "\\N{SNOWMAN}\U0001fae0\xa0" f"{d:{b}.{e}}{g:}"
    numbers = 1_000, 1e400, .1, 2j, 0b1, b"\\xff" rb"\\d", -1, True, None
    with (open(a) as b, open(c)):
        x = [y := 1, *c, *(z async for z in a if z), lambda: (yield)]
    try:
        del x[1:2, ::3], x.y
    except (A, B) as error:
        raise C from error
    else:
        assert x, "m"
    finally:
        a @= {**g, 1: {2}}
    match a:
        case {"k": [1, *_], **others} | C(d=None) if b:
            return not a if b else await c
        case None | -1.5 | "s" as other:
            pass

    class Inner(Base, metaclass=M):
        """Docstring."""
        x: int
'''
MANY_FORMS_SHA256 = "1f3419f1c3d8cc147fd27df76431c9fafe2f803929ad8e1fdc203ac0b98e99f8"


def definition(source: str, name: str = "Model.forward") -> ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef:
    node = find_definition(ast.parse(source), name)
    assert node is not None
    return node


def print_of(source: str, name: str = "Model.forward") -> str:
    return fingerprint(definition(source, name))


def point(name: str = "Model.forward", source: str = MODEL, **changes: object) -> SourcePoint:
    node = definition(source, name)
    values = {"file": "model.py", "name": name, "parameters": parameters_of(node)}
    return SourcePoint(**values | {"fingerprints": {"abc1234": fingerprint(node)}} | changes)  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL, "utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # a comment", ""),
        ("        hidden =", "\n\n        # another\n        hidden  =  "),
        ('        """Runs it."""\n', ""),
        ("Runs it.", "Something else."),
        ("x * self.scale + 1", "(x * self.scale) + 1"),
        ("        return hidden", "        return (\n            hidden\n        )"),
        ("(self, x, t, y=None)", "(\n        self,\n        x,\n        t,\n        y=None,\n    )"),
        ('"text"', "'text'"),
        ('"text"', "u'te' 'xt'"),
        ("0.5", "5e-1"),
        ("\n\n", "\n\n\n"),
        ("scale = 1.5", "scale = 2.5"),  # beside the method, not in it
        ("    ", "\t"),
        ("\n", "\r\n"),
    ],
)
def test_spelling_does_not_count(old: str, new: str) -> None:
    assert old in MODEL
    assert print_of(MODEL.replace(old, new)) == print_of(MODEL)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+ 1", "+ 2"),
        ("+ 1", "+ 1.0"),
        ("+ 1", "+ True"),
        ("+ 1", "- 1"),
        ("t > 0.5", "t >= 0.5"),
        ("is not None", "is None"),
        ("and y", "or y"),
        ('"text"', '"Text"'),
        ('"text"', 'b"text"'),
        ('b"bytes"', 'b"Bytes"'),
        (", ...", ", None"),
        (":.{self", ":{self"),
        ("{hidden:", "{hidden!r:"),
        ("self.scale", "self.width"),
        ("hidden", "hidden_states"),
        ("y=None", "y"),
        ("y=None", "y=0"),
        ("y=None", "*, y=None"),
        ("x, t,", "t, x,"),
        ("x, t,", "x: int, t,"),
        ("    @functools.lru_cache(maxsize=None)\n", ""),
        ("maxsize=None", "maxsize=1"),
        ("    def forward", "    async def forward"),
        ("        return hidden\n", "        return hidden\n        pass\n"),
    ],
)
def test_any_change_of_meaning_counts(old: str, new: str) -> None:
    assert old in MODEL
    assert print_of(MODEL.replace(old, new)) != print_of(MODEL)


def test_docstrings_of_inner_definitions_do_not_count_but_other_strings_do() -> None:
    bare = MODEL.replace('    """A model."""\n', "").replace('        """Builds it."""\n', "")
    assert '"""Runs' in bare and print_of(bare, "Model") == print_of(MODEL, "Model")
    first = [MODEL.replace('"""Runs it."""', text) for text in ("check(x)", "check(t)", 'b"x"')]
    assert len({print_of(source) for source in first}) == 3  # a first statement that is no docstring
    assert print_of(MODEL.replace("scale = 1.5", 'scale = 1.5\n    "size"'), "Model") != print_of(MODEL, "Model")


def test_every_python_version_takes_the_same_fingerprint() -> None:
    assert fingerprint(ast.parse(MANY_FORMS)) == MANY_FORMS_SHA256


@pytest.mark.parametrize("module", [argparse, dataclasses, inspect, textwrap])
def test_reformatting_real_modules_changes_no_fingerprint(module: object) -> None:
    tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]
    assert fingerprint(ast.parse(ast.unparse(tree))) == fingerprint(tree)


CONSTANTS = st.one_of(
    st.integers(min_value=0),
    st.floats(min_value=0),
    st.text(),
    st.binary(),
    st.booleans(),
    st.sampled_from([None, ...]),
)
EXPRESSIONS = st.recursive(
    st.builds(ast.Constant, CONSTANTS) | st.builds(lambda name: ast.Name(name, ast.Load()), st.sampled_from("abc")),
    lambda inner: (
        st.builds(ast.BinOp, inner, st.sampled_from([ast.Add(), ast.Pow(), ast.MatMult()]), inner)
        | st.builds(ast.UnaryOp, st.sampled_from([ast.Not(), ast.USub()]), inner)
        | st.builds(ast.IfExp, inner, inner, inner)
        | st.builds(lambda items: ast.Tuple(items, ast.Load()), st.lists(inner, max_size=3))
        | st.builds(lambda f, args: ast.Call(f, args, []), inner, st.lists(inner, max_size=2))
    ),
    max_leaves=8,
)


@given(EXPRESSIONS, EXPRESSIONS)
def test_fingerprints_are_equal_exactly_where_the_trees_are(first: ast.expr, second: ast.expr) -> None:
    one, two = (ast.parse(ast.unparse(tree), mode="eval") for tree in (first, second))
    assert (fingerprint(one) == fingerprint(two)) == (ast.dump(one) == ast.dump(two))
    spread = ast.parse(f"(  # comment\n\n {ast.unparse(one)}\n)", mode="eval")
    assert fingerprint(spread) == fingerprint(one)


def test_definitions_are_found_by_qualified_name() -> None:
    tree = ast.parse("class A:\n class B:\n  def f(self): pass\n def f(self): pass\ndef f(): pass\nasync def g(): pass")
    lines = {
        name: getattr(find_definition(tree, name), "lineno", None) for name in ("A", "A.B", "A.B.f", "A.f", "f", "g")
    }
    assert lines == {"A": 1, "A.B": 2, "A.B.f": 3, "A.f": 4, "f": 5, "g": 6}
    assert [find_definition(tree, name) for name in ("B", "B.f", "A.g", "f.x", "A.f.x", "", "A.", "os")] == [None] * 8


def test_the_last_definition_wins() -> None:
    source = "class A:\n def f(self): return 1\n def f(self): return 2\ndef g(): pass\nclass g: pass\n"
    assert definition(source, "A.f").lineno == 3
    assert isinstance(definition(source, "g"), ast.ClassDef)
    assert find_definition(ast.parse("class A:\n def f(self): pass\nclass A: pass"), "A.f") is None


@pytest.mark.parametrize(
    "head",
    [
        "if x:",
        "try:\n pass\nexcept E:",
        "try:\n pass\nfinally:",
        "with x:",
        "for i in x:",
        "if x:\n pass\nelse:",
        "match x:\n case 1:",
    ],
)
def test_definitions_inside_a_statement_are_found(head: str) -> None:
    source = f"{head}\n  class A:\n   if y:\n    def f(self): pass"
    node = find_definition(ast.parse(source), "A.f")
    assert node is not None and node.name == "f"


def test_definitions_inside_a_function_are_not_found() -> None:
    tree = ast.parse("def outer():\n def inner(): pass")
    assert find_definition(tree, "inner") is None and find_definition(tree, "outer.inner") is None


@pytest.mark.parametrize(
    ("signature", "parameters"),
    [
        ("", ()),
        ("self, x, t=0", ("self", "x", "t")),
        ("self, x, *, y: int = 1", ("self", "x", "*", "y")),
        ("a, /, b", ("a", "/", "b")),
        ("*args, **kwargs", ("*args", "**kwargs")),
        ("a, /, b=1, *rest, c, d=2, **more", ("a", "/", "b", "*rest", "c", "d", "**more")),
    ],
)
def test_parameters_are_named_in_order(signature: str, parameters: tuple[str, ...]) -> None:
    assert parameters_of(definition(f"def f({signature}): pass", "f")) == parameters
    assert parameters_of(definition(f"class A:\n def __init__({signature}): pass", "A")) == parameters


def test_class_without_constructor_has_no_parameters() -> None:
    assert parameters_of(definition("class A(B):\n def f(self, x): pass", "A")) == ()


@pytest.mark.parametrize(
    ("source", "encoding"),
    [
        ("def f(): return 'ä'\n", "utf-8"),
        ("def f(): return 'ä'\n", "utf-8-sig"),
        ("# -*- coding: latin-1 -*-\ndef f(): return 'ä'\n", "latin-1"),
        ("def f():\r\n    return 'ä'\r\n", "utf-8"),
    ],
)
def test_encoding_of_the_file_does_not_count(tmp_path: Path, source: str, encoding: str) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(source.encode(encoding))
    node = find_definition(read_tree(path), "f")
    assert node is not None and fingerprint(node) == print_of("def f(): return 'ä'", "f")


@pytest.mark.parametrize("content", [b"def f(:\n", b"x = '\xff'\n", b"# coding: klingon\n", b"x = 1\0\n"])
def test_file_that_is_no_python_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.py").write_bytes(content)
    with pytest.raises(HostChangedError, match=r"model\.py: expected Python source, got \w+Error"):
        read_tree(tmp_path / "model.py")
    with pytest.raises(HostChangedError, match="Python source"):
        inspect_point(tmp_path, point())


def test_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(HostNotFoundError, match=f"{path.name}: expected a readable file"):
            read_tree(path)


def test_known_source_names_its_commit(root: Path) -> None:
    prints = {"0000000": "0" * 64, "abc1234": print_of(MODEL), "def5678": print_of(MODEL)}
    points = [point(fingerprints=prints), point("sample"), point("Model")]
    findings = verify_points(root, points)
    assert [one.status for one in findings] == ["known"] * 3
    assert [one.commit for one in findings] == ["abc1234"] * 3
    assert [one.point for one in findings] == points
    assert findings[0].path == root / "model.py" and findings[0].fingerprint == print_of(MODEL)
    assert findings[2].parameters == ("self", "width", "*", "depth")


def test_changed_body_is_refused_unless_allowed(root: Path) -> None:
    changed = point(fingerprints={"abc1234": "0" * 64, "def5678": "1" * 64})
    with pytest.raises(HostChangedError) as error:
        verify_points(root, [point("sample"), changed])
    for part in (
        str(root / "model.py"),
        "Model.forward",
        "abc1234 or def5678",
        print_of(MODEL)[:12],
        f"'vrpo check {root}'",
        "allow_unverified=True (VRPO_ALLOW_UNVERIFIED=1)",
    ):
        assert part in str(error.value)
    findings = verify_points(root, [point("sample"), changed], allow_unverified=True)
    assert [(one.status, one.commit) for one in findings] == [("known", "abc1234"), ("changed", None)]


@pytest.mark.parametrize("allow_unverified", [False, True])
def test_changed_signature_is_always_refused(root: Path, allow_unverified: bool) -> None:
    changed = point(parameters=("self", "x", "s"))
    body = point("sample", fingerprints={"abc1234": "0" * 64})
    assert inspect_point(root, changed).status == "signature"
    with pytest.raises(HostChangedError) as error:
        verify_points(root, [body, changed], allow_unverified=allow_unverified)
    for part in ("Model.forward", "(self, x, s) as in commit abc1234", "got (self, x, t, y)", "does not waive"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("expected", "there", "appended"),
    [
        ("self x", "self, x, y=None", True),
        ("self x", "self, x, y=None, *, z=1, **more", True),
        ("self x **more", "self, x, y=None, **more", True),
        ("self x *args **more", "self, x, *args, z=1, **more", True),
        ("self x", "self, x, y", False),
        ("self x", "self, x, *, z", False),
        ("self x", "self, y=None, x=None", False),
        ("self x y", "self, x, z=0, y=None", False),
        ("self x *args", "self, x, y=None, *args", False),  # a second argument by place would be y
        ("self x y", "self, x", False),
        ("self x y", "self, y, x", False),
    ],
)
def test_appended_parameters_with_defaults_can_be_waived(
    tmp_path: Path, expected: str, there: str, appended: bool
) -> None:
    """They take every call that the known version takes."""
    (tmp_path / "a.py").write_text(f"class A:\n    def __init__({there}): pass\n", "utf-8")
    for name in ("A.__init__", "A"):
        wanted = SourcePoint("a.py", name, tuple(expected.split()), {"abc1234": "0" * 64})
        assert inspect_point(tmp_path, wanted).status == ("changed" if appended else "signature")
        waived = "more parameters, which have defaults .*allow_unverified=True" if appended else "does not waive"
        with pytest.raises(HostChangedError, match=waived):
            verify_points(tmp_path, [wanted])
        if appended:
            assert verify_points(tmp_path, [wanted], allow_unverified=True)[0].commit is None


def test_the_command_that_an_error_suggests_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "my host"
    folder.mkdir()
    (folder / "model.py").write_text(MODEL, "utf-8")
    with pytest.raises(HostChangedError, match=f"run 'vrpo check '.*{folder}''"):
        verify_points(folder, [point(fingerprints={"abc1234": "0" * 64})])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("Model.forwards", "nearest is Model.forward."),
        ("Modle.forward", "nearest is Model."),
        ("simple", "nearest is sample."),
        ("Models.forward", "nearest is Model."),  # not Modelss, which is a function
        ("Model.forward.x", None),
        ("zzz", None),
    ],
)
def test_missing_definition_names_the_nearest(root: Path, name: str, nearest: str | None) -> None:
    (root / "model.py").write_text(MODEL + "\ndef Modelss(): pass\n", "utf-8")
    missing = SourcePoint("model.py", name, (), {"abc1234": "0" * 64})
    with pytest.raises(HostNotFoundError) as error:
        verify_points(root, [point(fingerprints={}), missing], allow_unverified=True)
    message = str(error.value)
    assert message.startswith(f"{root / 'model.py'}: {name}: expected it as in commit abc1234, got no such definition")
    assert (nearest in message) if nearest else ("nearest" not in message)


def test_missing_file_is_refused_with_the_name(root: Path) -> None:
    missing = point(file="models/sit.py")
    finding = inspect_point(root, missing)
    assert (finding.status, finding.commit, finding.parameters, finding.fingerprint) == ("missing", None, (), "")
    with pytest.raises(HostNotFoundError) as error:
        verify_points(root, [point(), missing])
    assert str(error.value).startswith(f"{root / 'models' / 'sit.py'}: Model.forward: expected")
    assert "got no readable file" in str(error.value)


DEEP = {
    "codec": b"# coding: rot13\n",
    "sum": b"a" + b"+a" * 50000,
    "attribute": b"class A:\n def f(s):\n  a" + b".a" * 3000,
}


@pytest.mark.parametrize("source", DEEP.values(), ids=DEEP.keys())
def test_source_that_cannot_be_followed_is_refused(tmp_path: Path, source: bytes) -> None:
    (tmp_path / "a.py").write_bytes(source)
    with pytest.raises(HostChangedError, match="expected Python source, got"):
        inspect_point(tmp_path, SourcePoint("a.py", "A.f", ("s",), {}))


def test_a_pipe_is_no_readable_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.py")
    with pytest.raises(HostNotFoundError, match="something else than a file"):
        read_tree(tmp_path / "a.py")

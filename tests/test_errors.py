import ast
import pickle
from pathlib import Path

import pytest

import vrpo_plugin
from vrpo_plugin import errors
from vrpo_plugin.errors import ConfigError, VRPOError

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and value.__module__ == errors.__name__]


PARTS = {"expected", "got", "do"}


def bare_messages(source: str) -> list[int]:
    """Lines that build an error of this package from anything but a subject and the three parts."""
    names = {cls.__name__ for cls in CLASSES}
    lines = []
    for node in ast.walk(ast.parse(source)):
        made = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
        if made and (len(node.args) != 1 or {keyword.arg for keyword in node.keywords} != PARTS):
            lines.append(node.lineno)
    return lines


def test_message_has_three_parts() -> None:
    error = ConfigError("rewards", expected="(..., G=4)", got=(8, 3), do="Pass one reward per action.")
    assert str(error) == "rewards: expected (..., G=4), got (8, 3). Pass one reward per action."
    with pytest.raises(TypeError):
        ConfigError("rewards", expected="another")


def test_every_message_of_the_package_has_three_parts() -> None:
    root = Path(vrpo_plugin.__file__).parent
    found = {str(path.relative_to(root)): bare_messages(path.read_text("utf-8")) for path in root.rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_bare_message_is_found() -> None:
    right = "raise ConfigError('a', expected=1, got=2, do='b')"
    assert bare_messages(f'raise ConfigError("no")\n{right}\nraise ShapeError()') == [1, 3]


def test_errors_are_also_what_their_callers_catch() -> None:
    kinds = {cls.__name__: cls.__mro__[1:] for cls in CLASSES}
    for name in ("ConfigError", "ShapeError", "DataError"):
        assert ValueError in kinds[name]
    assert FileNotFoundError in kinds["WeightsNotFoundError"]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_is_public_and_survives_a_worker_process(cls: type[Exception]) -> None:
    assert issubclass(cls, VRPOError)
    assert getattr(vrpo_plugin, cls.__name__) is cls and cls.__name__ in vrpo_plugin.__all__
    copy = pickle.loads(pickle.dumps(cls("a: expected b, got c. Do d.")))
    assert type(copy) is cls and str(copy) == "a: expected b, got c. Do d."

"""Dataclasses from files and flags, in three kinds of mistakes: the key, the kind of the value, the file."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.settings import add_flags, build, check_kinds, read_mapping


@dataclass(frozen=True)
class Inner:
    steps: tuple[int, ...]
    span: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    rate: float = 0.5
    count: int | None = None
    flag: bool = False
    solver: Literal["euler", "heun"] = "euler"
    share: Literal["equal"] | tuple[tuple[str, float], ...] = "equal"
    blocks: Literal["early"] | tuple[int, ...] = "early"
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


PLAIN: dict[str, Any] = {"name": "a", "inner": {"steps": [1, 2], "span": [0, "5e-1"]}, "rate": "1e-4", "blocks": [3]}


def test_plain_data_becomes_the_dataclass() -> None:
    built = build(Outer, PLAIN | {"methods": {"vrpo": {"x": [1]}}}, "recipe")
    assert built == Outer("a", Inner((1, 2), (0.0, 0.5)), 1e-4, blocks=(3,), methods={"vrpo": {"x": [1]}})
    assert isinstance(built.inner.span[0], float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "b"}, "recipe key: expected .*got 'nam'. Did you mean 'name'"),
        ({"inner": {}}, "recipe: inner: expected steps, got nothing. Add it"),
        ({"inner": None}, "recipe: inner: expected steps, got nothing. Add it"),
        ({"inner": [1]}, r"recipe: inner: expected key: value lines, got \[1\]"),
        ({"inner": {"steps": [1, 2.5]}}, "recipe: inner: steps: expected int, got 2.5"),
        ({"inner": {"steps": [1], "span": [0]}}, r"span: expected 2 values, got \[0\]"),
        ({"rate": "fast"}, "recipe: rate: expected a number, got 'fast'"),
        ({"rate": float("nan")}, "recipe: rate: expected a finite number, got nan"),
        ({"rate": True}, "recipe: rate: expected a finite number, got True"),
        ({"count": "1"}, "recipe: count: expected int or None, got '1'"),
        ({"count": True}, "recipe: count: expected int or None, got True"),
        ({"flag": 1}, "recipe: flag: expected bool, got 1"),
        ({"solver": "rk4"}, "recipe: solver: expected one of euler, heun, got 'rk4'"),
        ({"methods": {"vrpo": None}}, "recipe: methods: vrpo: expected key: value lines, got None"),
    ],
)
def test_a_mistake_is_named_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Outer, PLAIN | change, "recipe")


def test_values_given_in_python_are_checked_likewise() -> None:
    check_kinds(Outer("a", Inner((1,))))
    with pytest.raises(ConfigError, match=r"^count: expected int or None, got 2\.0"):
        check_kinds(Outer("a", Inner((1,)), count=2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.json", "a.yaml"])
def test_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"rate": 1e-05}))
    assert float(read_mapping(tmp_path / name)["rate"]) == 1e-05
    for content, message in ((b"[", "expected a recipe, got"), (b"\xff", "expected a recipe"), (b"[1]", "key: value")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_mapping(tmp_path / name, "a recipe")
    with pytest.raises(ConfigError, match="No such file"):
        read_mapping(tmp_path / f"none-{name}")


def test_an_empty_yaml_file_has_no_keys(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert read_mapping(tmp_path / "a.yaml") == {}


@dataclass(frozen=True)
class Flags:
    rate: float = field(default=0.5, metadata={"help": "of the optimizer"})
    count: int | None = None
    flag: bool = False
    share: Literal["equal"] | tuple[tuple[str, float], ...] = "equal"
    blocks: Literal["early"] | tuple[int, ...] = "early"
    names: tuple[str, ...] = ()


def test_flags_hold_only_what_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Flags)
    assert vars(parser.parse_args([])) == {}
    given = ["--rate", "1e-3", "--count", "2", "--no-flag", "--share", "a=1,b=0.5", "--blocks", "1,2", "--names", "a,b"]
    expected = {"rate": 1e-3, "count": 2, "flag": False, "share": {"a": 1.0, "b": 0.5}, "blocks": (1, 2)}
    assert vars(parser.parse_args(given)) == expected | {"names": ("a", "b")}
    words = vars(parser.parse_args(["--share", "equal", "--blocks", "early"]))
    assert words == {"share": "equal", "blocks": "early"}
    assert "of the optimizer (default: 0.5)" in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args(["--blocks", "one"])
    assert "--blocks: invalid comma_list value: 'one'" in capsys.readouterr().err

"""Settings are dataclasses: built from files and flags, with the kind of every value checked against its annotation."""

import argparse
import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vrpo_plugin.config import check_keys, describe_fields
from vrpo_plugin.errors import ConfigError

T = TypeVar("T")
SCALARS = (bool, int, float, str)
LINES = "Write one 'key: value' a line, or JSON."


def read_mapping(path: str | Path, what: str = "a YAML or JSON file") -> dict[str, Any]:
    """The keys and values of a YAML or JSON file; an empty file has none.

    Raises:
        ConfigError: the file is missing, cannot be parsed, or is no mapping.
    """
    path = Path(path)
    load: Callable[[str], Any] = json.loads
    errors: tuple[type[Exception], ...] = (OSError, ValueError)
    if path.suffix != ".json":
        import yaml

        load, errors = yaml.safe_load, (*errors, yaml.YAMLError)
    try:
        content = load(path.read_text(encoding="utf-8"))
    except errors as error:
        raise ConfigError(str(path), expected=what, got=" ".join(str(error).split()), do=LINES) from error
    return _mapping({} if content is None else content, str(path), what)


def build(kind: type[T], values: object, subject: str) -> T:
    """A dataclass from plain data; a field that is a dataclass is built likewise.

    Args:
        kind: the dataclass.
        values: a mapping from field to value, as YAML and JSON give them.
        subject: where they come from, for messages.

    Raises:
        ConfigError: a key is unknown or missing, or a value is not of its field's kind.
    """
    values, hints = _mapping(values, subject), get_type_hints(kind)
    check_keys(values, hints, subject=subject)
    required = (f.name for f in fields(kind) if f.default is f.default_factory is MISSING)  # type: ignore[arg-type]
    if missing := [name for name in required if name not in values]:
        raise ConfigError(subject, expected=", ".join(missing), got="nothing", do="Add it.")
    return kind(**{key: convert(value, hints[key], f"{subject}: {key}") for key, value in values.items()})


def convert(value: Any, hint: Any, subject: str) -> Any:
    """A value of YAML or JSON, as its annotation wants it: lists to tuples, whole numbers and ``1e-4`` to float.

    Raises:
        ConfigError: it is of another kind.
    """
    kinds = _alternatives(hint)
    for kind in kinds:
        inner = get_args(kind)
        if is_dataclass(kind):
            return build(kind, {} if value is None else value, subject)  # type: ignore[arg-type]
        if get_origin(kind) is Mapping:
            return {key: convert(one, inner[1], f"{subject}: {key}") for key, one in _mapping(value, subject).items()}
        if get_origin(kind) is tuple and isinstance(value, list):
            inner = (inner[0],) * len(value) if inner[-1] is ... else inner
            if len(inner) != len(value):
                raise ConfigError(subject, expected=f"{len(inner)} values", got=value, do="Correct it.")
            return tuple(convert(one, of, subject) for one, of in zip(value, inner, strict=True))
    if float in kinds and int not in kinds and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML 1.1 reads 1e-4 as a string
        except ValueError as error:
            raise ConfigError(subject, expected="a number", got=repr(value), do="Correct it.") from error
    check_kind(value, hint, subject)
    return value


def check_kinds(settings: Any) -> None:
    """Checks every value of a dataclass, wherever it comes from: None and NaN pass no comparison, or every one.

    Raises:
        ConfigError: a value is not of its field's kind.
    """
    for name, hint in get_type_hints(type(settings)).items():
        check_kind(getattr(settings, name), hint, name)


def check_kind(value: Any, hint: Any, subject: str) -> None:
    """Checks a value against an annotation of bool, int, float, str, None and Literal; others pass.

    Raises:
        ConfigError: it is of another kind, or not finite.
    """
    kinds = _alternatives(hint)
    if not all(kind in (*SCALARS, type(None)) or get_origin(kind) is Literal for kind in kinds):
        return
    if not any(_fits(value, kind) for kind in kinds):
        choices = ", ".join(map(str, _choices(hint)))
        names = {float: "a finite number", type(None): "None"}
        others = [names.get(kind, kind.__name__) for kind in kinds if get_origin(kind) is not Literal]
        expected = " or ".join([f"one of {choices}"] * bool(choices) + others)
        raise ConfigError(subject, expected=expected, got=repr(value), do="Correct it.")


def add_flags(group: Any, kind: type) -> None:
    """Adds one command-line option per field of a dataclass, without defaults: what is not given hides no recipe.

    A field without a default is a required option.

    Args:
        group: an ``argparse`` parser or a group of one.
        kind: the dataclass; ``metadata["help"]`` of a field is its text, or what its docstring says of the field.
    """
    hints = get_type_hints(kind)
    described = {name: text for own in describe_fields(kind).values() for name, text in own.items()}
    for f in fields(kind):
        hint, text = (
            hints[f.name],
            f.metadata.get("help", described.get(f.name, "").replace("%", "%%").replace("``", "")),
        )
        kwargs: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS}
        if f.default is MISSING:
            kwargs |= {"help": text, "required": True}
        else:
            kwargs["help"] = f"{text} (default: {f.default})".strip()
        alternatives = _alternatives(hint)
        lists = [part for part in alternatives if get_origin(part) is tuple]
        if hint is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif lists:
            pairs = get_origin(get_args(lists[0])[0]) is tuple
            kwargs |= {"type": _list_parser(lists[0], _choices(hint)), "metavar": "A=W,B=W" if pairs else "A,B"}
        elif choices := _choices(hint):
            kwargs["choices"] = choices
        else:
            plain = next(part for part in alternatives if part in SCALARS)
            kwargs |= {"type": plain, "metavar": plain.__name__.upper()}
        group.add_argument("--" + f.name.replace("_", "-"), **kwargs)


def _list_parser(kind: Any, words: list[str]) -> Any:
    inner = get_args(kind)[0]

    def comma_list(text: str) -> Any:
        if text in words:
            return text
        if get_origin(inner) is not tuple:
            return tuple(inner(part) for part in text.split(","))
        name_kind, share_kind = get_args(inner)
        if "=" not in text:
            return text
        return {name_kind(name): share_kind(share) for name, share in (part.split("=") for part in text.split(","))}

    return comma_list


def _mapping(content: object, subject: str, what: str = "key: value lines") -> dict[str, Any]:
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        got = repr(content)[:200]
        raise ConfigError(subject, expected=what, got=got, do=LINES)
    return dict(content)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _choices(hint: Any) -> list[Any]:
    return [choice for part in _alternatives(hint) if get_origin(part) is Literal for choice in get_args(part)]


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)

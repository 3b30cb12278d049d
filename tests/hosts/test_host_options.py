"""Settings of an application: where they come from, what text becomes, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from vrpo_plugin import VRPOConfig
from vrpo_plugin.errors import ConfigError
from vrpo_plugin.hosts.options import FLAGS, KEYS, HostOptions, parse_value, resolve_settings

DEFAULTS = (VRPOConfig(), HostOptions())


def value_of(key: str, **sources: Any) -> Any:
    config, options = resolve_settings(**{"environ": {}, **sources})
    return getattr(options if hasattr(options, key) else config, key)


def write(folder: Path, values: Any, kind: str) -> Path:
    path = folder / f"settings.{kind}"
    path.write_text(json.dumps(values) if kind == "json" else yaml.safe_dump(values))
    return path


# ---- precedence ----


def test_nothing_given_is_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("VRPO_")]:
        monkeypatch.delenv(name)
    assert resolve_settings() == DEFAULTS
    assert (
        resolve_settings(environ={"OTHER": "1", "VRPO_HOST": "sit", "VRPO_TEST_X": "1", "VRPO_CONFIG": ""}) == DEFAULTS
    )


@pytest.mark.parametrize("kind", ["yaml", "yml", "json"])
@pytest.mark.parametrize(
    ("key", "values"),
    [("reward_coeff", (0.1, 0.2, 0.3)), ("log_every", (1, 2, 3)), ("features", ("none", "host", "policy"))],
)
def test_what_is_given_goes_before_the_environment_and_that_before_the_file(
    kind: str, key: str, values: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    file, environ = write(tmp_path, {key: values[0]}, kind), {f"VRPO_{key.upper()}": str(values[1])}
    given = {key: str(values[2])}
    assert value_of(key, file=file) == values[0]
    assert value_of(key, file=file, environ=environ) == values[1]
    assert value_of(key, file=file, environ=environ, given=given) == values[2]
    assert value_of(key, file=file, given=given) == values[2]
    assert value_of(key, given={key: values[2]}) == values[2]


def test_each_key_by_itself_and_the_process_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, other = tmp_path / "named.json", tmp_path / "other.json"
    named.write_text('{"reward_coeff": 0.1, "actions": 4, "log_every": 5}')
    other.write_text('{"reward_coeff": 0.7}')
    for name in [name for name in os.environ if name.startswith("VRPO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VRPO_CONFIG", str(named))
    monkeypatch.setenv("VRPO_ACTIONS", "6")
    settings = resolve_settings({"proj_coeff": 1.5})
    assert settings == (VRPOConfig(reward_coeff=0.1, actions=6, proj_coeff=1.5), HostOptions(log_every=5))
    # A file that is named in the call stands for VRPO_CONFIG's, and does not add to it.
    assert resolve_settings(file=other) == (VRPOConfig(reward_coeff=0.7, actions=6), HostOptions())


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_file_can_hold_every_key(kind: str, tmp_path: Path) -> None:
    config = VRPOConfig(reward_weights={"semantic": 1, "perceptual": 3}, layers=(2, 4), critic_checkpoint="c.pt")
    options = HostOptions(encoder="a", encoder_checkpoint="b", compat=("resume", "sit_s"), allow_unverified=True)
    values = config.to_dict() | {
        "compat": ["resume", "sit_s"],
        "allow_unverified": True,
        "log_every": 100,
        "max_skipped_steps": 100,
        "fused_optimizer": False,
        "compile": False,
    }
    values |= {"encoder": "a", "encoder_checkpoint": "b"}
    assert values.keys() == KEYS
    assert resolve_settings(file=write(tmp_path, values, kind), environ={}) == (config, options)


# ---- text ----

TEXTS = [
    ("reward_coeff", "0.25", 0.25),
    ("reward_coeff", "1e-3", 1e-3),
    ("reward_coeff", "2", 2),
    ("action_std", "1e-8", 1e-8),
    ("actions", "6", 6),
    ("critic_trainable", "true", True),
    ("allow_unverified", "true", True),
    ("allow_unverified", "True", True),
    ("allow_unverified", "FALSE", False),
    ("allow_unverified", "1", True),  # as the refusal of a changed host advises
    ("allow_unverified", "0", False),
    ("critic_checkpoint", "null", None),
    ("critic_checkpoint", "none", None),
    ("encoder_checkpoint", "None", None),
    ("critic_checkpoint", "/data/critic.safetensors", "/data/critic.safetensors"),
    ("critic_checkpoint", "runs/lr=0.1,seed=3/critic.safetensors", "runs/lr=0.1,seed=3/critic.safetensors"),
    ("encoder_checkpoint", "a=1/b.pt", "a=1/b.pt"),
    ("encoder_checkpoint", "123", "123"),
    ("encoder_checkpoint", "one.pt,two.pt", "one.pt,two.pt"),
    ("encoder", "dinov2-vit-b, clip-vit-L", "dinov2-vit-b, clip-vit-L"),
    ("features", "none", "none"),
    ("release", " none ", "none"),
    ("layers", "early", "early"),
    ("layers", "4", (4,)),
    ("layers", "2,4", (2, 4)),
    ("layers", "[2, 4]", (2, 4)),
    ("rewards", "semantic", ("semantic",)),
    ("rewards", "semantic, perceptual", ("semantic", "perceptual")),
    ("rewards", '["fidelity"]', ("fidelity",)),
    ("reward_weights", "inverse_variance", "inverse_variance"),
    ("reward_weights", "semantic=0.25, perceptual=0.75", (("perceptual", 0.75), ("semantic", 0.25))),
    ("reward_weights", '{"semantic": 1}', (("semantic", 1),)),
    ("compat", "none", "none"),
    ("compat", "all", "all"),
    ("compat", "resume", ("resume",)),
    ("compat", "resume,sit_s", ("resume", "sit_s")),
]


@pytest.mark.parametrize(("key", "text", "value"), TEXTS)
def test_text_means_the_same_in_every_source(key: str, text: str, value: Any, tmp_path: Path) -> None:
    more = {"critic_checkpoint": "c"} if key == "critic_trainable" else {}
    sources = [
        {"given": {key: text, **more}},
        {"environ": {f"VRPO_{key.upper()}": text, **{f"VRPO_{k.upper()}": v for k, v in more.items()}}},
        {"file": write(tmp_path, {key: text, **more}, "json")},
        {"file": write(tmp_path, {key: text, **more}, "yaml")},
    ]
    for source in sources:
        found = value_of(key, **source)
        assert (found, type(found)) == (value, type(value)), source


def test_yaml_as_people_write_it(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    lines = [
        "action_std: 1e-8",
        "features: none",
        "layers: [2, 4]",
        "critic_checkpoint: ~",
        "critic_trainable: yes",
    ]
    path.write_text("\n".join([*lines, "reward_weights: {semantic: 0.5, perceptual: 0.5}", "rewards:", "  - semantic"]))
    expected = VRPOConfig(
        action_std=1e-8,
        features="none",
        layers=(2, 4),
        reward_weights={"semantic": 0.5, "perceptual": 0.5},
        rewards=("semantic",),
    )
    assert resolve_settings(file=path, environ={}) == (expected, HostOptions())


def test_plain_words_and_flags() -> None:
    assert parse_value("a-word") == "a-word"
    assert parse_value("a=1,b=x") == {"a": 1, "b": "x"}
    assert {"critic_trainable", "fallback", "allow_unverified", "fused_optimizer", "compile"} == FLAGS


# ---- objects ----


def test_encoders_in_code_are_a_path_or_several(tmp_path: Path) -> None:
    assert HostOptions(encoder_checkpoint=tmp_path).encoder_checkpoint == str(tmp_path)
    several = HostOptions(encoder=["a", "b"], encoder_checkpoint=("x.pt", tmp_path))
    assert (several.encoder, several.encoder_checkpoint) == ("a,b", f"x.pt,{tmp_path}")
    assert HostOptions(compat=["resume"]) == HostOptions(compat="resume") == HostOptions(compat=("resume",))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        *(("allow_unverified", value, "expected True or False, got") for value in ("yes", 1, None)),
        *(("log_every", value, "expected an int >= 0, got") for value in (-1, True, 1.5, "many", None)),
        *(("encoder", value, "expected a name, or several") for value in (3, True)),
        ("fused_optimizer", "yes", "expected True or False, got"),
        ("encoder_checkpoint", 3, "expected a name, or several"),
    ],
)
def test_options_of_the_wrong_kind(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: {expected}.*Correct it"):
        HostOptions(**{key: value})


# ---- errors ----


@pytest.mark.parametrize(("typed", "meant"), [("reward_coef", "reward_coeff"), ("allow_unverifed", "allow_unverified")])
def test_an_unknown_key_is_named_with_its_source_and_the_nearest(typed: str, meant: str, tmp_path: Path) -> None:
    nearest = rf"VRPO setting key: expected one of .*, got '{typed}'\. Did you mean '{meant}'\?"
    for kind in ("yaml", "json"):
        file = write(tmp_path, {typed: 1}, kind)
        with pytest.raises(ConfigError, match=rf"^{file}: {nearest}"):
            resolve_settings(file=file, environ={})
        with pytest.raises(ConfigError, match=rf"^{file}: {nearest}"):
            resolve_settings(environ={"VRPO_CONFIG": str(file)})
    with pytest.raises(ConfigError, match=rf"^environment: {nearest}"):
        resolve_settings(environ={f"VRPO_{typed.upper()}": "1"})
    with pytest.raises(ConfigError, match=rf"^given: {nearest}"):
        resolve_settings({typed: 1}, environ={})


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("reward_coeff", "much", "reward_coeff: expected a finite float >= 0, got 'much'"),
        ("reward_coeff", "-1", "reward_coeff: expected a finite float >= 0, got -1"),
        ("reward_coeff", "NaN", "reward_coeff: expected a finite float >= 0, got nan"),
        ("actions", "4.5", r"actions: expected a finite int >= 0, got 4\.5"),
        ("critic_trainable", "maybe", "critic_trainable: expected True or False, got 'maybe'"),
        ("allow_unverified", "2", "allow_unverified: expected True or False, got 2"),
        ("log_every", "often", "log_every: expected an int >= 0, got 'often'"),
        ("features", "ours", "features: expected one of .*, got 'ours'"),
        ("layers", "true", "layers: expected .* or block numbers from 1, got"),
        ("rewards", "semantics", "rewards: expected names among .*, got 'semantics'"),
        ("reward_weights", "semantic=x", "reward_weights: expected shares >= 0"),
        ("reward_weights", "semantic", "reward_weights: expected .*inverse_variance.*, got 'semantic'"),
    ],
)
def test_values_that_do_not_parse(key: str, text: str, expected: str) -> None:
    for source in ({"given": {key: text}}, {"environ": {f"VRPO_{key.upper()}": text}}):
        with pytest.raises(ConfigError, match=expected):
            value_of(key, **source)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.yaml", None),
        ("list.yaml", "- reward_coeff\n"),
        ("word.yaml", "reward_coeff"),
        ("broken.yaml", "a: [1\n"),
        ("number.yaml", "1: 2\n"),
        ("list.json", "[1]"),
        ("broken.json", "{"),
        ("yaml.json", "reward_coeff: 1"),
        ("bytes.yaml", b"\xff\xfe\x00"),
        ("folder", "/"),
    ],
)
def test_a_file_that_is_no_mapping_of_settings(name: str, content: str | bytes | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if content == "/":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    for source in ({"file": path, "environ": {}}, {"environ": {"VRPO_CONFIG": str(path)}}):
        with pytest.raises(
            ConfigError, match=rf"^{path}: expected a YAML or JSON mapping of VRPO settings, got .* JSON\."
        ):
            resolve_settings(**source)

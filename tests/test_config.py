import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest

from vrpo_plugin.config import BUILTIN_REWARDS, VRPOConfig, check_keys
from vrpo_plugin.errors import ConfigError

OTHER_VALUES: dict[str, Any] = {
    "reward_coeff": 0.0,
    "reward_release_steps": 10,
    "critic_checkpoint": "critic.safetensors",
    "critic_trainable": False,
    "layers": (2, 5),
    "proj_coeff": 1.5,
    "features": "host",
    "projector": "conv",
    "projector_dim": 64,
    "targets": "critic",
    "target_norm": "spatial",
    "release": "stop",
    "release_steps": 100,
    "rewards": ("fidelity", "semantic"),
    "reward_weights": {"semantic": 2, "fidelity": 1.0},
    "scale": "none",
    "reward_release": "stop",
    "reward_floor": 0.5,
    "noise_gate": "cut",
    "noise_gate_end": 0.7,
    "critic_width": 32,
    "actions": 2,
    "action_std": 0.5,
    "action_grid": 0,
    "fallback": False,
    "path_type": "cosine",
}

INVALID = [
    *(
        (name, value)
        for name in ("features", "projector", "release", "noise_gate", "scale")
        for value in ("Host", None, 1)
    ),
    *((name, "other") for name in ("layers", "targets", "target_norm", "path_type", "reward_weights")),
    ("features", ("policy",)),
    ("scale", ["none"]),
    *((f.name, value) for f in fields(VRPOConfig) if type(f.default) is float for value in (-0.1, math.nan, math.inf)),
    *(
        (f.name, value)
        for f in fields(VRPOConfig)
        if type(f.default) is float
        for value in ("0.5", None, True, 10**400)
    ),
    *((f.name, value) for f in fields(VRPOConfig) if type(f.default) is int for value in (-1, 1.0, "8", True)),
    *((name, 0) for name in ("projector_dim", "critic_width")),
    *((name, 0.0) for name in ("action_std", "noise_gate_end")),
    *((name, 1.01) for name in ("noise_gate_end", "reward_floor")),
    ("noise_gate", "late"),
    ("actions", 1),
    ("critic_trainable", 1),
    ("critic_trainable", "yes"),
    ("critic_checkpoint", 3),
    ("rewards", "semantic"),
    ("rewards", None),
    ("rewards", ("semantic", "beauty")),
    ("rewards", ("semantic", "semantic")),
    ("rewards", [["semantic"]]),
    ("layers", ()),
    ("layers", (0,)),
    ("layers", (1.0,)),
    ("layers", (True,)),
    ("layers", 3),
    ("layers", [[1]]),
    ("reward_weights", {}),
    ("reward_weights", {"semantic": 0.0, "perceptual": 0.0}),
    ("reward_weights", {"semantic": -1.0, "perceptual": 2.0}),
    ("reward_weights", {"semantic": math.nan}),
    ("reward_weights", {"semantic": math.inf}),
    ("reward_weights", {"semantic": "half"}),
    ("reward_weights", {"semantic": 10**400}),
    ("reward_weights", {"semantic": 1.7e308, "perceptual": 1.7e308}),
    ("reward_weights", {1: 0.5}),
    ("reward_weights", (("semantic", 1.0), ("semantic", 2.0))),
    ("reward_weights", ("semantic", "perceptual")),
    ("reward_weights", [0.5, 0.5]),
    ("reward_weights", None),
    ("reward_weights", 1.0),
]


def test_the_other_values_cover_every_field_and_differ_from_the_defaults() -> None:
    assert list(OTHER_VALUES) == [f.name for f in fields(VRPOConfig)]
    assert not [f.name for f in fields(VRPOConfig) if OTHER_VALUES[f.name] == f.default]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("critic_witdh", "critic_width"), ("proj_coef", "proj_coeff"), ("reward_weight", "reward_weights")],
)
def test_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    for build in (lambda values: VRPOConfig(**values), VRPOConfig.from_dict, lambda v: replace(VRPOConfig(), **v)):
        with pytest.raises(ConfigError, match=rf"got '{key}'. Did you mean '{nearest}'\?"):
            build({key: 1})


@pytest.mark.parametrize("values", [None, "scale", ["scale"], 3])
def test_plain_data_that_is_no_mapping_is_a_config_error(values: Any) -> None:
    with pytest.raises(ConfigError, match=r"VRPOConfig\.from_dict: expected a mapping"):
        VRPOConfig.from_dict(values)


def test_a_key_that_is_no_text_is_unknown() -> None:
    with pytest.raises(ConfigError, match=r"VRPOConfig key: expected .*, got 3\."):
        VRPOConfig.from_dict({3: 1})  # type: ignore[dict-item]


def test_unknown_key_without_a_neighbour_is_to_be_removed() -> None:
    with pytest.raises(ConfigError, match=r"VRPOConfig key: expected one of action_grid, .*got 'xyzzy'. Remove it\."):
        VRPOConfig(xyzzy=1)  # type: ignore[call-arg]


def test_check_keys_passes_what_is_known() -> None:
    check_keys(["a", "b"], iter(["b", "a", "c"]), subject="recipe")
    with pytest.raises(ConfigError, match=r"recipe key: expected one of alpha, beta, got 'alpah'.*'alpha'"):
        check_keys(["beta", "alpah"], iter(["beta", "alpha"]), subject="recipe")


@pytest.mark.parametrize(("name", "value"), INVALID, ids=lambda x: str(x)[:40])
def test_invalid_value_is_a_config_error_that_names_its_field(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: expected .*, got ") as caught:
        VRPOConfig(**{name: value})
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"release": "linear"}, "release_steps: expected >= 1 with release='linear', got 0"),
        ({"release": "stop"}, "release_steps: expected >= 1 with release='stop', got 0"),
        ({"reward_release": "stop"}, "reward_release_steps: expected >= 1 with reward_release='stop', got 0"),
        ({"critic_trainable": False}, "critic_checkpoint: expected a file .*got None.*vrpo train-critic"),
    ],
)
def test_contradictions_are_config_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VRPOConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"release": "linear", "release_steps": 1},
        {"scale": "group", "reward_weights": "equal"},
        {"critic_trainable": False, "critic_checkpoint": "critic.safetensors"},
        {"rewards": ()},
        {"reward_coeff": 0, "proj_coeff": 0},
        {"rewards": BUILTIN_REWARDS},
        {"layers": (1,)},
    ],
)
def test_what_does_not_contradict_is_accepted(values: dict[str, Any]) -> None:
    config = VRPOConfig(**values)
    assert {name: getattr(config, name) for name in values if name != "reward_weights"} == {
        name: value for name, value in values.items() if name != "reward_weights"
    }


@pytest.mark.parametrize("values", [{}, OTHER_VALUES, {"layers": "middle"}], ids=["defaults", "others", "middle"])
def test_round_trip_through_json(values: dict[str, Any]) -> None:
    config = VRPOConfig(**values)
    plain = json.loads(json.dumps(config.to_dict()))
    assert list(plain) == [f.name for f in fields(VRPOConfig)]
    assert plain == config.to_dict()
    assert VRPOConfig.from_dict(plain) == config
    assert hash(VRPOConfig.from_dict(plain)) == hash(config)


@pytest.mark.parametrize(
    "weights",
    [
        {"semantic": 0.75, "perceptual": 0.25},
        {"perceptual": 0.25, "semantic": 0.75},
        (("semantic", 0.75), ("perceptual", 0.25)),
        [["semantic", 0.75], ["perceptual", 0.25]],
    ],
)
def test_reward_weights_are_the_same_however_they_are_written(weights: Any) -> None:
    config = VRPOConfig(reward_weights=weights)
    assert config.reward_weights == (("perceptual", 0.25), ("semantic", 0.75))
    assert config.to_dict()["reward_weights"] == {"perceptual": 0.25, "semantic": 0.75}
    assert VRPOConfig.from_dict(config.to_dict()) == config


def test_lists_become_tuples() -> None:
    config = VRPOConfig(rewards=["semantic"], layers=[3, 1])  # type: ignore[arg-type]
    assert config.rewards == ("semantic",) and config.layers == (3, 1)
    hash(config)


def test_a_path_becomes_text() -> None:
    config = VRPOConfig(critic_checkpoint=Path("runs") / "critic.safetensors")  # type: ignore[arg-type]
    assert config.critic_checkpoint == str(Path("runs") / "critic.safetensors")
    assert VRPOConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_field_is_frozen(name: str) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(VRPOConfig(), name, OTHER_VALUES[name])


def test_equal_configurations_are_one_key() -> None:
    assert len({VRPOConfig(), VRPOConfig(proj_coeff=0.5), VRPOConfig(proj_coeff=0.6)}) == 2


def test_copies_and_pickles_are_equal() -> None:
    config = VRPOConfig(**OTHER_VALUES)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_replace_checks_again() -> None:
    assert replace(VRPOConfig(), actions=4).actions == 4
    with pytest.raises(ConfigError, match="actions"):
        replace(VRPOConfig(), actions=0)


def test_settings_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        VRPOConfig("host")  # type: ignore[call-arg]


def test_a_run_gives_its_length_to_the_release_of_the_rewards() -> None:
    config = VRPOConfig(release="linear", release_steps=10).for_run(400)
    assert (config.release_steps, config.reward_release, config.reward_release_steps) == (10, "linear", 100)
    assert VRPOConfig(reward_release_steps=20).for_run(400).reward_release_steps == 20
    for config in (VRPOConfig(reward_release="none"), VRPOConfig(reward_release="stop", reward_release_steps=3)):
        assert config.for_run(400) == config

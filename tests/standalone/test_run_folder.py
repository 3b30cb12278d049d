"""A run's folder refuses another run, and says which options go on with its own."""

import json
from pathlib import Path
from typing import Any

import pytest

from vrpo_plugin import ConfigError
from vrpo_plugin.standalone.run_folder import RunFolder

SETTINGS: dict[str, Any] = {
    "seed": 0,
    "max_train_steps": 12,
    "reward_release_steps": 12,
    "qk_norm": False,
    "exp": None,
    "layers": [2, 4],
    "reward_weights": {"semantic": 0.5, "fidelity": 0.5},
    "data_fingerprint": "0123",
}


def folder(path: Path, *, resume: bool = True, **changed: Any) -> RunFolder:
    return RunFolder(path / "run", {**SETTINGS, **changed}, free={"max_train_steps"}, resume=resume)


def test_extending_a_run_says_which_option_keeps_its_schedule(tmp_path: Path) -> None:
    folder(tmp_path).start()
    longer = {"max_train_steps": 24, "reward_release_steps": 24}
    with pytest.raises(ConfigError, match=r"reward_release_steps: 12 then, 24 now\. Pass --reward-release-steps 12\.$"):
        folder(tmp_path, **longer)
    with pytest.raises(ConfigError, match=r"or pass --resume --reward-release-steps 12 to go on with that run\.$"):
        folder(tmp_path, resume=False, **longer)
    folder(tmp_path, max_train_steps=24)
    with pytest.raises(ConfigError, match=r"or pass --resume to go on with that run\.$"):
        folder(tmp_path, resume=False)


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"qk_norm": True}, "Pass --no-qk-norm."),
        ({"exp": "a"}, "Pass (no --exp)."),
        ({"layers": [3]}, "Pass --layers 2,4."),
        ({"reward_weights": "equal", "seed": 1}, "Pass --seed 0 --reward-weights semantic=0.5,fidelity=0.5."),
        ({"data_fingerprint": "4567"}, "Point --data-dir at the data that the run began with."),
    ],
)
def test_other_settings_are_named_as_options(changed: dict[str, Any], option: str, tmp_path: Path) -> None:
    folder(tmp_path).start()
    with pytest.raises(ConfigError) as caught:
        folder(tmp_path, **changed)
    assert str(caught.value).endswith(option), caught.value


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"got another run's files\. Choose another --exp-name\.$"):
        folder(tmp_path)
    (tmp_path / "run" / "notes.txt").unlink()
    folder(tmp_path).start()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"] == SETTINGS

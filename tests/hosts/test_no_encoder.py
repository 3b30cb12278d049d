"""``targets="critic"`` in patched hosts: no encoder is loaded or run."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.host_folders import FakeHost, critic_file, fake_host
from fakes.hosts import accelerate_loop
from hosts.test_session import host, model_of, on  # noqa: F401  the fixture too

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.hosts import attach

STEPS = {"sit": "--steps", "dit": "--steps", "lightningdit": "--steps"}


def settings_of(folder: Path, **overrides: Any) -> dict[str, Any]:
    return {"targets": "critic", "critic_checkpoint": str(critic_file(folder)), "critic_trainable": False, **overrides}


def refuse(*_: object, **__: object) -> Any:
    raise AssertionError("an encoder was loaded or run")


@pytest.mark.parametrize("name", ["repa", "repa_t2i", "sit", "dit", "lightningdit"])
@pytest.mark.parametrize("overrides", [{}, {"features": "none"}, {"reward_coeff": 0.0}], ids=str)
def test_trains_without_an_encoder(
    name: str,
    overrides: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(accelerate_loop, "load_encoders", refuse)
    monkeypatch.setattr(accelerate_loop.Encoder, "forward_features", refuse)
    monkeypatch.setattr(attach, "load_pixel_targets", refuse)
    caplog.set_level(logging.INFO, "vrpo_plugin")
    with fake_host(name) as host, host.apply(tmp_path, **settings_of(tmp_path, **overrides)) as handle:  # noqa: F811
        run = host.train(STEPS.get(name, "--max-train-steps"), 3, output_dir=str(tmp_path))
        assert all(handle.fired[label] for label in host.spec.must_run)
    assert len(run.logs) == 3 and all(torch.tensor(list(row.values())).isfinite().all() for row in run.logs)
    if name.startswith("repa"):
        assert all(row["proj_loss"] != 0 for row in run.logs) == (overrides.get("features") != "none")
        said = [record.getMessage() for record in caplog.records if "targets=critic" in record.getMessage()]
        assert len(said) == 1 and "the encoder 12 is neither loaded nor run; tokens of (12,) channels" in said[0]


@on("repa")
def test_a_model_of_encoders_that_were_loaded_before_is_refused(host: FakeHost, tmp_path: Path) -> None:  # noqa: F811
    with (
        host.apply(tmp_path, **settings_of(tmp_path)),
        pytest.raises(ConfigError, match=r"load_encoders of utils\.py to be called .*Apply above the script's import"),
    ):
        model_of(host)


@on("repa")
def test_with_the_encoder_as_target_its_loader_is_left_alone(host: FakeHost, tmp_path: Path) -> None:  # noqa: F811
    original = host.module("utils").load_encoders
    with host.apply(tmp_path, **settings_of(tmp_path, targets="encoder")) as handle:
        assert host.module("utils").load_encoders is original and "load_encoders" not in handle.seams
    with host.apply(tmp_path, **settings_of(tmp_path)) as handle:
        assert host.module("utils").load_encoders is not original and "load_encoders" in handle.seams
    assert host.module("utils").load_encoders is original

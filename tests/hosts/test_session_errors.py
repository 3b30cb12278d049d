"""What applying to a host refuses, and what it says."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from fakes.host_folders import (
    PROJECTING,
    ROOT,
    SCRIPTS,
    FakeHost,
    fake_host,
    fake_spec,
    imports_from,
)
from torch import nn

from vrpo_plugin import VRPOConfig, apply_vrpo
from vrpo_plugin.errors import (
    CheckpointError,
    ConfigError,
    HostChangedError,
    HostNotFoundError,
    PatchConflictError,
    VRPOError,
)
from vrpo_plugin.hosts.known import find_spec
from vrpo_plugin.hosts.options import HostOptions
from vrpo_plugin.patching.handle import active_handles

HOSTS = tuple(SCRIPTS)
OTHERS = ("sit", "dit", "lightningdit")


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[FakeHost]:
    """A fake host; after the test's refusals its classes, and those of its packages, hold their own attributes."""
    with fake_host(getattr(request, "param", "repa")) as fake:
        before = attributes(fake)
        yield fake
        assert active_handles() == ()
        changed = [name for name, value in attributes(fake).items() if value is not before[name]]
        assert changed == []


def attributes(host: FakeHost) -> dict[str, Any]:
    owners: list[Any] = [host.model_class, Accelerator, torch.optim.Optimizer, nn.SyncBatchNorm]
    owners += [host.module(host.spec.model.file.removesuffix(".py").replace("/", "."))]
    if host.spec.loss is not None:
        module = host.module(host.spec.loss.file.removesuffix(".py").replace("/", "."))
        owners.append(getattr(module, host.spec.loss.name.partition(".")[0]))
    if host.spec.encoder == "pixels":
        owners.append(host.module("diffusers.models").AutoencoderKL)
    return {f"{owner.__name__}.{name}": value for owner in owners for name, value in vars(owner).items()}


def on(*names: str) -> Callable[..., Any]:
    return pytest.mark.parametrize("host", names, indirect=True)


# ---- settings ----

NOT_OURS = "{}: expected unset: the host's own {} is used, got {}. Set it there."
NO_ALIGNMENT = "features: expected 'policy' or 'none': {} has no alignment loss of its own, got 'host'. With reward_"
CRITIC = "critic_checkpoint: expected a pretrained critic, and frozen: lightningdit trains on latents without"
NO_TARGETS = "targets: expected 'encoder': {}: {}"
BY_CRITIC = {"targets": "critic", "critic_checkpoint": "none.pt", "critic_trainable": False}
REFUSED = [
    ("reg", BY_CRITIC, ConfigError, NO_TARGETS.format("reg", "its model generates the encoder's class token")),
    ("irepa", BY_CRITIC, ConfigError, NO_TARGETS.format("irepa", "its script normalises its encoder's tokens")),
    ("repae", BY_CRITIC, ConfigError, NO_TARGETS.format("repae", "its VAE is aligned with the encoder")),
    ("repa", {**BY_CRITIC, "features": "host"}, ConfigError, NO_TARGETS.format("repa", "with features='host' its own")),
    ("repa", BY_CRITIC, CheckpointError, "none.pt: expected a critic file, got FileNot"),
    ("sit", BY_CRITIC, CheckpointError, "none.pt: expected a critic file, got FileNot"),
    *((name, {"path_type": "cosine"}, ConfigError, NOT_OURS.format("path_type", "path", "cosine")) for name in HOSTS),
    *(
        (name, {"proj_coeff": 1.0}, ConfigError, NOT_OURS.format("proj_coeff", "--proj-coeff", "1.0"))
        for name in PROJECTING
    ),
    *((name, {"features": "host"}, ConfigError, NO_ALIGNMENT.format(name)) for name in OTHERS),
    ("lightningdit", {"critic_checkpoint": None, "critic_trainable": True}, ConfigError, CRITIC),
    ("lightningdit", {"critic_trainable": True}, ConfigError, CRITIC),
    ("lightningdit", {"critic_checkpoint": "none.pt"}, CheckpointError, "none.pt: expected a critic file, got FileNot"),
    ("repa", {"compat": "resum"}, ConfigError, "got 'resum'. Did you mean 'resume'?"),
    ("repa", {"compat": ("sit_s", "wandb_entity")}, ConfigError, "compat of repa key: expected one of dynamo_ema, "),
]


@pytest.mark.parametrize(("host", "settings", "error", "text"), REFUSED, indirect=["host"])
def test_settings_that_the_host_cannot_serve(
    host: FakeHost, settings: dict[str, Any], error: type[VRPOError], text: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=re.escape(text)) as caught:
        host.apply(tmp_path, **settings)
    assert type(caught.value) is error


@on("repa")
def test_unknown_keys_are_named_with_the_nearest(host: FakeHost) -> None:
    for config, options in ((None, None), (VRPOConfig(), None), (VRPOConfig(), HostOptions())):
        with pytest.raises(ConfigError, match=r"got 'reward_coef'\. Did you mean 'reward_coeff'\?"):
            apply_vrpo(host.spec, config, options=options, reward_coef=1.0)
        with pytest.raises(ConfigError, match=r"got 'alow_unverified'\. Did you mean 'allow_unverified'\?"):
            apply_vrpo(host.spec, config, options=options, alow_unverified=True)
    with pytest.raises(ConfigError, match=r"host key: expected one of .*, got 'rep'\. Did you mean 'repa'\?"):
        apply_vrpo("rep")


@on("repa")
def test_single_settings_count_beside_a_configuration(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRPO_ACTIONS", "4")
    given = VRPOConfig(critic_width=16, reward_coeff=0.5)
    with apply_vrpo(host.spec, given, reward_coeff=0.25, log_every=7) as handle:
        assert handle.config == (replace(given, reward_coeff=0.25), HostOptions(log_every=7))
    with apply_vrpo(host.spec, options=HostOptions(log_every=3), reward_coeff=0.25, compat="none") as handle:
        config, options = handle.config
        assert (config.actions, config.reward_coeff) == (4, 0.25)
        assert options == HostOptions(log_every=3, compat="none")
    with apply_vrpo(find_spec("repa"), given, allow_unverified=True) as handle:
        assert handle.config == (given, HostOptions(allow_unverified=True))


# ---- the host's code ----


def test_modules_that_are_not_there(tmp_path: Path) -> None:
    expected = r"repa: expected module models\.sit of sihyun-yu/REPA on sys\.path, got no module named 'models'\. Call"
    with pytest.raises(HostNotFoundError, match=rf"{expected}.*python -m vrpo_plugin\.launch train\.py"):
        apply_vrpo("repa")
    shutil.copytree(ROOT / "repa", tmp_path / "host", ignore=shutil.ignore_patterns("loss.py"))
    (tmp_path / "host/train.py").write_text("")
    with (
        imports_from(tmp_path / "host"),
        pytest.raises(HostNotFoundError, match=r"expected module loss of .*'loss'"),
    ):
        apply_vrpo("repa")
    # What the host itself lacks is not for us to explain.
    (tmp_path / "host/models/sit.py").write_text("import a_package_that_is_not_there")
    with imports_from(tmp_path / "host"), pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        apply_vrpo("repa")
    assert active_handles() == ()


@on(*HOSTS)
def test_another_body_is_refused_and_can_be_allowed(host: FakeHost, tmp_path: Path) -> None:
    real = replace(host, spec=find_spec(host.name))
    (commit,) = real.spec.model.fingerprints
    with pytest.raises(HostChangedError, match=rf"commit {commit}, got another body .*allow_unverified=True"):
        real.apply(tmp_path)


@on("repa")
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"parameters": ("self", "model", "batch")}, HostChangedError, "allow_unverified does not waive"),
        ({"name": "SILoss.call"}, HostNotFoundError, "got no such definition; the nearest is SILoss.__call__"),
        ({"file": "losses.py"}, HostNotFoundError, "expected module losses of sihyun-yu/REPA"),
    ],
    ids=["parameters", "name", "file"],
)
def test_other_seams_are_refused_even_unverified(
    host: FakeHost, change: dict[str, Any], error: type[VRPOError], text: str
) -> None:
    assert host.spec.loss is not None
    spec = replace(host.spec, loss=replace(host.spec.loss, **change))
    with pytest.raises(error, match=re.escape(text)):
        apply_vrpo(spec, allow_unverified=True)


# ---- applied before ----


@on(*HOSTS)
def test_the_same_twice_is_one_patch_and_another_is_a_conflict(host: FakeHost, tmp_path: Path) -> None:
    with host.apply(tmp_path) as handle:
        patched = attributes(host)
        assert host.apply(tmp_path) is handle
        with pytest.raises(PatchConflictError, match=rf"patch '{host.name}': .*got reward_coeff .* -> 0\.5\. Call"):
            host.apply(tmp_path, reward_coeff=0.5)
        with pytest.raises(PatchConflictError, match=r"got compat .* -> 'none'"):
            host.apply(tmp_path, compat="none")
        assert active_handles() == (handle,)
        assert all(value is patched[name] for name, value in attributes(host).items())


@on("repa")
def test_two_hosts_on_one_loss(host: FakeHost, tmp_path: Path) -> None:
    other = replace(host, name="repa_t2i", spec=fake_spec("repa_t2i"))
    with host.apply(tmp_path) as handle:
        with pytest.raises(PatchConflictError, match=r"SILoss\.__call__: expected an attribute not yet.*'repa'"):
            other.apply(tmp_path)
        assert active_handles() == (handle,)


@pytest.mark.parametrize("sharding", ["FSDP", "DEEPSPEED"])
def test_sharding_is_refused(host: FakeHost, sharding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{sharding}", "true")
    with pytest.raises(ConfigError, match=rf"accelerate launch: repa: expected one process or DDP, got {sharding}\."):
        host.apply(tmp_path)

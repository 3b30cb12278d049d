"""Trained models from run folders, single files and hosts' weights: loaded whole, or refused with what to do."""

import importlib.util
import os
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fakes.runs import SETTINGS, finished_run, randomised, tiny_sit
from safetensors.torch import save_file
from torch import Tensor

from vrpo_plugin.errors import CheckpointError, ConfigError
from vrpo_plugin.hosts.checkpoint import read_weights
from vrpo_plugin.standalone.checkpoint import file_sha256
from vrpo_plugin.standalone.sit import SiT
from vrpo_plugin.standalone.trained import ReversedSiT, Trained, build_trained, open_trained

HOST_ARGUMENTS = {"model": "SiT-Ti/2", "resolution": 64, "num_classes": 10, "cfg_prob": 0.1, "path_type": "cosine"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "run")


def same(trained: Trained, model: SiT) -> bool:
    state = trained.model.state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def batch(channels: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, channels, size, size, generator=generator)
    return x, torch.rand(4, generator=generator), torch.arange(4)


def test_the_newest_checkpoint_and_its_ema_by_default(run: Path) -> None:
    trained = open_trained(run)
    assert same(trained, tiny_sit(9)) and (trained.step, trained.ema, trained.latent) == (8, True, False)
    assert trained.sha256 == file_sha256(run / "checkpoints/0000008/ema.safetensors")
    assert trained.describe().startswith("SiT-Ti/2, EMA of step 8 (sha256 ")
    assert not trained.model.training and trained.model.null_label == 10


def test_the_loaded_model_computes_what_the_saved_one_did(run: Path) -> None:
    x, t, y = batch(1)
    assert torch.equal(open_trained(run).model(x, t, y), tiny_sit(9).eval()(x, t, y))


def test_step_and_raw_weights_are_chosen(run: Path) -> None:
    trained = open_trained(run, step=4, ema=False)
    assert same(trained, tiny_sit(4)) and (trained.step, trained.ema) == (4, False)


@pytest.mark.parametrize("where", ["checkpoints/0000004", "checkpoints/0000004/ema.safetensors"])
def test_a_checkpoint_or_its_file_knows_its_run(run: Path, where: str) -> None:
    assert same(open_trained(run / where), tiny_sit(5))
    assert open_trained(run / "checkpoints/0000004/model.safetensors").ema is False


def test_a_file_of_weights_with_its_configuration(tmp_path: Path) -> None:
    weights = tmp_path / "ema.safetensors"
    save_file(tiny_sit(1).state_dict(), weights)
    with pytest.raises(ConfigError, match=r"expected a config\.json beside it, got none\. Name a YAML or JSON file"):
        open_trained(weights)
    config = tmp_path / "model.yaml"
    config.write_text("model: SiT-Ti/2\nresolution: 8\n")
    trained = open_trained(weights, config=config)
    assert same(trained, tiny_sit(1)) and trained.step is None


def test_without_dropped_labels_and_without_classes() -> None:
    for settings, overrides, null in (
        ({"cfg_prob": 0.0}, {"class_dropout_prob": 0.0}, None),
        ({}, {"num_classes": 0}, 0),
        ({}, {"qk_norm": True}, 10),
        ({}, {"z_dims": (5, 7), "projector_dim": 16}, 10),
    ):
        model = tiny_sit(1, **overrides)
        built = build_trained(model.state_dict(), {**SETTINGS, **settings}, "x", ema=True, step=None, sha256="0")
        assert built.model.null_label == null and built.model.num_classes == model.num_classes
        assert same(built, model)


REFUSED = {
    "no model": ({"model": "DiT-XL/2"}, r"expected model, one of .* got 'DiT-XL/2'.*generate\.py or sample\.py"),
    "another size": ({"model": "SiT-B/2"}, "expected the weights of REPA's or SiT's SiT-B/2, by name and shape"),
    "pixels": ({"resolution": 32}, r"resolution: expected 8 \(pixels\) or 64 \(latents\)"),
    "no resolution": ({"resolution": None}, "expected resolution, a number, got None"),
    "path": ({"path_type": "VP"}, "and a velocity as prediction, got 'VP'"),
    "prediction": ({"prediction": "noise"}, "got 'linear' and 'noise'"),
    "chance": ({"cfg_prob": "often"}, "cfg_prob: expected a number"),
}


@pytest.mark.parametrize(("settings", "said"), REFUSED.values(), ids=REFUSED)
def test_settings_that_do_not_fit_are_refused(settings: dict, said: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=said):
        build_trained(tiny_sit(1).state_dict(), {**SETTINGS, **settings}, "x", ema=True, step=None, sha256="0")


@pytest.mark.parametrize("key", ["bn.running_mean", "cls_token", "final_layer.linear.bias"])
def test_weights_of_another_model_are_refused(key: str) -> None:
    weights = tiny_sit(1).state_dict()
    if weights.pop(key, None) is None:
        weights[key] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=rf"x: expected the weights of .*{key}.*with its own codebase"):
        build_trained(weights, SETTINGS, "x", ema=True, step=None, sha256="0")


def test_what_is_not_there_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint of step 5, got those of steps 4, 8"):
        open_trained(run, step=5)
    with pytest.raises(ConfigError, match="step: expected a run's folder"):
        open_trained(run / "checkpoints/0000004", step=4)
    with pytest.raises(CheckpointError, match="got nothing there"):
        open_trained(tmp_path / "absent")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="expected a file of tensors"):
        open_trained(tmp_path / "bad.safetensors", config=run / "config.json")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", steps=(4,))
    file = folder / "checkpoints/0000004/ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: expected sha256"):
        open_trained(folder)
    assert same(open_trained(folder, ema=False), tiny_sit(4))  # the other file is whole


def save_host(path: Path, model: SiT, ema: SiT) -> Path:
    averaged = {**ema.state_dict(), "vrpo.features.projector.weight": torch.ones(2, 2)}
    torch.save({"model": model.state_dict(), "ema": averaged, "opt": {}, "args": Namespace(**HOST_ARGUMENTS)}, path)
    return path


def test_a_hosts_checkpoint(tmp_path: Path) -> None:
    sizes = {"in_channels": 4, "z_dims": (6,), "projector_dim": 16}
    file = save_host(tmp_path / "0050000.pt", tiny_sit(1, **sizes), tiny_sit(2, **sizes))
    for ema, seed in ((True, 2), (False, 1)):
        weights, arguments, step = read_weights(file, ema=ema)
        trained = build_trained(weights, arguments, file, ema=ema, step=step, sha256="0")
        assert same(trained, tiny_sit(seed, **sizes))
        assert (trained.step, trained.latent, trained.path_type) == (50_000, True, "cosine")


def test_published_weights_alone(tmp_path: Path) -> None:
    torch.save(tiny_sit(1, in_channels=4).state_dict(), tmp_path / "last.pt")
    weights, arguments, step = read_weights(tmp_path / "last.pt")
    assert (arguments, step) == ({}, None)
    assert same(
        build_trained(weights, HOST_ARGUMENTS, "x", ema=True, step=None, sha256="0"), tiny_sit(1, in_channels=4)
    )
    with pytest.raises(CheckpointError, match="expected a checkpoint with 'model', got weights alone"):
        read_weights(tmp_path / "last.pt", ema=False)


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch evil",)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "ema": {}, "args": Evil()}, "evil.pt")
    with pytest.raises(CheckpointError, match="got a pickle that calls"):
        read_weights(Path("evil.pt"))
    assert not Path("evil").exists()


def load_host(folder: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("host_sit", Path(os.environ["VRPO_HOSTS_DIR"]) / folder / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.host
def test_a_model_of_sit_is_seen_in_our_time() -> None:
    """0 is data for us, and noise for SiT, whose last layer has a second half that its scripts leave unused."""
    theirs = load_host("SiT", "models.py").SiT_models["SiT-S/2"](input_size=8, num_classes=10)
    randomised(theirs.eval(), seed=1)
    settings = {"model": "SiT-S/2", "image_size": 64, "path_type": "Linear", "prediction": "velocity"}
    ours = build_trained(theirs.state_dict(), settings, "x", ema=True, step=None, sha256="0")
    assert isinstance(ours.model, ReversedSiT)
    x, t, y = batch(4)
    with torch.no_grad():
        torch.testing.assert_close(ours.model(x, t, y), -theirs(x, 1 - t, y), rtol=1e-5, atol=1e-5)
        assert theirs(x, t, y).std() > 0.1


@pytest.mark.host
def test_a_model_of_repa_computes_the_same() -> None:
    theirs = load_host("REPA", "models/sit.py").SiT_models["SiT-B/2"](
        input_size=8, num_classes=10, z_dims=[12], encoder_depth=4, qk_norm=False
    )
    randomised(theirs.eval(), seed=1)
    settings = {"model": "SiT-B/2", "resolution": 64, "cfg_prob": 0.1, "prediction": "v"}
    ours = build_trained(theirs.state_dict(), settings, "x", ema=True, step=None, sha256="0")
    x, t, y = batch(4)
    with torch.no_grad():
        assert torch.equal(ours.model(x, t, y), theirs(x, t, y)[0])

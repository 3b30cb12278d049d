"""``vrpo export --guide``: projectors and critic of a host's checkpoint, as the run's own aligner has them."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.tiny_sit import TinySiT, make_batch, tiny_aligner
from torch import Tensor, nn

from vrpo_plugin import CheckpointError, ConfigError, RewardGuide
from vrpo_plugin.cli import main
from vrpo_plugin.hosts.guide import export_guide
from vrpo_plugin.modules.critic import save_critic
from vrpo_plugin.modules.parametrisation import of_path

BATCH = make_batch(4)
SETTINGS: dict[str, Any] = {"strength": 0.3, "interval": (0.0, 1.0)}


def trained(**overrides: Any) -> TinySiT:
    torch.manual_seed(0)
    model = TinySiT()
    tiny_aligner(**overrides).attach(model)
    return model


def write(path: Path, weights: dict[str, Tensor], **arguments: Any) -> Path:
    """As a host's script does: the EMA of a patched one holds no aligner."""
    ema = {name: value for name, value in weights.items() if "vrpo." not in name}
    torch.save({"model": weights, "ema": ema, "args": argparse.Namespace(**arguments), "steps": 3}, path)
    return path


@torch.no_grad()
def guided(guide: RewardGuide) -> Tensor:
    with guide.watch() as hidden:
        velocity = guide.model(BATCH.x_t, BATCH.t, BATCH.y)
    return guide.guide(velocity, BATCH.x_t, BATCH.t, BATCH.y, hidden, of_path())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("settings", [{}, {"target_dims": (12, 20)}, {"projector": "conv"}])
def test_the_command_writes_the_run_s_own_guide(settings: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    model = trained(**settings)
    expected = guided(RewardGuide(model, **SETTINGS))
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    checkpoint = write(tmp_path / "last.pt", weights)
    out, guide = tmp_path / "plain.safetensors", tmp_path / "guide.safetensors"
    main(["export", str(checkpoint), str(out), "--guide", str(guide)])
    assert out.exists()
    model.vrpo.detach(model)
    assert torch.equal(guided(RewardGuide.load(guide, model, **SETTINGS)), expected)


def test_repa_s_own_checkpoint_needs_a_critic_s_file(tmp_path: Path) -> None:
    """No aligner: ``projectors`` and ``--encoder-depth`` are the host's."""
    model = trained()
    expected = guided(RewardGuide(model, **SETTINGS))
    aligner, critic = model.vrpo, tmp_path / "critic.safetensors"
    save_critic(aligner.critic, critic, record={"made_for": {"encoder": "e"}})
    aligner.detach(model)
    model.projectors = nn.ModuleList(aligner.projectors)
    checkpoint = write(tmp_path / "last.pt", model.state_dict(), encoder_depth=aligner.layers[0])
    with pytest.raises(CheckpointError, match="--guide-critic"):
        export_guide(checkpoint, tmp_path / "guide.safetensors")
    parts = export_guide(checkpoint, tmp_path / "guide.safetensors", critic=critic)
    assert parts.layers == aligner.layers and parts.record == {"made_for": {"encoder": "e"}}
    assert torch.equal(guided(RewardGuide.load(tmp_path / "guide.safetensors", model, **SETTINGS)), expected)


def test_layers_that_were_chosen_are_named(tmp_path: Path) -> None:
    model = trained(layers=(1, 3))
    checkpoint = write(tmp_path / "last.pt", model.state_dict())
    with pytest.raises(ConfigError, match="--guide-layers"):
        export_guide(checkpoint, tmp_path / "guide.safetensors")
    assert not (tmp_path / "guide.safetensors").exists()
    assert export_guide(checkpoint, tmp_path / "guide.safetensors", layers=(1, 3)).layers == (1, 3)


def test_what_is_refused_writes_nothing(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "last.pt", trained().state_dict())
    (tmp_path / "there.safetensors").write_bytes(b"old")
    before = set(tmp_path.iterdir())
    plain = str(tmp_path / "plain.pt")
    for words in (
        [plain, "--guide", str(tmp_path / "guide.pt")],
        [plain, "--guide", str(tmp_path / "there.safetensors")],
        [str(tmp_path / "there.safetensors"), "--guide", str(tmp_path / "guide.safetensors")],
        [plain, "--guide-layers", "2"],
        [plain, "--guide", str(tmp_path / "guide.safetensors"), "--guide-layers", "two"],
        [plain, "--guide", str(tmp_path / "guide.safetensors"), "--guide-critic", str(tmp_path / "none")],
    ):
        with pytest.raises(SystemExit, match="expected"):
            main(["export", str(checkpoint), *words])
    assert set(tmp_path.iterdir()) == before
    assert (tmp_path / "there.safetensors").read_bytes() == b"old"

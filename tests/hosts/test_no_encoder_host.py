"""``targets="critic"`` in the real hosts: their encoder cannot be loaded, and they train."""

from pathlib import Path

import pytest
import torch
from hosts.host_runs import run_host
from hosts.test_patched_hosts import LAUNCH

from vrpo_plugin.modules.critic import LatentCritic, save_critic

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def critic(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options for a frozen critic of SD-VAE latents whose tokens have another width than the stand-in's encoder."""
    file = tmp_path_factory.mktemp("critic") / "critic.safetensors"
    torch.manual_seed(0)
    record = {"made_for": {"encoder": "dinov2-vit-b (01234567)"}}
    save_critic(LatentCritic((4, 32, 32), (24,), (16, 16), width=16), file, record=record)
    settings = ("--vrpo-targets", "critic", "--vrpo-critic-checkpoint", str(file), "--vrpo-no-critic-trainable")
    return (*settings, "--vrpo-critic-width", "16")


@pytest.mark.parametrize("processes", [1, 2])
def test_repa_trains_without_its_encoder(processes: int, critic: tuple[str, ...], tmp_path: Path) -> None:
    # With the host's own loader this type would fail: 'not enough values to unpack'.
    arguments = ("--max-train-steps", "6", "--checkpointing-steps", "6", "--enc-type", "none")
    run = run_host("REPA", tmp_path, *arguments, processes=processes, launcher=(*LAUNCH, *critic))
    assert len(run.rows) == len(run.hashes) == 6 and len({str(hashes) for hashes in run.hashes}) == 6
    assert all(row["proj_loss"] != 0 for row in run.rows)
    if processes == 1:  # else the host logs the mean of both
        assert all(row["proj_loss"] == pytest.approx(-row["vrpo/align_cos"], abs=1e-6) for row in run.rows)
    assert {"vrpo/reward/semantic", "vrpo/reward/perceptual"} <= run.rows[-1].keys()
    assert "vrpo/critic_cos" not in run.rows[-1]
    said = [line for line in run.stderr.splitlines() + run.stdout.splitlines() if "neither loaded nor run" in line]
    assert len(said) == 1 and "the encoder none" in said[0] and "trained for dinov2-vit-b (01234567)" in said[0]
    weights = run.checkpoint(6)["ema"]
    assert weights["projectors.0.4.weight"].shape[0] == 24 and not any("vrpo" in key for key in weights)
    if processes == 2:
        assert [r["parameters"] for r in run.of("step", 0)] == [r["parameters"] for r in run.of("step", 1)]


@pytest.mark.parametrize("name", ["SiT", "DiT"])
def test_sit_and_dit_make_no_encoder(name: str, critic: tuple[str, ...], tmp_path: Path) -> None:
    few = ("--vrpo-log-every", "2")
    run = run_host(name, tmp_path, "--epochs", "1", processes=2, launcher=(*LAUNCH, *critic, *few))
    (log,) = run.folder.glob("out/*/log.txt")
    lines = [line for line in log.read_text().splitlines() if "vrpo (call=" in line]
    assert lines and "align_cos" in lines[-1] and "critic_cos" not in lines[-1]


@pytest.mark.parametrize("name", ["REG"])
def test_a_host_that_needs_its_encoder_says_why(name: str, critic: tuple[str, ...], tmp_path: Path) -> None:
    run = run_host(name, tmp_path, launcher=(*LAUNCH, *critic), check=False)
    assert run.returncode != 0 and "targets: expected 'encoder': reg: its model generates" in run.stderr

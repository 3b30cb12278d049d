"""Files that others may read: their mode is the umask's, whatever writes them."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from vrpo_plugin.files import write_file
from vrpo_plugin.modules.critic import LatentCritic, load_critic_weights, save_critic
from vrpo_plugin.standalone.checkpoint import save_checkpoint
from vrpo_plugin.standalone.frechet import FeatureStatistics
from vrpo_plugin.standalone.small_training import train_small_features


@pytest.fixture(params=[0o022, 0o002, 0o077])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def test_every_file_has_the_umasks_mode(mode: int, tmp_path: Path) -> None:
    critic = LatentCritic((4, 8, 8), (12,), (4, 4), width=16)
    save_critic(critic, tmp_path / "critic.safetensors")
    images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8)
    small = train_small_features(images, torch.arange(64) % 4, seed=0, width=4, steps=1)
    small.save(tmp_path / "encoder.safetensors")
    small.save(str(tmp_path / "encoder.safetensors"))  # and replaced, by a path that is text
    save_checkpoint(tmp_path / "run", 1, {"model": {"a": torch.zeros(2)}}, {"step": 1})
    write_file(tmp_path / "config.json", "{}")
    FeatureStatistics(np.zeros(2), np.eye(2)).save(tmp_path / "reference.npz")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 7
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {path.name: mode for path in files}
    load_critic_weights(LatentCritic((4, 8, 8), (12,), (4, 4), width=16), tmp_path / "critic.safetensors")

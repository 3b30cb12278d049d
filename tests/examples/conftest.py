"""What the example's runs share."""

from pathlib import Path

import pytest

from vrpo_plugin.standalone.small_training import train_small_features
from vrpo_plugin.standalone.sources import DigitsSource, all_images


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    train_small_features(*all_images(DigitsSource()), seed=0, steps=40).save(path)
    return path

"""Targets by name: what does not belong to the data is refused before anything is trained."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vrpo_plugin.errors import ConfigError, DataError
from vrpo_plugin.standalone.small_training import train_small_features
from vrpo_plugin.standalone.sources import ArraySource, DigitsSource
from vrpo_plugin.standalone.targets import load_targets


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 8)])
def test_a_small_encoder_of_other_images_is_refused(shape: tuple[int, int, int], tmp_path: Path) -> None:
    images = torch.randint(0, 256, (40, *shape), dtype=torch.uint8)
    path = tmp_path / "encoder.safetensors"
    train_small_features(images, torch.arange(40) % 4, seed=0, width=4, steps=1).save(path)
    with pytest.raises(ConfigError, match=r"small encoder: expected one of images \(1, 8, 8\), got \("):
        load_targets("small", DigitsSource(8), checkpoint=str(path))
    with pytest.raises(ConfigError, match="small encoder"):
        load_targets("small", DigitsSource(8), cache=path)


@pytest.mark.parametrize("name", ["small", "test_vit"])
@pytest.mark.parametrize("shapes", [((3, 256, 512), (4, 32, 64)), ((3, 256, 256), (4, 32, 64))])
def test_oblong_images_are_refused(name: str, shapes: Any) -> None:
    source: Any = SimpleNamespace(image_shape=shapes[0], latent_shape=shapes[1])
    with pytest.raises(ConfigError, match=r"(images|latents): expected squares"):
        load_targets(name, source)


@pytest.mark.parametrize(("images", "classes"), [(6, 1), (6, 3), (100, 1)])
def test_a_small_encoder_of_next_to_nothing_is_refused(images: int, classes: int, tmp_path: Path) -> None:
    labels = np.arange(images) % classes
    np.savez(tmp_path / "data.npz", images=np.zeros((images, 3, 8, 8), np.uint8), labels=labels)
    cache = tmp_path / "run" / "encoder.safetensors"
    with pytest.raises(DataError, match=rf"small encoder: expected at least 40 .* got {images} images in {classes}\."):
        load_targets("small", ArraySource(tmp_path / "data.npz"), cache=cache)
    assert not cache.parent.exists()

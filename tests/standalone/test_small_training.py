import pytest
import torch

from vrpo_plugin.errors import ConfigError, ShapeError
from vrpo_plugin.standalone.small_network import load_small_features, pool
from vrpo_plugin.standalone.small_training import train_denoising_features, train_rotation_features
from vrpo_plugin.standalone.sources import DigitsSource, all_images

TASKS = [train_rotation_features, train_denoising_features]


@pytest.fixture(scope="module")
def images():
    return all_images(DigitsSource(8))[0]


@pytest.mark.slow
def test_rotations_are_told_apart(images):
    network = train_rotation_features(images, seed=0, width=16, steps=150)
    assert network.accuracy > 0.7  # chance: 0.25
    by_turn = torch.stack([network(images.rot90(turns, (2, 3))).mean(0) for turns in range(4)])
    assert torch.pdist(by_turn).min() > 0.1


def test_noise_is_taken_away(images):
    short = train_denoising_features(images, seed=0, width=16, steps=2)
    network = train_denoising_features(images, seed=0, width=16, steps=100)
    assert short.accuracy < 0.2 < 0.6 < network.accuracy <= 1
    assert network(images[:4]).shape == (4, 32)


@pytest.mark.slow
def test_noise_that_no_neighbour_tells_from_the_pixels_stays():
    images = torch.randint(0, 256, (2000, 1, 8, 8), dtype=torch.uint8)
    network = train_denoising_features(images, seed=0, width=16, steps=150)
    # The best linear guess of a pixel explains 1/3 / (1/3 + deviation^2) of its variance: 0.56 on average.
    assert 0.3 < network.accuracy < 0.7


@pytest.mark.parametrize("train", TASKS)
def test_same_seed_same_network_without_a_global_draw(train, images, tmp_path):
    state = torch.get_rng_state()
    first, second, other = (train(images[:200], seed=seed, width=8, steps=3) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.name == second.name != other.name
    first.save(tmp_path / "network.safetensors")
    assert load_small_features(tmp_path / "network.safetensors").name == first.name


@pytest.mark.parametrize("train", TASKS)
def test_bad_settings_are_refused(train, images):
    with pytest.raises(ConfigError, match="Did you mean 'width'"):
        train(images, seed=0, widht=8)
    with pytest.raises(ConfigError, match="steps"):
        train(images, seed=0, steps=0)
    with pytest.raises(ShapeError, match="uint8"):
        train(images.float(), seed=0)


def test_pooling_drops_what_is_negative():
    assert pool(torch.tensor([[[[1.0, -3.0]], [[-1.0, -1.0]]]])).tolist() == [[0.5, 0.0]]

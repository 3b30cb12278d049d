import copy
import json
from dataclasses import FrozenInstanceError

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vrpo_plugin.errors import CheckpointError, ConfigError, ShapeError, WeightsNotFoundError
from vrpo_plugin.standalone.small_network import (
    SmallFeatureNetwork,
    load_small_features,
    weights_hash,
)
from vrpo_plugin.standalone.small_training import _shift, train_small_features


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (torch.from_numpy(data.images) * (255 / 16)).round().to(torch.uint8)[:, None]
    return images, torch.from_numpy(data.target)


@pytest.fixture(scope="module")
def network(digits):
    return train_small_features(*digits, seed=0, steps=100, held_out=0.2)


def noise(count, channels, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8)


def quick(images, **changes):
    labels = torch.arange(len(images)) % 3
    settings = {"seed": 0, "width": 4, "steps": 3, "batch_size": 8} | changes
    return train_small_features(images, labels, **settings)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_learns_digits(network):
    assert 0.95 < network.accuracy <= 1


def test_plain_learns_digits_too(digits):
    assert train_small_features(*digits, seed=1, steps=60, architecture="plain").accuracy > 0.95


def test_accuracy_is_of_images_it_did_not_see():
    # Labels that say nothing about the images can be learnt by heart, never guessed.
    images, labels = noise(80, 1, 8), torch.randint(2, (80,), generator=torch.Generator().manual_seed(0))
    network = train_small_features(images, labels, seed=0, width=32, steps=80, batch_size=40, held_out=0.5)
    assert 0.2 < network.accuracy < 0.8


def test_held_out_images_leave_no_trace_in_the_weights():
    images = noise(30, 1, 8)
    held_out = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:15]
    changed = images.clone()
    changed[held_out] ^= 255
    assert same_weights(quick(images, held_out=0.5), quick(changed, held_out=0.5))
    assert not same_weights(quick(images, held_out=0.5), quick(images.flip(-1), held_out=0.5))


def test_features_are_frozen_float32_and_stay_put(network, digits):
    images = digits[0][:5]
    pooled, tokens = network(images), network.tokens(images)
    assert pooled.shape == (5, network.dim)
    assert tokens.shape == (5, network.grid[0] * network.grid[1], network.token_dim)
    assert pooled.dtype == tokens.dtype == torch.float32
    assert not pooled.requires_grad
    assert not tokens.requires_grad
    assert not any(p.requires_grad for p in network.body.parameters())
    torch.testing.assert_close(network(images[:1]), pooled[:1], msg="batch statistics leak into features")
    torch.testing.assert_close(tokens.relu().mean(1), pooled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(images), pooled)
    with pytest.raises(FrozenInstanceError):
        network.width = 8


@pytest.mark.parametrize(("side", "grid"), [(8, 4), (16, 8), (28, 7), (32, 8), (64, 8)])
def test_grid(side, grid):
    images = noise(12, 3, side)
    network = quick(images, steps=1)
    assert network.grid == (grid, grid)
    assert network.tokens(images).shape == (12, grid * grid, 8)


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_tokens_lie_where_the_pixels_are(below, right):
    images = noise(12, 3, 64)
    network = quick(images, steps=1)
    touched = images[:1].clone()
    touched[..., 44 * below : 44 * below + 20, 44 * right : 44 * right + 20] ^= 255
    change = (network.tokens(touched) - network.tokens(images[:1])).square().sum(-1).view(8, 8)
    assert (change[4:].sum() > 2 * change[:4].sum()) == below
    assert (change[:, 4:].sum() > 2 * change[:, :4].sum()) == right


def test_same_seed_same_network_and_the_global_generator_is_untouched():
    images = noise(30, 1, 8)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = quick(images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = quick(images)
    assert same_weights(first, again)
    assert first.name == again.name
    assert not same_weights(first, quick(images, seed=1))
    assert quick(images, architecture="plain").name != first.name


def test_training_works_where_gradients_are_off():
    images = noise(30, 1, 8)
    with torch.no_grad():
        inside = quick(images)
    assert same_weights(inside, quick(images))


def test_architectures_differ_in_their_shortcuts():
    images = noise(30, 1, 8)
    plain, residual = quick(images, architecture="plain", steps=1), quick(images, steps=1)
    for network in (plain, residual):
        for part in network.body[1]:
            nn.init.zeros_(part[2].weight)
    x = torch.rand(1, 4, 8, 8)
    assert torch.equal(residual.body[1](x), x)
    assert not plain.body[1](x).any()


def test_a_module_that_holds_it_does_not_own_it(network):
    holder = nn.Linear(1, 1)
    holder.encoder = network
    assert len(holder.state_dict()) == 2
    assert copy.deepcopy(holder).encoder is network


def test_hash_changes_with_names_and_values():
    state = {"a": torch.zeros(2, 2), "b": torch.tensor(3, dtype=torch.int64)}
    assert weights_hash(state) == weights_hash(dict(reversed(state.items())))
    assert weights_hash(state) != weights_hash({"a": state["a"], "c": state["b"]})
    assert weights_hash(state) != weights_hash(state | {"a": torch.full((2, 2), 1e-30)})
    assert weights_hash({"a": torch.zeros(2, dtype=torch.bfloat16)})


def test_save_and_load(network, digits, tmp_path):
    path = tmp_path / "network.safetensors"
    network.save(path)
    before = torch.get_rng_state()
    loaded = load_small_features(path)
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("channels", "resolution", "width", "architecture", "seed", "accuracy", "grid", "dim", "name"):
        assert getattr(loaded, name) == getattr(network, name)
    assert torch.equal(loaded(digits[0][:9]), network(digits[0][:9]))


def test_bad_files_are_refused(network, tmp_path):
    with pytest.raises(WeightsNotFoundError, match=r"absent\.safetensors"):
        load_small_features(tmp_path / "absent.safetensors")
    network.save(tmp_path / "good")
    state = load_file(tmp_path / "good")
    arguments = {k: v for k, v in vars(network).items() if k != "body"}
    whole = {"small_features": json.dumps(arguments)}
    save_file(state, tmp_path / "no_metadata")
    save_file(state, tmp_path / "other_metadata", metadata={"small_features": "[]"})
    save_file(state, tmp_path / "no_json", metadata={"small_features": "{"})
    save_file({k: v for k, v in state.items() if k != "0.weight"}, tmp_path / "missing", metadata=whole)
    save_file(state, tmp_path / "more", metadata={"small_features": json.dumps(arguments | {"depth": 3})})
    (tmp_path / "damaged").write_bytes((tmp_path / "good").read_bytes()[:-10])
    for name in ("no_metadata", "other_metadata", "no_json", "missing", "more", "damaged"):
        with pytest.raises(CheckpointError, match="train_small_features"):
            load_small_features(tmp_path / name)


def test_images_of_another_kind_are_refused(network):
    for images in (noise(2, 3, 8), noise(2, 1, 16), noise(2, 1, 8)[0], noise(2, 1, 8).float()):
        with pytest.raises(ShapeError, match=r"uint8 \(B, 1, 8, 8\)"):
            network.tokens(images)


def test_bad_training_arguments_are_refused():
    images = noise(30, 1, 8)
    for bad in (images.float(), images[..., :7], images[:, 0], noise(30, 1, 3)):
        with pytest.raises(ShapeError, match="uint8"):
            quick(bad)
    for labels in (torch.zeros(30), torch.zeros(29, dtype=torch.long), torch.full((30,), -100)):
        with pytest.raises(ShapeError, match="integers from 0"):
            train_small_features(images, labels, seed=0)
    bad_settings = ({"architecture": "vit"}, {"width": 0}, {"steps": 0}, {"batch_size": 0})
    for settings in (*bad_settings, {"held_out": 0.0}, {"held_out": 1.0}, {"held_out": 0.001}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            quick(images, **settings)


def test_shift_moves_each_image_and_repeats_its_edge():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(200, 2, 1, 1)
    shifted = _shift(images, 1, torch.Generator().manual_seed(0))
    rows, columns = torch.arange(8)[:, None], torch.arange(8)
    seen = set()
    for image in shifted:
        assert torch.equal(image[0], image[1])
        dy, dx = image[0, 3, 3].item() // 8 - 3, image[0, 3, 3].item() % 8 - 3
        seen.add((dy, dx))
        expected = 8 * (rows + dy).clamp(0, 7) + (columns + dx).clamp(0, 7)
        assert torch.equal(image[0].long(), expected)
    assert seen == {(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}


def test_repr_is_short(network):
    assert isinstance(network, SmallFeatureNetwork)
    assert len(repr(network)) < 200

import pytest
import torch

from vrpo_plugin.errors import DataError, ShapeError
from vrpo_plugin.standalone.features import (
    TokenMean,
    extract_features,
    load_small_features,
    timm_features,
    train_small_features,
)


def images(count, side=4):
    values = torch.arange(count, dtype=torch.uint8)
    return values[:, None, None, None].expand(count, 3, side, side)


def pixel_mean(batch):
    return batch.float().mean((2, 3))


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_tensor_and_batches_give_the_same_features_in_order(batch_size):
    whole = images(11)
    sizes = []

    def network(batch):
        sizes.append(len(batch))
        return pixel_mean(batch)

    features = extract_features(network, whole, batch_size=batch_size)
    assert torch.equal(features, pixel_mean(whole))
    assert max(sizes) <= batch_size
    for batches in (list(whole.split(5)), (part for part in whole.split(3)), [whole[:0], whole]):
        assert torch.equal(extract_features(network, batches, batch_size=batch_size), features)


def test_features_are_float32_without_gradient():
    weight = torch.ones(3, requires_grad=True)
    features = extract_features(lambda batch: (pixel_mean(batch) * weight).half(), images(3))
    assert features.dtype == torch.float32
    assert not features.requires_grad


def test_nothing_and_tokens_are_refused():
    for nothing in (images(3)[:0], []):
        with pytest.raises(DataError, match="at least one"):
            extract_features(pixel_mean, nothing)
    with pytest.raises(ShapeError, match=r"\(B, D\)"):
        extract_features(lambda batch: batch.float().mean(1), images(3))


def test_token_mean_pools_over_tokens():
    tokens = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    pooled = TokenMean(lambda _: tokens, "fixed")(images(2))
    torch.testing.assert_close(pooled, sum(tokens[:, n] for n in range(5)) / 5)
    assert not pooled.requires_grad


def test_timm_features_are_the_mean_of_the_models_own_tokens():
    import timm

    network = timm_features("test_vit", resolution=64, pretrained=False)
    batch = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = extract_features(network, batch, batch_size=2)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=64).eval()
    model.load_state_dict(network.encoder.model.state_dict())
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    tokens = model.forward_features((batch / 255 - mean) / std)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(features, tokens.mean(1), rtol=1e-4, atol=1e-5)
    assert network.name.startswith("test_vit@64-")
    assert network.name != timm_features("test_vit", resolution=64, pretrained=False).name


def test_timm_checkpoint(tmp_path):
    from safetensors.torch import save_file

    network = timm_features("test_vit", resolution=160, pretrained=False)
    save_file(network.encoder.model.state_dict(), tmp_path / "weights.safetensors")
    loaded = timm_features("test_vit", resolution=160, checkpoint=str(tmp_path / "weights.safetensors"))
    assert loaded.name == network.name
    assert torch.equal(loaded(images(2, 160)), network(images(2, 160)))


def test_small_networks_are_feature_networks(tmp_path):
    noise = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    network = train_small_features(noise, torch.arange(20) % 2, seed=0, width=4, steps=2, batch_size=4)
    network.save(tmp_path / "small")
    features = extract_features(load_small_features(tmp_path / "small"), noise, batch_size=7)
    torch.testing.assert_close(features, network(noise))

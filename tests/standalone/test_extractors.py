import hashlib
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes.inception import write_inception_weights

from vrpo_plugin.errors import CheckpointError, ConfigError, ShapeError, WeightsNotFoundError
from vrpo_plugin.standalone.extractors import inception, open_extractor, open_extractors
from vrpo_plugin.standalone.small_network import SmallFeatureNetwork, build_body


def images(count=2, side=16, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    return drawn.expand(-1, 3, -1, -1).contiguous()


def small(path: Path, channels=3, seed=0) -> str:
    body = build_body(channels, 16, 8, "plain", seed)
    SmallFeatureNetwork(channels, 16, 8, "plain", seed, 0.5, body).save(path)
    return str(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    pytest.importorskip("torch_fidelity")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    write_inception_weights(path)
    return path


@pytest.mark.slow
def test_inceptions_parts_are_adms(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(weights))
    inputs = []
    theirs.Mixed_6d.register_forward_pre_hook(lambda module, args: inputs.append(args[0].numpy()))
    network, batch = inception(weights), images()
    parts, (pool,) = network.parts(batch), theirs(batch)
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "pool": (2, 2048),
        "spatial": (2, 2023),
        "logits": (2, 1008),
    }
    assert torch.equal(parts["pool"], pool)
    torch.testing.assert_close(parts["logits"], pool @ theirs.fc.weight.T)
    branch = theirs.Mixed_6d.branch1x1
    convolved = np.einsum("bchw,oc->bhwo", inputs[0], branch.conv.weight.numpy()[:, :, 0, 0])
    norm = branch.bn
    mean, var, weight, bias = (one.numpy() for one in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    normed = (convolved - mean) / np.sqrt(var + 0.001) * weight + bias
    expected = np.maximum(normed, 0)[..., :7].reshape(2, -1)  # as evaluator.py, whose arrays are NHWC
    np.testing.assert_allclose(parts["spatial"].numpy(), expected, rtol=1e-3, atol=1e-4)
    assert network.name.startswith("inception-") and open_extractor(f"inception={weights}", resolution=16).name


def test_inception_needs_its_weights(tmp_path):
    pytest.importorskip("torch_fidelity")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("text")
    for name in ("other", "list", "text"):
        with pytest.raises(CheckpointError, match=rf"{name}.pth: expected torch-fidelity's Inception weights"):
            inception(tmp_path / f"{name}.pth")
    with pytest.raises(WeightsNotFoundError, match="none at"):
        inception(tmp_path / "missing.pth")


class _Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_file_of_weights_runs_no_code(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    monkeypatch.chdir(tmp_path)
    Path("harmful.pth").write_bytes(pickle.dumps(_Harmful()))
    torch.save({"a": _Harmful()}, "harmful2.pth")
    for name in ("harmful.pth", "harmful2.pth"):
        with pytest.raises(CheckpointError):
            inception(name)
    assert not Path("harm").exists()


def test_without_torch_fidelity_the_refusal_says_what_to_give(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ConfigError, match=r"pip install 'vrpo-plugin\[eval\]', or give another .* by --network"):
        open_extractor("inception", resolution=16)


@pytest.mark.slow
def test_a_download_is_announced_and_kept(weights, tmp_path, monkeypatch, capfd):
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    remote = tmp_path / "remote" / f"weights-{digest}.pth"
    remote.parent.mkdir()
    remote.symlink_to(weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(theirs, "URL_INCEPTION_V3", remote.as_uri())
    name = inception().name
    assert f"Downloading Inception weights (91 MiB) from {remote.as_uri()} to " in capfd.readouterr().err
    remote.unlink()
    assert inception().name == name == inception(weights).name  # from the cache
    assert capfd.readouterr().err == ""


def test_a_download_that_fails_says_what_to_give(tmp_path, monkeypatch, capfd):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for content, url in ((None, "weights-00000000.pth"), (b"other", "weights-11111111.pth")):
        if content is not None:
            (tmp_path / url).write_bytes(content)  # its hash is another than its name says
        monkeypatch.setattr(theirs, "URL_INCEPTION_V3", (tmp_path / url).as_uri())
        with pytest.raises(WeightsNotFoundError, match="pass it by --inception FILE, or give another network"):
            inception()
        assert not list((tmp_path / "hub" / "checkpoints").iterdir())


def test_small_networks_take_images_of_their_own_size_and_colour(tmp_path):
    colour, grey = small(tmp_path / "colour.safetensors"), small(tmp_path / "grey.safetensors", channels=1)
    opened = open_extractors([colour, grey], resolution=16, device="cpu")
    assert all(one.name.startswith("small-plain-8-") and one.resolution == 16 for one in opened)
    for one in opened:
        assert one.parts(images(channels=1))["pool"].shape == (2, 16)
    with pytest.raises(ShapeError, match="expected grey images"):
        opened[1].parts(images())
    with pytest.raises(ConfigError, match="of 16x16 pixels, which it was trained on, got 32x32"):
        open_extractor(colour, resolution=32)
    with pytest.raises(ConfigError, match="Name each once"):
        open_extractors([colour, colour], resolution=16, device="cpu")
    with pytest.raises(WeightsNotFoundError, match="none at"):
        open_extractor(str(tmp_path / "missing.safetensors"), resolution=16)


def test_timm_models_take_local_weights(tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    network = open_extractor(f"test_vit={tmp_path / 'vit.safetensors'}", resolution=16)
    assert network.name.startswith("test_vit@256-") and network.resolution is None
    first, again = (network.parts(images(seed=seed))["pool"] for seed in (0, 0))
    assert first.shape == (2, model.num_features) and torch.equal(first, again)
    larger = open_extractor(f"test_vit={tmp_path / 'vit.safetensors'}", resolution=512)
    assert larger.name.startswith("test_vit@512-")
    with pytest.raises(ConfigError, match="a model of the installed timm"):
        open_extractor("no_such_model", resolution=16)

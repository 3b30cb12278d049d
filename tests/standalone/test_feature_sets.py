import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from fakes.gloo import on_two_processes

from vrpo_plugin.errors import CheckpointError, DataError
from vrpo_plugin.standalone.extractors import Extractor
from vrpo_plugin.standalone.feature_sets import Features, FeatureSet, extract, file_digest, load_features
from vrpo_plugin.standalone.frechet import FeatureStatistics
from vrpo_plugin.standalone.image_sets import open_images


def by_columns(images):
    """As many parts as Inception has, of different widths."""
    values = images.float().mean(1)
    return {"pool": values.flatten(1)[:, :12], "spatial": values[:, 0], "logits": values.mean(2)[:, :3]}


NETWORKS = [Extractor("columns", by_columns), Extractor("pixels", lambda x: {"pool": x.flatten(1)[:, :4].float()})]


def images_file(folder: Path, count: int = 23) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=pixels)
    return folder / "images.npz"


def extracted(path: Path, **settings) -> FeatureSet | None:
    settings = {"batch_size": 4, "what": "images", **settings}
    return extract(open_images(path), NETWORKS, Accelerator(cpu=True), **settings)


def test_features_are_those_of_one_call_in_order(tmp_path, capfd):
    path = images_file(tmp_path)
    found = extracted(path)
    images = open_images(path)
    whole = torch.stack([images[i] for i in range(len(images))])
    expected = by_columns(whole)
    columns, pixels = found.networks["columns"], found.networks["pixels"]
    assert torch.equal(columns.pool, expected["pool"]) and torch.equal(columns.logits, expected["logits"])
    assert torch.equal(pixels.pool, whole.flatten(1)[:, :4].float()) and pixels.logits is None
    for part in ("pool", "spatial"):
        direct = FeatureStatistics.from_features(expected[part])
        np.testing.assert_allclose(columns.statistics[part].mean, direct.mean, rtol=1e-13)
        np.testing.assert_allclose(columns.statistics[part].covariance, direct.covariance, rtol=1e-10, atol=1e-10)
        assert columns.statistics[part].count == 23
    assert (found.count, found.resolution, found.record) == (23, 5, {})
    assert "images: 23/23" in capfd.readouterr().err


def test_statistics_that_come_in_many_batches_are_those_of_all_rows(tmp_path, monkeypatch):
    path = images_file(tmp_path)
    at_once = extracted(path).networks["columns"].statistics
    monkeypatch.setattr("vrpo_plugin.standalone.feature_sets._BUFFERED", 6)
    merged = extracted(path).networks["columns"].statistics
    for part in ("pool", "spatial"):
        np.testing.assert_allclose(merged[part].mean, at_once[part].mean, rtol=1e-13)
        np.testing.assert_allclose(merged[part].covariance, at_once[part].covariance, rtol=1e-10, atol=1e-9)


def test_evenly_spaced_features_are_kept(tmp_path):
    path = images_file(tmp_path, 20)
    every, some = extracted(path), extracted(path, keep=5)
    assert torch.equal(some.networks["columns"].pool, every.networks["columns"].pool[::4])
    assert torch.equal(some.networks["columns"].logits, every.networks["columns"].logits[::4])
    assert some.networks["columns"].statistics["pool"].count == 20
    assert len(extracted(path, keep=50).networks["columns"].pool) == 20


def test_batches_and_workers_change_no_feature(tmp_path):
    path = images_file(tmp_path)
    first, second = extracted(path), extracted(path, batch_size=64, num_workers=2)
    assert torch.equal(first.networks["columns"].pool, second.networks["columns"].pool)
    assert first.digest == second.digest


def test_the_digest_is_of_the_pixels_in_order(tmp_path):
    from PIL import Image

    path = images_file(tmp_path)
    pixels = np.load(path)["arr_0"]
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "folder" / f"any{number:02d}.png")
    assert extracted(tmp_path / "folder").digest == extracted(path).digest
    other = pixels.copy()
    other[7, 0, 0, 0] ^= 1
    for changed in (other, pixels[::-1], pixels[:-1]):
        np.savez(tmp_path / "changed.npz", arr_0=changed)
        assert extracted(tmp_path / "changed.npz").digest != extracted(path).digest


def test_one_image_and_infinite_features_are_refused(tmp_path):
    with pytest.raises(DataError, match="at least 2 images, got 1"):
        extracted(images_file(tmp_path, 1))
    path = images_file(tmp_path)
    broken = [Extractor("broken", lambda x: {"pool": x.flatten(1).float() * np.inf})]
    with pytest.raises(DataError, match="NaN or infinity in images 0 to 22"):
        extract(open_images(path), broken, Accelerator(cpu=True), what="images")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_in_one_line(tmp_path, num_workers):
    from PIL import Image

    for number in range(9):
        Image.new("RGB", (5, 5)).save(tmp_path / f"{number}.png")
    whole = (tmp_path / "7.png").read_bytes()
    (tmp_path / "7.png").write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"^\S+7.png: expected a readable image, got .* Replace or remove .*$"):
        extracted(tmp_path, num_workers=num_workers)


def test_a_file_of_features_is_read_as_it_was_written(tmp_path):
    found = extracted(images_file(tmp_path), keep=5, record={"solver": "heun"})
    found.save(tmp_path / "stored.safetensors")
    read = load_features(tmp_path / "stored.safetensors")
    assert (read.count, read.digest, read.resolution) == (found.count, found.digest, found.resolution)
    assert read.record == {"solver": "heun"} and list(read.networks) == ["columns", "pixels"]
    for name, features in found.networks.items():
        assert torch.equal(read.networks[name].pool, features.pool)
        assert features.statistics.keys() == read.networks[name].statistics.keys()
        for part, statistics in features.statistics.items():
            assert np.array_equal(read.networks[name].statistics[part].covariance, statistics.covariance)
            assert np.array_equal(read.networks[name].statistics[part].mean, statistics.mean)
    assert torch.equal(read.networks["columns"].logits, found.networks["columns"].logits)
    statistics_only = FeatureSet({"a": Features({"pool": FeatureStatistics(np.zeros(2), np.eye(2))})}, None, "0", None)
    statistics_only.save(tmp_path / "statistics.safetensors")
    assert load_features(tmp_path / "statistics.safetensors").networks["a"].pool is None


def test_other_files_are_not_read_as_features(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "network.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    for name in ("network", "text"):
        with pytest.raises(CheckpointError, match="a file written by vrpo eval"):
            load_features(tmp_path / f"{name}.safetensors")
    with pytest.raises(DataError, match="no such file"):
        load_features(tmp_path / "missing.safetensors")


def test_a_file_is_known_by_its_bytes(tmp_path):
    import hashlib

    path = images_file(tmp_path)
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _extract_here(rank: int, world_size: int) -> list[dict]:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    all_found = []
    for path in sorted(Path(os.environ["VRPO_TEST_IMAGES"]).iterdir()):
        found = extracted(path / "images.npz")
        assert (found is None) == (rank > 0)
        all_found.append({} if found is None else _tensors(found))
    return all_found


def _tensors(found: FeatureSet) -> dict:
    columns = found.networks["columns"]
    covariance = torch.from_numpy(columns.statistics["spatial"].covariance)
    return {"pool": columns.pool, "logits": columns.logits, "covariance": covariance, "digest": found.digest}


@pytest.mark.slow
def test_two_processes_give_the_features_of_one(tmp_path, monkeypatch):
    sets = tmp_path / "sets"
    for count in (3, 16, 21, 23):  # one batch for two; full rounds; half a last round; a short batch
        (sets / f"{count:02d}").mkdir(parents=True)
        images_file(sets / f"{count:02d}", count)
    monkeypatch.setenv("VRPO_TEST_IMAGES", str(sets))
    first, second = on_two_processes(_extract_here, tmp_path)
    assert second == [{}] * 4
    for path, together in zip(sorted(sets.iterdir()), first, strict=True):
        alone = _tensors(extracted(path / "images.npz"))
        assert together.pop("digest") == alone.pop("digest")
        assert all(torch.equal(together[name], alone[name]) for name in alone), path.name

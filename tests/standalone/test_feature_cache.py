"""vrpo_plugin.standalone.cache_features and feature_cache: written, cut, gone on with, read, and refused."""

import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F

from vrpo_plugin.cli import main
from vrpo_plugin.errors import CheckpointError, ConfigError, DataError
from vrpo_plugin.standalone import cache_features as writer
from vrpo_plugin.standalone.cache_features import CacheSettings, cache_features
from vrpo_plugin.standalone.data import TrainingSamples
from vrpo_plugin.standalone.feature_cache import BASIS, MANIFEST, FeatureCache, record_file, shard_file
from vrpo_plugin.standalone.small_network import SmallFeatureNetwork, load_small_features
from vrpo_plugin.standalone.small_training import train_small_features
from vrpo_plugin.standalone.sources import all_images, open_source

REPO = Path(__file__).resolve().parents[2]
IMAGES, SHARD = 50, 16


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images of two kinds in one file, and a small encoder of them."""
    folder = tmp_path_factory.mktemp("inputs")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (IMAGES, 3, 8, 8), dtype=np.uint8)
    images[::2, :, :, :4] //= 4
    np.savez(folder / "data.npz", images=images, labels=np.arange(IMAGES) % 2)
    torch.manual_seed(0)
    source = open_source(folder / "data.npz")
    train_small_features(*all_images(source), seed=0, steps=3, width=8).save(folder / "encoder.safetensors")
    return folder / "data.npz", folder / "encoder.safetensors"


def settings_of(inputs: tuple[Path, Path], output: Path, **overrides: Any) -> CacheSettings:
    given = {"data": str(inputs[0]), "encoder": "small", "encoder_checkpoint": str(inputs[1]), "resolution": 8}
    given |= {"output": str(output), "num_workers": 0, "batch_size": 5, "shard_images": SHARD}
    return CacheSettings(**{**given, **overrides})


def encoder_of(inputs: tuple[Path, Path]) -> SmallFeatureNetwork:
    return load_small_features(inputs[1])


@pytest.mark.parametrize(("pca", "least"), [(0, 0.999999), (64, 0.999), (4, 0.6)])
def test_what_is_read_is_what_the_encoder_says(
    pca: int, least: float, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    result = cache_features(settings_of(inputs, tmp_path / "cache", pca=pca))
    cache = FeatureCache(tmp_path / "cache")
    images, encoder = all_images(open_source(inputs[0]))[0], encoder_of(inputs)
    assert len(cache) == IMAGES and cache.identity.shards == 4 and result["new"] == 4
    cosines = []
    for flipped in (False, True):
        expected = encoder.tokens(images.flip(-1) if flipped else images)
        (found,) = cache.decode(torch.stack([cache.read(i, flipped) for i in range(IMAGES)]))
        assert found.dtype == torch.float32 and found.shape == expected.shape
        cosines.append(F.cosine_similarity(found, expected, dim=-1))
        if not pca:  # the stated tolerance: what fp16 rounds away
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert pca or torch.stack(cosines).min() > least
    assert torch.stack(cosines).mean().item() == pytest.approx(result["cosine"], abs=1e-5) and result["cosine"] > least
    cache.verify()
    stored = sum(shard_file(tmp_path / "cache", i).stat().st_size for i in range(4))
    dim = encoder.token_dim
    numbers = 2 * dim if not pca else min(pca, dim)  # two bytes, or one
    assert stored == result["bytes"] == IMAGES * 2 * encoder.grid[0] * encoder.grid[1] * numbers


def test_flips_are_those_of_the_training_samples(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    cache_features(settings_of(inputs, tmp_path / "cache"))
    cache, encoder = FeatureCache(tmp_path / "cache"), encoder_of(inputs)
    samples = TrainingSamples(open_source(inputs[0]), seed=1, flip_prob=0.5, features=cache)
    plain = TrainingSamples(open_source(inputs[0]), seed=1, flip_prob=0.5)
    for position in range(2 * IMAGES):
        item = samples[position]
        (tokens,) = cache.decode(item["features"][None])
        torch.testing.assert_close(tokens, encoder.tokens(item["image"][None]), rtol=1e-3, atol=1e-5)
        stored = item.pop("features")
        assert stored.shape == (encoder.grid[0] * encoder.grid[1], encoder.token_dim)
        assert all(torch.equal(item[name], value) for name, value in plain[position].items())


def test_maps_are_not_sent_to_other_processes(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    cache_features(settings_of(inputs, tmp_path / "cache"))
    cache = FeatureCache(tmp_path / "cache")
    first = cache.read(20)
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 10_000 and torch.equal(copy.read(20), first)


def test_the_code_of_the_page_runs(inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_features(settings_of(inputs, tmp_path / "features"))
    monkeypatch.chdir(tmp_path)
    page = (REPO / "docs" / "feature-cache.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    stored = FeatureCache("features").read(3, True)
    names: dict[str, Any] = {"index": 3, "flipped": True, "device": "cpu", "stored_batch": stored[None]}
    exec(compile(block, "feature-cache.md", "exec"), names)
    assert torch.equal(names["stored"], stored) and names["z"][0].dtype == torch.float32


class Killed(BaseException):
    pass


def test_a_run_that_was_cut_goes_on_and_writes_the_same_bytes(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_features(settings_of(inputs, tmp_path / "whole", pca=6))
    original, calls = writer._views, []

    def dies(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 6:  # in the second file: a file takes four calls
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_views", dies)
        with pytest.raises(Killed):
            cache_features(settings_of(inputs, tmp_path / "cut", pca=6))
    with pytest.raises(DataError, match=r"expected a finished cache of features, got one that is not finished\. Run"):
        FeatureCache(tmp_path / "cut")
    assert [i for i in range(4) if shard_file(tmp_path / "cut", i).exists()] == [0]
    before = shard_file(tmp_path / "cut", 0).stat().st_mtime_ns
    assert cache_features(settings_of(inputs, tmp_path / "cut", pca=6))["new"] == 3
    assert shard_file(tmp_path / "cut", 0).stat().st_mtime_ns == before
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert cache_features(settings_of(inputs, tmp_path / "cut", pca=6))["new"] == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_another_encoder_data_set_or_setting_is_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache_features(settings_of(inputs, folder))
    before = contents(folder)
    other = tmp_path / "other.safetensors"
    train_small_features(*all_images(open_source(inputs[0])), seed=1, steps=3, width=8).save(other)
    fewer = tmp_path / "fewer.npz"
    with np.load(inputs[0]) as arrays:
        np.savez(fewer, images=arrays["images"][:40], labels=arrays["labels"][:40])
    for overrides, text in (
        ({"encoder_checkpoint": str(other)}, "encoder small-"),
        ({"data": str(fewer)}, "images 50 then, 40 now"),
        ({"pca": 4}, "pca 0 then, 4 now"),
        ({"flips": False}, "flips True then, False now"),
        ({"shard_images": 8}, "shard_images 16 then, 8 now"),
    ):
        with pytest.raises(ConfigError, match=f"expected the encoder, data and settings of this cache, got .*{text}"):
            cache_features(settings_of(inputs, folder, **overrides))
    assert contents(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"expected a new or empty folder, or a cache, got other files\. Choose"):
        cache_features(settings_of(inputs, tmp_path / "mine"))


def test_what_is_damaged_is_said_and_written_again(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache_features(settings_of(inputs, folder, pca=4))
    before = contents(folder)
    damaged = bytearray(before["shard-000001.bin"])
    damaged[7] ^= 1
    shard_file(folder, 1).write_bytes(damaged)
    with pytest.raises(DataError, match=r"shard-000001\.bin: expected sha256 .*Delete it"):
        FeatureCache(folder).verify()
    shard_file(folder, 1).write_bytes(damaged[:-1])
    with pytest.raises(DataError, match=r"shard-000001\.bin: expected \d+ bytes, got \d+ bytes\. Run"):
        FeatureCache(folder)
    shard_file(folder, 1).unlink()
    assert cache_features(settings_of(inputs, folder, pca=4))["new"] == 1
    assert contents(folder) == before
    (folder / BASIS).write_bytes(b"no")
    with pytest.raises(CheckpointError, match="expected the basis of a cache"):
        FeatureCache(folder)
    (folder / MANIFEST).write_text(json.dumps({"format": 2}))
    with pytest.raises(DataError, match=r"expected a manifest of format 1, got .*format 2"):
        FeatureCache(folder)
    with pytest.raises(DataError, match="expected a finished cache of features, got none"):
        FeatureCache(tmp_path / "nowhere")


def test_what_a_run_cannot_use_is_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    cache_features(settings_of(inputs, tmp_path / "cache", flips=False))
    cache = FeatureCache(tmp_path / "cache")
    own = {"data": cache.identity.data, "images": IMAGES}
    cache.check(**own, flips=False)
    with pytest.raises(ConfigError, match=r"expected tokens of mirrored images, got a cache without\. .*--flip-prob 0"):
        cache.check(**own, flips=True)
    with pytest.raises(ConfigError, match=r"expected one of this data: 50 images, ffff, got a cache of 50 images with"):
        cache.check(data="ffff", images=IMAGES, flips=False)
    with pytest.raises(DataError, match="expected tokens of mirrored images"):
        cache.read(0, flipped=True)


def test_a_full_disk_is_refused_before_anything_is_written(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match=r"expected [\d.]+ kB of free space, got 1 kB\. Take --pca"):
        cache_features(settings_of(inputs, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"pca": -1}, "pca: expected >= 0"),
        ({"batch_size": 0}, "batch_size: expected >= 1"),
        ({"encoder_checkpoint": None}, "expected the file of the encoder small"),
    ],
)
def test_bad_settings(bad: dict[str, Any], text: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        settings_of(inputs, tmp_path, **bad)


def command(inputs: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    given = ["cache-features", str(inputs[0]), "-o", str(output), "--encoder", "small"]
    given += ["--encoder-checkpoint", str(inputs[1]), "--resolution", "8"]
    return [*given, "--num-workers", "0", "--batch-size", "5", "--shard-images", str(SHARD), *more]


def test_the_command_prints_sizes_and_cosine(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(inputs, tmp_path / "cache", "--pca", "4", "--no-flips"))
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith("50 images x 1 views x ") and "as fp16); mean cosine to the original 0." in before
    assert before.endswith("4 of 4 files to write")
    assert "bytes in 4 files, 4 of them new; mean cosine to the original 0." in after
    with pytest.raises(SystemExit):
        main(["cache-features", "--help"])
    shown = capsys.readouterr().out
    assert "one that was cut is gone on with" in shown and "(default: 1024)" in shown


@pytest.mark.slow
def test_two_processes_write_what_one_does_and_a_kill_is_survived(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", str(29500 + os.getpid() % 2000), "-m", "vrpo_plugin.cli"]
    small = ("--pca", "6", "--shard-images", "1", "--batch-size", "1")
    arguments = command(inputs, tmp_path / "two", *small)
    process = subprocess.Popen([*launch, *arguments], env=environment)
    deadline = time.monotonic() + 300
    while not record_file(tmp_path / "two", 0).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    # The launcher first, which would end the others in order; they are in sessions of their own.
    launcher = psutil.Process(process.pid)
    for running in (launcher, *launcher.children(recursive=True)):
        running.kill()
    process.wait()
    assert "shards" not in json.loads((tmp_path / "two" / MANIFEST).read_text()), "it had ended before the kill"
    done = subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("mean cosine to the original") == 2  # said once before and once after
    main(command(inputs, tmp_path / "one", *small))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")

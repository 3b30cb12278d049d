"""``vrpo train-critic`` and the critic file that a run loads."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes.host_folders import reset_accelerate
from safetensors import safe_open

from vrpo_plugin import CheckpointError, ConfigError, DataError, VRPOAligner, VRPOConfig
from vrpo_plugin.cli import main
from vrpo_plugin.modules.critic import LatentCritic, load_critic_weights
from vrpo_plugin.standalone import train_critic as module
from vrpo_plugin.standalone.cache_features import CacheSettings, cache_features
from vrpo_plugin.standalone.feature_cache import FeatureCache
from vrpo_plugin.standalone.sit import create_sit
from vrpo_plugin.standalone.small_training import train_small_features
from vrpo_plugin.standalone.sources import DigitsSource, all_images, open_source
from vrpo_plugin.standalone.targets import load_targets
from vrpo_plugin.standalone.train_critic import HELD_OUT_EVERY, CriticTraining, Part, PartOfCache, train_critic

OPTIONS = (
    "--resolution 8 --enc-type small --critic-width 16 --batch-size 64 --learning-rate 0.003 --num-workers 0".split(" ")
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("critic") / "critic.safetensors"
    main(["train-critic", "--output", str(path), "--steps", "300", *OPTIONS])
    return path


def test_critic_agrees_with_encoder_on_held_out_images(trained: Path) -> None:
    source = DigitsSource()
    targets = load_targets("small", source, checkpoint=str(trained.with_suffix(".encoder.safetensors")))
    critic = LatentCritic((1, 8, 8), targets.dims, targets.grid, width=16)
    record = load_critic_weights(critic, trained)
    held_out = Part(source, held_out=True)
    images = torch.stack([held_out.load(i)[0] for i in range(64)])
    z = targets.encode(images)[0]
    constant = torch.cosine_similarity(z.mean(0).expand_as(z), z, dim=-1).mean()  # says nothing of the image
    assert record["held_out_cosine"] > float(constant) + 0.1
    tokens = critic(images / 127.5 - 1).tokens[0]
    cosine = torch.cosine_similarity(tokens, z, dim=-1).mean()
    assert abs(cosine.item() - record["held_out_cosine"]) < 0.1


def test_run_uses_it_frozen(trained: Path) -> None:
    sizes = {"hidden_dim": 32, "depth": 2, "latent_shape": (1, 8, 8), "token_grid": (4, 4), "target_dims": (64,)}
    aligner = VRPOAligner(**sizes, critic_width=16, critic_checkpoint=str(trained), critic_trainable=False)
    assert aligner.critic is not None
    assert not any(p.requires_grad for p in aligner.critic.parameters())
    with pytest.raises(CheckpointError, match="width"):
        VRPOAligner(**sizes, critic_width=32, critic_checkpoint=str(trained))


def test_a_run_with_another_encoder_normalisation_or_data_is_refused(trained: Path, tmp_path: Path) -> None:
    source, options = DigitsSource(), {"critic_width": 16, "critic_checkpoint": str(trained)}
    own = load_targets("small", source, checkpoint=str(trained.with_suffix(".encoder.safetensors")))
    model = create_sit("SiT-Ti/2", input_size=8, in_channels=1, num_classes=10)
    VRPOAligner.from_model(model, own, **options)
    VRPOAligner.from_model(model, own, config=VRPOConfig(**options, critic_trainable=False))
    with pytest.raises(CheckpointError, match="critic of target_norm spatial, got none"):
        VRPOAligner.from_model(model, own, target_norm="spatial", **options)
    images, labels = all_images(source, 200)
    train_small_features(images, labels, seed=5, steps=2).save(tmp_path / "other.safetensors")
    other = load_targets("small", source, checkpoint=str(tmp_path / "other.safetensors"))
    with pytest.raises(CheckpointError, match=r"critic of encoder small-\S+, got small-\S+\. Train one"):
        VRPOAligner.from_model(model, other, **options)
    with pytest.raises(CheckpointError, match=r"latent_scale 0\.18215, got 1\.0"):
        VRPOAligner.from_model(model, replace(own, latent_scale=0.18215), **options)


def test_existing_output_is_kept(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = trained.read_bytes()
    with pytest.raises(SystemExit, match="expected a new file"):
        main(["train-critic", "--output", str(trained), *OPTIONS])
    assert trained.read_bytes() == before


def test_parts_share_no_image() -> None:
    source = DigitsSource()
    held_out, rest = Part(source, held_out=True), Part(source, held_out=False)
    assert not set(held_out.indices) & set(rest.indices)
    assert len(held_out) + len(rest) == len(source)
    assert abs(len(held_out) - len(source) / HELD_OUT_EVERY) < 1


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    output = str(tmp_path / "critic.safetensors")
    with pytest.raises(ConfigError, match="> 0"):
        train_critic(CriticTraining(output=output, steps=0))
    with pytest.raises(DataError):
        train_critic(CriticTraining(output=output, data_dir=str(tmp_path / "nowhere")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate: expected > 0"),
        ({"learning_rate": float("inf")}, "learning_rate: expected > 0"),
        ({"num_workers": -1}, "num_workers >= 0, critic_width >= 4, got -1 and 16"),
        ({"critic_width": 2}, "num_workers >= 0, critic_width >= 4, got 0 and 2"),
    ],
)
def test_settings_that_would_fail_later(changed: dict, message: str, tmp_path: Path) -> None:
    settings = {"resolution": 8, "enc_type": "small", "critic_width": 16, "num_workers": 0, "steps": 1, **changed}
    with pytest.raises(ConfigError, match=message):
        train_critic(CriticTraining(output=str(tmp_path / "critic.safetensors"), **settings))
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_refused_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    output = tmp_path / "file" / "critic.safetensors"
    settings = {"resolution": 8, "enc_type": "small", "critic_width": 16, "num_workers": 0, "steps": 10**9}
    with pytest.raises(ConfigError, match="expected a file in a folder that can be written"):
        train_critic(CriticTraining(output=str(output), **settings))


def test_an_encoder_of_other_images_is_not_taken_by_chance(trained: Path, tmp_path: Path) -> None:
    encoder = trained.with_suffix(".encoder.safetensors")
    left = tmp_path / "critic.encoder.safetensors"
    left.write_bytes(encoder.read_bytes())
    with pytest.raises(SystemExit, match="got an encoder of an earlier run"):
        main(["train-critic", "--output", str(tmp_path / "critic.safetensors"), "--steps", "1", *OPTIONS])
    chosen = ["--enc-checkpoint", str(left)]
    main(["train-critic", "--output", str(tmp_path / "critic.safetensors"), "--steps", "1", *OPTIONS, *chosen])


TINY = {"resolution": 8, "enc_type": "small", "critic_width": 16, "batch_size": 16, "num_workers": 0, "steps": 9}


@pytest.fixture
def _another_precision() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first accelerator."""
    reset_accelerate()
    yield
    reset_accelerate()


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and record of a critic."""
    with safe_open(file, "pt") as opened:
        record = json.loads(opened.metadata()["record"])
        return {name: opened.get_tensor(name) for name in opened.keys()}, record  # noqa: SIM118  no mapping


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("encoder") / "small.safetensors"
    train_small_features(*all_images(DigitsSource()), seed=0, steps=5).save(path)
    return str(path)


@pytest.mark.usefixtures("_another_precision")
@pytest.mark.parametrize(("precision", "stop_at"), [("no", 4), ("no", 9), ("bf16", 5)])
def test_a_stopped_training_resumes_bitwise(
    precision: Any, stop_at: int, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CriticTraining(
        output=str(tmp_path / "whole.safetensors"), enc_checkpoint=encoder, mixed_precision=precision, **TINY
    )
    train_critic(settings)
    cut = replace(settings, output=str(tmp_path / "cut.safetensors"), checkpointing_steps=2)
    with monkeypatch.context() as patch:
        save = module._Training.save

        def killed(self: Any) -> None:
            save(self)
            if self.step >= stop_at - 1:
                raise KeyboardInterrupt

        patch.setattr(module._Training, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train_critic(cut)
    assert not Path(cut.output).exists() and (tmp_path / "cut.checkpoints").is_dir()
    with pytest.raises(ConfigError, match=r"cut\.checkpoints: expected no folder, .* Pass --resume"):
        train_critic(cut)
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.001 then, 0\.002 now"):
        train_critic(replace(cut, resume=True, learning_rate=0.002))
    train_critic(replace(cut, resume=True))
    (ours, record), (theirs, other) = contents(Path(cut.output)), contents(Path(settings.output))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    assert record | {"output": ""} == other | {"output": ""} and record["mixed_precision"] == precision
    assert not list(tmp_path.glob("*.checkpoints"))


def test_the_small_encoder_of_a_stopped_training_is_found_again(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = load_targets("small", DigitsSource(), checkpoint=encoder)
    cache = tmp_path / "critic.encoder.safetensors"
    monkeypatch.setattr(module, "load_targets", lambda *a, cache, **k: (cache.write_bytes(b"x"), made)[1])
    monkeypatch.setattr(module._Training, "train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    settings = CriticTraining(output=str(tmp_path / "critic.safetensors"), **TINY)
    with pytest.raises(KeyboardInterrupt):
        train_critic(settings)
    assert cache.exists()
    monkeypatch.setattr(module._Training, "train", lambda self: None)
    train_critic(replace(settings, resume=True))
    assert Path(settings.output).exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_the_command_with_a_checkpoint_that_resumes_bitwise(
    processes: int, encoder: str, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launcher += ["--multi_gpu", "--main_process_port", str(29500 + os.getpid() % 2000)] if processes > 1 else []
    options = [*OPTIONS, "--steps", "200", "--enc-checkpoint", encoder]
    command = [*launcher, "-m", "vrpo_plugin.cli", "train-critic", *options, "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*command, str(tmp_path / "whole.safetensors")], env=environment, check=True, timeout=300)
    cut = [*command, str(tmp_path / "cut.safetensors"), "--checkpointing-steps", "10"]
    process = subprocess.Popen(
        cut, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    checkpoints, deadline = tmp_path / "cut.checkpoints", time.monotonic() + 200
    while not list(checkpoints.glob("0000[0-1][1-9]0")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)
    said, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    (stopped,) = re.findall(r"stopped by SIGTERM after step (\d+), with a checkpoint", said)
    assert max(path.name for path in checkpoints.iterdir()) == f"{int(stopped):07d}", errors
    subprocess.run([*cut, "--resume"], env=environment, check=True, timeout=300)
    ours, theirs = (contents(tmp_path / f"{name}.safetensors")[0] for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_repa_latents_train_a_critic(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    names = [f"00000/img{i:08d}" for i in range(2 * HELD_OUT_EVERY)]
    for folder in ("images", "vae-sd"):
        (tmp_path / "data" / folder / "00000").mkdir(parents=True)
    for name in names:
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{name}.png")
        moments = np.abs(generator.normal(size=(8, 4, 4))).astype(np.float32)
        np.save(tmp_path / "data" / "vae-sd" / f"{name}.npy", moments)
    labels = {"labels": [[f"{name}.npy", i % 3] for i, name in enumerate(names)]}
    (tmp_path / "data" / "vae-sd" / "dataset.json").write_text(json.dumps(labels))
    output = tmp_path / "critic.safetensors"
    settings = {
        "resolution": 32,
        "enc_type": "small",
        "critic_width": 16,
        "batch_size": 8,
        "steps": 3,
        "num_workers": 0,
    }
    train_critic(CriticTraining(output=str(output), data_dir=str(tmp_path / "data"), **settings))
    critic = LatentCritic((4, 4, 4), (64,), (8, 8), width=16)
    assert load_critic_weights(critic, output)["steps"] == 3


def test_stored_tokens_stand_for_the_encoder(trained: Path, tmp_path: Path) -> None:
    encoder = str(trained.with_suffix(".encoder.safetensors"))
    images, labels = all_images(DigitsSource(), 400)
    np.savez(tmp_path / "data.npz", images=images.numpy(), labels=labels.numpy())
    own = {
        "data_dir": str(tmp_path / "data.npz"),
        "resolution": 8,
        "critic_width": 16,
        "batch_size": 64,
        "num_workers": 0,
    }
    own |= {"learning_rate": 3e-3, "steps": 150}
    folder = tmp_path / "features"
    caching = {"data": own["data_dir"], "encoder": "small", "encoder_checkpoint": encoder, "resolution": 8}
    cache_features(CacheSettings(output=str(folder), num_workers=0, **caching))

    asked = train_critic(
        CriticTraining(output=str(tmp_path / "asked.safetensors"), enc_type="small", enc_checkpoint=encoder, **own)
    )
    stored = train_critic(CriticTraining(output=str(tmp_path / "stored.safetensors"), features_dir=str(folder), **own))
    assert stored["made_for"] == asked["made_for"] and stored["enc_type"] == asked["made_for"]["encoder"]
    # Tokens in half precision; those of other images would agree no better than at the start.
    assert abs(stored["held_out_cosine"] - asked["held_out_cosine"]) < 0.005 < stored["held_out_cosine"] - 0.3
    assert not (tmp_path / "stored.encoder.safetensors").exists()

    cache = FeatureCache(folder)
    part = Part(open_source(own["data_dir"], 8), held_out=True)
    assert torch.equal(PartOfCache(cache, part).read(3), cache.read(3 * HELD_OUT_EVERY))
    with pytest.raises(ConfigError, match="features_dir: expected None with enc_checkpoint"):
        train_critic(
            CriticTraining(output=str(tmp_path / "n"), features_dir=str(folder), enc_checkpoint=encoder, **own)
        )
    other = {**own, "data_dir": None}
    with pytest.raises(ConfigError, match="one of this data: 1797 images"):
        train_critic(CriticTraining(output=str(tmp_path / "n"), features_dir=str(folder), **other))

"""The main job as users run it: real processes, real files, a real kill."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import harness
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vrpo_plugin.cli import main as vrpo_main
from vrpo_plugin.modules.critic import LatentCritic, save_critic
from vrpo_plugin.standalone.evaluate import EvalResult, evaluate, read_results
from vrpo_plugin.standalone.sampler import sample
from vrpo_plugin.standalone.sit import create_sit
from vrpo_plugin.standalone.small_training import train_small_features
from vrpo_plugin.standalone.sources import DigitsSource, all_images

pytestmark = pytest.mark.slow
TWENTY = ("--max-train-steps", "20", "--checkpointing-steps", "20")


@pytest.fixture(scope="module")
def straight(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.run(tmp_path_factory.mktemp("straight"), "run", encoder=encoder)


def test_run_writes_metrics_curves_grid_and_checkpoints(encoder: Path, straight: Path, tmp_path: Path) -> None:
    folder = harness.run(
        tmp_path, "run", "--sampling-steps", "6", "--eval-samples", "64", "--solver-steps", "4", encoder=encoder
    )
    rows = harness.metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 13))
    wanted = {
        "loss",
        "denoising_loss",
        "vrpo/reward/semantic",
        "vrpo/weight/perceptual",
        "vrpo/critic_cos",
        "grad_norm",
    }
    assert wanted <= rows[0].keys()
    assert rows[-1]["vrpo/align_cos"] > rows[0]["vrpo/align_cos"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["0000004", "0000008", "0000012"]
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["0000006.png", "0000012.png"]
    for name in ("curves.png", "config.json", "evaluation.json"):
        assert (folder / name).stat().st_size > 0
    looks = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert [(look["step"], look["held_out/alarm"]) for look in looks] == [(6, 0), (12, 0)]
    assert harness.metrics(folder) == harness.metrics(straight)  # grids and looks have changed no step
    after_training(folder, straight, tmp_path)


def guided(run: Path, guide: Path, out: Path) -> None:
    plain = out.with_name(f"{out.name} plain")
    vrpo_main(["sample", str(run), "-o", str(out), "--num", "8", "--steps", "4", "--guide", str(guide)])
    vrpo_main(["sample", str(run), "-o", str(plain), "--num", "8", "--steps", "4"])
    assert json.loads((out / "samples.json").read_text())["guide"]["strength"] > 0
    pictures = [[(folder / f"{i:06d}.png").read_bytes() for i in range(8)] for folder in (out, plain)]
    assert pictures[0] != pictures[1]


def after_training(folder: Path, other: Path, tmp_path: Path) -> None:
    """README's commands on the run."""
    samples = tmp_path / "images"
    vrpo_main(["sample", str(folder), "-o", str(samples), "--num", "64", "--steps", "4"])
    vrpo_main(["eval", str(samples), "--reference", str(folder), "--network", str(folder), "--num-workers", "0"])
    (measured,) = read_results(samples / "evaluations.jsonl")
    at_the_end = EvalResult.from_json((folder / "evaluation.json").read_text())
    made, then = measured.protocol, at_the_end.protocol
    assert (made.feature_network, made.num_reference) == (then.feature_network, then.num_reference)
    # Other noise than the trainer's: of 64 samples after 12 steps the distance hardly depends on it.
    assert measured.frechet_distance == pytest.approx(at_the_end.frechet_distance, rel=0.1)
    guided(folder, folder / "guide.safetensors", tmp_path / "guided")
    critic, file = LatentCritic((1, 8, 8), (64,), (4, 4), width=16), tmp_path / "critic.safetensors"
    save_critic(critic, file)
    guided(other, file, tmp_path / "guided by a critic")  # a run's projectors with a critic of their own
    alone = tmp_path / "weights.safetensors"
    alone.write_bytes((folder / "checkpoints" / "0000012" / "ema.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(SystemExit, match="guide: expected a guide, for weights alone, got a critic"):
        guided(alone, file, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    vrpo_main(["plot", str(folder)])
    assert (folder / "report.html").stat().st_size > 10_000
    vrpo_main(["compare", str(folder), str(other), "--json"])


@pytest.mark.parametrize("checkpointing_steps", [4, 12])
def test_killed_run_resumes_bitwise(checkpointing_steps: int, encoder: Path, straight: Path, tmp_path: Path) -> None:
    every = ("--checkpointing-steps", str(checkpointing_steps))
    options = ("--enc-checkpoint", str(encoder), "--resume", *every)
    process = subprocess.Popen(
        harness.command(tmp_path, "run", *options),
        env=harness.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    first, metrics = tmp_path / "run" / "checkpoints" / "0000004", tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    # Killed after a line that no checkpoint covers: one is there already, or the first is still to come.
    wanted = 4 if checkpointing_steps == 4 else 0
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > wanted and first.exists() == (wanted > 0)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "checkpoints" / "0000012").exists()
    resumed = harness.run(tmp_path, "run", "--resume", *every, encoder=encoder)
    harness.assert_same(resumed, straight, 12)


@pytest.mark.parametrize("method", ["vrpo", "repa"])
def test_a_critics_tokens_need_no_encoder(method: str, tmp_path: Path) -> None:
    critic = tmp_path / "critic.safetensors"
    save_critic(LatentCritic((1, 8, 8), (12,), (4, 4), width=16), critic)
    settings = ("--targets", "critic", "--critic-checkpoint", str(critic), "--no-critic-trainable")
    nowhere = tmp_path / "no-encoder-here.safetensors"  # would be an error where it is read
    folder = harness.run(tmp_path, "run", "--method", method, *settings, encoder=nowhere)
    rows = harness.metrics(folder)
    assert len(rows) == 12 and rows[-1]["vrpo/align_cos"] > rows[0]["vrpo/align_cos"]
    assert ("vrpo/reward/semantic" in rows[0]) == (method == "vrpo") and "vrpo/critic_cos" not in rows[0]
    assert not list(folder.glob("encoder*.safetensors")), "a small encoder was trained"
    cut = harness.cut(folder, tmp_path / "cut", step=4)
    resumed = harness.run(cut.parent, "cut", "--resume", "--method", method, *settings, encoder=nowhere)
    harness.assert_same(resumed, folder, 12)


def test_stored_features_train_as_the_encoder_does(encoder: Path, tmp_path: Path) -> None:
    images, labels = all_images(DigitsSource())
    np.savez(tmp_path / "digits.npz", images=images.numpy(), labels=labels.numpy())
    data = ("--data-dir", str(tmp_path / "digits.npz"), "--resolution", "8", "--model", "SiT-Ti/2")
    data = (*data, "--enc-type", "small", "--flip-prob", "0.5")
    settings = ["cache-features", data[1], "-o", str(tmp_path / "features"), "--encoder", "small", "--resolution", "8"]
    vrpo_main([*settings, "--encoder-checkpoint", str(encoder), "--num-workers", "0"])
    online = harness.metrics(harness.run(tmp_path, "online", *data, encoder=encoder))
    nowhere = tmp_path / "no-encoder-here.safetensors"
    stored = ("--features-dir", str(tmp_path / "features"))
    runs = [harness.run(tmp_path, f"{n}", *data, *stored, processes=n, encoder=nowhere) for n in (1, 2)]
    for run in runs:
        for ours, theirs in zip(harness.metrics(run), online, strict=True):
            # fp16's rounding of the targets, which the steps after it feel; and another order of summation.
            for key in ("loss", "proj_loss", "vrpo/reward/semantic", "vrpo/critic_cos"):
                assert ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=2e-4), key
    np.savez(tmp_path / "fewer.npz", images=images[:900].numpy(), labels=labels[:900].numpy())
    other = harness.launch(tmp_path, "other", *data, "--data-dir", str(tmp_path / "fewer.npz"), *stored)
    assert other.returncode != 0 and "expected one of this data: 900 images" in other.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("options", [(), ("--method", "repa", "--gradient-accumulation-steps", "2")])
def test_two_processes_resume_bitwise(options: tuple[str, ...], encoder: Path, tmp_path: Path) -> None:
    whole = harness.run(tmp_path, "whole", *options, processes=2, encoder=encoder)
    cut = harness.cut(whole, tmp_path / "cut", step=4)
    resumed = harness.run(cut.parent, "cut", "--resume", *options, processes=2, encoder=encoder)
    harness.assert_same(resumed, whole, 12)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on(first: int, second: int, encoder: Path, tmp_path: Path) -> None:
    whole = harness.run(tmp_path, "whole", processes=first, encoder=encoder)
    cut = harness.cut(whole, tmp_path / "cut", step=4)
    resumed = harness.run(cut.parent, "cut", "--resume", processes=second, encoder=encoder)
    # As in test_two_processes_equal_one: the same samples, summed in another order.
    for a, b in zip(harness.metrics(whole), harness.metrics(resumed), strict=True):
        for name in ("loss", "denoising_loss", "critic_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), (a["step"], name)
    ours, theirs = harness.weights(whole, 12), harness.weights(resumed, 12)
    assert ours.keys() == theirs.keys()
    # One of Adam's moments is another as soon as a restored one is not there: that is far above these tolerances.
    for name in [k for k in ours if not re.search(r"\.(statistics|watch)\.", k)]:
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [(), ("--deterministic",)])
def test_same_seed_twice_is_identical(options: tuple[str, ...], encoder: Path, straight: Path, tmp_path: Path) -> None:
    # On a CPU every kernel here is deterministic anyway: the option must not change a bit, nor find one that is not.
    harness.assert_same(harness.run(tmp_path, "again", *options, encoder=encoder), straight, 12)


@pytest.mark.parametrize("scale", ["none", "group"])
def test_two_processes_equal_one(scale: str, encoder: Path, tmp_path: Path) -> None:
    """With the defaults: statistics, weights and advantages too."""
    options = ("--scale", scale, "--reward-coeff", "1.2" if scale == "none" else "0.12", *TWENTY)
    one = harness.run(tmp_path, "one", *options, encoder=encoder)
    two = harness.run(tmp_path, "two", *options, processes=2, encoder=encoder)
    # Batches and gradients are summed in another order; float32 rounds at 6e-8, and twenty steps of Adam let it grow.
    for a, b in zip(harness.metrics(one), harness.metrics(two), strict=True):
        compared = [name for name in a if name not in ("step", "seconds")]
        assert {"vrpo/weight/semantic", "vrpo/std/semantic", "vrpo/advantage_abs", "grad_norm"} < {*compared}
        # A process's mean of the ratios is that of its samples; the mean over processes is that of all.
        for name in compared:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (a["step"], name)
    ours, theirs = harness.weights(one, 20), harness.weights(two, 20)
    for name in ours:
        if name.startswith(("model/", "ema/")):
            torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=1e-4, atol=1e-5, msg=name)


# What the first few samples say of a reward's deviation differs; with a scale that sets the size of the first steps.
ACCUMULATION = {
    "none": {"denoising_loss": 0.02, "loss": 0.02, "grad_norm": 0.15},
    "group": {"denoising_loss": 0.06, "loss": 0.06, "vrpo/std/semantic": 0.06},
}


@pytest.mark.parametrize("scale", ACCUMULATION)
def test_accumulation_equals_one_batch(scale: str, encoder: Path, tmp_path: Path) -> None:
    """With the defaults: in the first steps the weights of the rewards come from few samples, and differ."""
    options = ("--scale", scale, "--reward-coeff", "1.2" if scale == "none" else "0.12", *TWENTY)
    whole = harness.run(tmp_path, "whole", *options, "--batch-size", "8", encoder=encoder)
    split = harness.run(
        tmp_path, "split", *options, "--batch-size", "1", "--gradient-accumulation-steps", "8", encoder=encoder
    )
    for a, b in zip(harness.metrics(whole), harness.metrics(split), strict=True):
        assert a["critic_loss"] == pytest.approx(b["critic_loss"], rel=1e-3), a["step"]
        if a["step"] > 5:
            for name, tolerance in ACCUMULATION[scale].items():
                assert a[name] == pytest.approx(b[name], rel=tolerance), (a["step"], name)
            assert a["vrpo/weight/semantic"] == pytest.approx(b["vrpo/weight/semantic"], abs=0.05), a["step"]


def test_accumulation_with_fixed_weights_is_exact(encoder: Path, tmp_path: Path) -> None:
    fixed = ("--reward-weights", "equal", "--scale", "none", "--reward-coeff", "1.2", *TWENTY)
    whole = harness.run(tmp_path, "whole", *fixed, "--batch-size", "8", encoder=encoder)
    split = harness.run(
        tmp_path, "split", *fixed, "--batch-size", "1", "--gradient-accumulation-steps", "8", encoder=encoder
    )
    # One sum over eight samples against eight sums.
    for a, b in zip(harness.metrics(whole), harness.metrics(split), strict=True):
        for name in ("loss", "denoising_loss", "generation_loss", "critic_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), (a["step"], name)


def test_without_dropped_labels(encoder: Path, tmp_path: Path) -> None:
    folder = harness.run(tmp_path, "run", "--cfg-prob", "0", "--sampling-steps", "12", encoder=encoder)
    table = harness.weights(folder, 12)["model/y_embedder.embedding_table.weight"]
    assert len(table) == 10 and (folder / "samples/0000012.png").exists()


def test_accelerate_launch_chooses_the_precision(encoder: Path, tmp_path: Path) -> None:
    asked = harness.run(tmp_path, "asked", "--mixed-precision", "bf16", encoder=encoder)
    launched = subprocess.run(
        [*(command := harness.command(tmp_path, "launched", "--enc-checkpoint", str(encoder)))[:3], "--mixed_precision",
         "bf16", *command[3:]],
        env=harness.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    harness.assert_same(tmp_path / "launched", asked, 12)
    settings = json.loads((tmp_path / "launched" / "config.json").read_text())["settings"]
    assert settings["mixed_precision"] == "bf16"


def test_an_evaluation_repeated_from_its_stamp_gives_its_number(encoder: Path, tmp_path: Path) -> None:
    options = ("--eval-samples", "64", "--solver-steps", "3", "--solver", "heun", "--cfg-scale", "1.5")
    folder = harness.run(tmp_path, "run", *options, "--max-train-steps", "4", encoder=encoder)
    first = (folder / "evaluation.json").read_text()
    result = EvalResult.from_json(first)
    stamp, source = result.protocol, DigitsSource(8)
    model = create_sit("SiT-Ti/2", input_size=8, in_channels=1, num_classes=10)
    model.load_state_dict(load_file(folder / "checkpoints/0000004/ema.safetensors"))
    shape = (stamp.num_samples, 1, 8, 8)
    images = sample(
        model,
        torch.randn(shape, generator=torch.Generator().manual_seed(stamp.seed)),
        torch.arange(stamp.num_samples) % 10,
        num_steps=stamp.num_steps,
        solver=stamp.solver,
        guidance_scale=stamp.guidance_scale,
        guidance_interval=stamp.guidance_interval,
    )
    images = images.add(1).mul(127.5).round().clamp(0, 255).byte()
    real, labels = all_images(source)
    judge = train_small_features(real, labels, seed=1, architecture="plain", width=24)
    again = evaluate(judge, real, images, stamp)
    assert again.frechet_distance == pytest.approx(result.frechet_distance, rel=1e-3)
    assert (again.precision, again.recall) == pytest.approx((result.precision, result.recall), abs=0.02)
    # Another protocol on the finished run has a file of its own.
    resumed = ("--resume", *options, "--max-train-steps", "4")
    harness.run(tmp_path, "run", *resumed, "--guidance-high", "0.5", encoder=encoder)
    assert (folder / "evaluation.json").read_text() == first
    (other,) = folder.glob("evaluation-*.json")
    assert EvalResult.from_json(other.read_text()).protocol.guidance_interval == (0, 0.5)


REFUSED_FIRST = {
    "a tracker": (("--report-to", "no-such-tracker"), "report_to: expected none, or a tracker"),
    "a judge": (("--eval-samples", "64", "--eval-network", "no-such-network"), "encoder: expected a model"),
    "its file": (
        ("--eval-samples", "64", "--eval-network", "resnet18", "--eval-checkpoint", "absent.pt"),
        "checkpoint of encoder 'resnet18': expected",
    ),
    "guidance": (("--cfg-scale", "0.5"), "cfg_scale: expected >= 1"),
    "checkpoints": (("--keep-last", "0"), "keep_last: expected > 0"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED_FIRST.values(), ids=REFUSED_FIRST)
def test_what_is_used_at_the_end_is_checked_first(
    options: tuple[str, ...], said: str, encoder: Path, tmp_path: Path
) -> None:
    result = harness.launch(tmp_path, "run", *options, encoder=encoder)
    assert result.returncode != 0 and said in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()


def _write_digits(folder: Path) -> list[tuple[str, int]]:
    """The first 60 digits as 32-pixel RGB files in class folders; names and labels."""
    names = []
    source = DigitsSource(32)
    for i in range(60):
        image, _, label = source.load(i)
        name = f"{label:05d}/img{i:08d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).convert("RGB").save(folder / name)
        names.append((name, label))
    return names


def test_image_folder_trains_with_a_frozen_pretrained_critic(tmp_path: Path) -> None:
    _write_digits(tmp_path / "data")
    common = ["--data-dir", str(tmp_path / "data"), "--enc-type", "small", "--critic-width", "16", "--num-workers", "0"]
    critic = tmp_path / "critic.safetensors"
    settings = ["--resolution", "32", "--steps", "3", "--batch-size", "8"]
    vrpo_main(["train-critic", "--output", str(critic), *settings, *common])
    frozen = ["--critic-checkpoint", str(critic), "--no-critic-trainable"]
    images = ["--resolution", "32", "--model", "SiT-Ti/2", "--max-train-steps", "2", "--flip-prob", "0.5"]
    encoder = critic.with_suffix(".encoder.safetensors")
    folder = harness.run(tmp_path, "run", *common, *images, *frozen, encoder=encoder)
    rows = harness.metrics(folder)
    assert "grad_norm_critic" not in rows[0]
    assert rows[0]["critic_loss"] == 0
    trained, given = harness.weights(folder, 2), load_file(critic)
    for name, value in given.items():
        assert torch.equal(trained[f"model/vrpo.generation.critic.{name}"], value), name


def test_repa_layout_trains_on_cached_latents(tmp_path: Path) -> None:
    names = _write_digits(tmp_path / "data" / "images")
    labels = []
    for i, (name, label) in enumerate(names):
        file = tmp_path / "data" / "vae-sd" / name.replace("img", "img-mean-std-").replace(".png", ".npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.abs(np.random.default_rng(i).normal(size=(8, 4, 4))).astype(np.float32))
        labels.append([str(file.relative_to(tmp_path / "data" / "vae-sd")), label])
    (tmp_path / "data" / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    options = ["--data-dir", str(tmp_path / "data"), "--resolution", "32", "--enc-type", "small", "--model", "SiT-Ti/2"]
    folder = harness.run(tmp_path, "run", *options, "--max-train-steps", "2")
    assert len(harness.metrics(folder)) == 2
    flipped = harness.launch(tmp_path, "flipped", *options, "--flip-prob", "0.5")
    assert "flip_prob: expected 0 with cached latents" in flipped.stderr and not (tmp_path / "flipped").exists()
    without_vae = subprocess.run(
        [*harness.command(tmp_path, "grids", *options), "--sampling-steps", "1"],
        env=harness.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert without_vae.returncode != 0
    assert "vae: expected a diffusers folder" in without_vae.stderr
    assert not (tmp_path / "grids").exists()


@pytest.mark.parametrize("method", ["none", "repa", "irepa"])
def test_baselines_run(method: str, encoder: Path, tmp_path: Path) -> None:
    folder = harness.run(tmp_path, method, "--method", method, "--max-train-steps", "4", encoder=encoder)
    rows = harness.metrics(folder)
    assert len(rows) == 4
    assert ("proj_loss" in rows[0]) == (method != "none")
    assert "vrpo/critic_cos" not in rows[0]
    assert not any("critic" in name for name in harness.weights(folder, 4))


def test_bf16_run_is_finite_and_close_to_fp32(encoder: Path, straight: Path, tmp_path: Path) -> None:
    folder = harness.run(tmp_path, "bf16", "--mixed-precision", "bf16", encoder=encoder)
    for a, b in zip(harness.metrics(straight), harness.metrics(folder), strict=True):
        # bfloat16 carries 8 bits: products differ by 0.4%, and 12 steps of Adam multiply that.
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05), a["step"]

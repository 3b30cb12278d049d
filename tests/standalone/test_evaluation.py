"""``vrpo eval`` on real files: small networks, folders, ADM's npz, stored features."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes.inception import write_inception_weights
from PIL import Image

from vrpo_plugin.cli import main
from vrpo_plugin.commands import evaluate
from vrpo_plugin.errors import ConfigError
from vrpo_plugin.standalone.evaluate import EvalResult, read_results
from vrpo_plugin.standalone.evaluation import run_evaluation
from vrpo_plugin.standalone.extractors import Extractor
from vrpo_plugin.standalone.frechet import FeatureStatistics, frechet_distance
from vrpo_plugin.standalone.image_sets import open_images
from vrpo_plugin.standalone.images import center_crop
from vrpo_plugin.standalone.metrics import kernel_distance
from vrpo_plugin.standalone.precision_recall import precision_recall
from vrpo_plugin.standalone.small_network import SmallFeatureNetwork, build_body, load_small_features
from vrpo_plugin.standalone.stamp import EvalSettings

REPO = Path(__file__).resolve().parents[2]
RECORD = {
    "format": 1,
    "model": "SiT-S/2",
    "checkpoint_sha256": "ab" * 32,
    "step": 4000,
    "ema": True,
    "solver": "heun",
    "num_steps": 25,
    "guidance_scale": 1.5,
    "guidance_interval": [0.0, 0.7],
    "guide": {"sha256": "cd", "strength": 0.5, "interval": [0.0, 1.0]},
    "labels": "balanced",
    "seed": 7,
    "num_samples": 40,
    "resolution": 16,
    "mixed_precision": "bf16",
    "complete": True,
}


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def blurred(rng: np.random.Generator, count: int, side: int) -> np.ndarray:
    """Images (N, side, side, 3) with structure, so that feature networks see differences."""
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in coarse])


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """40 samples of 16 pixels with their record, 50 real images of 32 in two classes, two feature networks."""
    root = tmp_path_factory.mktemp("evaluation")
    rng = np.random.default_rng(0)
    for number, pixels in enumerate(blurred(rng, 40, 16)):
        write_png(root / "samples" / f"{number:06d}.png", (pixels * 0.8).astype(np.uint8))
    (root / "samples" / "samples.json").write_text(json.dumps(RECORD))
    for number, pixels in enumerate(blurred(rng, 50, 32)):
        write_png(root / "real" / "ab"[number % 2] / f"{number:03d}.png", pixels)
    for seed, name in enumerate(("one", "two")):
        body = build_body(3, 16, 8, "plain", seed)
        SmallFeatureNetwork(3, 16, 8, "plain", seed, 0.5, body).save(root / f"{name}.safetensors")
    return root


@pytest.fixture
def folder(template, tmp_path, monkeypatch):
    """A copy in which a test may write; the working directory."""
    import shutil

    shutil.copytree(template, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def vrpo_eval(*arguments: str) -> None:
    main(["eval", *arguments, "--num-workers", "0"])


def refusal(*arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        vrpo_eval(*arguments)
    assert isinstance(caught.value.code, str), "it was not refused in words"
    return caught.value.code


def features_of(network: str, folder: str, side: int) -> torch.Tensor:
    paths = sorted(Path(folder).rglob("*.png"), key=lambda path: str(path.relative_to(folder)))
    pixels = [np.asarray(center_crop(Image.open(path).convert("RGB"), side)) for path in paths]
    return load_small_features(network)(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous())


def test_the_numbers_are_those_of_the_functions_and_carry_the_protocol(folder, capsys):
    vrpo_eval("samples", "--reference", "real", "--network", "one.safetensors", "--network", "two.safetensors")
    shown = capsys.readouterr().out
    assert "reference: 50 images center-cropped to 16x16 pixels in real" in shown
    assert "added 2 results to samples/evaluations.jsonl" in shown and "unknown" not in shown
    results = read_results("samples/evaluations.jsonl")
    for name, result in zip(("one", "two"), results, strict=True):
        network = load_small_features(f"{name}.safetensors")
        generated, real = (
            features_of(f"{name}.safetensors", "samples", 16),
            features_of(f"{name}.safetensors", "real", 16),
        )
        a, b = (FeatureStatistics.from_features(one) for one in (generated, real))
        assert result.frechet_distance == pytest.approx(frechet_distance(b, a), rel=1e-6)
        both = precision_recall(real, generated)
        assert (result.precision, result.recall) == (both.precision, both.recall)
        kernel = kernel_distance(generated, real, subset_size=40)
        assert result.kernel_distance == pytest.approx(kernel.mean, rel=1e-6)
        assert result.kernel_distance_std == pytest.approx(kernel.std, rel=1e-6)
        assert result.spatial_frechet_distance is result.inception_score is None
        assert f"{network.name} ({name}.safetensors): fd40_heun25_cfg1.5_t0-0.7" in shown
        assert f"{result.frechet_distance:.6g}" in shown and f"{result.precision:.6g}" in shown
        made = result.protocol.to_dict()
        same = ("solver", "num_steps", "guidance_scale", "guidance_interval", "ema", "labels", "seed", "resolution")
        assert {key: made[key] for key in same} == {key: RECORD[key] for key in same}
        assert made["guide"] == '{"interval": [0.0, 1.0], "sha256": "cd", "strength": 0.5}'
        assert (made["num_samples"], made["num_reference"], made["reference_features"]) == (40, 50, 50)
        assert (made["feature_network"], made["kernel_subset_size"], made["k"]) == (network.name, 40, 3)
        assert result.origin["step"] == 4000 and result.origin["checkpoint_sha256"] == "ab" * 32
        assert result.origin["network"] == f"{name}.safetensors"


def test_an_evaluation_repeated_from_its_own_stamp_gives_its_own_number(folder, monkeypatch, tmp_path):
    vrpo_eval("samples", "--reference", "real", "--network", "one.safetensors", "--k", "5", "--batch-size", "7")
    (first,) = read_results("samples/evaluations.jsonl")
    monkeypatch.chdir(tmp_path)
    (again,) = run_evaluation(EvalSettings(**first.origin["settings"], num_workers=0)).results
    assert again.metrics == first.metrics
    assert again.protocol.reference_hash == first.protocol.reference_hash
    assert again.origin["samples_hash"] == first.origin["samples_hash"]
    assert len(read_results(folder / "samples" / "evaluations.jsonl")) == 2  # added, not replaced


def test_a_run_is_the_reference_and_the_network(folder):
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps({"settings": {"data_dir": str(folder / "real"), "resolution": 16}}))
    Path("one.safetensors").rename("run/evaluation_network.safetensors")
    vrpo_eval("samples", "--reference", "run", "--network", "run")
    vrpo_eval("samples", "--reference", "real", "--network", "run")
    by_run, by_folder = read_results("samples/evaluations.jsonl")
    assert by_run.protocol.num_reference == 50
    assert by_run.frechet_distance == pytest.approx(by_folder.frechet_distance, rel=1e-6)
    Path("run/config.json").write_text("{}")
    assert "expected the settings of a run of the example" in refusal(
        "samples", "--reference", "run", "--network", "run"
    )


def test_without_a_record_what_is_unknown_is_said(folder, capsys):
    Path("samples/samples.json").unlink()
    vrpo_eval("samples", "--reference", "real", "--network", "one.safetensors", "--results", "mine.jsonl")
    assert "unknown, for no samples.json says it: solver, num_steps, guidance_scale" in capsys.readouterr().out
    (result,) = read_results("mine.jsonl")
    assert result.protocol.solver == "unknown" and result.protocol.seed is None
    assert not Path("samples/evaluations.jsonl").exists()


def test_a_stored_reference_and_stored_samples_give_the_same_numbers(folder):
    network = ("--network", "one.safetensors")
    vrpo_eval("samples", "--reference", "real", *network, "--save-samples", "s.safetensors")
    vrpo_eval("--reference", "real", *network, "--resolution", "16", "--save-reference", "r.safetensors")
    for samples, results in (("samples", "a.jsonl"), ("s.safetensors", "b.jsonl")):
        vrpo_eval(samples, "--reference", "r.safetensors", *network, "--results", results)
    vrpo_eval("s.safetensors", "--reference", "r.safetensors")  # no network is needed
    expected = read_results("samples/evaluations.jsonl")[0]
    for path in ("a.jsonl", "b.jsonl", "s.evaluations.jsonl"):
        (result,) = read_results(path)
        assert result.metrics == expected.metrics
        assert result.protocol.reference_hash == expected.protocol.reference_hash
        assert result.protocol.num_steps == 25
    assert "exists" in refusal("samples", "--reference", "real", *network, "--save-reference", "r.safetensors")
    said = refusal("samples", "--reference", "r.safetensors")
    assert "--network: expected the network that the stored features are of (small-plain-8-" in said
    assert "is of: small-plain-8-" in refusal("samples", "--reference", "r.safetensors", "--network", "two.safetensors")
    vrpo_eval("--reference", "real", *network, "--save-reference", "r32.safetensors", "--resolution", "16")
    vrpo_eval("--reference", "samples", *network, "--save-reference", "few.safetensors", "--reference-features", "10")
    assert "features of all 40 images, got those of 10" in refusal("few.safetensors", "--reference", "r.safetensors")


def test_adm_files_of_images_are_samples_and_reference(folder):
    def as_npz(images, path, **more):
        np.savez(path, arr_0=np.stack([images[i].permute(1, 2, 0).numpy() for i in range(len(images))]), **more)

    vrpo_eval("samples", "--reference", "real", "--network", "one.safetensors")
    os.mkdir("npz")
    as_npz(open_images("samples"), "npz/samples.npz", arr_1=np.arange(40))
    as_npz(open_images("real", 16), "reference.npz")
    os.rename("samples/samples.json", "npz/samples.json")
    vrpo_eval("npz", "--reference", "reference.npz", "--network", "one.safetensors")
    vrpo_eval("npz/samples.npz", "--reference", "reference.npz", "--network", "one.safetensors")
    expected = read_results("samples/evaluations.jsonl")[0]
    for path in ("npz/evaluations.jsonl", "npz/samples.evaluations.jsonl"):
        (result,) = read_results(path)
        assert result.metrics == expected.metrics and result.origin["samples_hash"] == expected.origin["samples_hash"]
        assert result.protocol.reference_hash == expected.protocol.reference_hash
    as_npz(open_images("real"), "large.npz")
    assert "of 16x16 pixels, as the samples, got 32" in refusal(
        "npz", "--reference", "large.npz", "--network", "one.safetensors"
    )


def fake_inception(images: torch.Tensor) -> dict[str, torch.Tensor]:
    values = images.float().mean(1) / 255
    return {"pool": values[:, ::4, ::4].flatten(1), "spatial": values[:, ::8, ::8].flatten(1), "logits": values[:, 0]}


@pytest.fixture
def inception(monkeypatch):
    """A small stand-in, for what is done with the features; the real one is in test_extractors and below."""
    network = Extractor("inception-01234567", fake_inception)
    monkeypatch.setattr("vrpo_plugin.standalone.extractors.inception", lambda *_, **__: network)
    return network


def adm_statistics(images, part):
    whole = fake_inception(torch.stack([images[i] for i in range(len(images))]))[part]
    return FeatureStatistics.from_features(whole)


def test_adms_statistics_take_the_place_of_those_of_its_images(folder, inception):
    real, few = open_images("real", 16), open_images("real/a", 16)
    pool, spatial = (adm_statistics(real, part) for part in ("pool", "spatial"))
    adm = {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    np.savez("statistics.npz", **adm)
    np.savez("pytorch_fid.npz", mu=pool.mean, sigma=pool.covariance)
    np.savez("all.npz", **adm, arr_0=np.stack([few[i].permute(1, 2, 0).numpy() for i in range(len(few))]))
    for reference in ("real", "statistics.npz", "pytorch_fid.npz", "all.npz", "real/a"):
        vrpo_eval("samples", "--reference", reference)
    of_images, statistics, pytorch_fid, both, of_few = read_results("samples/evaluations.jsonl")
    for result in (statistics, both):
        assert result.frechet_distance == pytest.approx(of_images.frechet_distance, rel=1e-9)
        assert result.spatial_frechet_distance == pytest.approx(of_images.spatial_frechet_distance, rel=1e-9)
        assert result.inception_score == of_images.inception_score
        assert result.protocol.num_reference is None
    assert pytorch_fid.frechet_distance == statistics.frechet_distance
    assert pytorch_fid.spatial_frechet_distance is None
    assert statistics.precision is statistics.kernel_distance is statistics.protocol.reference_features is None
    assert (both.precision, both.recall, both.kernel_distance) == (
        of_few.precision,
        of_few.recall,
        of_few.kernel_distance,
    )
    assert both.protocol.reference_features == 25 and both.protocol.reference_hash != of_images.protocol.reference_hash
    said = refusal("samples", "--reference", "statistics.npz", "--network", "one.safetensors")
    assert "a feature network that the file is of: inception, got small-plain-8-" in said


def test_ratios_to_a_baseline_of_the_same_protocol(folder, capsys):
    networks = ("--network", "one.safetensors", "--network", "two.safetensors")
    vrpo_eval("samples", "--reference", "real", *networks, "--results", "first.jsonl")
    record = json.loads(Path("samples/samples.json").read_text())
    baseline = [EvalResult(one.protocol, 2 * one.frechet_distance, 0, 0) for one in read_results("first.jsonl")]
    baseline[1] = EvalResult(baseline[1].protocol, baseline[1].frechet_distance / 8, 0, 0)
    Path("baseline.jsonl").write_text("".join(one.to_json(indent=None) + "\n" for one in baseline))
    capsys.readouterr()
    vrpo_eval("samples", "--reference", "real", *networks, "--baseline", "baseline.jsonl")
    shown = capsys.readouterr().out
    assert "(one.safetensors)" in shown and ": 0.5\n" in shown and ": 4\n" in shown
    assert "geometric mean of the ratios: 1.414\n" in shown
    Path("samples/samples.json").write_text(json.dumps(record | {"num_steps": 50}))
    said = refusal("samples", "--reference", "real", *networks, "--baseline", "baseline.jsonl")
    assert "different num_steps (25 and 50)" in said
    assert len(read_results("samples/evaluations.jsonl")) == 4  # the numbers are kept all the same
    Path("one.jsonl").write_text(baseline[0].to_json(indent=None))
    said = refusal("samples", "--reference", "real", *networks, "--baseline", "one.jsonl")
    assert "one.jsonl: expected results of small-plain-8-" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"complete": False}, "expected complete samples"),
        ({"num_samples": 50}, "expected {'num_samples': 50}, as samples.json says, got {'num_samples': 40}"),
        ({"resolution": 32}, "expected {'resolution': 32}"),
        ({"num_steps": "many"}, "samples.json: num_steps: expected int or None, got 'many'"),
        ({"ema": 9999.0}, "ema: expected a bool, or a decay"),
    ],
)
def test_records_that_do_not_fit_are_refused_before_anything_is_written(folder, change, said):
    Path("samples/samples.json").write_text(json.dumps(RECORD | change))
    assert said in refusal("samples", "--reference", "real", "--network", "one.safetensors")
    assert not Path("samples/evaluations.jsonl").exists()


def test_unusable_arguments_are_refused(folder):
    def said(*arguments):
        return refusal(*arguments, "--reference", "real", "--network", "one.safetensors")

    assert "--k: expected >= 1" in said("samples", "--k", "0")
    assert "--reference-features: expected >= 4" in said("samples", "--reference-features", "3")
    assert "SAMPLES: expected a folder" in said()
    assert "SAMPLES: expected a folder" in said("--save-reference", "r.safetensors", "--save-samples", "s.safetensors")
    assert "ends in .safetensors" in said("samples", "--save-reference", "r.npz")
    assert "a folder that can be written" in said("samples", "--results", "none/r.jsonl")
    assert "no such file or folder" in said("missing")
    assert "--resolution: expected 16, that of the samples" in said("samples", "--resolution", "32")
    assert "no such file or folder" in refusal("samples", "--reference", "gone", "--network", "one.safetensors")
    assert "more than k = 45" in said("samples", "--k", "45")
    write_png(Path("samples/grid.png"), np.zeros((64, 64, 3), np.uint8))
    Path("samples/samples.json").unlink()
    assert "samples of another size are not resized" in said("samples")
    with pytest.raises(ConfigError, match="--batch-size"):
        EvalSettings("real", "samples", batch_size=0)


def test_every_option_is_explained():
    commands = argparse.ArgumentParser().add_subparsers()
    evaluate.add(commands, wanted=True)
    actions = commands.choices["eval"]._actions
    assert len(actions) == 14
    assert all(len(action.help.split()) > 5 for action in actions[1:])
    page = (REPO / "docs" / "evaluation.md").read_text("utf-8")
    assert set(re.findall(r"--[a-z][a-z-]+", page)) <= {
        option for action in actions for option in action.option_strings
    }


@pytest.mark.slow
def test_two_launched_processes_give_the_numbers_of_one(folder):
    options = ["samples", "--reference", "real", "--network", "one.safetensors", "--batch-size", "8"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "vrpo_plugin.cli", "eval", *options, "--num-workers", "1"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("added 1 result to samples/evaluations.jsonl") == 1
    torch.set_num_threads(1)
    vrpo_eval(*options)
    together, alone = read_results("samples/evaluations.jsonl")
    assert together.metrics == alone.metrics and together.protocol == alone.protocol
    assert together.origin["samples_hash"] == alone.origin["samples_hash"]


@pytest.mark.slow
def test_inceptions_numbers_are_those_of_torch_fidelity_on_the_same_images(folder, tmp_path):
    torch_fidelity = pytest.importorskip("torch_fidelity")
    write_inception_weights(tmp_path / "inception.pth")
    for number, path in enumerate(sorted(Path("real").rglob("*.png"))):  # of the samples' size, for theirs do not crop
        kept = "cropped" if number < 14 else "rest"
        write_png(Path(kept) / f"{number:03d}.png", np.asarray(center_crop(Image.open(path), 16)))
    for number in range(12, 40):
        Path(f"samples/{number:06d}.png").unlink()
    Path("samples/samples.json").unlink()
    vrpo_eval("samples", "--reference", "cropped", "--inception", str(tmp_path / "inception.pth"))
    (ours,) = read_results("samples/evaluations.jsonl")
    theirs = torch_fidelity.calculate_metrics(
        input1="samples",
        input2="cropped",
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(tmp_path / "inception.pth"),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=12,
        samples_shuffle=False,
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=64,
    )
    assert ours.frechet_distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours.kernel_distance == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours.inception_score == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert ours.inception_score_std == pytest.approx(theirs["inception_score_std"], rel=1e-4)
    assert ours.precision == pytest.approx(theirs["precision"], rel=1e-4)
    assert ours.recall == pytest.approx(theirs["recall"], rel=1e-4)
    assert ours.spatial_frechet_distance is not None and ours.spatial_frechet_distance > 0

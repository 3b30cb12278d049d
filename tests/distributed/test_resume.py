"""Model and optimizer of the example, saved on some processes and loaded on others, go on alike."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.gloo import on_two_processes
from train_options import parse_options
from train_parts import TrainingStep, build_model, build_optimizer

from vrpo_plugin.encoders import Targets
from vrpo_plugin.standalone.sources import DigitsSource
from vrpo_plugin.standalone.training import load_states, whole_states

ARGUMENTS = ["--reward-weights", "semantic=0.5,perceptual=0.5", "--critic-width", "16"]


def _parts(world_size: int) -> tuple[Any, Any, torch.optim.Optimizer]:
    options, config = parse_options(ARGUMENTS)
    model = build_model(options, config, DigitsSource(), Targets((8,), (4, 4), lambda images: ()))
    step_module = TrainingStep(model, config.path_type)
    if world_size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(step_module, mesh=mesh)
    return model, step_module, build_optimizer(options, model)


def _steps(step_module: Any, optimizer: torch.optim.Optimizer, steps: range, rank: int, world_size: int) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        whole = {
            "x0": torch.randn(16, 1, 8, 8, generator=generator),
            "noise": torch.randn(16, 1, 8, 8, generator=generator),
            "t": torch.rand(16, generator=generator),
            "y": torch.randint(10, (16,), generator=generator),
            "drop": torch.zeros(16, dtype=torch.bool),
            "z": torch.randn(16, 16, 8, generator=generator),
        }
        part = {name: value.chunk(world_size)[rank] for name, value in whole.items()}
        step_module(part, (part.pop("z"),), step)[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def _uninterrupted(rank: int, world_size: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, step_module, optimizer = _parts(world_size)
    _steps(step_module, optimizer, range(4), rank, world_size)
    half = copy.deepcopy(whole_states(model, optimizer))
    _steps(step_module, optimizer, range(4, 8), rank, world_size)
    return {"half": half, "end": whole_states(model, optimizer)}


def _resumed(rank: int, world_size: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, step_module, optimizer = _parts(world_size)
    load_states(model, optimizer, torch.load(FILE, weights_only=True))
    _steps(step_module, optimizer, range(4, 8), rank, world_size)
    return whole_states(model, optimizer)


FILE = Path("half.pt")  # in the folder of the test


def _same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    for part in ("model", "optimizer"):
        assert ours[part].keys() == theirs[part].keys() and len(ours[part])
        for name, value in ours[part].items():
            torch.testing.assert_close(value, theirs[part][name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.slow
def test_shards_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sharded, _ = on_two_processes(_uninterrupted, tmp_path)
    torch.save(sharded["half"], FILE)
    _same(on_two_processes(_resumed, tmp_path)[0], sharded["end"], 0)
    # Sums in another order, and Adam's first steps: as in test_fsdp2.py.
    _same(_resumed(0, 1), sharded["end"], 1e-3)
    alone = _uninterrupted(0, 1)
    torch.save(alone["half"], FILE)
    _same(_resumed(0, 1), alone["end"], 0)
    _same(on_two_processes(_resumed, tmp_path)[0], alone["end"], 1e-3)

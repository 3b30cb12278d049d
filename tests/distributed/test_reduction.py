"""Reward statistics on two gloo processes that see different batches and share nothing else."""

from pathlib import Path

import pytest
import torch
from fakes.gloo import on_two_processes

from vrpo_plugin import VRPOAligner
from vrpo_plugin.functional.interpolant import noisy_sample

STEPS, BATCH = 5, 32
SIZES = {"hidden_dim": 16, "depth": 2, "latent_shape": (2, 8, 8), "target_dims": (8,), "critic_width": 8}


def _batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x0, noise, velocity = (torch.randn(BATCH, 2, 8, 8, generator=generator) for _ in range(3))
    t = torch.rand(BATCH, generator=generator)
    x_t, _ = noisy_sample(x0, noise, t)
    return {
        "z": torch.randn(BATCH, 16, 8, generator=generator),
        "x0": x0,
        "x_t": x_t,
        "t": t,
        "velocity": velocity,
        "hidden": torch.randn(BATCH, 16, 16, generator=generator),
    }


def _memory(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """The memory and the metrics after the last step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    aligner = VRPOAligner(**SIZES)
    assert aligner.generation is not None
    for step in range(STEPS):
        out = aligner(**{name: value.chunk(world_size)[rank] for name, value in _batch(step).items()})
    metrics = {
        name: out.metrics[name] for name in out.metrics if name.startswith(("vrpo/reward/", "vrpo/std", "vrpo/w"))
    }
    watch = {f"watch {name}": value for name, value in aligner.generation.watch.named_buffers()}
    return {"moments": aligner.generation.statistics.moments, **metrics, **watch}


@pytest.mark.slow
def test_the_memory_is_the_same_on_all_processes_and_that_of_one(tmp_path: Path) -> None:
    first, second = on_two_processes(_memory, tmp_path)
    alone = _memory(0, 1)
    halves = [_memory(rank, 2) for rank in range(2)]
    assert not torch.equal(halves[0]["moments"], halves[1]["moments"])  # without reduction they would part
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6, msg=name)
    assert first["moments"][0].sum(1).tolist() == pytest.approx([BATCH * STEPS] * 4, rel=0.02)

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


def _statistics(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """The buffers after the first step and after the last."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    aligner = VRPOAligner(**SIZES)
    assert aligner.generation is not None
    found = {}
    for step in range(STEPS):
        aligner(**{name: value.chunk(world_size)[rank] for name, value in _batch(step).items()})
        if step in (0, STEPS - 1):
            buffers = aligner.generation.statistics.named_buffers()
            found |= {f"{name} after step {step}": value.clone() for name, value in buffers}
    return found


@pytest.mark.slow
def test_statistics_are_reduced_and_the_same_on_all_ranks(tmp_path: Path) -> None:
    first, second = on_two_processes(_statistics, tmp_path)
    halves = [_statistics(rank, 2) for rank in range(2)]
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert not torch.equal(halves[0][name], halves[1][name])  # without reduction they would part
        if name.endswith("step 0"):
            torch.testing.assert_close(value, halves[0][name] + halves[1][name])
    assert first["count after step 0"].sum(1).tolist() == [BATCH] * 3

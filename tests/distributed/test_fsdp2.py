"""The example's parts on FSDP2 shards: two gloo processes train, and leave out a bad step, as one process does."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fakes.gloo import on_two_processes
from train_options import parse_options
from train_parts import TrainingStep, build_model, build_optimizer

from vrpo_plugin import NonFiniteGuard
from vrpo_plugin.encoders import Targets
from vrpo_plugin.standalone.sources import DigitsSource
from vrpo_plugin.standalone.training import build_ema, ema_decay, parameter_groups, update_ema

STEPS, BATCH = 20, 16
BAD_STEP = 7  # a gradient of the last process's shard is not a number
ARGUMENTS = ["--scale", "none", "--reward-weights", "semantic=0.5,perceptual=0.5", "--critic-width", "16"]


def _batch(step: int, rank: int, world_size: int) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    whole = {
        "x0": torch.randn(BATCH, 1, 8, 8, generator=generator),
        "noise": torch.randn(BATCH, 1, 8, 8, generator=generator),
        "t": torch.rand(BATCH, generator=generator),
        "y": torch.randint(10, (BATCH,), generator=generator),
        "drop": torch.zeros(BATCH, dtype=torch.bool),
        "z": torch.randn(BATCH, 16, 8, generator=generator),
    }
    part = {name: value.chunk(world_size)[rank] for name, value in whole.items()}
    return part, (part.pop("z"),)


def _train(rank: int, world_size: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    options, config = parse_options(ARGUMENTS)
    model = build_model(options, config, DigitsSource(), Targets((8,), (4, 4), lambda images: ()))
    ema = build_ema(model)
    step_module = TrainingStep(model, config.path_type)
    if world_size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(step_module, mesh=mesh)
    optimizer = build_optimizer(options, model)
    guard = NonFiniteGuard(optimizer, model)
    losses = []
    for step in range(STEPS):
        guard.keep()
        loss, _ = step_module(*_batch(step, rank, world_size), step)
        loss.backward()
        if (step, rank) == (BAD_STEP, world_size - 1):
            parameter = parameter_groups(model)[0][0]
            (parameter.grad.to_local() if world_size > 1 else parameter.grad).view(-1)[0] = torch.nan
        norms = [torch.nn.utils.clip_grad_norm_(group, 1.0) for group in parameter_groups(model)]
        skipped = guard.check([norm.full_tensor() if world_size > 1 else norm for norm in norms])
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, ema_decay(0.9, step), skipped)
        mean = loss.detach().clone()
        if world_size > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world_size)
    return losses, dict(ema.state_dict())


@pytest.mark.slow
def test_fsdp2_trains_as_one_process(tmp_path: Path) -> None:
    alone, ema_alone = _train(0, 1)
    for losses, ema in on_two_processes(_train, tmp_path):
        # Gradients are summed in another order; twenty steps of Adam let float32's rounding grow to this.
        assert losses == pytest.approx(alone, rel=1e-4)
        for name, value in ema_alone.items():
            torch.testing.assert_close(ema[name], value, rtol=1e-3, atol=1e-4, msg=name)

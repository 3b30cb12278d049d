"""``sample(guide=...)``: the plain sampler at strength 0, a higher reward above it, and never another model call."""

from typing import Any

import pytest
import torch
from fakes.tiny_sit import TinySiT, tiny_aligner
from torch import Tensor

from vrpo_plugin import RewardGuide
from vrpo_plugin.standalone.sampler import SOLVERS, sample

NOISE = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(4)


class Counting(TinySiT):
    """Keeps how many rows each call had."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.__dict__.setdefault("seen", []).append(len(x))
        return super().forward(x, t, y)


def trained() -> Counting:
    torch.manual_seed(0)
    model = Counting()
    tiny_aligner().attach(model)
    return model


def draw(model: Counting, guide: RewardGuide | None, **settings: Any) -> Tensor:
    model.__dict__["seen"] = []
    generator = torch.Generator().manual_seed(2)
    return sample(model, NOISE, LABELS, num_steps=5, null_label=9, generator=generator, guide=guide, **settings)


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_strength_0_is_bitwise_the_plain_sampler(solver: str, path_type: str, scale: float) -> None:
    model, settings = trained(), {"solver": solver, "path_type": path_type, "guidance_scale": scale}
    plain = draw(model, None, **settings)
    rows = model.seen
    assert torch.equal(draw(model, RewardGuide(model, strength=0), **settings), plain)
    guided = draw(model, RewardGuide(model, strength=0.2, interval=(0, 1)), **settings)
    assert model.seen == rows, "another call of the model"
    assert guided.isfinite().all() and not torch.equal(guided, plain)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_reward_of_the_samples_rises(solver: str) -> None:
    model = trained()

    def left_is_bright(x0_hat: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return x0_hat[..., :4].mean((1, 2, 3)) - x0_hat[..., 4:].mean((1, 2, 3))

    guide = RewardGuide(model, reward=left_is_bright, strength=0.3, interval=(0, 1))
    plain, guided = draw(model, None, solver=solver), draw(model, guide, solver=solver)
    assert (left_is_bright(guided, NOISE, None) > left_is_bright(plain, NOISE, None)).all()


def test_outside_the_interval_the_sampler_is_plain() -> None:
    """Steps start at 1, .8, .6, .4 and .2; of Heun's two calls the step's start counts."""
    model = trained()
    for solver in ("euler", "heun"):
        plain = draw(model, None, solver=solver)
        assert torch.equal(draw(model, RewardGuide(model, strength=0.3, interval=(0.65, 0.75)), solver=solver), plain)
        assert not torch.equal(draw(model, RewardGuide(model, strength=0.3, interval=(0.1, 0.3)), solver=solver), plain)

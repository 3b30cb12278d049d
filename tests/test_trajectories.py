"""Runs that must agree by design do, over twenty steps of AdamW: what one step hides, twenty show."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fakes.tiny_sit import Batch, TinySiT, denoising_loss, make_batch, tiny_aligner
from torch import Tensor, nn

from vrpo_plugin import RewardState

STEPS = 20
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"reward_release_steps": 30},
    "group scale, stop": {"scale": "group", "release": "stop", "release_steps": 10},
    "middle, conv": {"layers": "middle", "projector": "conv", "target_norm": "spatial"},
}


class Step(nn.Module):
    """A loop's forward pass with its loss."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = TinySiT(depth=2)
        tiny_aligner(**{"depth": 2, **settings}).attach(self.model)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        velocity = self.model(batch["x_t"], batch["t"], batch["y"])
        given = {name: batch[name] for name in ("x0", "x_t", "t", "y")}
        out = self.model.vrpo(batch["z"], velocity=velocity, **given)
        return (velocity.float() - batch["target"]).square().mean() + out.loss


def train(
    step: nn.Module, forward: Callable[[dict[str, Tensor]], Tensor], *, adam: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses (STEPS,) and the last state."""
    parameters = step.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3) if adam else torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    losses = []
    for seed in range(STEPS):
        batch = make_batch(16, seed=seed)
        tensors = {name: getattr(batch, name) for name in ("x0", "x_t", "t", "y")}
        loss = forward({**tensors, "target": batch.velocity, "z": batch.z[0]})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), dict(step.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("adam", [True, False])
def test_compiled_is_eager(setting: str, adam: bool) -> None:
    torch._dynamo.reset()
    eager, compiled = Step(**SETTINGS[setting]), Step(**SETTINGS[setting])
    losses, state = train(eager, eager, adam=adam)
    step = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    compiled_losses, compiled_state = train(compiled, step, adam=adam)
    assert losses.std() > 0.01  # it trains
    # The same operators, but for sums in another order (eager code forms the rewards' gradient in the forward pass):
    # float32 rounds at 6e-8, and Adam divides by the square root of small second moments.
    torch.testing.assert_close(compiled_losses, losses, rtol=1e-5, atol=1e-6)
    for name, value in state.items():
        ours, theirs = compiled_state[name], value
        if adam and name.endswith("qkv.bias"):
            # A shift of all keys changes no attention: their bias has gradient 0, and Adam makes steps of its rounding.
            # Plain descent does not, and there every parameter is compared.
            ours, theirs = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_bfloat16_autocast_stays_close_to_float32() -> None:
    step, cast = Step(), Step()

    def forward(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cast(batch)

    losses, _ = train(step, step)
    # bfloat16 keeps 8 bits: 0.4% per layer, of a few layers; the trajectories do not part beyond that.
    torch.testing.assert_close(train(cast, forward)[0], losses, rtol=0.02, atol=0)


def smooth(state: RewardState) -> Tensor:
    return -state.x0_hat.diff(dim=-1).square().mean((1, 2, 3))


class Maths(nn.Module):
    """The objective without a network: velocity and projected tokens are themselves what is trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.velocity = nn.Parameter(torch.randn(16, 4, 8, 8, generator=generator))
        self.z_tilde = nn.Parameter(torch.randn(16, 16, 12, generator=generator))
        self.aligner = tiny_aligner(
            built_in=("fidelity",),
            rewards={"smooth": smooth},
            own_projectors=False,
            scale="group",
            reward_release_steps=30,
        )

    def forward(self, batch: Batch) -> Tensor:
        given = {"x0": batch.x0, "x_t": batch.x_t, "t": batch.t, "z_tilde": self.z_tilde}
        return denoising_loss(self.velocity, batch) + self.aligner(batch.z, velocity=self.velocity, **given).loss


def test_the_maths_is_float32_under_autocast() -> None:
    """Rewards, groups, weights and losses are bitwise the same: autocast may lower the networks, never these."""
    plain, cast = Maths(), Maths()
    losses = {name: [] for name in ("plain", "cast")}
    for name, maths in (("plain", plain), ("cast", cast)):
        optimizer = torch.optim.AdamW(maths.parameters(), lr=1e-2)
        for seed in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "cast"):
                loss = maths(make_batch(16, seed=seed))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["cast"] == losses["plain"] and losses["plain"][-1] < losses["plain"][0]
    for name, value in plain.state_dict().items():
        assert torch.equal(cast.state_dict()[name], value), name

"""vrpo_plugin.modules.statistics: the memory as a module. What it computes is tested in functional/test_levels.py."""

import copy

import pytest
import torch

from vrpo_plugin.functional.levels import HORIZON, LEVELS, level_moments, remember
from vrpo_plugin.modules.statistics import RewardStatistics, update_buffer


def random_update(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    level = torch.randint(0, LEVELS, (24,), generator=g)
    return torch.randn(2, 24, generator=g), level, torch.rand(2, 24, generator=g) < 0.7


def test_it_remembers_in_training_alone() -> None:
    statistics = RewardStatistics(2)
    added = statistics.update(*random_update(0))
    assert torch.equal(added, level_moments(*random_update(0)))
    kept = statistics.moments.clone()
    assert torch.equal(kept, remember(torch.zeros_like(kept), added))
    statistics.eval()
    assert torch.equal(statistics.update(*random_update(1)), level_moments(*random_update(1)))
    assert torch.equal(statistics.moments, kept)


def test_state_dict_roundtrip() -> None:
    statistics, other = RewardStatistics(2), RewardStatistics(2)
    statistics.update(*random_update(0))
    other.load_state_dict(copy.deepcopy(statistics.state_dict()), strict=True)
    for each in (statistics, other):
        each.update(*random_update(1))
    assert torch.equal(statistics.moments, other.moments)
    assert list(statistics.state_dict()) == ["moments"] and not list(statistics.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_of_the_model_leaves_float32(dtype: torch.dtype) -> None:
    host = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2), "statistics": RewardStatistics(1)})
    host.to(dtype)
    statistics = host["statistics"]
    assert isinstance(statistics, RewardStatistics)
    assert host["linear"].weight.dtype == dtype and statistics.moments.dtype == torch.float32
    one = torch.tensor([[True]])
    for _ in range(4 * HORIZON):
        statistics.update(torch.tensor([[1.0]]), torch.tensor([3]), one)
    # bfloat16 would stop counting at 256.
    assert statistics.moments[0].max().item() == pytest.approx(HORIZON * (1 - torch.e**-4), rel=1e-2)


class Counting(torch.nn.Module):
    """Weighs its loss by a count that the same forward pass moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self) -> torch.Tensor:
        count = self.count + 1
        update_buffer(self, "count", count)
        return count * self.weight.sum()


@pytest.mark.slow
def test_a_compiled_gradient_sees_a_buffer_as_its_forward_pass_did() -> None:
    torch._dynamo.reset()
    module, gradients = Counting(), []
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        module.zero_grad()
        compiled().backward()
        gradients.append(module.weight.grad[0].item())
    assert gradients == [1, 2, 3] and module.count == 3

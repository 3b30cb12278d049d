"""vrpo_plugin.modules.statistics: running variances per noise level, against a numpy loop."""

import copy

import numpy as np
import pytest
import torch

from vrpo_plugin.modules.statistics import NOISE_BINS, RewardStatistics, update_buffer


def random_update(seed: int, *, rewards: int = 2, size: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(size, generator=generator)
    square_deviation = torch.rand(rewards, size, generator=generator)
    return t, square_deviation, torch.rand(rewards, size, generator=generator) < 0.7


def test_variance_is_the_weighted_mean_of_the_numpy_loop() -> None:
    statistics = RewardStatistics(2, decay=0.9)
    square_sum, count = np.zeros((2, NOISE_BINS)), np.zeros((2, NOISE_BINS))
    for seed in range(12):
        t, square_deviation, valid = random_update(seed)
        statistics.update(t, square_deviation, valid)
        for k in range(2):
            for b in range(NOISE_BINS):
                chosen = [i for i in range(len(t)) if int(t[i] * NOISE_BINS) == b and valid[k, i]]
                if chosen:
                    square_sum[k, b] = 0.9 * square_sum[k, b] + sum(square_deviation[k, i].item() for i in chosen)
                    count[k, b] = 0.9 * count[k, b] + len(chosen)
    edges = (torch.arange(NOISE_BINS) + 0.5) / NOISE_BINS
    # Twelve float32 sums of two dozen terms: relative errors of a few times 1e-7.
    np.testing.assert_allclose(statistics.variance(edges), square_sum / count, rtol=1e-5)


def test_it_finds_the_variance_of_each_noise_level() -> None:
    statistics = RewardStatistics(1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        t = torch.rand(64, generator=generator)
        reward = (1 + 3 * (t >= 0.5)) * torch.randn(64, generator=generator)
        statistics.update(t, reward.square()[None], torch.ones(1, 64, dtype=torch.bool))
    # About 640 remembered samples per bin: a relative deviation of sqrt(2 / 640) = 6%.
    variance = statistics.variance(torch.tensor([0.25, 0.75]))[0]
    assert variance[0].item() == pytest.approx(1, rel=0.25)
    assert variance[1].item() == pytest.approx(16, rel=0.25)


@pytest.mark.parametrize(("t", "number"), [(0.0, 0), (0.05, 0), (0.15, 1), (0.95, 9), (1.0, 9), (1.1, 9), (-0.1, 0)])
def test_bins_cover_all_times(t: float, number: int) -> None:
    statistics = RewardStatistics(1)
    statistics.update(torch.tensor([t]), torch.tensor([[2.0]]), torch.tensor([[True]]))
    assert statistics.count.nonzero().tolist() == [[0, number]]


def test_unseen_noise_levels_are_nan_and_seen_ones_are_kept() -> None:
    statistics = RewardStatistics(2, decay=0.5)
    valid = torch.tensor([[True], [False]])
    statistics.update(torch.tensor([0.3]), torch.tensor([[4.0], [9.0]]), valid)
    for _ in range(200):  # of another bin: nothing decays where nothing was seen
        statistics.update(torch.tensor([0.8]), torch.tensor([[1.0], [1.0]]), torch.tensor([[True], [True]]))
    variance = statistics.variance(torch.tensor([0.35, 0.85, 0.5]))
    np.testing.assert_array_equal(variance.numpy(), [[4.0, 1.0, np.nan], [np.nan, 1.0, np.nan]])


def test_what_is_left_out_does_not_count() -> None:
    with_rest, without = RewardStatistics(2), RewardStatistics(2)
    t, square_deviation, _ = random_update(0)
    valid = torch.arange(24).expand(2, 24) < 10
    with_rest.update(t, square_deviation, valid)
    without.update(t[:10], square_deviation[:, :10], valid[:, :10])
    assert torch.equal(with_rest.count, without.count)
    torch.testing.assert_close(with_rest.square_sum, without.square_sum)


def test_decay_zero_remembers_the_last_update_alone() -> None:
    statistics = RewardStatistics(1, decay=0.0)
    for value in (5.0, 7.0):
        statistics.update(torch.tensor([0.3]), torch.tensor([[value]]), torch.tensor([[True]]))
    assert statistics.variance(torch.tensor([0.3])).item() == 7.0


def test_state_dict_roundtrip() -> None:
    statistics, other = RewardStatistics(2), RewardStatistics(2)
    statistics.update(*random_update(0))
    other.load_state_dict(copy.deepcopy(statistics.state_dict()), strict=True)
    for each in (statistics, other):
        each.update(*random_update(1))
    assert torch.equal(statistics.square_sum, other.square_sum) and torch.equal(statistics.count, other.count)
    assert sorted(statistics.state_dict()) == ["count", "square_sum"]
    assert not list(statistics.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_of_the_model_leaves_float32(dtype: torch.dtype) -> None:
    host = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2), "statistics": RewardStatistics(1)})
    host.to(dtype)
    statistics = host["statistics"]
    assert isinstance(statistics, RewardStatistics)
    assert host["linear"].weight.dtype == dtype
    assert statistics.square_sum.dtype == statistics.count.dtype == torch.float32
    assert {p.dtype for p in statistics.state_dict().values()} == {torch.float32}
    for _ in range(1000):
        statistics.update(torch.tensor([0.3]), torch.tensor([[1.0]]), torch.tensor([[True]]))
    # 1 / (1 - 0.99) samples; bfloat16 would stop growing where one percent is below its resolution.
    assert statistics.count.max().item() == pytest.approx(100, rel=1e-3)


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

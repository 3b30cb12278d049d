import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vrpo_plugin.errors import ShapeError
from vrpo_plugin.functional.policy import action_noise, coarse_sides, pathwise_policy_loss, score_function_gradient


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient


def pathwise_loop(rewards: Tensor, coefficients: Tensor, valid: Tensor) -> float:
    loss = 0.0
    for k in range(len(rewards)):
        scored = [i for i in range(rewards.shape[1]) if valid[k, i] and math.isfinite(rewards[k, i])]
        loss -= sum((coefficients[k, i] * rewards[k, i]).item() for i in scored) / max(len(scored), 1)
    return loss


def test_pathwise_is_the_loop_with_holes() -> None:
    rewards, coefficients = random(3, 8, seed=1), random(3, 8, seed=2)
    rewards[0, 2], rewards[1, 5], rewards[1, 6] = torch.nan, torch.inf, -torch.inf
    valid = random(3, 8, seed=3) > -0.5
    valid[2] = False
    everything = torch.ones_like(valid)
    assert pathwise_policy_loss(rewards, coefficients).item() == pytest.approx(
        pathwise_loop(rewards, coefficients, everything)
    )
    assert pathwise_policy_loss(rewards, coefficients, valid=valid).item() == pytest.approx(
        pathwise_loop(rewards, coefficients, valid)
    )


def test_pathwise_gradient_is_the_weighted_gradient_of_the_rewards() -> None:
    x, coefficients = random(6, 3).requires_grad_(), random(2, 6, seed=1).requires_grad_()
    loss = pathwise_policy_loss(torch.stack([-x.square().sum(1), x.sin().sum(1)]), coefficients)
    gradient, of_coefficients = torch.autograd.grad(loss, (x, coefficients), allow_unused=True)
    c, a = coefficients.detach().numpy(), x.detach().numpy()
    np.testing.assert_allclose(gradient, -(c[0, :, None] * -2 * a + c[1, :, None] * np.cos(a)) / 6, rtol=1e-12)
    assert of_coefficients is None


def test_pathwise_gradient_of_what_is_left_out_is_0() -> None:
    rewards = random(2, 5).index_fill(1, torch.tensor([3]), torch.nan).requires_grad_()
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[0, 0] = False
    coefficients = random(2, 5, seed=1)
    coefficients[0, 0] = torch.nan
    gradient = gradient_of(pathwise_policy_loss(rewards, coefficients, valid=valid), rewards)
    expected = -coefficients / torch.tensor([[3.0], [4.0]])
    expected[0, 0] = 0
    expected[:, 3] = 0
    torch.testing.assert_close(gradient, expected)


def test_pathwise_of_no_rewards_is_0() -> None:
    assert pathwise_policy_loss(torch.zeros(0, 4), torch.zeros(0, 4)).item() == 0


@pytest.mark.parametrize("shapes", [((2, 4), (2, 3)), ((2, 4), (4,)), ((4,), (4,))])
def test_pathwise_of_other_shapes_is_an_error(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ShapeError, match=r"coefficients: expected \(K, B\).*one coefficient per reward"):
        pathwise_policy_loss(torch.ones(shapes[0]), torch.ones(shapes[1]))


# ---- actions ----


@pytest.mark.parametrize(
    ("shape", "count", "grid"),
    [((5, 4, 8, 8), 8, 4), ((5, 1, 8, 8), 8, 0), ((3, 2, 8, 4), 4, 16), ((1, 1, 2, 2), 8, 0), ((2, 3, 6, 6), 2, 4)],
)
def test_directions_of_a_state_are_orthogonal_and_coarse(shape: tuple[int, ...], count: int, grid: int) -> None:
    like = torch.zeros(shape, dtype=torch.float64)
    noise = action_noise(like, count, grid, torch.Generator().manual_seed(0))
    assert noise.shape == (count, *shape) and noise.dtype == torch.float64
    rows, columns = coarse_sides(like, grid)
    assert (rows, columns) == tuple(min(grid, side) if grid else side for side in shape[2:])
    # The first pixel of each coarse cell.
    down = [math.ceil(row * shape[2] / rows) for row in range(rows)]
    across = [math.ceil(column * shape[3] / columns) for column in range(columns)]
    coarse = noise[..., down, :][..., across].flatten(2)
    n = shape[1] * rows * columns
    torch.testing.assert_close(coarse.square().sum(-1), torch.full((count, shape[0]), float(n), dtype=torch.float64))
    if shape[2] % rows == shape[3] % columns == 0:
        blocks = noise.unflatten(-2, (rows, -1)).unflatten(-1, (columns, -1))
        assert torch.equal(blocks, blocks[..., :1, :, :1].expand_as(blocks))
    products = torch.einsum("kbn,lbn->bkl", coarse, coarse) / n
    if count <= n:
        torch.testing.assert_close(products, torch.eye(count, dtype=torch.float64).expand_as(products))
    again = action_noise(like, count, grid, torch.Generator().manual_seed(0))
    assert torch.equal(noise, again)


def estimate(
    reward: Callable[[Tensor], Tensor], x: Tensor, std: Tensor, *, seed: int = 0, grid: int = 0, **settings: Any
) -> Tensor:
    noise = action_noise(x, settings.pop("count", 8), grid, torch.Generator().manual_seed(seed))
    rewards = torch.stack([reward(x + std[:, None, None, None] * direction) for direction in noise])
    return score_function_gradient(rewards, noise, std, **settings)[0]


def test_the_estimate_is_the_loop_over_states_and_actions() -> None:
    rewards, noise, std = random(5, 3, seed=1), random(5, 3, 2, 4, 4, seed=2), random(3, seed=3).exp()
    rewards[0, 1], rewards[2, 1], rewards[1, 2] = torch.nan, torch.inf, -torch.inf
    for normalize in (False, True):
        gradient, usable = score_function_gradient(rewards, noise, std, cell=4.0, normalize=normalize)
        for i in range(3):
            told = [j for j in range(5) if math.isfinite(rewards[j, i])]
            values = np.array([rewards[j, i].item() for j in told])
            scale = values.std(ddof=1) if normalize else 1.0
            expected = sum(
                (value - values.mean()) / scale * noise[j, i] / (std[i] * (len(told) - 1) * 4)
                for j, value in zip(told, values, strict=True)
            )
            torch.testing.assert_close(gradient[i], expected)
        assert usable.tolist() == [True] * 3


@pytest.mark.parametrize("told", [0, 1])
def test_a_state_with_fewer_than_two_rewards_tells_nothing(told: int) -> None:
    rewards = torch.full((4, 2), torch.nan, dtype=torch.float64)
    rewards[:, 0] = random(4)
    rewards[:told, 1] = 1.0
    gradient, usable = score_function_gradient(rewards, random(4, 2, 1, 2, 2), torch.ones(2), normalize=True)
    assert usable.tolist() == [True, False] and not gradient[1].any() and gradient[0].any()


def test_equal_rewards_tell_nothing() -> None:
    for normalize in (False, True):
        gradient, _ = score_function_gradient(
            torch.full((8, 3), 0.3), random(8, 3, 1, 4, 4).float(), torch.ones(3), normalize=normalize
        )
        assert not gradient.any()


def test_with_as_many_actions_as_dimensions_a_linear_reward_is_known_but_for_the_mean_direction() -> None:
    c, x = random(1, 2, 2, seed=4), random(6, 1, 2, 2, seed=5)
    estimates = [
        estimate(lambda a: (a * c).sum((1, 2, 3)), x, torch.full((6,), 0.1, dtype=torch.float64), seed=s, count=4)
        for s in range(500)
    ]
    torch.testing.assert_close(torch.cat(estimates).mean(0), c, atol=0.08, rtol=0)


@pytest.mark.parametrize("grid", [0, 2])
def test_the_estimate_is_the_gradients_mean_over_coarse_cells_in_expectation(grid: int) -> None:
    """Of E[-|a - c|^2], within 4 standard errors."""
    x, centre = random(1, 1, 4, 4, seed=6), random(1, 1, 4, 4, seed=7)
    std, states = torch.full((20_000,), 0.2, dtype=torch.float64), x.expand(20_000, 1, 4, 4)
    cell = 4.0 if grid else 1.0
    found = estimate(lambda a: -(a - centre).square().sum((1, 2, 3)), states, std, grid=grid, cell=cell)
    exact = -2 * (x - centre)[0]
    if grid:
        exact = exact.unflatten(-2, (2, 2)).unflatten(-1, (2, 2)).mean((-3, -1), keepdim=True)
        exact = exact.expand(1, 2, 2, 2, 2).flatten(-2).flatten(-3, -2)
    error = found.std(0) / 20_000**0.5
    assert ((found.mean(0) - exact).abs() < 4 * error).all() and (error < 0.03 * exact.abs().mean()).all()


def test_eight_actions_of_a_state_tell_a_third_of_a_gradient_of_64_dimensions() -> None:
    x, centre = random(64, 1, 8, 8, seed=8), random(64, 1, 8, 8, seed=9)
    exact = -2 * (x - centre)
    cosines = []
    for normalize in (False, True):
        std = torch.full((64,), 0.1, dtype=torch.float64)
        found = estimate(lambda a: -(a - centre).square().sum((1, 2, 3)), x, std, normalize=normalize)
        cosines.append(torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0).item())
    assert min(cosines) >= 0.25  # sqrt(7 / 64) = 0.33


def test_a_tenfold_reward_changes_nothing_where_advantages_are_normalised() -> None:
    rewards, noise, std = random(8, 3, seed=1), random(8, 3, 1, 4, 4, seed=2), torch.ones(3, dtype=torch.float64)
    one, ten = (score_function_gradient(f * rewards, noise, std, normalize=True)[0] for f in (1, 10))
    torch.testing.assert_close(one, ten)
    shifted = score_function_gradient(rewards + 5, noise, std, normalize=True)[0]
    torch.testing.assert_close(one, shifted)


@pytest.mark.parametrize(
    "shapes",
    [((4, 3), (4, 2, 1, 2, 2), (3,)), ((4, 3), (3, 3, 1, 2, 2), (3,)), ((4, 3), (4, 3, 1, 2, 2), (4,)), ((4,),) * 3],
)
def test_actions_of_other_shapes_are_an_error(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ShapeError, match="one direction per action"):
        score_function_gradient(*(random(*shape) for shape in shapes))


def test_gradcheck() -> None:
    rewards, coefficients = random(2, 4, seed=1).requires_grad_(), random(2, 4, seed=2)
    assert torch.autograd.gradcheck(lambda r: pathwise_policy_loss(r, coefficients), (rewards,))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    # Sums of rewards overflow float16.
    rewards, coefficients = (20_000 * random(2, 3, 8)).to(dtype)
    scored, noise, std = (20_000 * random(4, 3)).to(dtype), random(4, 3, 1, 2, 2).to(dtype), random(3).exp().to(dtype)
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (pathwise_policy_loss, (rewards, coefficients)),
        (lambda *tensors: score_function_gradient(*tensors)[0], (scored, noise, std)),
    ]
    for call, tensors in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = call(*tensors)
        assert value.dtype == torch.float32
        exact = call(*(x.double() for x in tensors))
        torch.testing.assert_close(value.double(), exact, atol=1e-6, rtol=1e-5 if not autocast else 1e-4)


def test_no_host_sync() -> None:
    with FakeTensorMode():
        rewards, x = torch.randn(2, 4), torch.randn(4, 3, 8, 8)
        loss = pathwise_policy_loss(rewards, rewards, valid=rewards > 0)
        noise = action_noise(x, 2, 4, torch.Generator())
        gradient, usable = score_function_gradient(rewards, noise, torch.ones(4), normalize=True)
        assert loss.shape == () and gradient.shape == x.shape and usable.shape == (4,)

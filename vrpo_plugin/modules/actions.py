"""Rewards without a gradient: several actions of each state are scored, and compared with each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.errors import ConfigError, ShapeError
from vrpo_plugin.functional.interpolant import time_like
from vrpo_plugin.functional.policy import action_noise, coarse_sides, score_function_gradient
from vrpo_plugin.functional.rewards import RewardState
from vrpo_plugin.functional.tensors import promote
from vrpo_plugin.modules.checks import described

SMALLEST_ACTION_TIME = 0.05

Reward = Callable[[RewardState], Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Actions:
    """K actions of each state.

    Attributes:
        noise: directions (K, B, C, H, W).
        std: of each state's actions (B,).
        rewards: (R, K, B), marked as :func:`marked` says.
    """

    noise: Tensor
    std: Tensor
    rewards: Tensor


@torch.no_grad()
def score_actions(
    rewards: Mapping[str, Reward], state: RewardState, config: VRPOConfig, generator: torch.Generator | None
) -> Actions:
    """Every reward at K actions of each state (equation 13).

    Raises:
        ConfigError: there is no generator.
        ShapeError: a reward is not (B,).
    """
    if generator is None:
        raise ConfigError(
            "generator",
            expected="a torch.Generator, for the actions that black-box rewards score",
            got=None,
            do="Pass aligner(..., generator=torch.Generator(device).manual_seed(seed)).",
        )
    mean = state.x0_hat.detach()
    noise = action_noise(mean, config.actions, config.action_grid, generator)
    # Near the data an estimate hardly errs, and is hardly varied; at t = 0 a direction still needs a length.
    std = config.action_std * promote(state.t).clamp(min=SMALLEST_ACTION_TIME)
    rows = []
    for direction in noise:  # over actions, not samples: a reward is called with a batch at a time
        acted = replace(state, x0_hat=mean + time_like(std, mean) * direction.to(mean.dtype))
        rows.append(torch.stack([marked(*call_reward(name, reward, acted)) for name, reward in rewards.items()]))
    return Actions(noise, std, torch.stack(rows, 1))


def black_box_loss(
    actions: Actions, shares: Tensor, rewards: Tensor, sound: Tensor, x0_hat: Tensor, config: VRPOConfig
) -> Tensor:
    """What the rewards are, with the gradient that their actions tell (equation 14).

    Args:
        actions: of each state.
        shares: weight of each reward (R, B).
        rewards: (R, B), means over the actions.
        sound: (B,); False leaves a sample out.
        x0_hat: estimates (B, C, H, W), which get the gradient.
        config: the objective.
    """
    rows, columns = coarse_sides(x0_hat, config.action_grid)
    cell = x0_hat[0, 0].numel() / (rows * columns)
    loss = x0_hat.new_zeros((), dtype=torch.float32)
    for scored, share, reward in zip(actions.rewards, shares, rewards, strict=True):
        gradient, usable = score_function_gradient(
            torch.where(sound, scored, torch.nan),
            actions.noise,
            actions.std,
            cell=cell,
            normalize=config.scale == "group",
        )
        weight = torch.where(usable, share, 0) / usable.sum().clamp(min=1)
        value = -(weight * torch.where(usable, reward, 0)).sum()
        # A sample that is not finite is zeros here, and has no gradient.
        loss = loss + value - (time_like(weight, x0_hat) * gradient * (x0_hat - x0_hat.detach())).sum()
    return loss


def call_reward(name: str, reward: Reward, state: RewardState) -> tuple[Tensor, Tensor | None]:
    """What a reward of the user gives: values (B,), and which samples it scored.

    Raises:
        ShapeError: it is something else.
    """
    result = reward(state)
    value, scored = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    right = isinstance(value, Tensor) and value.shape == state.t.shape and not value.is_complex()
    if scored is not None:
        right = right and isinstance(scored, Tensor) and scored.shape == state.t.shape and scored.dtype == torch.bool
    if not right:
        raise ShapeError(
            f"reward {name!r}",
            expected=f"values (B={len(state.t)},), higher is better, and an optional boolean mask of that shape",
            got=[described(x) for x in (result if isinstance(result, tuple) else (result,))],
            do="Return one value per sample.",
        )
    return value, scored


def mean_of_actions(rewards: Tensor) -> Tensor:
    """Means (R, B) over the finite of K actions (R, K, B); where fewer than two are, inf or NaN as in ``marked``."""
    finite = torch.isfinite(rewards)
    count = finite.sum(1)
    mean = torch.where(finite, rewards, 0).sum(1) / count.clamp(min=1)
    return torch.where(count >= 2, mean, torch.where(torch.isinf(rewards).any(1), torch.inf, torch.nan))


def marked(value: Tensor, scored: Tensor | None) -> Tensor:
    """Inf for a reward that is not finite, which is counted; NaN where the reward did not score the sample."""
    value = torch.where(torch.isfinite(value), value, torch.inf)
    return value if scored is None else torch.where(scored, value, torch.nan)

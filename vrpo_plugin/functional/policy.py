"""Policy losses: pathwise for rewards with a gradient, score function for those without."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vrpo_plugin.errors import ShapeError
from vrpo_plugin.functional.advantages import group_moments, inverse_scale
from vrpo_plugin.functional.tensors import is_finite, promote


def pathwise_policy_loss(rewards: Tensor, coefficients: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Loss whose gradient is -mean_i sum_k c_ki grad r_ki, c = w / s (equation 12).

    The pathwise (reparameterised) gradient of the expected advantage: the group's baseline drops out of it,
    the group's scale and the weights stay.

    Args:
        rewards: differentiable rewards (K, B).
        coefficients: weight over scale (K, B); detached here.
        valid: (K, B); False leaves a reward out of the mean, which is taken per reward over the valid ones.
            Rewards that are not finite are always left out.

    Returns:
        Scalar loss.

    Raises:
        ShapeError: the shapes differ.

    Source: our derivation; reparameterisation as in SVG, arXiv 1510.09142.
    """
    if rewards.shape != coefficients.shape or rewards.ndim != 2:
        raise ShapeError(
            "coefficients",
            expected=f"(K, B) like rewards {tuple(rewards.shape)}",
            got=tuple(coefficients.shape),
            do="Pass one coefficient per reward and sample.",
        )
    rewards = promote(rewards)
    finite = is_finite(rewards.detach())
    valid = finite if valid is None else valid & finite
    factors = torch.where(valid, coefficients.detach(), 0) / -valid.sum(1, keepdim=True).clamp(min=1)
    return (factors * torch.where(valid, rewards, 0)).sum()


def at_estimate(loss: Tensor, leaf: Tensor, x0_hat: Tensor) -> tuple[Tensor, Tensor]:
    """A loss of a detached estimate, as a loss of the estimate itself: L + <stop(dL / dx), x - stop(x)> (equation 12b).

    The gradient is formed here, so that the graph from ``leaf`` to ``loss`` is freed before the transformer's backward
    pass, and not kept beside its activations.

    Args:
        loss: scalar, of ``leaf`` alone; its graph is used up.
        leaf: ``x0_hat.detach().requires_grad_()``.
        x0_hat: what the loss is to be of.

    Returns:
        Scalar of the same value, and dL / dx of the shape of ``x0_hat``.

    Source: our derivation.
    """
    # In units of about 1: a mean over a batch has gradients that half precision in a reward's network rounds to 0.
    unit = loss.new_full((), 2.0 ** math.floor(math.log2(max(1, leaf.numel()))))  # a power of 2 rounds nothing itself
    with nullcontext() if leaf.is_meta else torch.autocast(leaf.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(loss, leaf, unit, materialize_grads=True)
    gradient = gradient / unit
    return _WithGradient.apply(loss.detach(), gradient, x0_hat), gradient


class _WithGradient(torch.autograd.Function):
    """A value with a given gradient by its last input."""

    @staticmethod
    def forward(value: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, None, grad * gradient


def coarse_sides(like: Tensor, grid: int) -> tuple[int, int]:
    """Sides of the grid that the actions' noise is drawn on: at most the latent's own."""
    height, width = like.shape[-2:]
    return (min(grid, height), min(grid, width)) if grid else (height, width)


def action_noise(like: Tensor, count: int, grid: int, generator: torch.Generator) -> Tensor:
    """Orthogonal directions of low dimension for the actions of each state, e_ij (equation 13).

    Normal noise on a coarse grid, made orthogonal within each state, of length sqrt(n), n its dimension; where there
    are more actions than dimensions they are normal alone. Each coarse cell is repeated over the pixels it covers.

    Args:
        like: latents (B, C, H, W), for shape, dtype and device.
        count: K, actions of each state.
        grid: sides of the coarse grid; 0, or more than a side, stands for the latent's own.
        generator: source of the noise, on the device of ``like``.

    Returns:
        (K, B, C, H, W), of unit mean square.

    Source: our derivation. Independent orthogonal directions tell more of a gradient than antithetic pairs of half as
        many: cosines of sqrt((K - 1) / n) against sqrt(K / 2 / n).
    """
    batch, channels, height, width = like.shape
    rows, columns = coarse_sides(like, grid)
    n = channels * rows * columns
    noise = torch.randn(batch, count, n, generator=generator, device=like.device, dtype=promote(like).dtype)
    directions: list[Tensor] = []
    for direction in noise.unbind(1):  # over actions, all samples at once
        if count <= n:
            for other in directions:
                direction = direction - (direction * other).sum(-1, keepdim=True) * other
        directions.append(torch.nn.functional.normalize(direction, dim=-1))
    coarse = rearrange(torch.stack(directions) * math.sqrt(n), "k b (c h w) -> (k b) c h w", c=channels, h=rows)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="nearest")
    return rearrange(fine, "(k b) c h w -> k b c h w", k=count)


def score_function_gradient(
    rewards: Tensor, noise: Tensor, std: Tensor, *, cell: float = 1.0, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradient of a reward from its values at several actions of each state (equation 14).

    g_i = sum_j A_ij e_ij / (std_i (K - 1) m), A_ij = R_ij - mean_j R_i, or that over std_j R_i; in expectation
    the gradient's mean over each coarse cell of m pixels. The group is the state: no state is compared with another.

    Args:
        rewards: R of the actions x0_hat + std * noise, (K, B); those that are not finite are left out.
        noise: e (K, B, C, H, W) of :func:`action_noise`.
        std: standard deviation of each state's actions (B,), > 0.
        cell: m, pixels that share a direction.
        normalize: divide advantages by the state's own standard deviation.

    Returns:
        The gradient (B, C, H, W), 0 for states with fewer than two finite rewards, and which states (B,) have more.

    Raises:
        ShapeError: the shapes differ.

    Source: REINFORCE with the group's mean as baseline; GRPO, arXiv 2402.03300, section 4.1.
    """
    if rewards.ndim != 2 or noise.shape[:2] != rewards.shape or std.shape != rewards.shape[1:]:
        raise ShapeError(
            "noise, std",
            expected=f"(K, B, ...) and (B,) of rewards {tuple(rewards.shape)}",
            got=(tuple(noise.shape), tuple(std.shape)),
            do="Pass one direction per action.",
        )
    moments = group_moments(rewards.T)  # the actions of a state are a group
    advantages = moments.deviation * inverse_scale(moments.variance, scale="group" if normalize else "none")
    factors = advantages / ((moments.count - 1).clamp(min=1) * promote(std)[:, None] * cell)
    # Not einsum, which autocast would compute in half precision.
    gradient = (rearrange(factors, "b k -> k b 1 1 1") * promote(noise)).sum(0)
    return gradient, (moments.count >= 2).squeeze(-1)

"""Policy losses: pathwise for rewards with a gradient, score function for those without."""

import math
from contextlib import nullcontext

import torch
from einops import reduce
from torch import Tensor

from vrpo_plugin.errors import ConfigError, ShapeError, explain
from vrpo_plugin.functional.tensors import promote, require_shape


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
            explain(
                "coefficients",
                expected=f"(K, B) like rewards {tuple(rewards.shape)}",
                got=tuple(coefficients.shape),
                do="Pass one coefficient per reward and sample.",
            )
        )
    rewards = promote(rewards)
    finite = torch.isfinite(rewards)
    valid = finite if valid is None else valid & finite
    weighted = torch.where(valid, coefficients.detach() * torch.where(valid, rewards, 0), 0)
    return -(weighted.sum(1) / valid.sum(1).clamp(min=1)).sum()


def at_estimate(loss: Tensor, leaf: Tensor, x0_hat: Tensor) -> Tensor:
    """A loss of a detached estimate, as a loss of the estimate itself: L + <stop(dL / dx), x - stop(x)> (equation 12b).

    The gradient is formed here, so that the graph from ``leaf`` to ``loss`` is freed before the transformer's backward
    pass, and not kept beside its activations.

    Args:
        loss: scalar, of ``leaf`` alone; its graph is used up.
        leaf: ``x0_hat.detach().requires_grad_()``.
        x0_hat: what the loss is to be of.

    Returns:
        Scalar of the same value.

    Source: our derivation.
    """
    # In units of about 1: a mean over a batch has gradients that half precision in a reward's network rounds to 0.
    unit = 2.0 ** math.floor(math.log2(max(1, leaf.numel())))  # a power of 2 rounds nothing itself
    with nullcontext() if leaf.is_meta else torch.autocast(leaf.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(loss * unit, leaf, materialize_grads=True)
    return loss.detach() + ((x0_hat - x0_hat.detach()) * (gradient / unit)).sum()


def gaussian_log_prob(action: Tensor, mean: Tensor, std: float | Tensor) -> Tensor:
    """Log density of N(mean, std^2 I) at an action (equation 13).

    Args:
        action: (B, ...).
        mean: same shape.
        std: positive, a number or broadcastable to ``mean``.

    Returns:
        Log densities (B,), summed over all but the first dimension.

    Raises:
        ConfigError: ``std`` is a number that is not positive.
        ShapeError: the shapes differ.

    Source: definition of the normal density.
    """
    require_shape("action", action, mean.shape)
    if not isinstance(std, Tensor) and not std > 0:
        raise ConfigError(explain("std", expected="> 0", got=std, do="Set action_std to 0.1, the default."))
    # A number stays one: bringing it to the device would make the host wait.
    log_std = promote(std).log() if isinstance(std, Tensor) else math.log(std)
    log_prob = -0.5 * ((promote(action) - promote(mean)) / std).square() - log_std - 0.5 * math.log(2 * math.pi)
    return reduce(log_prob, "b ... -> b", "sum")


def score_function_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    epsilon: float = 0.2,
    valid: Tensor | None = None,
) -> Tensor:
    """Clipped score-function loss for rewards without a gradient, -mean min(rho A, clip(rho) A) (equation 14).

    rho = exp(log_probs - old_log_probs) is 1 when each group is used for one update, and the gradient is then
    REINFORCE's.

    Args:
        log_probs: under the present policy, any shape.
        old_log_probs: under the policy that drew the actions, same shape; detached here.
        advantages: same shape; detached here.
        epsilon: half-width of the ratio's trust region.
        valid: same shape; False leaves an action out of the mean.

    Returns:
        Scalar loss.

    Raises:
        ShapeError: the shapes differ.

    Source: PPO, arXiv 1707.06347, equation 7; GRPO, arXiv 2402.03300, equation 3, without its KL term.
    """
    if not log_probs.shape == old_log_probs.shape == advantages.shape:
        raise ShapeError(
            explain(
                "advantages, old_log_probs",
                expected=f"like log_probs {tuple(log_probs.shape)}",
                got=(tuple(advantages.shape), tuple(old_log_probs.shape)),
                do="Pass one advantage and one old log-probability per action.",
            )
        )
    if valid is None:
        valid = torch.ones_like(advantages, dtype=torch.bool)
    # Before the product: 0 times the gradient of a NaN that is left out would be NaN again.
    advantages = torch.where(valid, promote(advantages).detach(), 0)
    ratio = torch.where(valid, promote(log_probs) - promote(old_log_probs).detach(), 0).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    return -surrogate.sum() / valid.sum().clamp(min=1)

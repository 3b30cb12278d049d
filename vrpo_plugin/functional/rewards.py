"""Rewards of the generation readout: one number per sample, higher is better."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from vrpo_plugin.functional.alignment import cosine_alignment
from vrpo_plugin.functional.tensors import direction_distances, promote, require_shape


@dataclass(frozen=True)
class RewardState:
    """What a reward may look at.

    Attributes:
        x0_hat: one-step clean estimate (B, C, H, W); carries the gradient to the generator.
        x0: clean latents (B, C, H, W).
        x_t: noisy latents (B, C, H, W).
        t: times (B,), 0 = data, 1 = noise.
        z: frozen encoder tokens of the clean image, one (B, N, D) per encoder.
        y: labels (B,) where the host passes them.
        step: training step where the host passes it; needed only by rewards that run every k steps.
    """

    x0_hat: Tensor
    x0: Tensor
    x_t: Tensor
    t: Tensor
    z: tuple[Tensor, ...]
    y: Tensor | None = None
    step: int | None = None


def fidelity_reward(x0_hat: Tensor, x0: Tensor) -> Tensor:
    """Generation fidelity: r = -mean((x0_hat - x0)^2) (equation 5).

    Args:
        x0_hat: estimates (B, ...), any floating dtype; computed in float32 at least.
        x0: clean latents, same shape.

    Returns:
        Rewards (B,), at most 0.

    Raises:
        ShapeError: the shapes differ.

    Source: our derivation; the denoising loss is this reward, weighted by 1 / sigma(t)^2 on the linear path.
    """
    require_shape("x0_hat", x0_hat, x0.shape)
    error = promote(x0_hat) - promote(x0)
    return -reduce(error.square(), "b ... -> b", "mean")


def semantic_reward(tokens: Sequence[Tensor], z: Sequence[Tensor]) -> Tensor:
    """Semantic coherence: r = mean over encoders and tokens of <C(x0_hat), z> (equation 3).

    Args:
        tokens: the critic's tokens of x0_hat, one (B, N, D) per encoder.
        z: the frozen encoder's tokens of the clean image, same shapes.

    Returns:
        Rewards (B,), in [-1, 1].

    Raises:
        ShapeError: a pair differs in shape.

    Source: our derivation.
    """
    return torch.stack([cosine_alignment(c, target) for c, target in zip(tokens, z, strict=True)]).mean(0)


def feature_distance(features: Sequence[Tensor], reference: Sequence[Tensor], *, eps: float = 1e-6) -> Tensor:
    """Distance between feature maps, normalised over channels at every position (equation 4).

    d = mean over maps and positions of |f / |f| - g / |g||^2.

    Args:
        features: feature maps (B, C_l, H_l, W_l), one per layer.
        reference: the same for the reference images.
        eps: smallest norm that is divided by, so that an all-zero position counts as 0; it gets no gradient.

    Returns:
        Distances (B,), in [0, 4].

    Raises:
        ShapeError: a pair differs in shape.

    Source: LPIPS, arXiv 1801.03924, equation 1, without learned weights.
    """
    distances = []
    for f, g in zip(features, reference, strict=True):
        require_shape("features", f, g.shape)
        distances.append(reduce(direction_distances(f, g, 1, eps=eps), "b h w -> b", "mean"))
    return torch.stack(distances).mean(0)


def retrieval_reward(tokens: Tensor, z: Tensor, *, queries: int = 16) -> Tensor:
    """Share of an image's tokens whose nearest encoder token in the batch is one of the same image.

    A reward without a gradient: for ``black_box_rewards``, with the critic's tokens of an estimate.

    Args:
        tokens: (B, N, D), of the estimates.
        z: frozen tokens of the clean images (B, N, D).
        queries: tokens of each image that are looked at, evenly spaced; memory is B * queries * B * N numbers.

    Returns:
        Rewards (B,), in [0, 1].

    Raises:
        ShapeError: the shapes differ.

    Source: our derivation; retrieval as in contrastive learning, CPC, arXiv 1807.03748.
    """
    require_shape("tokens", tokens, z.shape)
    batch, count, _ = z.shape
    picked = torch.arange(min(queries, count), device=z.device) * count // min(queries, count)
    asked, known = (F.normalize(promote(x), dim=-1) for x in (tokens[:, picked], z))
    # Distances, which no autocast computes in half precision; of unit vectors they order as cosines do.
    nearest = torch.cdist(asked.flatten(0, 1), known.flatten(0, 1)).argmin(1).unflatten(0, (batch, -1)) // count
    own = torch.arange(batch, device=z.device)[:, None]
    return (nearest == own).to(asked.dtype).mean(1)

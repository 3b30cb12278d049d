"""Alignment of tokens with a frozen encoder's tokens."""

from torch import Tensor

from vrpo_plugin.errors import ShapeError
from vrpo_plugin.functional.tensors import cosines, promote


def cosine_alignment(z_tilde: Tensor, z: Tensor) -> Tensor:
    """Mean cosine between predicted and frozen tokens, r = mean_n <z_tilde / |z_tilde|, z / |z|> (equation 3).

    REPA's projection loss is the negative of its batch mean. A token of no length has cosine 0 and gradient 0.

    Args:
        z_tilde: predicted tokens (B, N, D), any floating dtype; computed in float32 at least.
        z: frozen tokens, same shape.

    Returns:
        Rewards (B,), in [-1, 1].

    Raises:
        ShapeError: the shapes differ.

    Source: REPA, arXiv 2410.06940, equation 8; sihyun-yu/REPA@67f7145:loss.py.
    """
    if z_tilde.shape != z.shape or z.ndim != 3:
        raise ShapeError(
            "z",
            expected=f"(B, N, D) like z_tilde {tuple(z_tilde.shape)}",
            got=tuple(z.shape),
            do="Resample the tokens to one grid and check the encoder's dimension.",
        )
    return cosines(z_tilde, z, -1).mean(-1)


def spatial_normalize(z: Tensor, *, alpha: float = 0.6, eps: float = 1e-6) -> Tensor:
    """Normalises every feature over the tokens of its image, (z - alpha mean_n z) / (std_n z + eps) (equation 7).

    It takes away what all tokens of an image share, so that their differences are aligned.

    Args:
        z: frozen tokens (B, N, D), N >= 2.
        alpha: share of the mean that is taken away, in [0, 1]; 0.6 is iREPA's.
        eps: added to the standard deviation (unbiased).

    Returns:
        Tokens (B, N, D), in float32 at least.

    Raises:
        ShapeError: fewer than two tokens.

    Source: iREPA, End2End-Diffusion/iREPA@99ad4ac:ldm/utils.py.
    """
    if z.ndim != 3 or z.shape[1] < 2:
        raise ShapeError("z", expected="(B, N >= 2, D)", got=tuple(z.shape), do='Use target_norm="none".')
    z = promote(z)
    return (z - alpha * z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + eps)

"""Heads from a generator's hidden tokens to an encoder's tokens."""

from einops import rearrange
from torch import Tensor, nn

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.functional.tensors import grid_like


class ConvProjector(nn.Module):
    """One 3x3 convolution over the token grid.

    Args:
        hidden_dim: D of the hidden tokens.
        target_dim: D of the encoder's tokens.
        sides: (height, width) of the latents, whose aspect the token grid has; None for a square one.

    Source: iREPA, End2End-Diffusion/iREPA@99ad4ac:ldm/models/sit.py (same parameter names).
    """

    def __init__(self, hidden_dim: int, target_dim: int, *, sides: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.sides = sides
        self.projection_layer = nn.Conv2d(hidden_dim, target_dim, kernel_size=3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden tokens (B, N, D) to (B, N, target_dim)."""
        height, _ = grid_like(hidden.shape[1], self.sides)
        maps = self.projection_layer(rearrange(hidden, "b (h w) d -> b d h w", h=height))
        return rearrange(maps, "b d h w -> b (h w) d")


def build_projector(
    kind: str, hidden_dim: int, target_dim: int, *, projector_dim: int = 2048, sides: tuple[int, int] | None = None
) -> nn.Module:
    """Builds a projector, initialised like REPA's (Xavier-uniform linear layers, zero biases).

    Args:
        kind: ``mlp`` (three linear layers with SiLU, REPA's structure and parameter names) or ``conv``.
        hidden_dim: D of the hidden tokens.
        target_dim: D of the encoder's tokens.
        projector_dim: width of ``mlp``.
        sides: (height, width) of the latents, for ``conv``; None for square ones.

    Returns:
        A module from (B, N, hidden_dim) to (B, N, target_dim).

    Raises:
        ConfigError: ``kind`` is unknown.

    Source: REPA, sihyun-yu/REPA@67f7145:models/sit.py; iREPA for ``conv``.
    """
    if kind == "conv":
        return ConvProjector(hidden_dim, target_dim, sides=sides)
    if kind != "mlp":
        raise ConfigError("projector", expected="mlp or conv", got=repr(kind), do="Choose one of these.")
    projector = nn.Sequential(
        nn.Linear(hidden_dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, target_dim),
    )
    for layer in projector:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return projector

"""The features readout: how well the tokens of an early block are aligned, which is REPA's loss (equation 3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vrpo_plugin.errors import ShapeError
from vrpo_plugin.functional.alignment import cosine_alignment, spatial_normalize
from vrpo_plugin.functional.tensors import finite_samples, grid_like, masked_mean, resample_tokens, zero_unless


@dataclass(frozen=True)
class FeaturesOutput:
    """Loss and records of the features readout; ``VRPOOutput`` gives the shapes."""

    loss: Tensor
    rewards: dict[str, Tensor]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class TokenGrids:
    """Where tokens lie in their image.

    Attributes:
        latent: sides (H, W) of the latents; None where they are not known.
        encoder: sides, or a grid, of the image as the encoder sees it.
        tokens: the grid (h, w) that the encoder's tokens come in.
        prefix: tokens before the grid.
    """

    latent: tuple[int, int] | None
    encoder: tuple[int, int] | None
    tokens: tuple[int, int] | None
    prefix: int = 0

    @classmethod
    def of(
        cls, latent_shape: Sequence[int] | None, token_grid: tuple[int, int] | None, prefix: int = 0
    ) -> "TokenGrids":
        """By default the grid has half the latent's sides, as that of a patch-2 transformer and of REPA's encoders."""
        latent = None if latent_shape is None else (latent_shape[1], latent_shape[2])
        if token_grid is not None:
            token_grid = (token_grid[0], token_grid[1])
        encoder = token_grid or latent
        if token_grid is None and latent is not None:
            token_grid = (max(1, latent[0] // 2), max(1, latent[1] // 2))
        return cls(latent, encoder, token_grid, prefix)

    def on_grid(self, z: Tensor) -> Tensor:
        """An encoder's tokens (B, N, D) without what stands before the grid, on the grid of the encoder's tokens."""
        return self._resample(z[:, self.prefix :], self.tokens)

    def like(self, z: Tensor, z_tilde: Tensor) -> Tensor:
        """An encoder's tokens (B, N, D) on the transformer's grid, that of ``z_tilde`` (B, N', D)."""
        tokens = z_tilde.shape[1] - self.prefix
        if z.shape[1] == z_tilde.shape[1] and not self._squashed(tokens):
            return z
        grid = grid_like(tokens, self.latent or self.encoder)
        return torch.cat([z[:, : self.prefix], self._resample(z[:, self.prefix :], grid)], 1)

    def normalised(self, z: Tensor) -> Tensor:
        """iREPA's normalisation over the grid alone: a class token is no place in the image."""
        return torch.cat([z[:, : self.prefix], spatial_normalize(z[:, self.prefix :])], 1)

    def _squashed(self, tokens: int) -> bool:
        """An encoder that saw an oblong image as a square has as many tokens, in other places."""
        if self.latent is None or self.latent == self.encoder:
            return False
        try:
            return grid_like(tokens, self.latent) != grid_like(tokens, self.encoder)
        except ShapeError:  # no grid of these latents: nothing says that the two differ
            return False

    def _resample(self, z: Tensor, grid: tuple[int, int] | None) -> Tensor:
        if grid is None:
            return z
        own = self.tokens
        if own is None or z.shape[1] != own[0] * own[1]:
            own = grid_like(z.shape[1], self.encoder)
        return resample_tokens(z, own, grid)


def align_features(
    projectors: nn.ModuleList,
    tokens: Sequence[Tensor],
    projected: Sequence[Tensor],
    targets: Sequence[Tensor],
    grids: TokenGrids,
) -> FeaturesOutput:
    """The negative mean cosine over taps and encoders, of the samples that are finite.

    Args:
        projectors: one per tap and encoder, taps first.
        tokens: of each tap (B, N, hidden_dim).
        projected: tokens that the host has projected itself (B, N, D), one per encoder, or none.
        targets: frozen tokens (B, N, D), one per encoder.
        grids: where tokens lie.
    """
    sound = finite_samples(*tokens, *projected, *targets)
    targets = [zero_unless(sound, target) for target in targets]
    aligned = [(zero_unless(sound, z_tilde), z) for z_tilde, z in zip(projected, targets, strict=False)]
    for i, hidden in enumerate(tokens):
        clean = zero_unless(sound, hidden)
        aligned += [(projectors[i * len(targets) + j](clean), z) for j, z in enumerate(targets)]
    rewards = [cosine_alignment(z_tilde, grids.like(z, z_tilde)) for z_tilde, z in aligned]
    reward = torch.stack(rewards).mean(0)
    loss = -masked_mean(reward, sound)
    return FeaturesOutput(
        loss=loss,
        rewards={"semantic_features": torch.where(sound, reward.detach(), torch.nan)},
        metrics={"vrpo/align_cos": -loss.detach(), "vrpo/nonfinite": (~sound).sum().float()},
    )

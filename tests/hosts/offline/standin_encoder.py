"""In place of DINOv2: tokens that depend on the image through fixed random weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM = 32
GRID = 16


class SmallEncoder(nn.Module):
    """The parts of DINOv2 that the hosts touch."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.embed_dim = dim
        self.patch_size = 14
        self.num_register_tokens = 0
        self.embed = nn.Linear(3 * 4, dim)
        self.mix = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, 1 + 5 * 5, dim))  # of another size: the host resamples it
        self.head = nn.Linear(dim, dim)

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        pooled = F.pixel_unshuffle(F.adaptive_avg_pool2d(images.float(), 2 * GRID), 2)  # (B, 12, 16, 16)
        tokens = self.embed(pooled.flatten(2).transpose(1, 2))
        if self.pos_embed.shape[1] == 1 + GRID * GRID:
            tokens = tokens + self.pos_embed[:, 1:]
        tokens = self.norm(F.gelu(self.mix(tokens)))
        return {"x_norm_patchtokens": tokens, "x_norm_clstoken": tokens.mean(1) + self.pos_embed[:, 0]}


def small_encoder() -> SmallEncoder:
    """The same weights each time, and no draw from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        return SmallEncoder()

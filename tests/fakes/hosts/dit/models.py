"""Seams of facebookresearch/DiT, models.py."""

from fakes.hosts.parts import (
    WIDTH,
    Attention,
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    position_embedding,
    unpatchify,
)
from torch import nn


class DiT(nn.Module):
    """Returns noise and variance, in twice the channels."""

    def __init__(
        self,
        input_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=WIDTH,
        depth=3,
        num_heads=2,
        mlp_ratio=2.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        learn_sigma=True,
    ):
        super().__init__()
        self.in_channels, self.patch_size = in_channels, patch_size
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = position_embedding(self.x_embedder.num_patches, hidden_size)
        self.blocks = nn.ModuleList(
            Block(Attention(hidden_size, num_heads), hidden_size, mlp_ratio) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels * (2 if learn_sigma else 1))

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        return unpatchify(self.final_layer(x, c), self.patch_size)


DiT_models = {"DiT-T/2": DiT}

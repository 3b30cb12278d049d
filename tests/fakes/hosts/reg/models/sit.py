"""Seams of Martinser/REG, models/sit.py."""

import torch
from fakes.hosts.parts import (
    WIDTH,
    Attention,
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    build_mlp,
    position_embedding,
    unpatchify,
)
from torch import nn


class SiT(nn.Module):
    """Returns the velocity, the projected tokens with a class token before them, and the class token's velocity."""

    def __init__(
        self,
        path_type="edm",
        input_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=WIDTH,
        decoder_hidden_size=48,
        encoder_depth=2,
        depth=3,
        num_heads=2,
        mlp_ratio=2.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        use_cfg=False,
        z_dims=(12,),
        projector_dim=24,
        cls_token_dim=12,
        **block_kwargs,
    ):
        super().__init__()
        self.in_channels, self.patch_size, self.num_classes = in_channels, patch_size, num_classes
        self.z_dims, self.encoder_depth = list(z_dims), encoder_depth
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = position_embedding(self.x_embedder.num_patches + 1, hidden_size)
        self.blocks = nn.ModuleList(
            Block(Attention(hidden_size, num_heads, qk_norm=block_kwargs["qk_norm"]), hidden_size, mlp_ratio)
            for _ in range(depth)
        )
        self.projectors = nn.ModuleList(build_mlp(hidden_size, projector_dim, z_dim) for z_dim in z_dims)
        self.final_layer = FinalLayer(decoder_hidden_size, patch_size, in_channels)
        self.cls_in = nn.Linear(z_dims[0], hidden_size)
        self.cls_out = nn.Linear(decoder_hidden_size, z_dims[0])

    def forward(self, x, t, y, return_logvar=False, cls_token=None):
        x = torch.cat([self.cls_in(cls_token)[:, None], self.x_embedder(x)], 1) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, c)
            if i + 1 == self.encoder_depth:
                projected = [projector(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for projector in self.projectors]
        return unpatchify(self.final_layer(x[:, 1:], c), self.patch_size), projected, self.cls_out(x[:, 0])


SiT_models = {
    "SiT-T/2": lambda **kwargs: SiT(hidden_size=WIDTH, decoder_hidden_size=WIDTH, **kwargs),
    "SiT-S/2": lambda **kwargs: SiT(hidden_size=WIDTH, **kwargs),
}

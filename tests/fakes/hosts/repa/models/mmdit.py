"""Seams of sihyun-yu/REPA, models/mmdit.py."""

import torch
from fakes.hosts.parts import (
    WIDTH,
    Attention,
    Block,
    FinalLayer,
    PatchEmbed,
    TimestepEmbedder,
    build_mlp,
    unpatchify,
)
from torch import nn


class JointBlock(nn.Module):
    """Two streams; returns (context, image tokens)."""

    def __init__(self, width):
        super().__init__()
        self.block = Block(Attention(width), width)

    def forward(self, context, x, c):
        both = self.block(torch.cat([context, x], 1), c)
        return both[:, : context.shape[1]], both[:, context.shape[1] :]


class MMDiT(nn.Module):
    """Returns the velocity, and per encoder the projected image tokens of block ``encoder_depth``."""

    def __init__(
        self,
        input_size=8,
        patch_size=2,
        in_channels=4,
        depth=3,
        mlp_ratio=2.0,
        learn_sigma=False,
        adm_in_channels=None,
        context_embedder_config=None,
        register_length=0,
        attn_mode="torch",
        rmsnorm=False,
        scale_mod_only=False,
        swiglu=False,
        out_channels=None,
        pos_embed_scaling_factor=None,
        pos_embed_offset=None,
        pos_embed_max_size=None,
        num_patches=None,
        qk_norm=None,
        qkv_bias=True,
        dtype=None,
        device=None,
        encoder_depth=2,
        z_dims=(12,),
        projector_dim=24,
    ):
        super().__init__()
        self.in_channels, self.patch_size = in_channels, patch_size
        self.encoder_depth = encoder_depth
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, WIDTH)
        self.t_embedder = TimestepEmbedder(WIDTH)
        self.context_embedder = nn.Linear(10, WIDTH)
        self.register_buffer("pos_embed", torch.randn(1, self.x_embedder.num_patches, WIDTH))
        self.joint_blocks = nn.ModuleList(JointBlock(WIDTH) for _ in range(depth))
        self.final_layer = FinalLayer(WIDTH, patch_size, in_channels)
        self.projectors = nn.ModuleList(build_mlp(WIDTH, projector_dim, z_dim) for z_dim in z_dims)

    def forward(self, x, t, y=None, context=None, detach=False):
        x, c, context = self.x_embedder(x) + self.pos_embed, self.t_embedder(t), self.context_embedder(context)
        for i, block in enumerate(self.joint_blocks):
            context, x = block(context, x, c)
            if i + 1 == self.encoder_depth:
                projected = [projector(x) for projector in self.projectors]
        return unpatchify(self.final_layer(x, c), self.patch_size), projected

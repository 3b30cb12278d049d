"""Seams of End2End-Diffusion/REPA-E, models/sit.py."""

import torch
import torch.nn.functional as F
from fakes.hosts.parts import (
    WIDTH,
    Attention,
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    build_mlp,
    interpolant,
    mean_flat,
    position_embedding,
    unpatchify,
)
from torch import nn


class SiT(nn.Module):
    """Normalises its latents, noises them, and computes its losses itself."""

    compared = 0  # samples that went through the loop

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
        z_dims=(12,),
        projector_dim=24,
        bn_momentum=0.1,
        **block_kwargs,
    ):
        super().__init__()
        self.in_channels, self.patch_size, self.num_classes = in_channels, patch_size, num_classes
        self.z_dims, self.encoder_depth = list(z_dims), encoder_depth
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = position_embedding(self.x_embedder.num_patches, hidden_size)
        self.blocks = nn.ModuleList(
            Block(Attention(hidden_size, num_heads, qk_norm=block_kwargs["qk_norm"]), hidden_size, mlp_ratio)
            for _ in range(depth)
        )
        self.projectors = nn.ModuleList(build_mlp(hidden_size, projector_dim, z_dim) for z_dim in z_dims)
        self.final_layer = FinalLayer(decoder_hidden_size, patch_size, in_channels)
        self.bn = nn.BatchNorm2d(in_channels, eps=1e-4, momentum=bn_momentum, affine=False)

    def forward(self, x, y, zs, loss_kwargs, time_input=None, noises=None):
        clean = self.bn(x)
        time_input = torch.rand((len(x), 1, 1, 1)).to(clean) if time_input is None else time_input
        noises = torch.randn_like(clean) if noises is None else noises
        alpha, sigma, d_alpha, d_sigma = interpolant(time_input, loss_kwargs["path_type"])
        x = self.x_embedder(alpha * clean + sigma * noises) + self.pos_embed
        c = self.t_embedder(time_input.flatten()) + self.y_embedder(y, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, c)
            if i + 1 == self.encoder_depth:
                zs_tilde = [projector(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for projector in self.projectors]
                if loss_kwargs["align_only"]:
                    break
        output = unpatchify(self.final_layer(x, c), self.patch_size)
        denoising = None
        if not loss_kwargs["align_only"]:
            denoising = mean_flat((output - (d_alpha * clean + d_sigma * noises)) ** 2)
        projection = torch.zeros(())
        for z, z_tilde in zip(zs, zs_tilde, strict=True):
            for one, one_tilde in zip(z, z_tilde, strict=False):  # the shorter ends it, as in the host
                if not torch.compiler.is_compiling():
                    SiT.compared += 1
                projection = projection - (F.normalize(one, dim=-1) * F.normalize(one_tilde, dim=-1)).sum(-1).mean()
        return {
            "zs_tilde": zs_tilde,
            "model_output": output,
            "denoising_loss": denoising,
            "proj_loss": projection / (len(zs) * len(zs[0])),
            "time_input": time_input,
            "noises": noises,
        }


SiT_models = {
    "SiT-T/2": lambda **kwargs: SiT(hidden_size=WIDTH, decoder_hidden_size=WIDTH, **kwargs),
    "SiT-S/2": lambda **kwargs: SiT(hidden_size=WIDTH, **kwargs),
}

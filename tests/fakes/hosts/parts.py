"""Parts of the fake hosts' transformers, with the arguments and attributes that real ones have.

Neither this file nor the hosts import vrpo_plugin: unpatched runs must not meet it.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

WIDTH, DEPTH, TOKEN_DIM = 32, 3, 12


class PatchEmbed(nn.Module):
    """Latents (B, C, H, W) to tokens (B, N, D)."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias=True):
        super().__init__()
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, x):
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class Attention(nn.Module):
    """Self-attention which, as timm's does today, leaves the choice of norm for ``qk_norm`` to its caller."""

    def __init__(self, dim, num_heads=2, qkv_bias=False, qk_norm=False, norm_layer=None):
        super().__init__()
        if qk_norm:
            assert norm_layer is not None, "qk_norm without norm_layer"
        self.heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (k h d) -> k b h n d", k=3, h=self.heads)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Attention and MLP under a condition. No gate starts at zero, so that gradients reach everything at once."""

    def __init__(self, attention, width, mlp_ratio=2.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        inner = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x, c):
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        x = x + self.attn(self.norm1(x) * (1 + scale) + shift)
        return x + self.mlp(self.norm2(x))


class TimestepEmbedder(nn.Module):
    """Times (B,), of any range, to (B, D)."""

    def __init__(self, width, longest=1000.0):
        super().__init__()
        self.longest = longest
        self.mlp = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angles = t.float()[:, None] * self.longest ** -torch.linspace(-0.3, 1, 8, device=t.device)
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) to (B, D); in training some become the null label, drawn from the global generator."""

    def __init__(self, num_classes, width, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def forward(self, labels, train):
        if train and self.dropout_prob > 0:
            dropped = torch.rand(len(labels), device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """Tokens (B, N, D) to patches (B, N, p p C)."""

    def __init__(self, width, patch_size, out_channels):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.linear = nn.Linear(width, patch_size**2 * out_channels)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x, c):
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


def build_mlp(width, projector_dim, z_dim):
    """REPA's head from hidden tokens to encoder tokens."""
    return nn.Sequential(
        nn.Linear(width, projector_dim), nn.SiLU(), nn.Linear(projector_dim, projector_dim), nn.SiLU(),
        nn.Linear(projector_dim, z_dim),
    )  # fmt: skip


def position_embedding(tokens, width):
    """A frozen parameter (1, N, D), as all hosts but MMDiT have."""
    return nn.Parameter(torch.randn(1, tokens, width), requires_grad=False)


def unpatchify(x, patch_size):
    """Patches (B, N, p p C) to latents (B, C, H, W)."""
    side = round(x.shape[1] ** 0.5)
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=patch_size, q=patch_size)


def mean_flat(x):
    return x.flatten(1).mean(1)


def interpolant(t, path_type):
    """(alpha, sigma, their derivatives) with t = 0 at the data."""
    if path_type == "linear":
        return 1 - t, t, -1, 1
    quarter = torch.pi / 2
    return (
        torch.cos(quarter * t),
        torch.sin(quarter * t),
        -quarter * torch.sin(quarter * t),
        quarter * torch.cos(quarter * t),
    )


@torch.no_grad()
def update_ema(ema, model, decay=0.99):
    """Moves the copy towards the model, by REPA's rule for names."""
    copied = dict(ema.named_parameters())
    for name, parameter in model.named_parameters():
        copied[name.replace("module.", "")].lerp_(parameter.data, 1 - decay)


def requires_grad(model, flag):
    for parameter in model.parameters():
        parameter.requires_grad = flag

"""A tiny SiT-like transformer, batches for it, and one training step's calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.functional.interpolant import noisy_sample
from vrpo_plugin.modules.aligner import VRPOAligner, VRPOOutput

TINY: dict[str, Any] = {
    "hidden_dim": 32,
    "target_dims": (12,),
    "depth": 4,
    "latent_shape": (4, 8, 8),
    "projector_dim": 16,
    "critic_width": 16,
}


class PatchEmbed(nn.Module):
    """Latents to tokens; ``img_size`` as timm's has it."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class TinyBlock(nn.Module):
    """Attention and MLP under a condition. No gate starts at zero, so gradients reach everything."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        q, k, v = rearrange(
            self.qkv(self.norm1(x) * (1 + scale) + shift), "b n (k h d) -> k b h n d", k=3, h=self.heads
        )
        x = x + self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))


class TinySiT(nn.Module):
    """Predicts the velocity of small latents.

    Args:
        input_size: (H, W) of the latents.
        recompute: activation checkpointing: None, or the value of ``use_reentrant``.
    """

    def __init__(
        self,
        *,
        input_size: tuple[int, int] = (8, 8),
        in_channels: int = 4,
        width: int = 32,
        depth: int = 4,
        patch_size: int = 2,
        num_classes: int = 10,
        recompute: bool | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.patch_size, self.recompute = in_channels, patch_size, recompute
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, width)
        self.rows = input_size[0] // patch_size
        self.pos_embed = nn.Parameter(torch.randn(1, self.rows * (input_size[1] // patch_size), width))
        self.t_embedder = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(num_classes, width)
        self.blocks = nn.ModuleList(TinyBlock(width, heads=2) for _ in range(depth))
        self.final_layer = nn.Linear(width, patch_size**2 * in_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t[:, None].to(x.dtype)) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c) if self.recompute is None else checkpoint(block, x, c, use_reentrant=self.recompute)
        p = self.patch_size
        return rearrange(self.final_layer(x), "b (h w) (p q c) -> b c (h p) (w q)", h=self.rows, p=p, q=p)


@dataclass(frozen=True)
class Batch:
    """What a training loop holds when it calls the model and the aligner."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    y: Tensor
    z: tuple[Tensor, ...]

    @property
    def x_t(self) -> Tensor:
        return noisy_sample(self.x0, self.noise, self.t)[0]

    @property
    def velocity(self) -> Tensor:
        return noisy_sample(self.x0, self.noise, self.t)[1]

    def __getitem__(self, index: slice | Tensor) -> "Batch":
        z = tuple(z[index] for z in self.z)
        return Batch(x0=self.x0[index], noise=self.noise[index], t=self.t[index], y=self.y[index], z=z)

    def to(self, *args: Any) -> "Batch":
        x0, noise, t = self.x0.to(*args), self.noise.to(*args), self.t.to(*args)
        return Batch(x0=x0, noise=noise, t=t, y=self.y, z=tuple(z.to(*args) for z in self.z))


def make_batch(
    size: int,
    *,
    latent_shape: tuple[int, int, int] = (4, 8, 8),
    tokens: int = 16,
    dims: Sequence[int] = (12,),
    seed: int = 0,
) -> Batch:
    """A random batch from a generator of its own; its times are distinct."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator)
    return Batch(
        x0=torch.randn(size, *latent_shape, generator=generator),
        noise=torch.randn(size, *latent_shape, generator=generator),
        t=(order + 0.1 + 0.8 * torch.rand(size, generator=generator)) / size,
        y=torch.randint(0, 10, (size,), generator=generator),
        z=tuple(torch.randn(size, tokens, dim, generator=generator) for dim in dims),
    )


def tiny_aligner(*, built_in: Sequence[str] | None = None, **overrides: Any) -> VRPOAligner:
    """An aligner of the sizes of :class:`TinySiT`; ``built_in`` are the configuration's rewards."""
    config = VRPOConfig() if built_in is None else VRPOConfig(rewards=tuple(built_in))
    return VRPOAligner(**{**TINY, "config": config, **overrides})


def align(model: nn.Module, aligner: VRPOAligner, batch: Batch, **kwargs: Any) -> VRPOOutput:
    """The model's call and the aligner's, as a training loop makes them."""
    velocity = model(batch.x_t, batch.t, batch.y)
    return aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity, y=batch.y, **kwargs)


def denoising_loss(velocity: Tensor, batch: Batch) -> Tensor:
    return (velocity - batch.velocity).square().mean()


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """Copies of the gradients of the trainable parameters, by name."""
    named = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
    return {name: None if p.grad is None else p.grad.clone() for name, p in named}

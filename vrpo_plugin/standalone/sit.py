"""A compact SiT whose state dict and forward numerics are those of REPA's, so that its checkpoints load."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from timm.layers import GELUTanh
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vrpo_plugin.errors import ConfigError, ShapeError

SIT_MODELS: dict[str, dict[str, int]] = {
    f"SiT-{size}/{patch_size}": {
        "depth": depth,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "encoder_depth": encoder_depth,
        "patch_size": patch_size,
    }
    for size, depth, hidden_size, num_heads, encoder_depth, patch_sizes in (
        ("XL", 28, 1152, 16, 8, (2, 4, 8)),
        ("L", 24, 1024, 16, 8, (2, 4, 8)),
        ("B", 12, 768, 12, 8, (2, 4, 8)),
        ("S", 12, 384, 6, 8, (2, 4, 8)),
        ("Ti", 6, 128, 4, 2, (1, 2)),
    )
    for patch_size in patch_sizes
}


def create_sit(name: str, **overrides: Any) -> "SiT":
    """Builds a SiT by its name, ``SiT-XL/2`` to ``SiT-S/8`` or ``SiT-Ti/1`` and ``SiT-Ti/2``.

    Args:
        name: a key of ``SIT_MODELS``; the number is the patch size.
        overrides: arguments of :class:`SiT`; ``input_size`` is always needed.

    Returns:
        The model, initialised.

    Raises:
        ConfigError: the name is unknown, or the sizes contradict each other.

    Source: SiT, arXiv 2401.08740, table 1; the tiny ones (1.9M parameters with ten classes) are ours.
    """
    if name not in SIT_MODELS:
        nearest = difflib.get_close_matches(name, SIT_MODELS, n=3, cutoff=0.0)
        raise ConfigError("name", expected=f"one of {tuple(SIT_MODELS)}", got=repr(name), do=f"Nearest: {nearest}.")
    return SiT(**{**SIT_MODELS[name], **overrides})


class SiT(nn.Module):
    """A diffusion transformer with adaptive layer norm that predicts the velocity.

    Args:
        input_size: height and width of the latent.
        patch_size: side of a patch; the token grid is ``input_size // patch_size`` squared.
        in_channels: channels of the latent, and of the velocity.
        hidden_size: width D of a token.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of a block's MLP relative to ``hidden_size``.
        class_dropout_prob: share of labels replaced by the null label in training mode, in [0, 1];
            0 means that there is no null label.
        num_classes: number of classes; 0 is an unconditional model, which ignores ``y``.
        encoder_depth: 1-based block whose output the projectors read.
        z_dims: token widths of the frozen encoders, one projector each; empty for none.
        projector_dim: width of the projectors' hidden layers.
        qk_norm: layer norm on queries and keys.
        gradient_checkpointing: recompute the blocks in the backward pass; may be set at any time.

    Raises:
        ConfigError: the sizes contradict each other.

    Source: SiT, arXiv 2401.08740, section 3; names and shapes of REPA@67f7145:models/sit.py.
    """

    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        encoder_depth: int = 8,
        z_dims: Sequence[int] = (),
        projector_dim: int = 2048,
        qk_norm: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_divides("input_size", input_size, "patch_size", patch_size)
        _check_divides("hidden_size", hidden_size, "num_heads", num_heads)
        _check_divides("hidden_size", hidden_size, "4, for sines and cosines of rows and columns", 4)
        if z_dims and not 1 <= encoder_depth <= depth:
            raise ConfigError("encoder_depth", expected=f"1 to {depth}", got=encoder_depth, do="Choose a block.")
        self.input_shape = (in_channels, input_size, input_size)
        self.grid_size = input_size // patch_size
        self.patch_size, self.in_channels = patch_size, in_channels
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads
        self.num_classes, self.encoder_depth, self.z_dims = num_classes, encoder_depth, tuple(z_dims)
        self.gradient_checkpointing = gradient_checkpointing

        # Built and initialised in REPA's order: one seed gives both the same weights.
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid_size**2, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(
            SiTBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, qk_norm=qk_norm) for _ in range(depth)
        )
        self.projectors = nn.ModuleList(_projector(hidden_size, projector_dim, z_dim) for z_dim in z_dims)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self._initialize()

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class: ``num_classes``, or None where no label was ever dropped."""
        return self.y_embedder.null_label

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        force_drop_ids: Tensor | None = None,
        return_projections: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Predicts the velocity, and on request the projected tokens of block ``encoder_depth``.

        Args:
            x: noisy latents (B, C, H, W).
            t: times (B,) in [0, 1], 1 is noise.
            y: labels (B,), integers in [0, num_classes]; ignored where ``num_classes`` is 0.
            force_drop_ids: (B,), bool or int, 1 = use the null label; no random draw is made then.
            return_projections: run the projectors as well.

        Returns:
            The velocity (B, C, H, W), or ``(velocity, [z_tilde])`` with one (B, N, D) per projector.

        Raises:
            ShapeError: ``x`` has not the size that the model was built for.
            ConfigError: labels are missing, or are to be dropped and there is no null label.
        """
        if tuple(x.shape[1:]) != self.input_shape:
            expected = ("B", *self.input_shape)
            raise ShapeError("x", expected=expected, got=tuple(x.shape), do="Build the SiT for this size.")
        c = self.t_embedder(t) + self.y_embedder(self._labels(x, y), force_drop_ids)
        x = self.x_embedder(x) + self.pos_embed
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        projections: list[Tensor] = []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, c, recompute=recompute)
            if return_projections and number == self.encoder_depth:
                projections = [projector(x) for projector in self.projectors]
        patches = self.final_layer(x, c)
        p, h = self.patch_size, self.grid_size
        velocity = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=p, q=p)
        return (velocity, projections) if return_projections else velocity

    def _labels(self, x: Tensor, y: Tensor | None) -> Tensor:
        if self.num_classes == 0:
            return torch.zeros(len(x), dtype=torch.long, device=x.device)
        if y is None:
            raise ConfigError("y", expected="labels (B,)", got=None, do="Pass labels, or build with num_classes=0.")
        return y

    @torch.no_grad()
    def _initialize(self) -> None:
        self.apply(_xavier)
        self.pos_embed.copy_(sincos_position_embedding(self.hidden_size, self.grid_size))
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.get_parameter("proj.bias"))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp.get_parameter("0.weight"), std=0.02)
        nn.init.normal_(self.t_embedder.mlp.get_parameter("2.weight"), std=0.02)
        # Every block starts as the identity and the model as v = 0.
        modulations = [layer.get_submodule("adaLN_modulation") for layer in (*self.blocks, self.final_layer)]
        for module in (*modulations, self.final_layer.linear):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


class SiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, hidden_size: int, num_heads: int, *, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, *, recompute: bool = False) -> Tensor:
        """Tokens x (B, N, D) and condition c (B, D) to tokens (B, N, D)."""
        if recompute:
            # Inside the block, so that hooks on it do not fire again in the backward pass.
            return checkpoint(self._transform, x, c, use_reentrant=False, preserve_rng_state=False)
        return self._transform(x, c)

    def _transform(self, x: Tensor, c: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = rearrange(
            self.adaLN_modulation(c), "b (k d) -> k b 1 d", k=6
        ).unbind(0)
        x = x + gate_attn * self.attn(_modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(_modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens to flattened patches of the velocity."""

    def __init__(self, hidden_size: int, patch_dim: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, D) and condition c (B, D) to patches (B, N, p p C)."""
        shift, scale = rearrange(self.adaLN_modulation(c), "b (k d) -> k b 1 d", k=2).unbind(0)
        return self.linear(_modulate(self.norm_final(x), shift, scale))


class TimestepEmbedder(nn.Module):
    """Cosines and sines of t at 128 frequencies, through an MLP."""

    NUM_FREQUENCIES = 128

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.NUM_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Times (B,) to embeddings (B, D)."""
        exponent = torch.arange(self.NUM_FREQUENCIES, dtype=torch.float32, device=t.device)
        angle = t.float()[:, None] * torch.exp(-math.log(10000) * exponent / self.NUM_FREQUENCIES)
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(waves.to(self.mlp.get_parameter("0.weight").dtype))


class LabelEmbedder(nn.Module):
    """A table of class embeddings, its last row the null label's where labels are dropped."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.dropout_prob = dropout_prob if num_classes else 0.0
        self.null_label = num_classes if self.dropout_prob > 0 or num_classes == 0 else None
        self.embedding_table = nn.Embedding(num_classes + (self.null_label is not None), hidden_size)

    def forward(self, y: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Labels (B,) to embeddings (B, D); ``force_drop_ids`` (B,) replaces the random draw."""
        if force_drop_ids is None and self.training and self.dropout_prob > 0:
            force_drop_ids = torch.rand(len(y), device=y.device) < self.dropout_prob
        if force_drop_ids is not None:
            if self.null_label is None:
                raise ConfigError("null label", expected="one", got=None, do="Build with class_dropout_prob > 0.")
            y = torch.where(force_drop_ids == 1, self.null_label, y)
        return self.embedding_table(y)


def sincos_position_embedding(dim: int, grid_size: int) -> Tensor:
    """Fixed position embedding: sines and cosines of the column, then of the row.

    Args:
        dim: width, divisible by 4.
        grid_size: rows and columns of the token grid.

    Returns:
        (grid_size^2, dim), float32, row by row.

    Source: MAE, arXiv 2111.06377, as in REPA@67f7145:models/sit.py; timm's helper has the row first.
    """
    # In float64, which the default device may not have.
    frequencies = 10000.0 ** -(np.arange(dim // 4) / (dim // 4))
    angle = np.arange(grid_size)[:, None] * frequencies
    waves = torch.from_numpy(np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32))
    columns = repeat(waves, "w d -> (h w) d", h=grid_size)
    rows = repeat(waves, "h d -> (h w) d", w=grid_size)
    return torch.cat([columns, rows], dim=-1)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def _projector(hidden_size: int, projector_dim: int, z_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(hidden_size, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, z_dim),
    )


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _check_divides(name: str, value: int, by: str, divisor: int) -> None:
    if value % divisor:
        raise ConfigError(name, expected=f"a multiple of {by} ({divisor})", got=value, do="Change one of the two.")

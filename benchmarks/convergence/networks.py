"""Pretrained networks of ``benchmarks/pretrained.py`` as the encoder and as judges of a recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, reduce
from pretrained import PACKAGES
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.functional import normalize, resize

from vrpo_plugin.encoders import load_encoder, weights_hash
from vrpo_plugin.errors import WeightsNotFoundError

JUDGE_SIDE = 128  # in pixels, of the images that a judge sees
SQUEEZENET = "squeezenet1_1"


@dataclass(frozen=True, eq=False)
class PretrainedNetwork:
    """A frozen network with what a benchmark asks of a small one.

    Attributes:
        name: with a hash of the weights.
        tokens: uint8 images (B, 3, S, S) to (B, N, D), float32, without gradient.
        token_dim: D.
        grid: (h, w) of the tokens.
        module: its layers.
        accuracy: none that was measured here.
    """

    name: str
    tokens: Callable[[Tensor], Tensor]
    token_dim: int
    grid: tuple[int, int]
    module: Any
    accuracy: float | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Pooled features (B, D)."""
        return reduce(self.tokens(images), "b n d -> b d", "mean")

    def to(self, device: str | torch.device) -> "PretrainedNetwork":
        """Moves the weights and returns self."""
        self.module.to(device)
        return self


def load_pretrained(name: str, file: Path, *, resolution: int, token_grid: tuple[int, int] | None) -> PretrainedNetwork:
    """Loads a network that ``benchmarks/pretrained.py`` wrote.

    Args:
        name: one of its names, a timm model's or squeezenet1_1.
        file: where it was written.
        resolution: side in pixels of the images.
        token_grid: (h, w) of an encoder's tokens; None for a judge, which sees images of ``JUDGE_SIDE`` pixels.

    Raises:
        WeightsNotFoundError: there is no file.
        ConfigError, CheckpointError: as :func:`vrpo_plugin.encoders.load_encoder`.
    """
    if not file.exists():
        do = f"Run 'python benchmarks/pretrained.py --output {file.parent}'."
        raise WeightsNotFoundError(name, expected="its weights", got=f"none at {file}", do=do)
    if name == SQUEEZENET:
        return _squeezenet(file)
    side = JUDGE_SIDE if token_grid is None else resolution
    encoder = load_encoder(name, resolution=side, token_grid=token_grid, checkpoint=file)
    hashed = f"{name}@{encoder.input_size}-{weights_hash(encoder.model.state_dict())}"
    return PretrainedNetwork(hashed, encoder, encoder.dim, encoder.grid, encoder)


def _squeezenet(file: Path) -> PretrainedNetwork:
    package = PACKAGES[SQUEEZENET]
    model = package.build()
    state = load_file(file)
    model.load_state_dict(state)
    layers: Any = model.features
    layers.eval().requires_grad_(False)

    @torch.no_grad()
    def maps(images: Tensor) -> Tensor:
        device = next(layers.parameters()).device
        pixels = resize(images.to(device).float() / 255, [JUDGE_SIDE, JUDGE_SIDE], antialias=True)
        with torch.autocast(device.type, enabled=False):
            found: Tensor = layers(normalize(pixels, package.mean, package.std))
        return found

    _, dim, height, width = maps(torch.zeros(1, 3, JUDGE_SIDE, JUDGE_SIDE, dtype=torch.uint8)).shape
    name = f"{SQUEEZENET}@{JUDGE_SIDE}-{weights_hash(state)}"
    return PretrainedNetwork(
        name, lambda images: rearrange(maps(images), "b d h w -> b (h w) d"), dim, (height, width), layers
    )

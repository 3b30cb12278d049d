"""A small frozen convolutional network: an encoder, or a judge of samples."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from einops import rearrange, reduce
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vrpo_plugin.encoders import weights_hash
from vrpo_plugin.errors import CheckpointError, ShapeError, WeightsNotFoundError
from vrpo_plugin.files import write_file

Architecture = Literal["plain", "residual"]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)
MAX_GRID = 8


@dataclass(frozen=True, eq=False)
class SmallFeatureNetwork:
    """A small frozen convolutional network; made by ``vrpo_plugin.standalone.small_training``.

    Serves as encoder (``tokens``) and as feature network of an evaluation (``network(images)``). A plain
    object, so that a module which holds it neither trains nor saves it.

    Attributes:
        channels: of the images.
        resolution: side of the images, which are square.
        width: channels of the first stage; the last has twice as many.
        architecture: ``plain`` or ``residual``.
        seed: that it was trained with.
        accuracy: of its task on held-out images: share of right classes, or of variance explained; at most 1.
        body: the layers.
    """

    channels: int
    resolution: int
    width: int
    architecture: Architecture
    seed: int
    accuracy: float
    body: nn.Sequential = field(repr=False)

    def __post_init__(self) -> None:
        self.body.eval().requires_grad_(False)

    @property
    def dim(self) -> int:
        """Size D of a pooled feature."""
        return self.token_dim

    @property
    def token_dim(self) -> int:
        """Size D of a token."""
        return 2 * self.width

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the tokens; N = h w."""
        side = (self.resolution // _stem_stride(self.resolution) + 1) // 2
        return side, side

    @property
    def name(self) -> str:
        """Architecture and a hash of the weights, for evaluation records."""
        return f"small-{self.architecture}-{self.width}-{weights_hash(self.state_dict())}"

    def tokens(self, images: Tensor) -> Tensor:
        """Token grid of the last stage, before its activation.

        Args:
            images: uint8 (B, channels, resolution, resolution), on any device.

        Returns:
            Tokens (B, N, D), float32, row by row, on the network's device; no gradient.

        Raises:
            ShapeError: the images are not uint8, or have another shape.
        """
        return rearrange(self._map(images), "b d h w -> b (h w) d")

    def __call__(self, images: Tensor) -> Tensor:
        """Pooled features (B, D) of images as for :meth:`tokens`; what the classifier saw."""
        return pool(self._map(images))

    def _map(self, images: Tensor) -> Tensor:
        shape = (self.channels, self.resolution, self.resolution)
        if images.dtype != torch.uint8 or images.shape[1:] != shape:
            raise ShapeError(
                "images",
                expected=f"uint8 (B, {', '.join(map(str, shape))})",
                got=f"{images.dtype} {tuple(images.shape)}",
                do="Pass pixels in [0, 255], of the size it was trained on.",
            )
        device = next(self.body.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return self.body(normalize(images.to(device)))

    def __deepcopy__(self, memo: dict[int, object]) -> "SmallFeatureNetwork":
        return self

    def to(self, device: str | torch.device) -> "SmallFeatureNetwork":
        """Moves the weights and returns self."""
        self.body.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The weights."""
        return self.body.state_dict()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: weights, and in its metadata what rebuilds the network."""
        arguments = {k: v for k, v in vars(self).items() if k != "body"}
        write_file(path, save(self.state_dict(), metadata={"small_features": json.dumps(arguments)}))


def load_small_features(path: str | os.PathLike[str]) -> SmallFeatureNetwork:
    """Reads what :meth:`SmallFeatureNetwork.save` wrote.

    Raises:
        WeightsNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or something else.
    """
    if not os.path.isfile(path):
        raise WeightsNotFoundError(
            "small features", expected="a file", got=f"none at {path}", do="Train it and save it first."
        )
    try:
        with safe_open(path, "pt") as file:
            arguments = json.loads(file.metadata()["small_features"])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        built_from = ("channels", "resolution", "width", "architecture", "seed")
        body = build_body(**{key: arguments[key] for key in built_from})
        body.load_state_dict(state)
        return SmallFeatureNetwork(**arguments, body=body)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            str(path),
            expected="a file written by SmallFeatureNetwork.save",
            got=f"{type(error).__name__}: {error}",
            do="Train the network again with train_small_features, and save it.",
        ) from error


def normalize(images: Tensor) -> Tensor:
    """uint8 to [-1, 1], float32."""
    return images.float() / 127.5 - 1


def pool(feature_map: Tensor) -> Tensor:
    """Maps (B, D, h, w) to features (B, D)."""
    return reduce(feature_map.relu(), "b d h w -> b d", "mean")


def _stem_stride(resolution: int) -> int:
    """Stride of the first layer, so that one more halving leaves at most MAX_GRID tokens a side."""
    return 2 ** max(0, math.ceil(math.log2(resolution / MAX_GRID)) - 1)


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def build_body(channels: int, resolution: int, width: int, architecture: Architecture, seed: int) -> nn.Sequential:
    """Stem, stage, halving, stage, norm; each layer is norm, ReLU, convolution."""

    def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), convolution)

    stride = _stem_stride(resolution)
    stage = _Residual if architecture == "residual" else nn.Sequential

    def build() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, width, stride + 2, stride, padding=1, bias=False),
            stage(layer(width, width), layer(width, width)),
            layer(width, 2 * width, stride=2),
            stage(layer(2 * width, 2 * width), layer(2 * width, 2 * width)),
            nn.BatchNorm2d(2 * width),
        )

    return seeded(seed, build)


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    """What ``build()`` initialises under a seed; the global generator stays as it was."""
    # manual_seed of the default generator alone: torch.manual_seed would also reseed every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()

"""A small convolutional network, trained in seconds and frozen: an encoder, or a judge of samples."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vrpo_plugin.errors import CheckpointError, ConfigError, ShapeError, WeightsNotFoundError, explain

Architecture = Literal["plain", "residual"]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)
MAX_GRID = 8


@dataclass(frozen=True, eq=False)
class SmallFeatureNetwork:
    """A small frozen convolutional network; made by :func:`train_small_features`.

    Serves as encoder (``tokens``) and as feature network of an evaluation (``network(images)``). A plain
    object, so that a module which holds it neither trains nor saves it.

    Attributes:
        channels: of the images.
        resolution: side of the images, which are square.
        width: channels of the first stage; the last has twice as many.
        architecture: ``plain`` or ``residual``.
        seed: that it was trained with.
        accuracy: of its classifier on the held-out images, in [0, 1].
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
        return _pool(self._map(images))

    def _map(self, images: Tensor) -> Tensor:
        shape = (self.channels, self.resolution, self.resolution)
        if images.dtype != torch.uint8 or images.shape[1:] != shape:
            raise ShapeError(
                explain(
                    "images",
                    expected=f"uint8 (B, {', '.join(map(str, shape))})",
                    got=f"{images.dtype} {tuple(images.shape)}",
                    do="Pass pixels in [0, 255], of the size it was trained on.",
                )
            )
        device = next(self.body.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return self.body(_normalize(images.to(device)))

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
        save_file(self.state_dict(), path, metadata={"small_features": json.dumps(arguments)})


def weights_hash(state: dict[str, Tensor]) -> str:
    """Eight hexadecimal digits that change with any name or value of a state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


def load_small_features(path: str | os.PathLike[str]) -> SmallFeatureNetwork:
    """Reads what :meth:`SmallFeatureNetwork.save` wrote.

    Raises:
        WeightsNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or something else.
    """
    if not os.path.isfile(path):
        raise WeightsNotFoundError(
            explain("small features", expected="a file", got=f"none at {path}", do="Train it and save it first.")
        )
    try:
        with safe_open(path, "pt") as file:
            arguments = json.loads(file.metadata()["small_features"])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        built_from = ("channels", "resolution", "width", "architecture", "seed")
        body = _build(**{key: arguments[key] for key in built_from})
        body.load_state_dict(state)
        return SmallFeatureNetwork(**arguments, body=body)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            explain(
                str(path),
                expected="a file written by SmallFeatureNetwork.save",
                got=f"{type(error).__name__}: {error}",
                do="Train the network again with train_small_features, and save it.",
            )
        ) from error


def train_small_features(
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    width: int = 32,
    steps: int = 200,
    architecture: Architecture = "residual",
    batch_size: int = 128,
    learning_rate: float = 4e-3,
    held_out: float = 0.1,
    device: str | torch.device = "cpu",
) -> SmallFeatureNetwork:
    """Trains a small classifier on the spot and freezes it: an encoder, or a network to evaluate with.

    On one CPU, with one number of threads, the same arguments give the same network bitwise; to share it between
    machines, save it. torch's global generator is left as it was.

    Args:
        images: uint8 (N, C, S, S), S at least 4.
        labels: integers (N,), from 0.
        seed: of the initialisation, the held-out split, the batches and the shifts.
        width: channels of the first stage; features have twice as many.
        steps: of AdamW, one cycle.
        architecture: ``plain`` or ``residual``; with another seed, the other one is an independent judge.
        batch_size: images per step, each shifted by up to an eighth of its side.
        learning_rate: the highest.
        held_out: share of the images kept back to measure ``accuracy``, in (0, 1).
        device: where to train; the network stays there.

    Returns:
        The frozen network.

    Raises:
        ConfigError: an argument is out of range.
        ShapeError: images are not uint8 and square, or labels not as many integers from 0.
    """
    sizes = {"width": width, "steps": steps, "batch_size": batch_size}
    _check_training(images, labels, architecture, sizes, held_out)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    test, train = order.tensor_split([round(held_out * len(images))])
    channels, resolution = images.shape[1:3]
    body = _build(channels, resolution, width, architecture, seed).to(device)
    head = _seeded(seed, lambda: nn.Linear(2 * width, int(labels.max()) + 1)).to(device)
    parameters = [*body.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)

    def classify(batch: Tensor) -> Tensor:
        return head(_pool(body(_normalize(batch.to(device)))))

    with torch.enable_grad():
        for _ in range(steps):
            index = train[torch.randint(len(train), (batch_size,), generator=generator)]
            logits = classify(_shift(images[index.to(images.device)], resolution // 8, generator))
            target = labels[index.to(labels.device)].to(device).long()
            optimizer.zero_grad()
            F.cross_entropy(logits, target, label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    body.eval()
    with torch.no_grad():
        parts = images[test.to(images.device)].split(512)
        guesses = torch.cat([classify(part).argmax(1).cpu() for part in parts])
    accuracy = (guesses == labels.cpu()[test]).float().mean().item()
    return SmallFeatureNetwork(channels, resolution, width, architecture, seed, accuracy, body)


def _normalize(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _pool(feature_map: Tensor) -> Tensor:
    return reduce(feature_map.relu(), "b d h w -> b d", "mean")


def _stem_stride(resolution: int) -> int:
    """Stride of the first layer, so that one more halving leaves at most MAX_GRID tokens a side."""
    return 2 ** max(0, math.ceil(math.log2(resolution / MAX_GRID)) - 1)


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _build(channels: int, resolution: int, width: int, architecture: Architecture, seed: int) -> nn.Sequential:
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

    return _seeded(seed, build)


def _seeded(seed: int, build: Callable[[], Any]) -> Any:
    # manual_seed of the default generator alone: torch.manual_seed would also reseed every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def _shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Moves each image by up to ``most`` pixels in each direction, its edge repeated."""
    size = images.shape[-1]
    shifts = torch.randint(-most, most + 1, (2, len(images), 1), generator=generator).to(images.device)
    rows, columns = (torch.arange(size, device=images.device) + shifts).clamp(0, size - 1)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return rearrange(images[sample, :, rows[:, :, None], columns[:, None, :]], "b h w c -> b c h w")


def _check_training(
    images: Tensor, labels: Tensor, architecture: str, numbers: dict[str, int], held_out: float
) -> None:
    square = images.ndim == 4 and images.shape[2] == images.shape[3] >= 4
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    labelled = integers and labels.shape == images.shape[:1] and bool((labels >= 0).all())
    if not (square and images.dtype == torch.uint8 and labelled):
        raise ShapeError(
            explain(
                "train_small_features",
                expected="images uint8 (N, C, S, S) with S >= 4, and labels (N,), integers from 0",
                got=f"{images.dtype} {tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}",
                do="Pass pixels in [0, 255] and class indices.",
            )
        )
    kept = round(held_out * len(images)) if 0 < held_out < 1 else 0
    if architecture not in ARCHITECTURES or min(numbers.values()) < 1 or not 1 <= kept < len(images):
        raise ConfigError(
            explain(
                "train_small_features",
                expected=f"architecture of {ARCHITECTURES}, {', '.join(numbers)} >= 1, "
                "and a share held_out of the images that leaves some to train on and some to test on",
                got=f"{architecture!r}, {numbers}, held_out={held_out} of {len(images)} images",
                do="Correct the argument that is out of range.",
            )
        )

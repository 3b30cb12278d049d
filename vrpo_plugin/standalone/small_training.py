"""Trains small feature networks: on classes, on rotations, or to take away noise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vrpo_plugin.config import check_keys
from vrpo_plugin.errors import ConfigError, ShapeError
from vrpo_plugin.standalone.progress import progress
from vrpo_plugin.standalone.small_network import (
    ARCHITECTURES,
    Architecture,
    SmallFeatureNetwork,
    build_body,
    normalize,
    pool,
    seeded,
)


@dataclass(frozen=True, kw_only=True)
class SmallTraining:
    """How a small network is trained.

    Attributes:
        seed: of the initialisation, the held-out split, the batches, the shifts and the noise.
        width: channels of the first stage; features have twice as many.
        steps: of AdamW, one cycle.
        architecture: ``plain`` or ``residual``; with another seed, the other one is an independent judge.
        batch_size: images per step, each shifted by up to an eighth of its side.
        learning_rate: the highest.
        held_out: share of the images kept back to measure ``accuracy``, in (0, 1).
        device: where to train; the network stays there.
        show: what the bar is called; None shows none.
    """

    seed: int
    width: int = 32
    steps: int = 200
    architecture: Architecture = "residual"
    batch_size: int = 128
    learning_rate: float = 4e-3
    held_out: float = 0.1
    device: str | torch.device = "cpu"
    show: str | None = "small network"


def train_small_features(images: Tensor, labels: Tensor, **settings: Any) -> SmallFeatureNetwork:
    """Trains a small classifier on the spot and freezes it: an encoder, or a network to evaluate with.

    On one CPU, with one number of threads, the same arguments give the same network bitwise; to share it between
    machines, save it. torch's global generator is left as it was.

    Args:
        images: uint8 (N, C, S, S), S at least 4.
        labels: integers (N,), from 0.
        **settings: fields of :class:`SmallTraining`; ``seed`` is needed.

    Returns:
        The frozen network.

    Raises:
        ConfigError: a setting is out of range.
        ShapeError: images are not uint8 and square, or labels not as many integers from 0.
    """
    training = _settings(settings)
    _check_training(images, labels, training)
    head = seeded(training.seed, lambda: nn.Linear(2 * training.width, int(labels.max()) + 1)).to(training.device)

    def logits(body: nn.Module, index: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        target = labels[index.to(labels.device)].to(training.device).long()
        return head(pool(body(normalize(pixels.to(training.device))))), target

    def loss(body: nn.Module, index: Tensor, pixels: Tensor, _: torch.Generator) -> Tensor:
        return F.cross_entropy(*logits(body, index, pixels), label_smoothing=0.1)

    def score(body: nn.Module, index: Tensor, pixels: Tensor, _: torch.Generator) -> Tensor:
        guesses, target = logits(body, index, pixels)
        return (guesses.argmax(1) == target).float()

    return _train(images, training, head, loss, score)


def train_rotation_features(images: Tensor, **settings: Any) -> SmallFeatureNetwork:
    """Trains a small network to tell by how many quarter turns an image was rotated: a judge without classes.

    Args:
        images: uint8 (N, C, S, S), S at least 4.
        **settings: fields of :class:`SmallTraining`; ``seed`` is needed.

    Returns:
        The frozen network.

    Raises:
        ConfigError, ShapeError: as :func:`train_small_features`.

    Source: Gidaris et al., arXiv 1803.07728.
    """
    turned = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
    return train_small_features(turned, torch.arange(4).repeat_interleave(len(images)), **settings)


def train_denoising_features(images: Tensor, **settings: Any) -> SmallFeatureNetwork:
    """Trains a small network whose tokens tell a decoder the image without its noise: a judge of textures.

    Pixels in [-1, 1] get normal noise, of a deviation drawn from [0.1, 1] per image; the loss is the squared error.

    Args:
        images: uint8 (N, C, S, S), S at least 4.
        **settings: fields of :class:`SmallTraining`; ``seed`` is needed.

    Returns:
        The frozen network without its decoder; ``accuracy`` is the share of the pixels' variance that was explained.

    Raises:
        ConfigError, ShapeError: as :func:`train_small_features`.

    Source: Vincent et al., "Extracting and composing robust features with denoising autoencoders", ICML 2008.
    """
    training = _settings(settings)
    _check_training(images, torch.zeros(len(images), dtype=torch.long), training)
    channels, side = images.shape[1:3]

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Upsample((side, side)),
            nn.Conv2d(2 * training.width, training.width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(training.width, channels, 3, padding=1),
        )

    decoder = seeded(training.seed, build).to(training.device)

    def errors(body: nn.Module, clean: Tensor, generator: torch.Generator) -> Tensor:
        deviation = torch.rand(len(clean), 1, 1, 1, generator=generator) * 0.9 + 0.1
        noise = torch.randn(clean.shape, generator=generator) * deviation
        return (decoder(body(clean + noise.to(clean.device)).relu()) - clean).square().mean((1, 2, 3))

    def loss(body: nn.Module, _: Tensor, pixels: Tensor, generator: torch.Generator) -> Tensor:
        return errors(body, normalize(pixels.to(training.device)), generator).mean()

    def score(body: nn.Module, _: Tensor, pixels: Tensor, generator: torch.Generator) -> Tensor:
        clean = normalize(pixels.to(training.device))
        return 1 - errors(body, clean, generator) / clean.var()

    return _train(images, training, decoder, loss, score)


Objective = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def _train(
    images: Tensor, training: SmallTraining, head: nn.Module, loss: Objective, score: Objective
) -> SmallFeatureNetwork:
    """Trains body and head by ``loss``; ``accuracy`` is the mean of ``score`` on the images held out.

    Both take (body, indices, images, generator).
    """
    generator = torch.Generator().manual_seed(training.seed)
    order = torch.randperm(len(images), generator=generator)
    test, train = order.tensor_split([round(training.held_out * len(images))])
    channels, resolution = images.shape[1:3]
    body = build_body(channels, resolution, training.width, training.architecture, training.seed).to(training.device)
    optimizer = torch.optim.AdamW(
        [*body.parameters(), *head.parameters()], lr=training.learning_rate, weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, total_steps=training.steps)
    with torch.enable_grad():
        shown = training.show is not None
        for _ in progress(range(training.steps), training.show or "", unit="step", enabled=shown):
            index = train[torch.randint(len(train), (training.batch_size,), generator=generator)]
            pixels = _shift(images[index.to(images.device)], resolution // 8, generator)
            optimizer.zero_grad()
            loss(body, index, pixels, generator).backward()
            optimizer.step()
            schedule.step()
    body.eval()
    with torch.no_grad():
        scores = [score(body, part, images[part.to(images.device)], generator).cpu() for part in test.split(512)]
    accuracy = torch.cat(scores).mean().item()
    return SmallFeatureNetwork(
        channels, resolution, training.width, training.architecture, training.seed, accuracy, body
    )


def _shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Moves each image by up to ``most`` pixels in each direction, its edge repeated."""
    size = images.shape[-1]
    shifts = torch.randint(-most, most + 1, (2, len(images), 1), generator=generator).to(images.device)
    rows, columns = (torch.arange(size, device=images.device) + shifts).clamp(0, size - 1)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return rearrange(images[sample, :, rows[:, :, None], columns[:, None, :]], "b h w c -> b c h w")


def _settings(settings: dict[str, Any]) -> SmallTraining:
    check_keys(settings, SmallTraining.__dataclass_fields__, subject="SmallTraining")
    return SmallTraining(**settings)


def _check_training(images: Tensor, labels: Tensor, training: SmallTraining) -> None:
    square = images.ndim == 4 and images.shape[2] == images.shape[3] >= 4
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    labelled = integers and labels.shape == images.shape[:1] and bool((labels >= 0).all())
    if not (square and images.dtype == torch.uint8 and labelled):
        raise ShapeError(
            "train_small_features",
            expected="images uint8 (N, C, S, S) with S >= 4, and labels (N,), integers from 0",
            got=f"{images.dtype} {tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}",
            do="Pass pixels in [0, 255] and class indices.",
        )
    numbers = {name: getattr(training, name) for name in ("width", "steps", "batch_size")}
    kept = round(training.held_out * len(images)) if 0 < training.held_out < 1 else 0
    if training.architecture not in ARCHITECTURES or min(numbers.values()) < 1 or not 1 <= kept < len(images):
        raise ConfigError(
            "train_small_features",
            expected=f"architecture of {ARCHITECTURES}, {', '.join(numbers)} >= 1, "
            "and a share held_out of the images that leaves some to train on and some to test on",
            got=f"{training.architecture!r}, {numbers}, held_out={training.held_out} of {len(images)} images",
            do="Correct the setting that is out of range.",
        )

"""LPIPS on pixels as a reward; the distance in latents, without a decoder, is ``functional.rewards``'."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from vrpo_plugin.errors import CheckpointError, ConfigError, ShapeError, WeightsNotFoundError
from vrpo_plugin.functional.rewards import RewardState
from vrpo_plugin.functional.tensors import directions, require_pixels

LPIPSNet = Literal["alex", "vgg", "squeeze"]

_WEIGHTS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}
_SMALLEST = 64


class LPIPSReward:
    """Perceptual quality on pixels: r = -LPIPS(decode(x0_hat), decode(x0)) (equation 4, learned weights).

    A plain object and no ``nn.Module``: its frozen network enters no state dict, optimizer or EMA copy.

    Args:
        net: backbone, ``alex``, ``vgg`` or ``squeeze``.
        decode: latents to pixels in [-1, 1], differentiable, its own weights frozen by the caller; None where
            the model works on pixels.
        max_samples: score at most so many samples, spread evenly over the batch; None for all.
        every: score only when ``state.step`` is a multiple of it; other steps run no network.
        pretrained: ImageNet weights for the backbone, from ``backbone_checkpoint`` or torch's hub cache;
            nothing is ever downloaded. False gives random weights, for tests only.
        backbone_checkpoint: local file with torchvision's state dict of the backbone.
        device: where the network lives.

    Raises:
        ConfigError: an argument is out of range.
        WeightsNotFoundError: the backbone's file is not there.
        CheckpointError: the file holds another network.

    Source: LPIPS, arXiv 1801.03924, equation 1; layers, scaling and learned weights are the lpips package's.
    """

    def __init__(
        self,
        net: LPIPSNet = "alex",
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        max_samples: int | None = None,
        every: int = 1,
        pretrained: bool = True,
        backbone_checkpoint: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if net not in _WEIGHTS or every < 1 or (max_samples is not None and max_samples < 1):
            raise ConfigError(
                "LPIPSReward",
                expected=f"net one of {get_args(LPIPSNet)}, every >= 1, max_samples >= 1 or None",
                got=f"net={net!r}, every={every}, max_samples={max_samples}",
                do="Correct the value.",
            )
        self.decode = decode
        self.max_samples = max_samples
        self.every = every
        self._range_checked = False
        # Looked up first: building vgg takes seconds, and a missing file should not.
        file = _backbone_file(net, backbone_checkpoint) if pretrained or backbone_checkpoint else None
        self._lpips: Any = _build(net, file).to(device)

    def __deepcopy__(self, memo: dict[int, object]) -> "LPIPSReward":
        return self

    def to(self, device: torch.device | str) -> "LPIPSReward":
        """Moves the network to a device and returns the reward."""
        self._lpips.to(device)
        return self

    def __call__(self, state: RewardState) -> tuple[Tensor, Tensor]:
        """Scores a batch.

        Args:
            state: ``x0_hat`` and ``x0`` are read, and ``step`` where ``every > 1``.

        Returns:
            ``values`` (B,) in float32, at most 0, with a gradient to ``x0_hat``; ``scored`` (B,) bool. Where
            that is False, the value is 0 and has no gradient.

        Raises:
            ConfigError: ``every > 1`` and the state has no step.
            ShapeError: the pixels are not floating, or have not 1 or 3 channels.
            DataError: the clean pixels leave [-1, 1] by far; on a device, only the first batch is looked at.
        """
        batch = state.x0.shape[0]
        # The sum over nothing: 0, yet part of x0_hat's graph, as callers expect of a differentiable reward.
        values = state.x0_hat.flatten(1)[:, :0].float().sum(1)
        if not self._due(state.step):
            return values, torch.zeros_like(values, dtype=torch.bool)
        if self.max_samples is None or self.max_samples >= batch:
            return -self._distance(state.x0_hat, state.x0), torch.ones_like(values, dtype=torch.bool)
        # Evenly by index and without a draw: the batch is already in random order.
        index = torch.arange(self.max_samples, device=values.device) * batch // self.max_samples
        scores = -self._distance(state.x0_hat[index], state.x0[index])
        scored = torch.zeros_like(values, dtype=torch.bool).index_fill(0, index, True)
        return values.index_copy(0, index, scores), scored

    def _due(self, step: int | None) -> bool:
        if self.every == 1:
            return True
        if step is None:
            raise ConfigError(
                f"LPIPSReward(every={self.every})",
                expected="the training step in the state",
                got="step=None",
                do="Pass step= to the aligner, or use every=1 with a small max_samples.",
            )
        return step % self.every == 0

    def _distance(self, x0_hat: Tensor, x0: Tensor) -> Tensor:
        estimate = self._features(self._pixels(x0_hat))
        with torch.no_grad():
            pixels = self._pixels(x0)
            # Of the clean ones: an estimate may leave [-1, 1].
            require_pixels("LPIPSReward", pixels, first=not self._range_checked)
            self._range_checked = True
            reference = self._features(pixels)
        total = torch.zeros(len(x0), device=x0.device)
        with torch.autocast(x0.device.type, enabled=False):
            for linear, f, g in zip(self._lpips.lins, estimate, reference, strict=True):
                # lpips' own normalisation has a NaN gradient where every channel is 0.
                difference = directions(f, 1, eps=1e-10) - directions(g, 1, eps=1e-10)
                total = total + reduce(linear(difference.square()), "b 1 h w -> b", "mean")
        return total

    def _pixels(self, x: Tensor) -> Tensor:
        pixels = self.decode(x) if self.decode is not None else x
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not pixels.is_floating_point():
            raise ShapeError(
                "LPIPSReward",
                expected="floating pixels (B, 3, H, W) or (B, 1, H, W)",
                got=f"{tuple(pixels.shape)}, {pixels.dtype}",
                do="Pass decode=, a function from latents to pixels in [-1, 1].",
            )
        return pixels

    def _features(self, pixels: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = pixels.float()
            scale = _SMALLEST / min(pixels.shape[2:])
            if scale > 1:
                size = [math.ceil(side * scale) for side in pixels.shape[2:]]
                pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
            # The scaling makes three channels of one.
            return tuple(self._lpips.net(self._lpips.scaling_layer(pixels)))


def _backbone_file(net: str, checkpoint: str | Path | None) -> Path:
    """Where the backbone's weights lie; raises where they do not."""
    from torchvision import models

    url: str = getattr(models, _WEIGHTS[net]).IMAGENET1K_V1.url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    path = cached if checkpoint is None else Path(checkpoint)
    if not path.is_file():
        raise WeightsNotFoundError(
            f"LPIPSReward(net={net!r})",
            expected=f"the backbone's weights, torchvision's {cached.name}",
            got=f"no file at {path}",
            do=f"Fetch {url}, put it there or pass backbone_checkpoint=/path/to/{cached.name}. "
            "pretrained=False gives a random backbone, for tests only.",
        )
    return path


def _build(net: str, file: Path | None) -> torch.nn.Module:
    import lpips

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision with arguments it deprecates
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    if file is not None:
        try:
            weights = torch.load(file, map_location="cpu", weights_only=True)
            # lpips cuts torchvision's `features` into slices and keeps the layers' numbers.
            names = {name: f"features.{name.partition('.')[2]}" for name in model.net.state_dict()}
            model.net.load_state_dict({name: weights[source] for name, source in names.items()})
        except Exception as error:  # zip, pickle, missing-key and shape errors have no common class
            raise CheckpointError(
                f"{file}",
                expected=f"torchvision's state dict for the backbone {net!r}",
                got=f"{type(error).__name__}: {str(error)[:500]}",
                do="Pass the file that belongs to this net, or fetch it again.",
            ) from error
    return model.requires_grad_(False)

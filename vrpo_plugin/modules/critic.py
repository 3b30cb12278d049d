"""The critic: a small student from latents to encoder tokens."""

import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.func import functional_call

from vrpo_plugin.errors import CheckpointError, ConfigError, ShapeError
from vrpo_plugin.files import write_file
from vrpo_plugin.functional.tensors import resample_tokens

FULL_RESOLUTION_LIMIT = 64  # sides above are folded into channels, so that pixels cost no more than latents


@dataclass(frozen=True)
class CriticOutput:
    """What the critic sees in a latent.

    Attributes:
        tokens: one (B, N, D) per encoder, not normalised.
        features: maps (B, C_l, H_l, W_l) of the stages before the token grid, for the perceptual distance.
    """

    tokens: tuple[Tensor, ...]
    features: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class CriticPurpose:
    """What a critic is trained for, or wanted for; None where that is not known.

    Attributes:
        encoder: names of the encoder(s), each with a hash of its weights.
        target_norm: of the encoder's tokens, as in :class:`VRPOConfig`.
        latent_scale: factor on the latents; 1 for pixels.
        resolution: side in pixels of the images that the encoder sees.
    """

    encoder: str | None = None
    target_norm: str | None = None
    latent_scale: float | None = None
    resolution: int | None = None


class LatentCritic(nn.Module):
    """Predicts what the frozen encoder would see in a latent, without decoding it.

    A thin stage at full resolution, strided convolutions down to the token grid, one residual block there with
    a pooled image-wide context, and one linear head per encoder.

    Args:
        latent_shape: (C, H, W) of the latents (or pixels).
        target_dims: D of each encoder's tokens.
        token_grid: (h, w) of those tokens. A grid that H and W are no power-of-two multiple of is reached by
            bilinear resampling of the tokens.
        width: channels at the token grid; the full-resolution stage has a quarter.

    Raises:
        ConfigError: a size is not positive.

    Source: our derivation; about 0.43 GMAC for (4, 32, 32) to 16 x 16 x 768 at width 256
        (benchmarks/critic_flops.py).
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        target_dims: tuple[int, ...],
        token_grid: tuple[int, int],
        *,
        width: int = 256,
    ) -> None:
        super().__init__()
        if min(*latent_shape, *token_grid, *(target_dims or (0,)), width // 4) < 1:
            raise ConfigError(
                "critic sizes",
                expected="latent_shape, token_grid and target_dims >= 1, width >= 4",
                got=(latent_shape, token_grid, target_dims, width),
                do="Correct them.",
            )
        self.latent_shape, self.target_dims = tuple(latent_shape), tuple(target_dims)
        self.token_grid = (token_grid[0], token_grid[1])
        self.width = width
        channels, height, side = latent_shape
        self.fold = fold_of(height, side)
        height, side = height // self.fold, side // self.fold
        levels = max(0, int(math.log2(min(height / token_grid[0], side / token_grid[1]))))
        widths = [min(width, width // 4 * 2**i) for i in range(levels)] + [width]
        self.stem = nn.Sequential(
            nn.Conv2d(channels * self.fold**2, widths[0], 3, padding=1),
            _Activation(widths[0]),
            nn.Conv2d(widths[0], widths[0], 3, padding=1),
            _Activation(widths[0]),
        )
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), _Activation(b))
            for a, b in itertools.pairwise(widths)
        )
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), _Activation(width), nn.Conv2d(width, width, 3, padding=1)
        )
        self.context = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.norm = _Activation(width)
        self.heads = nn.ModuleList(nn.Linear(width, dim) for dim in target_dims)

    def sizes(self) -> dict[str, Any]:
        """The constructor's arguments, as plain data."""
        return {
            "latent_shape": list(self.latent_shape),
            "target_dims": list(self.target_dims),
            "token_grid": list(self.token_grid),
            "width": self.width,
        }

    def forward(self, latent: Tensor) -> CriticOutput:
        """Sees a latent (B, C, H, W).

        Raises:
            ShapeError: another latent shape than the critic was built for.
        """
        if latent.ndim != 4 or tuple(latent.shape[1:]) != self.latent_shape:
            raise ShapeError(
                "latent",
                expected=f"(B, {', '.join(map(str, self.latent_shape))})",
                got=tuple(latent.shape),
                do="Build the critic with latent_shape= of your latents.",
            )
        half = _autocast_dtype(latent.device.type)
        if half is None or half == next(self.parameters()).dtype:
            return self._see(latent.to(next(self.parameters()).dtype))
        # Autocast would compute the norms in float32, with a cast before and after each: twice the memory.
        # Cast anew in each call: nothing says reliably that a weight has changed, fused optimizers count no version.
        weights = {name: p.to(half) for name, p in self.named_parameters()}
        with torch.autocast(latent.device.type, enabled=False):
            return functional_call(self, weights, (latent.to(half),))

    def _see(self, latent: Tensor) -> CriticOutput:
        h = rearrange(latent, "b c (h p) (w q) -> b (c p q) h w", p=self.fold, q=self.fold)
        h = self.stem(h)
        features = [h]
        for stage in self.down:
            h = stage(h)
            features.append(h)
        h = h + self.block(h)
        h = h + rearrange(self.context(reduce(h, "b c h w -> b c", "mean")), "b c -> b c 1 1")
        grid = (h.shape[-2], h.shape[-1])
        h = rearrange(self.norm(h), "b c h w -> b (h w) c")
        tokens = tuple(resample_tokens(head(h), grid, self.token_grid) for head in self.heads)
        return CriticOutput(tokens=tokens, features=tuple(features))


def save_critic(critic: LatentCritic, path: Path, *, record: dict[str, Any] | None = None) -> None:
    """Writes the critic's weights, sizes and an optional record of its training as one safetensors file."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in critic.state_dict().items()}
    metadata = {"vrpo_critic": json.dumps(critic.sizes()), "record": json.dumps(record or {})}
    write_file(path, save(tensors, metadata=metadata))


def load_critic_weights(critic: LatentCritic, path: Path) -> dict[str, Any]:
    """Loads weights that :func:`save_critic` wrote, and returns their record.

    Raises:
        CheckpointError: the file is missing, damaged, or of a critic of other sizes.
    """
    weights, sizes, record = _read_critic(path)
    if sizes != critic.sizes() or weights.keys() != critic.state_dict().keys():
        raise CheckpointError(
            str(path),
            expected=f"a critic of sizes {critic.sizes()}",
            got=sizes,
            do="Train a critic for these latents, this encoder and this critic_width.",
        )
    critic.load_state_dict(weights)
    return record


def check_purpose(path: Path, record: dict[str, Any], wanted: CriticPurpose) -> None:
    """Refuses a critic of another purpose: its rewards would be for tokens that the run does not have.

    Args:
        path: of its file.
        record: of its training, as :func:`load_critic_weights` returns it.
        wanted: by the run; what either side does not know is not compared.

    Raises:
        CheckpointError: encoder, target normalisation, latent scale or resolution are others.
    """
    made_for = record.get("made_for", {})
    unlike = {
        name: (value, made_for[name])
        for name, value in asdict(wanted).items()
        if value is not None and made_for.get(name) not in (None, value)
    }
    if unlike:
        raise CheckpointError(
            str(path),
            expected=", ".join(f"a critic of {name} {value}" for name, (value, _) in unlike.items()),
            got=", ".join(str(value) for _, value in unlike.values()),
            do="Train one for this run with 'vrpo train-critic', or bring the run to what the critic was made for.",
        )


def read_critic(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sizes of the critic in a file, as :meth:`LatentCritic.sizes` gives them, and the record of its training.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return _read_critic(path)[1:]


def _read_critic(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return weights, json.loads(metadata["vrpo_critic"]), json.loads(metadata["record"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            str(path), expected="a critic file", got=repr(error), do="Write one with 'vrpo train-critic'."
        ) from error


class _Activation(nn.Module):
    """Group norm, then SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Four channels a group at least: with one, the norm would take the image-wide context away again.
        self.norm = nn.GroupNorm(math.gcd(16, channels, max(1, channels // 4)), channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(x))


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast brings matrix products to; None outside of it."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def fold_of(height: int, width: int) -> int:
    """Smallest factor that divides both sides and brings them to the limit, else the largest divisor below."""
    common = math.gcd(height, width)
    wanted = math.ceil(max(height, width) / FULL_RESOLUTION_LIMIT)
    return next((f for f in range(wanted, common + 1) if common % f == 0), common)

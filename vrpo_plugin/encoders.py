"""Frozen encoders that give the alignment targets: any timm model, images to (B, N, D)."""

import difflib
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vrpo_plugin.errors import CheckpointError, ConfigError, ShapeError, WeightsNotFoundError
from vrpo_plugin.functional.tensors import require_pixels, resample_tokens
from vrpo_plugin.modules.critic import CriticPurpose, read_critic

_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
REPA_ENCODERS = {f"dinov2-vit-{k}": f"vit_{v}_patch14_dinov2.lvd142m" for k, v in _SIZES.items()} | {
    f"dinov2reg-vit-{k}": f"vit_{v}_patch14_reg4_dinov2.lvd142m" for k, v in _SIZES.items()
}
"""REPA's ``--enc-type`` names whose tokens timm reproduces, and timm's names for them."""

_RANDOM = "pretrained=False gives random weights, for tests only"


class FrozenEncoder:
    """Images to the tokens of a frozen timm model: z = E(resize(normalise(image))).

    A plain object and no ``nn.Module``, so that storing it on a module puts nothing into that module's
    state dict, optimizer or DDP buckets; ``deepcopy`` (the usual way to make an EMA model) shares it.

    Args:
        model: a timm model; it is put in eval mode and frozen.
        name: what error messages call it.
        input_size: side in pixels of the images that the model sees.
        token_grid: (h, w) of the tokens to return; None for the model's own grid.

    Attributes:
        dim: D, the channels of a token.
        grid: (h, w) with N = h w tokens.

    Raises:
        ConfigError: the model gives neither a square grid of tokens nor a feature map.

    Source: REPA@67f7145:train.py, ``preprocess_raw_image`` for DINOv2: normalise, then bicubic 256 -> 224.
    """

    def __init__(self, model: Any, name: str, input_size: int, token_grid: tuple[int, int] | None = None) -> None:
        from timm.data import resolve_model_data_config

        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.input_size = input_size
        pixels = resolve_model_data_config(model)
        reference = next(model.parameters())
        self._mean = rearrange(torch.tensor(pixels["mean"], device=reference.device), "c -> c 1 1")
        self._std = rearrange(torch.tensor(pixels["std"], device=reference.device), "c -> c 1 1")
        self._range_checked = False
        with torch.no_grad():
            blank = reference.new_zeros(1, 3, input_size, input_size)
            try:
                features = model.forward_features(blank)
            except Exception as error:  # whatever a network raises that has no way to see this size
                got = f"{type(error).__name__} at {input_size} x {input_size} pixels: {str(error)[:200]}"
                raise _unsupported(name, got) from error
            _, self.dim, *own_grid = self._feature_map(features).shape
        height, width = token_grid or own_grid
        self.grid = height, width

    @property
    def normalisation(self) -> dict[str, Any]:
        """Of the pixels that the network sees: mean, standard deviation and side."""
        return {"mean": self._mean.flatten().tolist(), "std": self._std.flatten().tolist(), "side": self.input_size}

    def __deepcopy__(self, memo: dict[int, object]) -> "FrozenEncoder":
        return self

    def to(self, device: torch.device | str) -> "FrozenEncoder":
        """Moves the encoder to a device and returns it."""
        self.model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Encodes a batch of images.

        Args:
            images: (B, 3, H, H), or (B, 1, H, H) repeated to three channels; uint8 in [0, 255] or floating
                in [-1, 1]. On a device, the first float batch alone is checked for its range.

        Returns:
            Tokens (B, N, D) in float32, row by row, without class and register tokens. Under autocast the
            model computes in autocast's dtype; the result is float32 all the same.

        Raises:
            ShapeError: wrong number of dimensions or channels, not square, or an integer dtype but uint8.
            DataError: a float batch leaves [-1, 1] by far.
        """
        pixels = self.preprocess(images).to(next(self.model.parameters()).dtype)
        features = self._feature_map(self.model.forward_features(pixels)).float()
        grid = (features.shape[2], features.shape[3])
        return resample_tokens(rearrange(features, "b d h w -> b (h w) d"), grid, self.grid)

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalises with the model's own mean and std, then resizes (bicubic): (B, 3, S, S) in float32."""
        _check_images(images)
        if images.dtype == torch.uint8:
            unit = images.float() / 255
        else:
            require_pixels("images", images, first=not self._range_checked)
            self._range_checked = True
            unit = (images.float() + 1) / 2
        pixels = (unit - self._mean) / self._std  # one channel becomes three here
        if pixels.shape[-1] != self.input_size:
            pixels = F.interpolate(pixels, self.input_size, mode="bicubic")
        # Convolutions are faster in this order, and give the same tokens to rounding.
        return pixels.contiguous(memory_format=torch.channels_last)

    def _feature_map(self, features: Any) -> Tensor:
        """What ``forward_features`` returned, as (B, D, h, w)."""
        if not isinstance(features, Tensor):
            raise _unsupported(self.name, f"a {type(features).__name__}")
        shape = tuple(features.shape)
        if features.ndim == 4:
            last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            maps = rearrange(features, "b h w d -> b d h w") if last else features
        else:
            tokens = features[:, getattr(self.model, "num_prefix_tokens", 0) :]
            side = math.isqrt(tokens.shape[1])
            # One token, where the network divides the image by less than its side, is a class token.
            strides = [stage["reduction"] for stage in getattr(self.model, "feature_info", ())]
            pooled = side == 1 and self.input_size // max(strides, default=1) > 1
            if tokens.ndim != 3 or side * side != tokens.shape[1] or pooled:
                raise _unsupported(self.name, f"features {shape}")
            maps = rearrange(tokens, "b (h w) d -> b d h w", h=side)
        if min(maps.shape) < 1 or maps.shape[1] != getattr(self.model, "num_features", maps.shape[1]):
            raise _unsupported(self.name, f"features {shape}, of which {self.model.num_features} are channels")
        return maps


class FrozenEncoders:
    """Several frozen encoders called on the same images.

    Attributes:
        encoders: the :class:`FrozenEncoder` objects.
        names, dims, grids: one entry per encoder.
    """

    def __init__(self, encoders: Sequence[FrozenEncoder]) -> None:
        self.encoders = tuple(encoders)
        self.names = tuple(encoder.name for encoder in encoders)
        self.dims = tuple(encoder.dim for encoder in encoders)
        self.grids = tuple(encoder.grid for encoder in encoders)

    def __deepcopy__(self, memo: dict[int, object]) -> "FrozenEncoders":
        return self

    def to(self, device: torch.device | str) -> "FrozenEncoders":
        """Moves all encoders to a device and returns them."""
        for encoder in self.encoders:
            encoder.to(device)
        return self

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Tokens (B, N, D) in float32, one tensor per encoder; see :meth:`FrozenEncoder.__call__`."""
        return tuple(encoder(images) for encoder in self.encoders)


@dataclass(frozen=True)
class Targets:
    """A frozen target encoder, or a pretrained critic in its place, which the aligner itself runs.

    Attributes:
        dims: D of each network.
        grid: (h, w) of their tokens.
        encode: uint8 images (B, C, H, W) to one (B, h * w, D) per network, without gradient.
        identify: names and hashes of the networks, which takes seconds where they are large.
        resolution: side in pixels of the images.
        latent_scale: factor on the latents of the same data; 1 for pixels.
        taught: of a critic's file: the encoder that it was trained for, where the file says it.
    """

    dims: tuple[int, ...]
    grid: tuple[int, int]
    encode: Callable[[Tensor], tuple[Tensor, ...]]
    identify: Callable[[], str] | None = None
    resolution: int | None = None
    latent_scale: float | None = None
    taught: str | None = None

    @classmethod
    def of_critic(cls, checkpoint: str | Path) -> "Targets":
        """What a critic's file says of the encoder that it was trained for, for ``targets="critic"``.

        It has nothing to encode: the aligner itself asks its critic.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        sizes, record = read_critic(Path(checkpoint))
        dims, (height, width) = tuple(sizes["target_dims"]), sizes["token_grid"]
        taught = record.get("made_for", {}).get("encoder")
        return cls(dims, (height, width), lambda images: (), taught=taught)

    def critic_purpose(self) -> CriticPurpose:
        """What a critic of these targets is for."""
        encoder = self.identify() if self.identify is not None else None
        return CriticPurpose(encoder=encoder, latent_scale=self.latent_scale, resolution=self.resolution)


def identify(encoders: FrozenEncoders) -> str:
    """Names of encoders, each with eight digits that change with its weights."""
    return ", ".join(f"{one.name} ({weights_hash(one.model.state_dict())})" for one in encoders.encoders)


def weights_hash(state: dict[str, Tensor]) -> str:
    """Eight hexadecimal digits that change with any name or value of a state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


def load_encoder(
    name: str,
    *,
    resolution: int,
    token_grid: tuple[int, int] | None = None,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> FrozenEncoder:
    """Loads a frozen encoder from timm.

    The images are resized so that the encoder sees 16 tokens a side per 256 pixels (224 pixels for 256 with
    patches of 14, 448 for 512; hierarchical networks see the resolution itself), or more where ``token_grid``
    asks for more. A model whose input size timm cannot change keeps its own.

    Args:
        name: a timm name (``vit_base_patch14_dinov2.lvd142m``) or one of REPA's (``dinov2-vit-b``).
        resolution: side of the training images in pixels.
        token_grid: (h, w) of the tokens to return, resampled bilinearly where the encoder's grid differs;
            None for the encoder's own grid.
        pretrained: load timm's weights: from the local cache, else by download, since naming a pretrained
            encoder names a remote model. False gives random weights, for tests only.
        checkpoint: a local .safetensors, .pt or .pth file to load instead; nothing is downloaded then.
        device: where the encoder lives.
        dtype: parameters and computation; None for float32.

    Returns:
        The encoder, in eval mode and frozen.

    Raises:
        ConfigError: unknown name (the nearest ones are named), or a bad resolution or token grid.
        WeightsNotFoundError: no such file, or the weights are neither cached nor can be downloaded.
        CheckpointError: the file is damaged or its keys do not fit the model.

    Source: REPA@67f7145:utils.py, ``load_encoders``: the position embedding is resampled once, here.
    """
    import timm

    if resolution < 1 or (token_grid is not None and min(token_grid) < 1):
        raise ConfigError(
            "load_encoder",
            expected="resolution >= 1 and token_grid of two positive numbers, or None",
            got=f"resolution={resolution}, token_grid={token_grid}",
            do="Pass the side of the training images in pixels and the (h, w) of the tokens.",
        )
    timm_name = _resolve_name(name)
    # timm draws random weights before it loads any; the training run's generator must not notice.
    with torch.random.fork_rng(devices=[]):
        if pretrained and checkpoint is None:
            model = _create_pretrained(name, timm_name)
        else:
            model = timm.create_model(timm_name, num_classes=0)
    input_size = _set_input_size(model, name, resolution, token_grid)
    if checkpoint is not None:  # after the size is set: a file's position embedding is resampled only once
        _load_checkpoint(model, name, Path(checkpoint))
    return FrozenEncoder(model.to(device=device, dtype=dtype), name, input_size, token_grid)


def load_encoders(
    names: str | Sequence[str],
    *,
    resolution: int,
    token_grid: tuple[int, int] | None = None,
    pretrained: bool = True,
    checkpoints: Sequence[str | Path | None] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> FrozenEncoders:
    """Loads several frozen encoders; see :func:`load_encoder`.

    Args:
        names: encoder names, as a sequence or joined by commas as in REPA's ``--enc-type``.
        resolution, token_grid, pretrained, device, dtype: as in :func:`load_encoder`, for all encoders.
        checkpoints: one local file, or None, per encoder; None for none at all.

    Returns:
        The encoders, in the order of ``names``.

    Raises:
        ConfigError: no name, or another number of checkpoints than of names.
    """
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    files = [None] * len(names) if checkpoints is None else list(checkpoints)
    if not names or isinstance(checkpoints, str) or len(files) != len(names):
        raise ConfigError(
            "load_encoders",
            expected="at least one encoder, and one checkpoint (or None) for each",
            got=f"names={names}, checkpoints={checkpoints!r}",
            do="Pass sequences of equal length, or no checkpoints at all.",
        )
    load = partial(
        load_encoder,
        resolution=resolution,
        token_grid=token_grid,
        pretrained=pretrained,
        device=device,
        dtype=dtype,
    )
    return FrozenEncoders([load(name, checkpoint=file) for name, file in zip(names, files, strict=True)])


def _resolve_name(name: str) -> str:
    import timm

    timm_name = REPA_ENCODERS.get(name, name)
    known = {*timm.list_models(), *timm.list_models(pretrained=True)}
    if timm_name not in known:
        nearest = difflib.get_close_matches(name, sorted(known | REPA_ENCODERS.keys()), n=4, cutoff=0.5)
        raise ConfigError(
            "encoder",
            expected="a model of the installed timm" + (f", such as {', '.join(nearest)}" if nearest else ""),
            got=repr(name),
            do=f"timm.list_models(pretrained=True) lists all; timm {timm.__version__} is installed.",
        )
    return timm_name


def _create_pretrained(name: str, timm_name: str) -> Any:
    import timm

    config = timm.get_pretrained_cfg(timm_name)
    source = config and (config.hf_hub_id or config.url)
    try:
        if not source:
            raise FileNotFoundError("timm publishes no weights of that name")
        return timm.create_model(timm_name, pretrained=True, num_classes=0)
    except OSError as error:  # what huggingface_hub and urllib raise without a network
        reason = str(error).strip().split("\n")[0]
        file = (config and config.hf_hub_filename) or "model.safetensors"
        raise WeightsNotFoundError(
            f"encoder {name!r}",
            expected=f"its weights: {file} of {source or timm_name} on the Hugging Face hub",
            got=f"neither in the local cache nor downloadable ({type(error).__name__}: {reason})",
            do="Fetch that file where there is a network, put it on any local path, and pass "
            f"checkpoint=/path/to/{file} (--enc-checkpoint). {_RANDOM}.",
        ) from error


def _load_checkpoint(model: Any, name: str, path: Path) -> None:
    from timm.models import load_state_dict

    if not path.is_file():
        raise WeightsNotFoundError(
            f"checkpoint of encoder {name!r}",
            expected="a .safetensors, .pt or .pth file",
            got=f"no file at {path}",
            do=f"Correct checkpoint= (--enc-checkpoint). {_RANDOM}.",
        )
    # Where authors publish another layout than timm's, timm's model file has the translation.
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = load_state_dict(str(path), weights_only=True)
        state = translate(state, model) if translate is not None else state
        missing, unexpected = model.load_state_dict(state, strict=False)
    except Exception as error:  # zip, pickle, safetensors and shape errors have no common class
        raise _does_not_fit(name, path, f"{type(error).__name__}: {str(error)[:500]}") from error
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    unexpected = [key for key in unexpected if not key.startswith(heads)]
    if missing or unexpected:
        raise _does_not_fit(name, path, f"{_some('missing', missing)}, {_some('unexpected', unexpected)}")


def _does_not_fit(name: str, path: Path, got: str) -> CheckpointError:
    return CheckpointError(
        f"{path}",
        expected=f"the weights of {name!r}",
        got=got,
        do="Name the encoder that the file belongs to, or fetch the file again.",
    )


def _some(what: str, keys: Sequence[str], most: int = 4) -> str:
    named = ", ".join([*keys[:most], "..."] if len(keys) > most else keys)
    return f"{len(keys)} {what} keys" + (f" ({named})" if keys else "")


def _unsupported(name: str, got: str) -> ConfigError:
    return ConfigError(
        f"encoder {name!r}",
        expected="a square grid of tokens, or a feature map",
        got=got,
        do="Choose a vision transformer or a convolutional network of timm.",
    )


def _set_input_size(model: Any, name: str, resolution: int, token_grid: tuple[int, int] | None) -> int:
    """Gives the model its input size in pixels, where it needs to know one, and returns that size."""
    strides = [stage["reduction"] for stage in getattr(model, "feature_info", ())]
    if not strides:
        raise _unsupported(name, f"{type(model).__name__}, which does not state its stride")
    resizable = hasattr(model, "set_input_size")
    if model.pretrained_cfg.get("fixed_input_size") and not resizable:
        return int(model.pretrained_cfg["input_size"][-1])
    plain = strides[0] == strides[-1]
    side = max(1, resolution // (16 if plain else strides[-1]), *(token_grid or ()))
    size = int(strides[-1]) * side
    if resizable:
        model.set_input_size(img_size=(size, size))
    return size


def _check_images(images: Tensor) -> None:
    square = images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[2] == images.shape[3]
    if not square or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ShapeError(
            "images",
            expected="(B, 3, H, H) or (B, 1, H, H), uint8 in [0, 255] or floating in [-1, 1]",
            got=f"{tuple(images.shape)}, {images.dtype}",
            do="Pass the images that the latents were made from, not the latents.",
        )

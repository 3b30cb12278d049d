"""Encoder tokens for hosts that make none: from the pixels that their VAE sees, or from a trained critic."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.encoders import FrozenEncoders, identify, load_encoders
from vrpo_plugin.errors import ConfigError, HostChangedError, explain
from vrpo_plugin.hosts.options import HostOptions
from vrpo_plugin.hosts.session import Session
from vrpo_plugin.modules.critic import CriticPurpose, read_critic_sizes
from vrpo_plugin.patching.handle import Seam

VAE_FACTOR = 8  # pixels per latent of the SD-VAE, the only one that SiT and DiT use
LATENTS_SCALE = 0.18215  # both, in their train.py


@dataclass(frozen=True)
class HostTargets:
    """Where the encoder's tokens come from, in a host that has no encoder.

    Attributes:
        dims: D of each encoder.
        grid: (h, w) of their tokens.
        encoders: None where a trained critic stands for them.
    """

    dims: tuple[int, ...]
    grid: tuple[int, int]
    encoders: FrozenEncoders | None = None
    resolution: int | None = None

    def critic_purpose(self) -> CriticPurpose:
        """What a critic of these targets is for."""
        if self.encoders is None:
            return CriticPurpose()
        return CriticPurpose(encoder=identify(self.encoders), resolution=self.resolution, latent_scale=LATENTS_SCALE)


def load_pixel_targets(options: HostOptions, latent_shape: tuple[int, int, int]) -> HostTargets:
    """The frozen encoders that the options name, for a model of these latents.

    Raises:
        ConfigError, WeightsNotFoundError, CheckpointError: as ``load_encoders``.
    """
    files, grid = options.encoder_checkpoint, (latent_shape[-2] // 2, latent_shape[-1] // 2)
    encoders = load_encoders(
        options.encoder,
        resolution=VAE_FACTOR * latent_shape[-1],
        token_grid=grid,
        checkpoints=files.split(",") if files else None,
    )
    return HostTargets(encoders.dims, grid, encoders, VAE_FACTOR * latent_shape[-1])


def read_critic_targets(config: VRPOConfig, host: str) -> HostTargets:
    """What a critic trained beforehand was taught, for a host that trains on latents without their images.

    Raises:
        ConfigError: the configuration names none, would go on training it, or makes no critic.
        CheckpointError: the file is missing or damaged.
    """
    if config.critic_checkpoint is None or config.critic_trainable:
        raise ConfigError(
            explain(
                "critic_checkpoint",
                expected=f"a critic trained beforehand, and frozen: {host} trains on latents without their images",
                got=f"{config.critic_checkpoint}, critic_trainable={config.critic_trainable}",
                do="Write one with 'vrpo train-critic' on these latents, and set critic_trainable=false.",
            )
        )
    if config.reward_coeff == 0 or not {"semantic", "perceptual"} & {*config.rewards}:
        raise ConfigError(
            explain(
                "reward_coeff, rewards",
                expected=f"a reward of the critic, whose tokens are the targets of {host}: semantic or perceptual",
                got=f"reward_coeff={config.reward_coeff}, rewards={config.rewards}",
                do="Set reward_coeff above 0, and name one of these rewards.",
            )
        )
    sizes = read_critic_sizes(Path(config.critic_checkpoint))
    return HostTargets(tuple(sizes["target_dims"]), tuple(sizes["token_grid"]))


def pixel_seam(session: Session) -> Sequence[Seam]:
    """``AutoencoderKL.encode``, which the host calls with the batch right before its loss."""
    from diffusers.models import AutoencoderKL

    def wrap(original: Any) -> Any:
        @wraps(original)
        def encode(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            session.cache["pixels"] = x
            return original(self, x, *args, **kwargs)

        return encode

    return [Seam(AutoencoderKL, "encode", wrap, "diffusers.AutoencoderKL.encode")]


def tokens_from_pixels(session: Session, x0: Tensor) -> tuple[Tensor, ...]:
    """Tokens (B, N, D) per encoder of the images whose latents these are.

    Raises:
        HostChangedError: the host's VAE has not seen such a batch.
    """
    pixels = session.cache.pop("pixels", None)
    if pixels is None or len(pixels) != len(x0):
        got = "none" if pixels is None else f"{len(pixels)} images"
        raise HostChangedError(
            explain(
                f"{session.spec.name}: pixels",
                expected=f"AutoencoderKL.encode with this batch of {len(x0)} images just before the loss",
                got=got,
                do="Encode each batch by diffusers' AutoencoderKL, or call VRPOAligner in your own loop.",
            )
        )
    if session.cache.get("encoder device") != x0.device:
        session.targets.encoders.to(x0.device)
        session.cache["encoder device"] = x0.device
    with torch.no_grad():
        return session.targets.encoders(pixels)


def tokens_from_critic(model: Any, x0: Tensor) -> tuple[Tensor, ...]:
    """What a frozen critic, trained beforehand, says that the encoder sees in clean latents."""
    inner = getattr(model, "module", model)  # DDP, once or twice
    inner = getattr(inner, "module", inner)
    with torch.no_grad():
        return inner.vrpo.critic(x0).tokens

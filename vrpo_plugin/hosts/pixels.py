"""Encoder tokens for hosts that make none: from the pixels that their VAE sees, or from a pretrained critic."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.encoders import Targets, identify, load_encoders
from vrpo_plugin.errors import ConfigError, HostChangedError
from vrpo_plugin.hosts.base import Session
from vrpo_plugin.hosts.options import DEFAULT_ENCODER, HostOptions

VAE_FACTOR = 8  # pixels per latent of the SD-VAE, the only one that SiT and DiT use
LATENTS_SCALE = 0.18215  # both, in their train.py


def load_pixel_targets(options: HostOptions, latent_shape: tuple[int, int, int]) -> Targets:
    """The frozen encoders that the options name, for a model of these latents.

    Raises:
        ConfigError, WeightsNotFoundError, CheckpointError: as ``load_encoders``.
    """
    files, grid = options.encoder_checkpoint, (latent_shape[-2] // 2, latent_shape[-1] // 2)
    encoders = load_encoders(
        options.encoder or DEFAULT_ENCODER,
        resolution=VAE_FACTOR * latent_shape[-1],
        token_grid=grid,
        checkpoints=files.split(",") if files else None,
    )
    return Targets(encoders.dims, grid, encoders, lambda: identify(encoders))


def of_latents(targets: Targets, latent_shape: tuple[int, int, int]) -> Targets:
    """The same, with what is known of a host's images and latents."""
    return replace(targets, resolution=VAE_FACTOR * latent_shape[-1], latent_scale=LATENTS_SCALE)


def read_critic_targets(config: VRPOConfig, host: str) -> Targets:
    """What a pretrained critic was trained for, whose tokens stand for the encoder's.

    Raises:
        ConfigError: the configuration names none, or would go on training it.
        CheckpointError: the file is missing or damaged.
    """
    if config.critic_checkpoint is None or config.critic_trainable:
        raise ConfigError(
            "critic_checkpoint",
            expected=f"a pretrained critic, and frozen: {host} trains on latents without their images",
            got=f"{config.critic_checkpoint}, critic_trainable={config.critic_trainable}",
            do="Write one with 'vrpo train-critic' on these latents, and set critic_trainable=false.",
        )
    return Targets.of_critic(config.critic_checkpoint)


def tokens_from_pixels(session: Session, x0: Tensor) -> tuple[Tensor, ...]:
    """Tokens (B, N, D) per encoder of the images whose latents these are.

    Raises:
        HostChangedError: the host's VAE has not seen such a batch.
    """
    targets: Any = session.targets
    pixels, encode = session.cache.pop("pixels", None), targets.encode
    if pixels is None or len(pixels) != len(x0):
        got = "none" if pixels is None else f"{len(pixels)} images"
        raise HostChangedError(
            f"{session.spec.name}: pixels",
            expected=f"AutoencoderKL.encode with this batch of {len(x0)} images just before the loss",
            got=got,
            do="Encode each batch by diffusers' AutoencoderKL, or call VRPOAligner in your own loop.",
        )
    if session.cache.get("encoder device") != x0.device:
        encode.to(x0.device)
        session.cache["encoder device"] = x0.device
    with torch.no_grad():
        return encode(pixels)

"""Target encoders by name: timm's and REPA's names, or a small network trained on the spot."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vrpo_plugin.encoders import Targets, identify, load_encoders
from vrpo_plugin.errors import ConfigError, DataError
from vrpo_plugin.standalone.data import LATENTS_SCALE
from vrpo_plugin.standalone.feature_cache import FeatureCache
from vrpo_plugin.standalone.sources import Source, all_images

SMALL = "small"
SMALL_SEED = 0  # fixed, so that runs of all seeds and methods share the encoder
SMALL_IMAGES = 20_000
FEWEST_IMAGES, FEWEST_CLASSES = 40, 2  # as train-critic wants at least: fewer give features of nothing


def critic_targets(checkpoint: str, source: Source) -> Targets:
    """What a pretrained critic of such data was trained for, in place of the encoder; it has nothing to encode.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return replace(Targets.of_critic(checkpoint), **_of_data(source))


def cached_targets(cache: FeatureCache, source: Source) -> Targets:
    """What a cache of features holds, in place of the encoder: the loader reads it, nothing is encoded."""
    own = cache.identity
    return Targets(own.dims, own.grid, lambda images: (), lambda: own.encoder, **_of_data(source))


def _of_data(source: Source) -> dict[str, Any]:
    scale = 1.0 if source.latent_shape == source.image_shape else LATENTS_SCALE
    return {"resolution": source.image_shape[-1], "latent_scale": scale}


def load_targets(
    enc_type: str,
    source: Source,
    *,
    checkpoint: str | None = None,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
) -> Targets:
    """Loads the encoder(s), or trains the small one on the source's images.

    Args:
        enc_type: timm's or REPA's names, comma-separated; or ``small``, a classifier of the source's labels,
            for runs without pretrained weights.
        source: images, for their sizes and for ``small``.
        checkpoint: local weights, comma-separated where there are several encoders; for ``small`` a file that an
            earlier run left.
        cache: where ``small`` is kept, and found again by the same run.
        device: of the encoder.

    Raises:
        ConfigError: the source's images are no squares, or the small encoder was trained on others.
        DataError: too few images or classes to train the small encoder on.
        ConfigError, WeightsNotFoundError, CheckpointError: as ``load_encoders`` and ``load_small_features``.
    """
    for name, shape in {"images": source.image_shape, "latents": source.latent_shape}.items():
        if shape[-1] != shape[-2]:
            do = "Crop the images before they are encoded."
            raise ConfigError(name, expected="squares, as the encoders see them", got=shape, do=do)
    of_data = _of_data(source)
    if enc_type != SMALL:
        # The grid of a patch-2 transformer: there the tokens of all encoders and of the model meet.
        side = max(1, source.latent_shape[-1] // 2)
        encoders = load_encoders(
            enc_type,
            resolution=source.image_shape[-1],
            token_grid=(side, side),
            checkpoints=checkpoint.split(",") if checkpoint else None,
            device=device,
        )
        return Targets(encoders.dims, (side, side), encoders, lambda: identify(encoders), **of_data)
    from vrpo_plugin.standalone.small_network import load_small_features
    from vrpo_plugin.standalone.small_training import train_small_features

    if checkpoint is not None:
        small = load_small_features(checkpoint)
    elif cache is not None and cache.exists():
        small = load_small_features(cache)
    else:
        check_small(source)
        images, labels = all_images(source, SMALL_IMAGES)
        small = train_small_features(images, labels, seed=SMALL_SEED, show="small encoder")
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            small.save(cache)
    if (small.channels, small.resolution, small.resolution) != tuple(source.image_shape):
        raise ConfigError(
            "small encoder",
            expected=f"one of images {tuple(source.image_shape)}",
            got=(small.channels, small.resolution, small.resolution),
            do="Pass the file that belongs to this data and resolution, or none.",
        )
    small = small.to(device)
    name = small.name
    return Targets((small.token_dim,), small.grid, lambda images: (small.tokens(images),), lambda: name, **of_data)


def check_small(source: Source, what: str = "small encoder", instead: str = "--enc-type dinov2-vit-b") -> None:
    """Refuses to train a small network on the classes of data that has next to none.

    Args:
        source: the images.
        what: of the network.
        instead: the option that names a pretrained one.

    Raises:
        DataError: too few images or classes.
    """
    if len(source) < FEWEST_IMAGES or source.num_classes < FEWEST_CLASSES:
        expected = f"at least {FEWEST_IMAGES} images in at least {FEWEST_CLASSES} classes, to train it on"
        got = f"{len(source)} images in {source.num_classes}"
        do = f"Add images, a folder for each class, or take a pretrained network ({instead})."
        raise DataError(what, expected=expected, got=got, do=do)

"""Networks that turn images into features: any timm model, or a small one trained on the spot."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor

from vrpo_plugin.errors import DataError, ShapeError
from vrpo_plugin.standalone.small_network import (
    SmallFeatureNetwork,
    load_small_features,
    weights_hash,
)
from vrpo_plugin.standalone.small_training import (
    train_denoising_features,
    train_rotation_features,
    train_small_features,
)

__all__ = [
    "FeatureNetwork",
    "SmallFeatureNetwork",
    "TokenMean",
    "extract_features",
    "load_small_features",
    "timm_features",
    "train_denoising_features",
    "train_rotation_features",
    "train_small_features",
]

# Images uint8 (B, C, H, W) -> features (B, D), float32.
FeatureNetwork = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class TokenMean:
    """Mean of an encoder's tokens as a feature network; ``name`` goes into evaluation records."""

    encoder: Callable[[Tensor], Tensor]
    name: str

    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return reduce(self.encoder(images), "b n d -> b d", "mean")


def timm_features(
    name: str,
    *,
    resolution: int = 256,
    checkpoint: str | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
) -> TokenMean:
    """Pooled features of any timm model: the mean of its tokens.

    Args:
        name: timm model name.
        resolution: side of the images in pixels; 256 lets an encoder with patches of 14 see 224.
        checkpoint: local weights, in place of timm's.
        pretrained: load timm's weights; False gives random ones, for tests.
        device: where to compute.

    Returns:
        A feature network, images uint8 (B, C, H, W) -> (B, D), named after the model and a hash of its weights.

    Raises:
        ConfigError, WeightsNotFoundError, CheckpointError: as :func:`vrpo_plugin.encoders.load_encoder`.
    """
    from vrpo_plugin.encoders import load_encoder

    encoder = load_encoder(name, resolution=resolution, pretrained=pretrained, checkpoint=checkpoint, device=device)
    return TokenMean(encoder, f"{name}@{resolution}-{weights_hash(encoder.model.state_dict())}")


def extract_features(network: FeatureNetwork, images: Tensor | Iterable[Tensor], *, batch_size: int = 256) -> Tensor:
    """Features of all images.

    Args:
        network: images uint8 (B, C, H, W) -> (B, D).
        images: one tensor (N, C, H, W), or batches of them.
        batch_size: images per call of the network.

    Returns:
        Features (N, D), float32, on the CPU.

    Raises:
        DataError: there are no images.
        ShapeError: the network does not return (B, D).
    """
    batches = (images,) if isinstance(images, Tensor) else images
    features = []
    with torch.no_grad():
        for batch in batches:
            features += [network(part).float().cpu() for part in batch.split(batch_size) if len(part)]
    if not features:
        raise DataError("images", expected="at least one", got="none", do="Pass images.")
    if features[0].ndim != 2:
        raise ShapeError(
            "feature network",
            expected="pooled features (B, D)",
            got=tuple(features[0].shape),
            do="Pool the tokens, for instance with TokenMean.",
        )
    return torch.cat(features)

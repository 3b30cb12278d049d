"""Seams of hustvl/LightningDiT, transport."""

from fakes.hosts.paths import PATHS

from .transport import ModelType, Transport


class Sampler:
    """The name that the script imports."""


def create_transport(path_type="Linear", prediction="velocity", loss_weight=None, train_eps=None, sample_eps=None):
    return Transport(
        model_type=ModelType[prediction.upper()], path_type=PATHS[path_type], loss_type=loss_weight, train_eps=0,
        sample_eps=0,
    )  # fmt: skip

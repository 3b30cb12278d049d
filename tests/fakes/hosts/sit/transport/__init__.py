"""Seams of willisma/SiT, transport."""

from fakes.hosts.paths import PATHS

from .transport import ModelType, Transport


def create_transport(path_type="Linear", prediction="velocity", loss_weight=None, train_eps=None, sample_eps=None):
    eps = 1e-3 if path_type == "VP" or prediction != "velocity" else 0
    return Transport(
        model_type=ModelType[prediction.upper()], path_type=PATHS[path_type], loss_type=loss_weight, train_eps=eps,
        sample_eps=eps,
    )  # fmt: skip

"""VRPO for REPA codebases: reward-guided, group-relative representation alignment of diffusion transformers."""

from vrpo_plugin._version import __version__
from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HostChangedError,
    HostNotFoundError,
    PatchConflictError,
    ShapeError,
    VRPOError,
    WeightsNotFoundError,
)
from vrpo_plugin.functional.rewards import RewardState
from vrpo_plugin.modules.aligner import VRPOAligner, VRPOOutput

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HostChangedError",
    "HostNotFoundError",
    "PatchConflictError",
    "RewardState",
    "ShapeError",
    "VRPOAligner",
    "VRPOConfig",
    "VRPOError",
    "VRPOOutput",
    "WeightsNotFoundError",
    "__version__",
]

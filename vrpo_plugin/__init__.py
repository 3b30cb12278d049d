"""VRPO for REPA codebases: reward-guided, group-relative representation alignment of diffusion transformers."""

from vrpo_plugin._moved import alias_moved_modules
from vrpo_plugin._version import __version__
from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HostChangedError,
    HostNotFoundError,
    NonFiniteError,
    PatchConflictError,
    ShapeError,
    VRPOError,
    WeightsNotFoundError,
)
from vrpo_plugin.functional.rewards import RewardState
from vrpo_plugin.hosts import (
    HostSpec,
    apply_vrpo,
    apply_vrpo_to_dit,
    apply_vrpo_to_irepa,
    apply_vrpo_to_lightningdit,
    apply_vrpo_to_reg,
    apply_vrpo_to_repa,
    apply_vrpo_to_repa_t2i,
    apply_vrpo_to_repae,
    apply_vrpo_to_sit,
)
from vrpo_plugin.modules.aligner import VRPOAligner, VRPOOutput
from vrpo_plugin.modules.guard import NonFiniteGuard

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HostChangedError",
    "HostNotFoundError",
    "HostSpec",
    "NonFiniteError",
    "NonFiniteGuard",
    "PatchConflictError",
    "RewardState",
    "ShapeError",
    "VRPOAligner",
    "VRPOConfig",
    "VRPOError",
    "VRPOOutput",
    "WeightsNotFoundError",
    "__version__",
    "apply_vrpo",
    "apply_vrpo_to_dit",
    "apply_vrpo_to_irepa",
    "apply_vrpo_to_lightningdit",
    "apply_vrpo_to_reg",
    "apply_vrpo_to_repa",
    "apply_vrpo_to_repa_t2i",
    "apply_vrpo_to_repae",
    "apply_vrpo_to_sit",
]

alias_moved_modules()

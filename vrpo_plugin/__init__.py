"""VRPO for REPA codebases: reward-guided, group-relative representation alignment of diffusion transformers.

Names are imported when they are first used: ``vrpo check`` and ``vrpo --version`` answer without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from vrpo_plugin.functional.rewards import RewardState
    from vrpo_plugin.hosts.apply import (
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
    from vrpo_plugin.hosts.base import HostSpec
    from vrpo_plugin.modules.aligner import VRPOAligner, VRPOOutput
    from vrpo_plugin.modules.guard import NonFiniteGuard
    from vrpo_plugin.modules.guide import RewardGuide

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
    "RewardGuide",
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
_LAZY = {
    "HostSpec": "hosts.base",
    "NonFiniteGuard": "modules.guard",
    "RewardGuide": "modules.guide",
    "RewardState": "functional.rewards",
    "VRPOAligner": "modules.aligner",
    "VRPOOutput": "modules.aligner",
    **{name: "hosts.apply" for name in __all__ if name.startswith("apply_vrpo")},
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


alias_moved_modules()

"""Host codebases: where the aligner attaches, and the conversion of their units."""

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
from vrpo_plugin.hosts.base import Aligned, HostSpec

__all__ = [
    "Aligned",
    "HostSpec",
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

"""The guide of a run: a guide's file, or a critic's beside the projectors that the run has trained."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.modules.guide import RewardGuide
from vrpo_plugin.modules.guide_parts import GuideParts, group, load_critic
from vrpo_plugin.modules.taps import resolve_layers
from vrpo_plugin.standalone.checkpoint import load_group
from vrpo_plugin.standalone.trained import Trained

RUN_GUIDE = "guide.safetensors"  # in the folder of a run whose aligner has a critic


def open_guide(file: Path, trained: Trained, **settings: Any) -> RewardGuide:
    """Reads a guide for a model.

    Args:
        file: of a guide; or of a critic, for a run that has none of its own, such as one of plain REPA: the projectors
            are then the run's.
        trained: the model, on its device.
        **settings: ``strength`` and ``interval`` of :class:`RewardGuide`.

    Raises:
        ConfigError: there is no such file, or a critic's for weights without a run, or for one without projectors.
        CheckpointError: the file is damaged.
    """
    if not file.is_file():
        do = "Check the path; a run with a critic writes it, vrpo export --guide too."
        raise ConfigError("guide", expected="a file", got=f"none at {file}", do=do)
    if not _is_critic(file):
        return RewardGuide.load(file, trained.model, **settings)
    device = next(trained.model.parameters()).device
    return RewardGuide(trained.model, _with_projectors(file, trained).to(device), **settings)


def _with_projectors(file: Path, trained: Trained) -> GuideParts:
    do = "Give the guide's file: of RewardGuide.save, or vrpo export --guide."
    if trained.checkpoint is None:
        raise ConfigError("guide", expected="a guide, for weights alone", got=f"a critic, {file}", do=do)
    critic, record = load_critic(file)
    weights, _, _ = load_group(trained.checkpoint, "model")
    chosen = trained.settings.get("layers", "early")
    layers = resolve_layers(
        tuple(chosen) if isinstance(chosen, list) else chosen,
        len(trained.model.blocks),
        encoder_depth=trained.settings.get("encoder_depth"),
    )
    return GuideParts.of_weights(critic, group(weights, "vrpo.projectors."), layers, 0, record, do=do)


def _is_critic(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return "vrpo_critic" in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return False  # RewardGuide.load says what is wrong with it

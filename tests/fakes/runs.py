"""The folder of a finished run, as the example writes it, of a model that was never trained."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vrpo_plugin.standalone.run_folder import RunFolder
from vrpo_plugin.standalone.sit import SiT, create_sit

SETTINGS: dict[str, Any] = {
    "model": "SiT-Ti/2",
    "resolution": 8,
    "cfg_prob": 0.1,
    "qk_norm": False,
    "path_type": "linear",
}


def randomised(model: nn.Module, seed: int, std: float = 0.05) -> nn.Module:
    """Every parameter random: at its own initialisation a SiT predicts zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = std * torch.randn(parameter.shape, generator=generator)
    return model


def tiny_sit(seed: int, **overrides: Any) -> SiT:
    sizes: dict[str, Any] = {"input_size": 8, "in_channels": 1, "num_classes": 10, **overrides}
    model = create_sit("SiT-Ti/2", **sizes)
    randomised(model, seed)
    return model


def finished_run(folder: Path, *, steps: tuple[int, ...] = (4, 8), settings: Any = None, **overrides: Any) -> Path:
    """Checkpoints with raw weights of seed ``step`` and averaged ones of seed ``step + 1``; an aligner's beside."""
    run = RunFolder(folder, {**SETTINGS, **(settings or {})})
    run.start()
    for step in steps:
        model = {**tiny_sit(step, **overrides).state_dict(), "vrpo.features.projector.weight": torch.ones(2, 2)}
        tensors = {"model": model, "ema": tiny_sit(step + 1, **overrides).state_dict(), "optimizer": {}}
        run.save(step, tensors, {"step": step})
    return folder

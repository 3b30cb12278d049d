"""Weights for torch-fidelity's Inception that no training made: the machinery is the same, the numbers mean nothing."""

from pathlib import Path
from unittest import mock

import torch


def write_inception_weights(path: Path, seed: int = 0) -> None:
    """Writes random weights with batch statistics of noise, so that features differ between images."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    torch.manual_seed(seed)
    extractor = theirs.FeatureExtractorInceptionV3
    with (
        mock.patch.object(theirs, "load_state_dict_from_url", return_value={}),
        mock.patch.object(extractor, "load_state_dict"),
    ):
        model = extractor("random", ["2048"])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    colours = torch.randint(0, 256, (6, 3, 5, 5), dtype=torch.uint8)
    with torch.no_grad():
        model.train()(colours)
        model.fc.weight.mul_(20)
    torch.save(model.eval().state_dict(), path)

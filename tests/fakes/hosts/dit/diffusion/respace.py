"""Seams of facebookresearch/DiT, diffusion/respace.py."""

import numpy as np
import torch

from .gaussian_diffusion import GaussianDiffusion


class SpacedDiffusion(GaussianDiffusion):
    """Uses some of the steps; its model sees their original numbers."""

    def __init__(self, use_timesteps, betas, **kwargs):
        self.timestep_map = sorted(use_timesteps)
        kept = np.cumprod(1.0 - betas)[self.timestep_map]
        super().__init__(betas=1 - kept / np.append(1.0, kept[:-1]), **kwargs)

    def training_losses(self, model, *args, **kwargs):
        return super().training_losses(_WrappedModel(model, self.timestep_map), *args, **kwargs)


class _WrappedModel:
    def __init__(self, model, timestep_map):
        self.model, self.timestep_map = model, torch.tensor(timestep_map)

    def __call__(self, x, ts, **kwargs):
        return self.model(x, self.timestep_map[ts], **kwargs)

"""Seams of facebookresearch/DiT, diffusion."""

import numpy as np

from .gaussian_diffusion import ModelMeanType
from .respace import SpacedDiffusion


def create_diffusion(timestep_respacing, predict_xstart=False, learn_sigma=True, diffusion_steps=1000):
    stride = diffusion_steps // int(timestep_respacing or diffusion_steps)
    return SpacedDiffusion(
        use_timesteps=range(0, diffusion_steps, stride),
        betas=np.linspace(1e-4, 0.02, diffusion_steps),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        learn_sigma=learn_sigma,
    )

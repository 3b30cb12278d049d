"""Seams of facebookresearch/DiT, diffusion/gaussian_diffusion.py."""

import enum

import numpy as np
import torch
from fakes.hosts.parts import mean_flat


class ModelMeanType(enum.Enum):
    """What the model predicts."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class GaussianDiffusion:
    """Whole-number steps, 0 next to the data."""

    def __init__(self, *, betas, model_mean_type, learn_sigma):
        self.model_mean_type, self.learn_sigma = model_mean_type, learn_sigma
        self.alphas_cumprod = np.cumprod(1.0 - betas)
        self.num_timesteps = len(betas)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        share = torch.from_numpy(self.alphas_cumprod)[t].view(-1, 1, 1, 1)
        x_t = share.sqrt().float() * x_start + (1 - share).sqrt().float() * noise
        output = model(x_t, t, **(model_kwargs or {}))
        channels = x_start.shape[1]
        assert output.shape[1] == channels * (2 if self.learn_sigma else 1)
        target = noise if self.model_mean_type == ModelMeanType.EPSILON else x_start
        terms = {"mse": mean_flat((target - output[:, :channels]) ** 2)}
        terms["vb"] = 0.001 * mean_flat(output[:, channels:] ** 2) if self.learn_sigma else 0.0
        return terms | {"loss": terms["mse"] + terms["vb"]}

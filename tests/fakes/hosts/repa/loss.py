"""Seams of sihyun-yu/REPA, loss.py."""

import torch
import torch.nn.functional as F
from fakes.hosts.parts import interpolant, mean_flat


class SILoss:
    """Draws times and noise, calls the model, and compares its tokens with the encoders' sample by sample."""

    compared = 0  # samples that went through the loop

    def __init__(self, prediction="v", path_type="linear", weighting="uniform", encoders=(), accelerator=None):
        self.path_type, self.weighting, self.accelerator = path_type, weighting, accelerator

    def __call__(self, model, images, model_kwargs=None, zs=None):
        t = torch.rand((len(images), 1, 1, 1)).to(images)
        noises = torch.randn_like(images)
        alpha, sigma, d_alpha, d_sigma = interpolant(t, self.path_type)
        output, zs_tilde = model(alpha * images + sigma * noises, t.flatten(), **(model_kwargs or {}))
        denoising = mean_flat((output - (d_alpha * images + d_sigma * noises)) ** 2)
        projection = 0.0
        for z, z_tilde in zip(zs, zs_tilde, strict=True):
            for one, one_tilde in zip(z, z_tilde, strict=True):
                SILoss.compared += 1
                projection += -(F.normalize(one, dim=-1) * F.normalize(one_tilde, dim=-1)).sum(-1).mean()
        return denoising, projection / (len(zs) * len(zs[0]))

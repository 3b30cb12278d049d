"""Seams of Martinser/REG, loss.py."""

import torch
import torch.nn.functional as F
from fakes.hosts.parts import interpolant, mean_flat


class SILoss:
    """REPA's, with a class token that is denoised as well."""

    compared = 0  # samples that went through the loop

    def __init__(self, prediction="v", path_type="linear", weighting="uniform", encoders=(), accelerator=None):
        self.path_type, self.weighting, self.accelerator = path_type, weighting, accelerator

    def __call__(self, model, images, model_kwargs=None, zs=None, cls_token=None, time_input=None, noises=None):
        t = torch.rand((len(images), 1, 1, 1)).to(images) if time_input is None else time_input
        noises = torch.randn_like(images) if noises is None else noises
        cls_noises = torch.randn_like(cls_token)
        alpha, sigma, d_alpha, d_sigma = interpolant(t, self.path_type)
        cls_input = alpha.flatten(1) * cls_token + sigma.flatten(1) * cls_noises
        output, zs_tilde, cls_output = model(
            alpha * images + sigma * noises, t.flatten(), **(model_kwargs or {}), cls_token=cls_input
        )
        denoising = mean_flat((output - (d_alpha * images + d_sigma * noises)) ** 2)
        cls_denoising = mean_flat((cls_output - (d_alpha * cls_token + d_sigma * cls_noises)) ** 2)
        projection = 0.0
        for z, z_tilde in zip(zs, zs_tilde, strict=True):
            for one, one_tilde in zip(z, z_tilde, strict=True):
                SILoss.compared += 1
                projection += -(F.normalize(one, dim=-1) * F.normalize(one_tilde, dim=-1)).sum(-1).mean()
        return denoising, projection / (len(zs) * len(zs[0])), t, noises, cls_denoising

"""Seams of End2End-Diffusion/iREPA, ldm/loss.py."""

import projection_loss as pl
import torch
from fakes.hosts.parts import interpolant, mean_flat


class SILoss:
    """As REPA's, with registered alignment losses that it weighs itself."""

    def __init__(
        self, prediction="v", path_type="linear", weighting="uniform", accelerator=None, projection_loss_type="cosine",
        proj_coeff="0.5",
    ):  # fmt: skip
        self.path_type, self.weighting, self.accelerator = path_type, weighting, accelerator
        self.projection_loss_type = projection_loss_type.split(",")
        self.proj_coeff = [float(coeff) for coeff in proj_coeff.split(",")]

    def __call__(self, model, images, model_kwargs=None, zs=FileNotFoundError):
        t = torch.rand((len(images), 1, 1, 1)).to(images)
        noises = torch.randn_like(images)
        alpha, sigma, d_alpha, d_sigma = interpolant(t, self.path_type)
        output, zs_tilde, hidden = model(alpha * images + sigma * noises, t.flatten(), **(model_kwargs or {}))
        denoising = mean_flat((output - (d_alpha * images + d_sigma * noises)) ** 2)
        total, logged = 0.0, {}
        for name, coeff in zip(self.projection_loss_type, self.proj_coeff, strict=True):
            each = [pl.LOSSES[name](*one) for one in zip(zs, zs_tilde, hidden, strict=True)]
            logged[name] = (sum(each) / len(each)).detach().item()
            total = total + coeff * sum(each) / len(each)
        return denoising, total, logged

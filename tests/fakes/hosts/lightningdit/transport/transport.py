"""Seams of hustvl/LightningDiT, transport/transport.py."""

import enum

import torch
import torch.nn.functional as F
from fakes.hosts.parts import mean_flat


class ModelType(enum.Enum):
    """What the model predicts."""

    NOISE = enum.auto()
    SCORE = enum.auto()
    VELOCITY = enum.auto()


class Transport:
    """Here x1 is data, and x0 noise."""

    def __init__(self, *, model_type, path_type, loss_type, train_eps, sample_eps):
        self.model_type, self.path_sampler = model_type, path_type()

    def training_losses(self, model, x1, model_kwargs=None, sp_timesteps=None, shifted_mu=0):
        low, high = sp_timesteps or (0, 1)
        t, x0 = low + (high - low) * torch.rand(len(x1)), torch.randn_like(x1)
        t, xt, ut = self.path_sampler.plan(t, x0, x1)
        prediction = model(xt, t, **(model_kwargs or {}))
        return {
            "pred": prediction,
            "loss": mean_flat((prediction - ut) ** 2),
            "cos_loss": mean_flat(1 - F.cosine_similarity(prediction, ut, dim=1)),
        }

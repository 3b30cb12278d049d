"""Seams of willisma/SiT, transport/transport.py."""

import enum

import torch
from fakes.hosts.parts import mean_flat


class ModelType(enum.Enum):
    """What the model predicts."""

    NOISE = enum.auto()
    SCORE = enum.auto()
    VELOCITY = enum.auto()


class Transport:
    """Here x1 is data, and x0 noise."""

    def __init__(self, *, model_type, path_type, loss_type, train_eps, sample_eps):
        self.model_type, self.path_sampler, self.train_eps = model_type, path_type(), train_eps

    def sample(self, x1):
        noise = torch.randn_like(x1)
        return self.train_eps + (1 - 2 * self.train_eps) * torch.rand(len(x1)).to(x1), noise, x1

    def training_losses(self, model, x1, model_kwargs=None):
        t, x0, x1 = self.sample(x1)
        t, xt, ut = self.path_sampler.plan(t, x0, x1)
        prediction = model(xt, t, **(model_kwargs or {}))
        assert prediction.shape == xt.shape
        if self.model_type == ModelType.VELOCITY:
            error = prediction - ut
        elif self.model_type == ModelType.NOISE:
            error = prediction - x0
        else:
            sigma, _ = self.path_sampler.compute_sigma_t(t.view(-1, 1, 1, 1))
            error = prediction * sigma + x0
        return {"pred": prediction, "loss": mean_flat(error**2)}

"""Paths between noise (t = 0) and data (t = 1), in the host's own time."""

import math

import torch


class Linear:
    def compute_alpha_t(self, t):
        return t, 1

    def compute_sigma_t(self, t):
        return 1 - t, -1

    def plan(self, t, x0, x1):
        times = t.view(-1, *(1,) * (x1.ndim - 1))
        alpha, d_alpha = self.compute_alpha_t(times)
        sigma, d_sigma = self.compute_sigma_t(times)
        return t, alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0


class GVP(Linear):
    def compute_alpha_t(self, t):
        angle = t * math.pi / 2
        return torch.sin(angle), math.pi / 2 * torch.cos(angle)

    def compute_sigma_t(self, t):
        angle = t * math.pi / 2
        return torch.cos(angle), -math.pi / 2 * torch.sin(angle)


class VP(Linear):
    def _log_alpha(self, t):
        """log alpha and its derivative, for betas from 0.1 to 20."""
        left = 1 - t
        return -(19.9 * left**2 + 0.2 * left) / 4, (19.9 * left + 0.1) / 2

    def compute_alpha_t(self, t):
        log_alpha, slope = self._log_alpha(t)
        return log_alpha.exp(), slope * log_alpha.exp()

    def compute_sigma_t(self, t):
        log_alpha, slope = self._log_alpha(t)
        sigma = (-torch.expm1(2 * log_alpha)).sqrt()
        return sigma, -slope * (2 * log_alpha).exp() / sigma


PATHS = {"Linear": Linear, "GVP": GVP, "VP": VP}

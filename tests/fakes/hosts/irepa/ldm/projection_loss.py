"""Seams of End2End-Diffusion/iREPA, ldm/projection_loss.py."""

import torch.nn.functional as F

compared = 0  # samples that the cosine has seen


def cosine(zs, zs_tilde, zs_tilde_original=None):
    global compared
    compared += len(zs)
    return -(F.normalize(zs, dim=-1) * F.normalize(zs_tilde, dim=-1)).sum(-1).mean()


def size(zs, zs_tilde, zs_tilde_original=None):
    """Another registered loss."""
    return (zs_tilde.square().mean() - zs.square().mean()).abs()


LOSSES = {"cosine": cosine, "size": size}

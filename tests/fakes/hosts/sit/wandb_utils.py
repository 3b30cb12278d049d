"""Seams of willisma/SiT, wandb_utils.py."""

import wandb


def log(stats, step=None):
    wandb.log(dict(stats), step=step)

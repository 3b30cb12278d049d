"""Schedules of the two parts of the objective."""

import torch
from torch import Tensor


def schedule_left(schedule: str, steps: int, done: Tensor | int, *, floor: float = 0.0) -> Tensor | float:
    """Share that a schedule has left, rho (equation 17).

    Args:
        schedule: ``none`` (1), ``linear`` (down to the floor at ``steps``) or ``stop`` (the floor from there on).
        steps: its length; 0 if nobody knows it: the floor from the start, or 1 without one.
        done: steps before this one; a number, or a tensor on the device.
        floor: what is left at the end, in [0, 1].

    Returns:
        In [0, 1]; a tensor where ``done`` is one.

    Source: our derivation; ``stop`` as in HASTE.
    """
    if schedule == "none":
        return 1.0
    if steps == 0:
        return floor or 1.0
    share = done / steps
    left: Tensor | float
    if isinstance(share, Tensor):
        left = torch.clamp(1 - share, 0, 1) if schedule == "linear" else (share < 1).float()
    else:
        left = min(max(1 - share, 0.0), 1.0) if schedule == "linear" else float(share < 1)
    return floor + (1 - floor) * left if floor else left

"""Groups: which samples of a batch are compared with each other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vrpo_plugin.errors import ConfigError, ShapeError, explain


@dataclass(frozen=True)
class Groups:
    """A partition of a batch of B samples into S groups, as rectangles of at most G slots.

    Attributes:
        index: sample of every slot (S, G), int64; empty slots hold 0.
        mask: True where a slot holds a sample (S, G).
        slot: flat slot of every sample (B,), int64.
    """

    index: Tensor
    mask: Tensor
    slot: Tensor

    def split(self, values: Tensor) -> Tensor:
        """(..., B) to (..., S, G); what stands in empty slots has no meaning."""
        return values[..., self.index]

    def join(self, values: Tensor) -> Tensor:
        """(..., S, G) back to (..., B)."""
        return values.flatten(-2)[..., self.slot]


def noise_strata(t: Tensor, group_size: int) -> Groups:
    """Sorts a batch by noise level and cuts it into strata of ``group_size`` (equation 8).

    Rewards at different noise levels are not comparable; within a stratum they are. What is left over after
    the last full stratum joins it, so every group but that of a smaller batch has at least ``group_size``.

    Args:
        t: times (B,), B >= 1.
        group_size: samples per stratum, >= 1.

    Returns:
        ``Groups`` of max(B // group_size, 1) strata, the least noisy first. Equal times keep their order.

    Raises:
        ShapeError: ``t`` is not (B,).
        ConfigError: ``group_size`` < 1.

    Source: our derivation.
    """
    if t.ndim != 1 or t.shape[0] == 0:
        raise ShapeError(explain("t", expected="(B,), B >= 1", got=tuple(t.shape), do="Pass one time per sample."))
    _check_group_size(group_size)
    batch = t.shape[0]
    strata = max(batch // group_size, 1)
    width = batch - (strata - 1) * group_size
    order = torch.argsort(t, stable=True)
    rank = torch.arange(batch, device=t.device)
    group = (rank // group_size).clamp(max=strata - 1)
    sorted_slot = group * width + rank - group * group_size
    index = torch.zeros(strata * width, dtype=torch.int64, device=t.device)
    mask = torch.zeros(strata * width, dtype=torch.bool, device=t.device)
    slot = torch.empty(batch, dtype=torch.int64, device=t.device)
    return Groups(
        index=index.scatter(0, sorted_slot, order).unflatten(0, (strata, width)),
        mask=mask.scatter(0, sorted_slot, torch.ones_like(order, dtype=torch.bool)).unflatten(0, (strata, width)),
        slot=slot.scatter(0, order, sorted_slot),
    )


def image_groups(batch: int, group_size: int, *, device: torch.device | str = "cpu") -> Groups:
    """Groups of ``group_size`` consecutive samples: several draws of one image at one time (equation 8).

    Args:
        batch: B, a multiple of ``group_size``.
        group_size: draws per image, >= 1.
        device: where the indices are made.

    Returns:
        ``Groups`` of B / group_size groups.

    Raises:
        ShapeError: ``group_size`` does not divide ``batch``.
        ConfigError: ``group_size`` < 1.

    Source: GRPO, arXiv 2402.03300, section 4.1 (one group per prompt).
    """
    _check_group_size(group_size)
    if batch < 1 or batch % group_size:
        raise ShapeError(
            explain(
                "batch",
                expected=f"a multiple of group_size={group_size}",
                got=batch,
                do='Lay the draws of an image side by side, or use group="noise".',
            )
        )
    slot = torch.arange(batch, device=device)
    index = slot.unflatten(0, (batch // group_size, group_size))
    return Groups(index=index, mask=torch.ones_like(index, dtype=torch.bool), slot=slot)


def _check_group_size(group_size: int) -> None:
    if group_size < 1:
        raise ConfigError(explain("group_size", expected=">= 1", got=group_size, do="Set it to 16, the default."))

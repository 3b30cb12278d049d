"""Optimizer steps of a host that are not finite are left out, by torch's own step hooks."""

from typing import Any

import torch
from torch import Tensor

from vrpo_plugin.errors import NonFiniteError
from vrpo_plugin.modules.guard import NonFiniteGuard

SKIPPED, IN_A_ROW = "vrpo/skipped", "vrpo/skipped_in_a_row"


class HostGuard:
    """Guards the optimizer that holds the aligner, and counts on the device what it leaves out.

    A fused step is left out on the device. Any other kind looks at its gradients on the host, so there one number
    per step is waited for.
    """

    def __init__(self) -> None:
        self.aligner = torch.nn.Module()  # of the model that was made last
        self.guard: NonFiniteGuard | None = None
        self._guarded: torch.optim.Optimizer | None = None
        self._counts: Tensor | None = None  # of steps left out: in all, and in a row

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Decides about the step that the optimizer is about to make."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        fused = all(group.get("fused") for group in optimizer.param_groups)
        if self.guard is None or self._guarded is not optimizer:
            target: Any = optimizer if fused else _TakesTheDecision()
            self.guard, self._guarded = NonFiniteGuard(target, self.aligner), optimizer
        norm = torch.stack(torch._foreach_norm([p.grad for p in parameters])).float().sum()
        skipped = self.guard.check([norm])
        in_all, in_a_row = self.counts(norm.device).values()
        self._counts = torch.stack([in_all + skipped, (in_a_row + 1) * skipped])
        if not fused and skipped.item():
            for parameter in parameters:  # a parameter without a gradient is not stepped, and keeps its moments
                parameter.grad = None

    def counts(self, device: torch.device) -> dict[str, Tensor]:
        """Steps left out so far: log name to 0-dim tensor."""
        if self._counts is None:
            self._counts = torch.zeros(2, device=device)
        return dict(zip((SKIPPED, IN_A_ROW), self._counts, strict=True))

    def after(self) -> None:
        """Remembers the aligner's statistics, as the next forward pass will find them."""
        if self.guard is not None:
            self.guard.keep()


class _TakesTheDecision:
    """What ``NonFiniteGuard`` tells in place of an optimizer that could not act on it."""

    param_groups = ({"fused": True},)


def make_fused(optimizer: torch.optim.Optimizer) -> None:
    """Makes the step one kernel, as ``fused_optimizer`` asks."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            continue
        group["fused"] = True
        for parameter in group["params"]:
            if "step" in (state := optimizer.state.get(parameter, {})):  # of a checkpoint that was not fused
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)


def check_skipped(values: dict[str, float], limit: int) -> None:
    """Takes the count of steps in a row out of the log's values, and ends a run that leaves out step after step.

    Raises:
        NonFiniteError: more than ``limit`` in a row.
    """
    in_a_row = values.pop(IN_A_ROW, 0)
    if in_a_row <= limit:
        return
    named = [name for name, value in values.items() if value != value or (name == "vrpo/nonfinite" and value)]
    raise NonFiniteError(
        "gradients",
        expected=f"at most {limit} optimizer steps in a row that are not finite (max_skipped_steps)",
        got=f"{in_a_row:.0f}; not finite in the last batch: {', '.join(named) or 'none of our metrics'}",
        do="The weights are those before the first of them. Go on from the last checkpoint with a lower learning "
        "rate, fp32, or without the data that does this.",
    )

"""Optimizer steps of a host that are not finite are left out, without waiting for the device."""

from collections.abc import Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vrpo_plugin.errors import NonFiniteError, explain
from vrpo_plugin.modules.guard import NonFiniteGuard
from vrpo_plugin.patching.handle import Seam

if TYPE_CHECKING:
    from vrpo_plugin.hosts.session import Session

SKIPPED, IN_A_ROW = "vrpo/skipped", "vrpo/skipped_in_a_row"


class HostGuard:
    """Guards the AdamW that holds the aligner; counts on the device what it leaves out."""

    def __init__(self) -> None:
        self.aligner = torch.nn.Module()  # of the model that was made last
        self.guard: NonFiniteGuard | None = None
        self._counts: Tensor | None = None  # of steps left out: in all, and in a row

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Decides about the step that the optimizer is about to make."""
        use_fused(optimizer)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        norm = torch.stack(torch._foreach_norm(gradients)).float().sum()
        if self.guard is None or self.guard.optimizer is not optimizer:
            self.guard = NonFiniteGuard(optimizer, self.aligner)
        skipped = self.guard.check([norm])
        in_all, in_a_row = self.counts(norm.device).values()
        self._counts = torch.stack([in_all + skipped, (in_a_row + 1) * skipped])

    def counts(self, device: torch.device) -> dict[str, Tensor]:
        """Steps left out so far: log name to 0-dim tensor."""
        if self._counts is None:
            self._counts = torch.zeros(2, device=device)
        return dict(zip((SKIPPED, IN_A_ROW), self._counts, strict=True))

    def after(self) -> None:
        """Remembers the aligner's statistics, as the next forward pass will find them."""
        if self.guard is not None:
            self.guard.keep()


def use_fused(optimizer: torch.optim.Optimizer) -> None:
    """Makes the step one kernel, which can leave it out on the device. The host has not asked for another kind."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            continue
        group["fused"] = True
        for parameter in group["params"]:
            if "step" in (state := optimizer.state.get(parameter, {})):  # of a checkpoint without the plugin
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)


def guarded_step(session: "Session") -> Sequence[Seam]:
    """``AdamW.step``, where it updates the aligner; every other optimizer of the process steps as it did."""
    if session.idle or not session.options.max_skipped_steps:
        return []
    # Torch replaces the method of a class when it makes its first instance: before us, so that we are on top.
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])

    def wrap(original: Any) -> Any:
        @wraps(original)
        def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            if not session.owns(self):
                return original(self, *args, **kwargs)
            session.guard.before(self)
            result = original(self, *args, **kwargs)
            session.guard.after()
            return result

        return step

    return [Seam(torch.optim.AdamW, "step", wrap, "torch.optim.AdamW.step")]


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
        explain(
            "gradients",
            expected=f"at most {limit} optimizer steps in a row that are not finite (max_skipped_steps)",
            got=f"{in_a_row:.0f}; not finite in the last batch: {', '.join(named) or 'none of our metrics'}",
            do="The weights are those before the first of them. Go on from the last checkpoint with a lower learning "
            "rate, fp32, or without the data that does this.",
        )
    )

"""Leaving out a training step that is not finite, without asking the device."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.modules.standstill import ZeroGradients


class NonFiniteGuard:
    """Leaves out the optimizer steps that are not finite; weights, moments and statistics stay as they are.

    Warns once where all gradients are zero for 100 steps.

    The decision is made on the device, so nothing waits for it, and over all processes, so that they stay alike. Call
    :meth:`keep` before the forward pass, :meth:`check` between clipping and ``optimizer.step()``.

    Args:
        optimizer: made with ``fused=True``: only a fused step can be left out on the device.
        model: its buffers are those that a forward pass changes, and that a step left out must not have changed.
        scaler: of fp16 training; it is told of the decision.

    Raises:
        ConfigError: the optimizer is not fused.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, *, scaler: torch.amp.GradScaler | None = None) -> None:
        if not all(group.get("fused") for group in optimizer.param_groups):
            raise ConfigError(
                "optimizer", expected="a fused one", got=type(optimizer).__name__, do="Pass fused=True to it."
            )
        self.optimizer, self.model, self.scaler = optimizer, model, scaler
        self.kept: list[Tensor] = []
        self._zero = ZeroGradients()

    def keep(self) -> None:
        """Remembers the buffers."""
        self.kept = [buffer.clone() for buffer in self.model.buffers()]

    @torch.no_grad()
    def check(self, norms: Iterable[Tensor], counts: Iterable[Tensor] = ()) -> Tensor:
        """Decides about the step that follows, and puts the buffers back if it is left out.

        Args:
            norms: gradient norms (0-dim) of all that the optimizer updates; under ``scaler`` after unscaling.
            counts: numbers (0-dim) of samples that were not finite, where the loss has left them out already.

        Returns:
            0-dim float32, 1 where the step is left out, else 0; the same on all processes.
        """
        norms = [norm.detach() for norm in norms]
        self._zero.add(torch.stack(norms))
        sound = torch.stack([torch.isfinite(norm) for norm in norms] + [count == 0 for count in counts])
        skipped = 1 - sound.all().float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(skipped, op=dist.ReduceOp.MAX)
        # Looked up again: compiled code gives the model new buffers.
        for buffer, kept in zip(self.model.buffers() if self.kept else (), self.kept, strict=True):
            buffer.copy_(torch.where(skipped > 0, kept, buffer))
        if self.scaler is None:
            self.optimizer.found_inf = skipped  # type: ignore[attr-defined]  # what a scaler hands to a fused step
        else:
            for found in self.scaler._found_inf_per_device(self.optimizer).values():
                found.copy_(torch.maximum(found, skipped))
        return skipped

"""The newest metrics of a run, and the lines of text that say them."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vrpo_plugin.hosts.guard import HostGuard, check_skipped
from vrpo_plugin.modules.collapse import describe_collapse

logger = logging.getLogger("vrpo_plugin")


class Tracker:
    """The newest metrics, copied to the host without waiting for the device.

    Args:
        log_every: calls between lines of text; 0 writes none.
        guard: its counts are logged with them.
        max_skipped_steps: in a row; more end the run.
    """

    def __init__(self, log_every: int = 0, guard: HostGuard | None = None, max_skipped_steps: int = 0) -> None:
        self.log_every, self.calls = log_every, 0
        self.guard, self.max_skipped_steps = guard, max_skipped_steps
        self._names: tuple[str, ...] = ()
        self._values: Tensor | None = None
        self._copied: Any = None
        self._kept: Mapping[str, Tensor] | None = None
        self._warned = False

    def keep(self, metrics: Mapping[str, Tensor]) -> None:
        """As :meth:`record`, for compiled code: nothing is done with them before they are asked for."""
        self._kept = metrics

    def record(self, metrics: Mapping[str, Tensor]) -> None:
        """Keeps the metrics of one call."""
        if not metrics:  # nothing is measured: no features, no reward
            return
        if self.max_skipped_steps and self.guard is not None:
            metrics = {**metrics, **self.guard.counts(next(iter(metrics.values())).device)}
        if self.log_every and self.calls and self.calls % self.log_every == 0 and is_main_process():
            text = ", ".join(f"{name.removeprefix('vrpo/')}: {value:.4f}" for name, value in self.latest().items())
            logger.info("vrpo (call=%07d) %s", self.calls, text)  # the call before this one: it is long done
        self.calls += 1
        self._names = tuple(metrics)
        packed = torch.stack([value.detach().float() for value in metrics.values()])
        if not packed.is_cuda:
            self._values = packed
            return
        if self._values is None or self._values.shape != packed.shape:
            self._values = torch.empty(packed.shape, pin_memory=True)
            self._copied = torch.cuda.Event()
        self._values.copy_(packed, non_blocking=True)
        self._copied.record()

    def latest(self) -> dict[str, float]:
        """Log name to value, of this process; the copy is over where the host has waited for its own loss."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            self.record(kept)
        if self._values is None:
            return {}
        if self._copied is not None:
            self._copied.synchronize()
        values = dict(zip(self._names, self._values.tolist(), strict=True))
        check_skipped(values, self.max_skipped_steps)
        if values.get("vrpo/fallback") and not self._warned:
            self._warned = True
            logger.warning("vrpo_plugin: %s", describe_collapse(values["vrpo/fallback"]))
        return values


def is_main_process() -> bool:
    """Of the processes that torchrun or accelerate launched, the first."""
    return int(os.environ.get("RANK", "0")) == 0

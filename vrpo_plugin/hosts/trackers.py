"""Our metrics beside the host's own, in the host's own tracker."""

import importlib
from collections.abc import Sequence
from functools import wraps
from typing import Any

from vrpo_plugin.hosts.session import Session
from vrpo_plugin.patching.handle import Seam


def accelerate_log(session: Session) -> Sequence[Seam]:
    """``Accelerator.log``: where the host logs its losses, ours go with them."""
    from accelerate import Accelerator

    def wrap(original: Any) -> Any:
        @wraps(original)
        def log(self: Any, values: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if session.spec.log_key in values:
                values = {**values, **session.tracker.latest()}
            return original(self, values, *args, **kwargs)

        return log

    return [Seam(Accelerator, "log", wrap, "accelerate.Accelerator.log")]


def wandb_utils_log(session: Session) -> Sequence[Seam]:
    """SiT's ``wandb_utils.log``, which it calls with ``--wandb``."""
    try:
        module = importlib.import_module("wandb_utils")
    except ModuleNotFoundError:  # wandb itself is missing: the host's own import says so
        return []

    def wrap(original: Any) -> Any:
        @wraps(original)
        def log(stats: dict[str, Any], step: int | None = None) -> Any:
            return original({**stats, **session.tracker.latest()}, step)

        return log

    return [Seam(module, "log", wrap, "wandb_utils.log")]


def tensorboard_log(session: Session) -> Sequence[Seam]:
    """LightningDiT's ``SummaryWriter.add_scalar``."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return []

    def wrap(original: Any) -> Any:
        @wraps(original)
        def add_scalar(self: Any, tag: str, scalar_value: Any, global_step: Any = None, *args: Any, **kw: Any) -> Any:
            if tag == "Loss/train":
                for name, value in session.tracker.latest().items():
                    original(self, name, value, global_step)
            return original(self, tag, scalar_value, global_step, *args, **kw)

        return add_scalar

    return [Seam(SummaryWriter, "add_scalar", wrap, "torch.utils.tensorboard.SummaryWriter.add_scalar")]

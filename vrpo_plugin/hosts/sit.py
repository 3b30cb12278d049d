"""SiT. Facts: willisma/SiT@947f95b. Its time runs from noise (0) to data (1)."""

import importlib
from collections.abc import Sequence
from functools import wraps
from typing import Any

from vrpo_plugin.hosts import compat, transport
from vrpo_plugin.hosts.base import HostSpec, Note, Session, apply_line, point
from vrpo_plugin.hosts.libraries import VAE
from vrpo_plugin.patching.handle import Seam
from vrpo_plugin.patching.source import Insertion


def seams(session: Session) -> Sequence[Seam]:
    """``wandb_utils.log``, which the script calls with ``--wandb``: our metrics go with the host's."""
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


SIT = HostSpec(
    name="sit",
    repository="willisma/SiT",
    model=point(
        "models.py",
        "SiT.forward",
        "self x t y",
        {"947f95b": "01edc3e2e1a184cdcc4525d473164533443550b0e0c735df008aab9a0620638d"},
    ),
    loss=point(
        "transport/transport.py",
        "Transport.training_losses",
        "self model x1 model_kwargs",
        {"947f95b": "9c68b113cc00390fcc19c60626ae1f87df497e99c7fa0753a506de5d29729423"},
    ),
    verified=(
        point(
            "models.py",
            "SiT.__init__",
            "self input_size patch_size in_channels hidden_size depth num_heads mlp_ratio class_dropout_prob "
            "num_classes learn_sigma",
            {"947f95b": "908aca500e6831cc779acac779d3db5a47a22a68c6b1eda62b39c873b6ac033f"},
        ),
        point(
            "wandb_utils.py",
            "log",
            "stats step",
            {"947f95b": "af3356bb157b5ac3ff5abbdf8aac80e6443a3f5d51eb623a60f0abae453cb3d6"},
        ),
    ),
    insertions=(Insertion("train.py", "import wandb_utils", apply_line("sit")),),
    encoder="pixels",
    before_loss=transport.before_loss,
    in_forward=transport.in_forward,
    after_loss=transport.after_loss,
    seams=seams,
    libraries=(VAE,),
    shims=(compat.RESUME, compat.WANDB_ENTITY, compat.FRESH_OPTIMIZER),
    notes=(
        Note(
            "train.py",
            "--ckpt is given: the optimizer is loaded before it exists",
            "Move the 'if args.ckpt is not None' block below 'opt = torch.optim.AdamW(...)'.",
            "train.py:158-164",
        ),
    ),
)

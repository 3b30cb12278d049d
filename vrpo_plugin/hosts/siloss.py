"""What REPA and its relatives share: their loss is ``SILoss``, and their time and velocity are this package's."""

import argparse
from collections.abc import Mapping
from typing import Any

from vrpo_plugin.hosts import compat
from vrpo_plugin.hosts.base import Aligned, Note, Session, point, sizes_of_model
from vrpo_plugin.hosts.libraries import ACCELERATE_LOG
from vrpo_plugin.patching.fingerprint import SourcePoint


def before_loss(session: Session, loss: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Latents, labels and encoder tokens of ``SILoss.__call__``."""
    images, z = arguments["images"], tuple(arguments["zs"])
    labels = (arguments["model_kwargs"] or {}).get("y")
    if session.replaces_features:
        # One token of one sample: the host's loop over samples is entered once, and its result dropped.
        encoders = z if session.targets is None else session.targets.dims
        arguments["zs"] = [images.new_zeros(1, 1, 1) for _ in encoders]
    return {"x0": images, "z": z, "y": labels, "path": loss.path_type}


def in_forward(inputs: Mapping[str, Any], x: Any, t: Any, output: Any) -> dict[str, Any]:
    """The model returns its velocity, and its projected tokens per encoder."""
    return {"x_t": x, "t": t, "velocity": output[0], "path": inputs["path"], "z_tilde": output[1]}


def show_to_loss(session: Session, output: Any) -> Any:
    """What the host's own cosine sees where it is replaced: see ``before_loss``."""
    if not session.replaces_features:
        return output
    return output[0], [z_tilde.new_zeros(1, 1, 1) for z_tilde in output[1]], *output[2:]


def after_loss(session: Session, loss: Any, result: Any, aligned: Aligned) -> Any:
    """The result's first entry is the denoising loss (B,), its second the alignment loss."""
    denoising, projection, *rest = result
    if aligned.features is not None:
        projection = aligned.features
    return aligned.add_to(denoising), projection, *rest


def sizes(model: Any) -> dict[str, Any]:
    """Sizes of a model that knows its encoders' dimensions."""
    return {**sizes_of_model(model), "target_dims": tuple(model.z_dims)}


def read_length(session: Session, arguments: argparse.Namespace) -> None:
    """``--max-train-steps``, for the schedules.

    The aligner counts its calls there: as many per step as gradients are accumulated.
    """
    steps, calls = getattr(arguments, "max_train_steps", None), getattr(arguments, "gradient_accumulation_steps", 1)
    if steps:
        session.total_calls = steps * calls
        session.earlier_calls = (getattr(arguments, "resume_step", None) or 0) * calls


def encoder_loader(fingerprints: Mapping[str, str]) -> SourcePoint:
    """``load_encoders`` of ``utils.py``: encoders, their types and architectures, which the script zips in its loop."""
    return point("utils.py", "load_encoders", "enc_type device resolution", fingerprints)


GRAD_NORM = Note(
    "train.py",
    "--gradient-accumulation-steps is above 1: UnboundLocalError for grad_norm at the first step",
    "Insert 'grad_norm = torch.zeros((), device=device)' before the training loop.",
    "train.py: grad_norm is read at every micro-step, and set where gradients are synchronised",
)
SHIMS = (compat.ONE_PROCESS, compat.RESUME, compat.REPORT_TO_NONE, compat.DYNAMO_EMA, compat.FRESH_OPTIMIZER)
SIT_SHIMS = (*SHIMS, compat.SIT_S, compat.QK_NORM)
SILOSS: dict[str, Any] = {
    "before_loss": before_loss,
    "in_forward": in_forward,
    "show_to_loss": show_to_loss,
    "after_loss": after_loss,
    "sizes": sizes,
    "read_arguments": read_length,
    "has_alignment_loss": True,
    "log_key": "proj_loss",
    "libraries": (ACCELERATE_LOG,),
}

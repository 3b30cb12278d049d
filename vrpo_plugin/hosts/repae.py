"""REPA-E, whose model computes its losses in its own forward.

Facts: End2End-Diffusion/REPA-E@3ad8046. Time and velocity are this package's. The model normalises its latents by a
batch norm first, so the clean latent is taken from that layer's output.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from vrpo_plugin.functional.interpolant import clean_estimate, noisy_sample
from vrpo_plugin.functional.tensors import add_gradient, promote
from vrpo_plugin.hosts import compat
from vrpo_plugin.hosts.base import HostSpec, Note, apply_line, point, sizes_of_repa_model
from vrpo_plugin.hosts.length import parsed_length
from vrpo_plugin.hosts.session import Session, made_before
from vrpo_plugin.hosts.trackers import accelerate_log
from vrpo_plugin.modules.taps import Tap
from vrpo_plugin.patching.handle import Seam
from vrpo_plugin.patching.source import Insertion


def forward_with_losses(session: Session, original: Callable[..., Any], model: Any, arguments: dict[str, Any]) -> Any:
    """The host's forward; the VAE's alignment pass (``align_only``, the model frozen) is the host's own."""
    if arguments["loss_kwargs"]["align_only"] or not torch.is_grad_enabled():
        return original(model, **arguments)
    if not hasattr(model, "vrpo"):
        raise made_before(session.spec)
    z, tap = tuple(arguments["zs"]), model.vrpo.latent_tap
    if session.replaces_features:
        # One token of one sample: the host's loop over samples is entered once, and its result dropped.
        arguments["zs"] = [target.new_zeros(1, 1, 1) for target in z]
    tap.armed = True
    output = original(model, **arguments)
    x0, tap.hidden = tap.hidden, None
    t, path_type = output["time_input"].flatten(), arguments["loss_kwargs"]["path_type"]
    x_t, _ = noisy_sample(x0, output["noises"], t, path_type)
    inputs = {"x0": x0, "z": z, "y": arguments["y"], "path_type": path_type}
    aligned = session.align(model, inputs, x_t, t, output)
    if aligned.features is not None:
        output["proj_loss"] = aligned.features
    output["denoising_loss"] = add_gradient(output["denoising_loss"], aligned.extra)
    session.tracker.keep(aligned.metrics)
    return output


def convert_output(inputs: Mapping[str, Any], x: Tensor, t: Tensor, output: Any) -> dict[str, Any]:
    """The output holds the velocity and the projected tokens."""
    x0_hat = clean_estimate(promote(x), promote(output["model_output"]), promote(t), inputs["path_type"])
    return {"x_t": x, "t": promote(t), "x0_hat": x0_hat, "z_tilde": output["zs_tilde"]}


def tap_latents(session: Session, model: Any) -> None:
    """Keeps what the model's batch norm gives: the clean latent in the units that it is denoised in."""
    model.vrpo.latent_tap = Tap()
    model.bn.register_forward_hook(model.vrpo.latent_tap.capture)


def _seams(session: Session) -> Sequence[Seam]:
    def wrap(original: Any) -> Any:
        convert = original.__func__

        @wraps(convert)
        def convert_sync_batchnorm(cls: type, module: nn.Module, process_group: Any = None) -> nn.Module:
            # It makes new layers, and does not hand the hooks on.
            tap = getattr(getattr(module, "vrpo", None), "latent_tap", None)
            converted = convert(cls, module, process_group)
            if tap is not None and tap.capture not in converted.bn._forward_hooks.values():
                converted.bn.register_forward_hook(tap.capture)
            return converted

        return classmethod(convert_sync_batchnorm)

    label = "torch.nn.SyncBatchNorm.convert_sync_batchnorm"
    return [
        *accelerate_log(session),
        *parsed_length(session),
        Seam(nn.SyncBatchNorm, "convert_sync_batchnorm", wrap, label),
    ]


REPAE = HostSpec(
    name="repae",
    repository="End2End-Diffusion/REPA-E",
    model=point(
        "models/sit.py",
        "SiT.forward",
        "self x y zs loss_kwargs time_input noises",
        {"3ad8046": "3646870779e23c7d0985ce08dc34d18c781715dad635ae03a7bdbba654fbcb27"},
    ),
    loss=None,
    points=(
        point(
            "models/sit.py",
            "SiT.__init__",
            "self path_type input_size patch_size in_channels hidden_size decoder_hidden_size encoder_depth depth "
            "num_heads mlp_ratio class_dropout_prob num_classes z_dims projector_dim bn_momentum **block_kwargs",
            {"3ad8046": "6ff3ed656244a1281ae85524b1070771bbcf8ed635cdc55495d67e49456ecf0d"},
        ),
    ),
    files=("train_repae.py", "train_ldm_only.py", "models/sit.py"),
    insertions=(
        Insertion(
            "train_repae.py",
            "from models.sit import SiT_models",
            apply_line("repae"),
            {"3ad8046": "4f25cd3b682fb03148f37932634be1933f04e8d2"},
        ),
        Insertion(
            "train_ldm_only.py",
            "from models.sit import SiT_models",
            apply_line("repae"),
            {"3ad8046": "4f5b78fbcf9d5dbaf137ede72ea72d3987c99a51"},
        ),
    ),
    projects=True,
    log_key="proj_loss",
    sizes=sizes_of_repa_model,
    convert=convert_output,
    forward=forward_with_losses,
    installed=tap_latents,
    seams=_seams,
    shims=(
        compat.RESUME,
        compat.SIT_S,
        compat.QK_NORM,
        compat.REPORT_TO_NONE,
        compat.CONT_DIR,
        compat.FRESH_OPTIMIZER,
    ),
    notes=(
        Note(
            "train_repae.py",
            "--gradient-accumulation-steps is above 1: the norms of gradients are logged before they are set",
            "Insert 'grad_norm_sit = grad_norm_vae = grad_norm_disc = torch.zeros((), device=device)' before the loop.",
            "train_repae.py: as REPA's train.py:368",
        ),
    ),
)

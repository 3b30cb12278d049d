"""REPA-E, whose model computes its losses in its own forward. Facts: End2End-Diffusion/REPA-E@3ad8046.

Time and velocity are this package's. The model normalises its latents by a batch norm first, so the clean latent is
taken from that layer's output.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from vrpo_plugin.hosts import compat, siloss
from vrpo_plugin.hosts.base import Aligned, HostSpec, Note, Session, apply_line, point
from vrpo_plugin.hosts.libraries import ACCELERATE_LOG
from vrpo_plugin.patching.handle import Seam
from vrpo_plugin.patching.source import Insertion


def own_forward(
    session: Session,
    align: Callable[..., Aligned],
    original: Callable[..., Any],
    model: Any,
    arguments: dict[str, Any],
) -> Any:
    """The host's forward; the VAE's alignment pass (``align_only``, the model frozen) is the host's own."""
    if arguments["loss_kwargs"]["align_only"]:
        return original(model, **arguments)
    z, tap = tuple(arguments["zs"]), getattr(getattr(model, "vrpo", None), "latent_tap", None)
    if session.replaces_features:
        # One token of one sample: the host's loop over samples is entered once, and its result dropped.
        arguments["zs"] = [target.new_zeros(1, 1, 1) for target in z]
    if tap is not None:
        tap.armed = True
    output = original(model, **arguments)
    inputs = {"z": z, "y": arguments["y"], "noise": output["noises"], "path": arguments["loss_kwargs"]["path_type"]}
    if tap is not None:
        inputs["x0"], tap.hidden = tap.hidden, None
    aligned = align(model, inputs, output["time_input"].flatten(), output)
    if aligned.features is not None:
        output["proj_loss"] = aligned.features
    output["denoising_loss"] = aligned.add_to(output["denoising_loss"])
    session.tracker.keep(aligned.metrics)
    return output


def in_forward(inputs: Mapping[str, Any], x: Any, t: Any, output: Any) -> dict[str, Any]:
    """The output holds the velocity and the projected tokens."""
    fields = {"velocity": output["model_output"], "z_tilde": output["zs_tilde"]}
    return {"x_t": x, "t": t, "path": inputs["path"], **fields}


def after_init(session: Session, model: Any) -> None:
    """Keeps what the model's batch norm gives: the clean latent in the units that it is denoised in."""
    from vrpo_plugin.modules.taps import Tap

    model.vrpo.latent_tap = Tap()
    model.bn.register_forward_hook(model.vrpo.latent_tap.capture)


def seams(session: Session) -> Sequence[Seam]:
    """``SiT.add_module``: SyncBatchNorm's conversion puts a new layer there, and does not hand the hooks on."""

    def wrap(original: Any) -> Any:
        @wraps(original)
        def add_module(self: Any, name: str, module: Any) -> None:
            original(self, name, module)
            tap = getattr(getattr(self, "vrpo", None), "latent_tap", None)
            if name == "bn" and tap is not None and tap.capture not in module._forward_hooks.values():
                module.register_forward_hook(tap.capture)

        return add_module

    return [Seam(session.model_class, "add_module", wrap, "SiT.add_module")]


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
    verified=(
        point(
            "models/sit.py",
            "SiT.__init__",
            "self path_type input_size patch_size in_channels hidden_size decoder_hidden_size encoder_depth depth "
            "num_heads mlp_ratio class_dropout_prob num_classes z_dims projector_dim bn_momentum **block_kwargs",
            {"3ad8046": "6ff3ed656244a1281ae85524b1070771bbcf8ed635cdc55495d67e49456ecf0d"},
        ),
    ),
    insertions=tuple(
        Insertion(script, "from models.sit import SiT_models", apply_line("repae"))
        for script in ("train_repae.py", "train_ldm_only.py")
    ),
    has_alignment_loss=True,
    needs_encoder="its VAE is aligned with the encoder, and a critic is trained for one VAE",
    log_key="proj_loss",
    sizes=siloss.sizes,
    in_forward=in_forward,
    own_forward=own_forward,
    after_init=after_init,
    read_arguments=siloss.read_length,
    seams=seams,
    libraries=(ACCELERATE_LOG,),
    shims=(
        *(compat.RESUME, compat.SIT_S, compat.QK_NORM),
        *(compat.REPORT_TO_NONE, compat.CONT_DIR, compat.FRESH_OPTIMIZER),
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

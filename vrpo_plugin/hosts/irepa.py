"""iREPA's ``ldm/train.py``, whose loss has a registry of alignment losses. Facts: End2End-Diffusion/iREPA@99ad4ac."""

import argparse
from typing import Any

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.hosts import compat, siloss
from vrpo_plugin.hosts.base import Aligned, HostSpec, Session, apply_line, point
from vrpo_plugin.hosts.siloss import GRAD_NORM, SILOSS, SIT_SHIMS
from vrpo_plugin.patching.source import Insertion


def read_arguments(session: Session, arguments: argparse.Namespace) -> None:
    """The run's length; and its encoders, which iREPA loads with ``--repa-loss`` only."""
    siloss.read_length(session, arguments)
    if not session.idle and getattr(arguments, "repa_loss", None) is False:
        raise ConfigError(
            "irepa",
            expected="--repa-loss, without which the script loads no encoder and no images",
            got="a command line without it",
            do="Add --repa-loss behind the script; or train without VRPO: reward_coeff=0 features=host.",
        )


def before_loss(session: Session, loss: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """As REPA's; its registry's other losses would be lost with the cosine."""
    others = sorted({*loss.projection_loss_type} - {"cosine"})
    if session.replaces_features and others:
        raise ConfigError(
            "features",
            expected="'host', which keeps iREPA's own projection losses",
            got=f"{session.config.features!r} with --projection-loss-type {', '.join(others)}",
            do="Set features=host (VRPO_FEATURES=host), or train with cosine alone.",
        )
    return siloss.before_loss(session, loss, arguments)


def after_loss(session: Session, loss: Any, result: Any, aligned: Aligned) -> Any:
    """iREPA weighs its alignment losses itself, and logs them by name as plain numbers."""
    denoising, projection, logged = siloss.after_loss(session, loss, result, aligned)
    if aligned.features is not None:
        value, weight = aligned.features.item(), sum(loss.proj_coeff)
        projection = weight * projection
        logged = {**logged, "cosine": value, "cosine_weighted": weight * value}
    return denoising, projection, logged


IREPA = HostSpec(
    name="irepa",
    repository="End2End-Diffusion/iREPA",
    model=point(
        "models/sit.py",
        "SiT.forward",
        "self x t y return_logvar",
        {"99ad4ac": "dfc172c1289ca0f2915737ca8e151678b30c1110f7b555817941eddf81c3f0ef"},
    ),
    loss=point(
        "loss.py",
        "SILoss.__call__",
        "self model images model_kwargs zs",
        {"99ad4ac": "bff967a5153615dabc4d42934102af76bd77556b6dee8e99f03054831d74d21d"},
    ),
    verified=(
        point(
            "models/sit.py",
            "SiT.__init__",
            "self path_type input_size patch_size in_channels hidden_size decoder_hidden_size encoder_depth depth "
            "num_heads mlp_ratio class_dropout_prob num_classes use_cfg z_dims eval_mode projector_dim "
            "projection_layer_type proj_kwargs_kernel_size old_projector_version **block_kwargs",
            {"99ad4ac": "5ab75bab9b6f80c855580ba59eaa1ef1c374a00e0aab0e155c2e88d48d86b61c"},
        ),
    ),
    folder="ldm",
    needs_encoder="its script normalises its encoder's tokens step by step",
    insertions=(Insertion("train.py", "from loss import SILoss", apply_line("irepa")),),
    notes=(GRAD_NORM,),
    shims=(*SIT_SHIMS, compat.NUM_CLASSES),
    **{**SILOSS, "before_loss": before_loss, "after_loss": after_loss, "read_arguments": read_arguments},
)

"""The aligner in a host's model: made when the model is, called when the model is."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vrpo_plugin.errors import CheckpointError
from vrpo_plugin.functional.interpolant import noisy_sample
from vrpo_plugin.hosts.aligner import HostAligner
from vrpo_plugin.hosts.base import Aligned, Session
from vrpo_plugin.hosts.no_encoder import check_not_loaded
from vrpo_plugin.hosts.pixels import load_pixel_targets, of_latents
from vrpo_plugin.hosts.units import to_aligner

logger = logging.getLogger("vrpo_plugin")


def install(session: Session, model: nn.Module) -> None:
    """Makes the aligner of a model that its constructor has just finished."""
    spec, config = session.spec, session.config
    if session.idle:
        model.register_load_state_dict_pre_hook(_refuse_aligner)
        return
    if spec.has_alignment_loss:
        config = replace(config, proj_coeff=0.0)
    if session.total_calls is not None:
        config = config.for_run(session.total_calls)
    check_not_loaded(session)
    sizes = spec.sizes(model)
    if spec.encoder == "pixels":
        if session.targets is None:
            session.targets = load_pixel_targets(session.options, sizes["latent_shape"])
        session.targets = of_latents(session.targets, sizes["latent_shape"])
    if session.targets is not None:
        sizes |= {"target_dims": session.targets.dims, "token_grid": session.targets.grid}
        if config.critic_checkpoint is not None:
            sizes["critic_purpose"] = session.targets.critic_purpose()
    aligner = HostAligner(
        **sizes,
        own_projectors=not session.uses_host_projectors,
        prefix_tokens=spec.prefix_tokens,
        config=config,
        earlier_calls=session.earlier_calls,
    )
    aligner.attach(model, getattr(model, spec.blocks))
    if session.options.compile:
        aligner.compile(dynamic=False)
    session.guard.aligner = aligner
    session.model_parameters |= {id(parameter) for parameter in model.parameters()}
    session.aligner_parameters |= {id(parameter) for parameter in aligner.parameters()}
    spec.after_init(session, model)
    logger.info(
        "vrpo_plugin: %s: aligner with %s parameters, features=%s on blocks %s, rewards %s",
        spec.name,
        f"{sum(p.numel() for p in aligner.parameters()):,}",
        config.features,
        aligner.layers,
        config.rewards if config.reward_coeff else "none",
    )
    if spec.has_alignment_loss and session.replaces_features and not _trains_host_projectors(session):
        logger.warning(
            "vrpo_plugin: %s: the host's own projectors get no gradient with layers=%s, projector=%s, features=%s: in "
            "'model' and 'ema' they stay as they were initialised. Its sampling does not use them.",
            *(spec.name, config.layers, config.projector, config.features),
        )


def align(
    session: Session, model: Any, inputs: Mapping[str, Any], t: Tensor, output: Any, x: Tensor | None = None
) -> Aligned:
    """Calls the aligner of a model that has just given ``output``; runs inside the model's forward.

    Args:
        session: of the application.
        model: the host's, with its aligner.
        inputs: what ``before_loss`` returned.
        t: the host's time (B,).
        output: of the model.
        x: the noisy input; by default made of ``inputs``: ``x0``, ``noise`` and ``path``.
    """
    if x is None:
        x, _ = noisy_sample(inputs["x0"], inputs["noise"], t, inputs["path"])
    fields = to_aligner(session.spec.in_forward(inputs, x, t, output))
    z = None if session.encoder == "critic" else inputs["z"]
    out = model.vrpo(z, x0=inputs["x0"], y=inputs.get("y"), **fields)
    features, metrics = None, out.metrics
    if session.spec.has_alignment_loss and session.replaces_features:
        features = out.release * out.features_loss
        if "z_tilde" in fields and not _trains_host_projectors(session):
            # The host's projectors stay in the graph: DDP waits for the gradient of every parameter.
            features = features + 0 * sum(z[:1, :1].sum() for z in fields["z_tilde"])
    if "x0_hat" in fields:
        rms = fields["x0_hat"].detach().float().square().mean().sqrt()
        metrics = {**metrics, "vrpo/norm/x0_hat": rms}
    return Aligned(features, out.loss, metrics)


def _trains_host_projectors(session: Session) -> bool:
    return session.uses_host_projectors and session.config.features != "none"


def _refuse_aligner(module: Any, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Says what to do where torch would list unexpected keys."""
    if any(key.startswith(f"{prefix}vrpo.") for key in state_dict):
        raise CheckpointError(
            "the checkpoint",
            expected="one without an aligner, for these settings make none",
            got="one of a run with VRPO",
            do="Resume with that run's settings, or from a copy made by 'vrpo export CKPT OUT.pt'.",
        )

"""SiT and LightningDiT, whose loss is ``Transport.training_losses``.

Facts: willisma/SiT@947f95b, hustvl/LightningDiT@2725fed. Their time runs from noise (0) to data (1).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vrpo_plugin.functional.interpolant import (
    estimate_from_noise,
    estimate_from_velocity,
    noise_level,
    time_like,
)
from vrpo_plugin.functional.tensors import add_gradient, promote
from vrpo_plugin.hosts import compat
from vrpo_plugin.hosts.base import Aligned, HostSpec, Note, apply_line, point
from vrpo_plugin.hosts.pixels import pixel_seam, read_critic_targets, tokens_from_critic, tokens_from_pixels
from vrpo_plugin.hosts.session import Session
from vrpo_plugin.hosts.trackers import tensorboard_log, wandb_utils_log
from vrpo_plugin.patching.handle import Seam
from vrpo_plugin.patching.source import Insertion


def read_transport(session: Session, transport: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Latents and labels of ``training_losses``; the encoder's tokens are ours to make."""
    return _inputs(transport, arguments, tokens_from_pixels(session, arguments["x1"]))


def read_lightningdit(session: Session, transport: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """As SiT's, but no pixels are at hand: a critic trained beforehand says what the encoder sees in a latent."""
    return _inputs(transport, arguments, tokens_from_critic(arguments["model"], arguments["x1"]))


def _inputs(transport: Any, arguments: dict[str, Any], z: tuple[Tensor, ...]) -> dict[str, Any]:
    return {
        "x0": arguments["x1"],
        "z": z,
        "y": (arguments["model_kwargs"] or {}).get("y"),
        "prediction": transport.model_type.name.lower(),
        "path": transport.path_sampler,
    }


def convert_transport(inputs: Mapping[str, Any], x: Tensor, t: Tensor, output: Any) -> dict[str, Any]:
    """x0_hat by the host's own path, which gives coefficients and derivatives in the host's own time."""
    host_time, x_t, prediction = time_like(promote(t), x), promote(x), promote(output)
    alpha, alpha_dot = inputs["path"].compute_alpha_t(host_time)
    sigma, sigma_dot = inputs["path"].compute_sigma_t(host_time)
    if inputs["prediction"] == "velocity":
        x0_hat = estimate_from_velocity(x_t, prediction, alpha, sigma, alpha_dot, sigma_dot)
    else:
        noise_hat = prediction if inputs["prediction"] == "noise" else -sigma * prediction  # else the score
        x0_hat = estimate_from_noise(x_t, noise_hat, alpha, sigma)
    return {"x_t": x, "t": noise_level(alpha, sigma).flatten(), "x0_hat": x0_hat}


def write_terms(session: Session, loss: Any, result: Any, aligned: Aligned) -> Any:
    """The result is a mapping; its ``loss`` (B,) is what the host minimises the mean of."""
    return {**result, "loss": add_gradient(result["loss"], aligned.extra)}


def _sit_seams(session: Session) -> Sequence[Seam]:
    return [*pixel_seam(session), *wandb_utils_log(session)]


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
    points=(
        point(
            "models.py",
            "SiT.__init__",
            "self input_size patch_size in_channels hidden_size depth num_heads mlp_ratio class_dropout_prob "
            "num_classes learn_sigma",
            {"947f95b": "908aca500e6831cc779acac779d3db5a47a22a68c6b1eda62b39c873b6ac033f"},
        ),
    ),
    files=("train.py", "models.py", "transport/transport.py", "wandb_utils.py"),
    insertions=(
        Insertion(
            "train.py",
            "import wandb_utils",
            apply_line("sit"),
            {"947f95b": "1c7914ea6c3f5b42160899ded8b321c27551db04"},
        ),
    ),
    needs_encoder=True,
    read=read_transport,
    convert=convert_transport,
    write=write_terms,
    seams=_sit_seams,
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


def _lightningdit_seams(session: Session) -> Sequence[Seam]:
    if not session.idle:
        session.targets = read_critic_targets(session.config, session.spec.name)
    return tensorboard_log(session)


LIGHTNINGDIT = HostSpec(
    name="lightningdit",
    repository="hustvl/LightningDiT",
    model=point(
        "models/lightningdit.py",
        "LightningDiT.forward",
        "self x t y",
        {"2725fed": "ebf7267cc171b39dc16540b971ef0c887cbcc4360d04c937d047ab439c9db1ed"},
    ),
    loss=point(
        "transport/transport.py",
        "Transport.training_losses",
        "self model x1 model_kwargs sp_timesteps shifted_mu",
        {"2725fed": "1d348b076dd287d016c24deff2553c0f1acbf7ca63df70959c3a6204872ea89e"},
    ),
    points=(
        point(
            "models/lightningdit.py",
            "LightningDiT.__init__",
            "self input_size patch_size in_channels hidden_size depth num_heads mlp_ratio class_dropout_prob "
            "num_classes learn_sigma use_qknorm use_swiglu use_rope use_rmsnorm wo_shift use_checkpoint",
            {"2725fed": "66dec7a176df0f079925375f0adceaddc5e5cad067dbd1cf40fc0a9ef5f80933"},
        ),
    ),
    files=("train.py", "models/lightningdit.py", "transport/transport.py"),
    insertions=(
        Insertion(
            "train.py",
            "from transport import create_transport, Sampler",
            apply_line("lightningdit"),
            {"2725fed": "a8a3158602210db9bb1993366140d1d97e62d5d8"},
        ),
    ),
    read=read_lightningdit,
    convert=convert_transport,
    write=write_terms,
    seams=_lightningdit_seams,
    shims=(compat.FRESH_OPTIMIZER,),
    notes=(
        Note(
            "configs/*.yaml",
            "features is 'policy' and model.use_checkpoint is true: reentrant checkpointing hides the hidden tokens",
            "Set model.use_checkpoint: false, or VRPO_FEATURES=none.",
            "models/lightningdit.py:409, use_reentrant=True",
        ),
    ),
)

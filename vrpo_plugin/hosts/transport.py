"""What SiT and LightningDiT share: their loss is ``Transport.training_losses``, and their time runs to the data."""

from collections.abc import Mapping
from typing import Any

from vrpo_plugin.hosts.base import Aligned, Session


def before_loss(session: Session, transport: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Latents and labels of ``training_losses``; the encoder's tokens are ours to make."""
    return {
        "x0": arguments["x1"],
        "y": (arguments["model_kwargs"] or {}).get("y"),
        "prediction": transport.model_type.name.lower(),  # velocity, noise or score
        "path": transport.path_sampler,
    }


def in_forward(inputs: Mapping[str, Any], x: Any, t: Any, output: Any) -> dict[str, Any]:
    """The host's own path gives coefficients and derivatives in the host's own time."""
    time = t.reshape(-1, *(1 for _ in x.shape[1:]))
    alpha, alpha_dot = inputs["path"].compute_alpha_t(time)
    sigma, sigma_dot = inputs["path"].compute_sigma_t(time)
    return {"x_t": x, "path": (alpha, sigma, alpha_dot, sigma_dot), inputs["prediction"]: output}


def after_loss(session: Session, loss: Any, result: Any, aligned: Aligned) -> Any:
    """The result is a mapping; its ``loss`` (B,) is what the host minimises the mean of."""
    return {**result, "loss": aligned.add_to(result["loss"])}

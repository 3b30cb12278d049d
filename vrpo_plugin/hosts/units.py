"""A prediction in a host's units, as keywords of the aligner."""

from typing import Any

from vrpo_plugin.functional.interpolant import (
    clean_estimate,
    estimate_from_noise,
    estimate_from_velocity,
    noise_level,
    time_like,
)
from vrpo_plugin.functional.tensors import promote


def to_aligner(fields: dict[str, Any]) -> dict[str, Any]:
    """Keywords of ``VRPOAligner.forward`` from what ``HostSpec.in_forward`` returned.

    Args:
        fields: those keywords; or, with ``path``, a prediction in other units, of which an ``x0_hat`` is made. ``path``
            is the name of one of this package's paths (with ``t`` and ``velocity``), or the host's own coefficients
            (alpha, sigma, and for a velocity their derivatives by the host's time; one number per sample), with one of
            ``velocity``, ``noise``, ``score`` or ``x0_hat``; ``t`` then follows from them.
    """
    if "path" not in fields:
        return fields
    path, x_t = fields["path"], promote(fields["x_t"])
    kept: dict[str, Any] = {key: fields[key] for key in ("x_t", "z_tilde") if key in fields}
    if isinstance(path, str):
        t = promote(fields["t"])
        return {**kept, "t": t, "x0_hat": clean_estimate(x_t, promote(fields["velocity"]), t, path)}  # type: ignore[arg-type]
    alpha, sigma = (time_like(promote(one), x_t) for one in path[:2])
    if "velocity" in fields:
        x0_hat = estimate_from_velocity(x_t, promote(fields["velocity"]), alpha, sigma, *path[2:])
    elif "x0_hat" in fields:
        x0_hat = promote(fields["x0_hat"])
    else:
        noise = promote(fields["noise"]) if "noise" in fields else -sigma * promote(fields["score"])
        x0_hat = estimate_from_noise(x_t, noise, alpha, sigma)
    return {**kept, "t": noise_level(alpha, sigma).flatten(), "x0_hat": x0_hat}

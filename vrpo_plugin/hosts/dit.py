"""DiT, whose loss is ``SpacedDiffusion.training_losses``.

Facts: facebookresearch/DiT@ed81ce2. Whole-number steps, 0 next to the data; the model predicts the noise, and in the
second half of its channels a variance.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vrpo_plugin.errors import ConfigError, explain
from vrpo_plugin.functional.interpolant import estimate_from_noise, noise_level, time_like
from vrpo_plugin.functional.tensors import promote
from vrpo_plugin.hosts import compat
from vrpo_plugin.hosts.base import HostSpec, apply_line, point
from vrpo_plugin.hosts.pixels import pixel_seam, tokens_from_pixels
from vrpo_plugin.hosts.session import Session
from vrpo_plugin.hosts.transport import write_terms
from vrpo_plugin.patching.source import Insertion


def read_diffusion(session: Session, diffusion: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Latents, steps and labels of ``training_losses(model, x_start, t, model_kwargs)``."""
    given = dict(zip(("x_start", "t", "model_kwargs"), arguments["args"], strict=False)) | arguments["kwargs"]
    x0, step = given["x_start"], given["t"]
    key = f"alphas_cumprod {x0.device}"
    if key not in session.cache:
        share = torch.from_numpy(diffusion.alphas_cumprod)  # float64: 1 - share loses digits at the first steps
        session.cache[key] = torch.stack([share.sqrt(), (1 - share).sqrt()]).float().to(x0.device)
    alpha, sigma = session.cache[key][:, step]
    return {
        "x0": x0,
        "z": tokens_from_pixels(session, x0),
        "y": (given.get("model_kwargs") or {}).get("y"),
        "alpha": alpha,
        "sigma": sigma,
        "prediction": _prediction(diffusion),
    }


def convert_diffusion(inputs: Mapping[str, Any], x: Tensor, t: Tensor, output: Any) -> dict[str, Any]:
    """x0_hat from the first half of the channels; the noise level instead of the step."""
    alpha, sigma = inputs["alpha"], inputs["sigma"]
    prediction = promote(output[:, : x.shape[1]])
    x0_hat = prediction
    if inputs["prediction"] == "epsilon":
        x0_hat = estimate_from_noise(promote(x), prediction, time_like(alpha, x), time_like(sigma, x))
    return {"x_t": x, "t": noise_level(alpha, sigma), "x0_hat": x0_hat}


def _prediction(diffusion: Any) -> str:
    name = diffusion.model_mean_type.name.lower()
    if name not in ("epsilon", "start_x"):
        do = "Use create_diffusion's defaults, or predict_xstart=True."
        raise ConfigError(explain("model_mean_type", expected="EPSILON or START_X", got=name.upper(), do=do))
    return name


DIT = HostSpec(
    name="dit",
    repository="facebookresearch/DiT",
    model=point(
        "models.py",
        "DiT.forward",
        "self x t y",
        {"ed81ce2": "971bf1d72a6ccadbeff605c595e356735641ad6ebd335ed8498c367b4cc2951b"},
    ),
    loss=point(
        "diffusion/respace.py",
        "SpacedDiffusion.training_losses",
        "self model *args **kwargs",
        {"ed81ce2": "d0907ba91474a84305731517622d4b506af6accb30e402b7e20864c82ba62ccb"},
    ),
    points=(
        point(
            "models.py",
            "DiT.__init__",
            "self input_size patch_size in_channels hidden_size depth num_heads mlp_ratio class_dropout_prob "
            "num_classes learn_sigma",
            {"ed81ce2": "d944f925a0918bce073b64464c162e6bd61af6a023370319682edcc5c82fd705"},
        ),
        point(
            "diffusion/gaussian_diffusion.py",
            "GaussianDiffusion.training_losses",
            "self model x_start t model_kwargs noise",
            {"ed81ce2": "7ee73ee8e7c1b8db507534f6e6cd8a9541d0d48ce65a13f996e3daa852580f5a"},
        ),
    ),
    files=("train.py", "models.py", "diffusion/respace.py", "diffusion/gaussian_diffusion.py"),
    insertions=(
        Insertion(
            "train.py",
            "from diffusers.models import AutoencoderKL",
            apply_line("dit"),
            {"ed81ce2": "7cfee8089bf569cbcdb525b543d93dab3b0a3be8"},
        ),
    ),
    needs_encoder=True,
    read=read_diffusion,
    convert=convert_diffusion,
    write=write_terms,
    seams=pixel_seam,
    shims=(compat.RESUME, compat.FRESH_OPTIMIZER),
)

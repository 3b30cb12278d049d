"""DiT, whose loss is ``SpacedDiffusion.training_losses``. Facts: facebookresearch/DiT@ed81ce2.

Whole-number steps, 0 next to the data; the model predicts the noise, and in the second half of its channels a variance.
"""

from collections.abc import Mapping
from typing import Any

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.hosts import compat, transport
from vrpo_plugin.hosts.base import HostSpec, Session, apply_line, point
from vrpo_plugin.hosts.libraries import VAE
from vrpo_plugin.patching.source import Insertion


def before_loss(session: Session, diffusion: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Latents, steps and labels of ``training_losses(model, x_start, t, model_kwargs)``."""
    import torch

    given = dict(zip(("x_start", "t", "model_kwargs"), arguments["args"], strict=False)) | arguments["kwargs"]
    x0, step = given["x_start"], given["t"]
    key = f"alphas_cumprod {x0.device}"
    if key not in session.cache:
        share = torch.from_numpy(diffusion.alphas_cumprod)  # float64: 1 - share loses digits at the first steps
        session.cache[key] = torch.stack([share.sqrt(), (1 - share).sqrt()]).float().to(x0.device)
    labels = (given.get("model_kwargs") or {}).get("y")
    return {"x0": x0, "y": labels, "path": session.cache[key][:, step].unbind(), "prediction": _prediction(diffusion)}


def in_forward(inputs: Mapping[str, Any], x: Any, t: Any, output: Any) -> dict[str, Any]:
    """The prediction is the first half of the channels; the path's coefficients stand for the step."""
    return {"x_t": x, "path": inputs["path"], inputs["prediction"]: output[:, : x.shape[1]]}


def _prediction(diffusion: Any) -> str:
    name = diffusion.model_mean_type.name
    if name not in ("EPSILON", "START_X"):
        do = "Use create_diffusion's defaults, or predict_xstart=True."
        raise ConfigError("model_mean_type", expected="EPSILON or START_X", got=name, do=do)
    return "noise" if name == "EPSILON" else "x0_hat"


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
    verified=(
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
    insertions=(Insertion("train.py", "from diffusers.models import AutoencoderKL", apply_line("dit")),),
    encoder="pixels",
    before_loss=before_loss,
    in_forward=in_forward,
    after_loss=transport.after_loss,
    libraries=(VAE,),
    shims=(compat.RESUME, compat.FRESH_OPTIMIZER),
)

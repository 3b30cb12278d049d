"""REPA and its relatives whose loss is ``SILoss``: REPA (SiT and MMDiT), REG, iREPA.

Facts: sihyun-yu/REPA@67f7145, Martinser/REG@021ea2e, End2End-Diffusion/iREPA@99ad4ac. Their time and velocity are
this package's: t = 0 is data, and the velocity points from data to noise.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vrpo_plugin.errors import ConfigError, explain
from vrpo_plugin.functional.interpolant import clean_estimate
from vrpo_plugin.functional.tensors import add_gradient, promote
from vrpo_plugin.hosts import compat
from vrpo_plugin.hosts.base import Aligned, HostSpec, Note, apply_line, point, sizes_of_repa_model
from vrpo_plugin.hosts.length import parsed_length
from vrpo_plugin.hosts.session import Session
from vrpo_plugin.hosts.trackers import accelerate_log
from vrpo_plugin.patching.handle import Seam
from vrpo_plugin.patching.source import Insertion


def read_siloss(session: Session, loss: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Latents, labels and encoder tokens of ``SILoss.__call__``."""
    images, z = arguments["images"], tuple(arguments["zs"])
    labels = (arguments["model_kwargs"] or {}).get("y")
    if session.replaces_features:
        # One token of one sample: the host's loop over samples is entered once, and its result dropped.
        arguments["zs"] = [images.new_zeros(1, 1, 1) for _ in z]
    return {"x0": images, "z": z, "y": labels, "path_type": loss.path_type}


def convert_siloss(inputs: Mapping[str, Any], x: Tensor, t: Tensor, output: Any) -> dict[str, Any]:
    """The model returns its velocity, and its projected tokens per encoder."""
    x0_hat = clean_estimate(promote(x), promote(output[0]), promote(t), inputs["path_type"])
    return {"x_t": x, "t": promote(t), "x0_hat": x0_hat, "z_tilde": output[1]}


def hide_projected(session: Session, output: Any) -> Any:
    """What the host's own cosine sees where it is replaced: see ``read_siloss``."""
    if not session.replaces_features:
        return output
    return output[0], [z_tilde.new_zeros(1, 1, 1) for z_tilde in output[1]], *output[2:]


def write_siloss(session: Session, loss: Any, result: Any, aligned: Aligned) -> Any:
    """The result's first entry is the denoising loss (B,), its second the alignment loss."""
    denoising, projection, *rest = result
    if aligned.features is not None:
        projection = aligned.features
    return add_gradient(denoising, aligned.extra), projection, *rest


def read_irepa(session: Session, loss: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """As REPA's; its registry's other losses would be lost with the cosine."""
    others = sorted({*loss.projection_loss_type} - {"cosine"})
    if session.replaces_features and others:
        raise ConfigError(
            explain(
                "features",
                expected="'host', which keeps iREPA's own projection losses",
                got=f"{session.config.features!r} with --projection-loss-type {', '.join(others)}",
                do="Set features=host (VRPO_FEATURES=host), or train with cosine alone.",
            )
        )
    return read_siloss(session, loss, arguments)


def write_irepa(session: Session, loss: Any, result: Any, aligned: Aligned) -> Any:
    """iREPA weighs its alignment losses itself."""
    denoising, projection, logged = write_siloss(session, loss, result, aligned)
    if aligned.features is not None:
        projection = sum(loss.proj_coeff) * projection
    return denoising, projection, logged


def sizes_of_mmdit(model: Any) -> dict[str, Any]:
    """Sizes of REPA's MMDiT, which calls its blocks otherwise and does not keep its encoders' dimensions."""
    return {
        "hidden_dim": model.pos_embed.shape[-1],
        "depth": len(model.joint_blocks),
        "latent_shape": (model.in_channels, *model.x_embedder.img_size),
        "encoder_depth": model.encoder_depth,
        "target_dims": tuple(projector[-1].out_features for projector in model.projectors),
    }


def _seams(session: Session) -> Sequence[Seam]:
    return [*accelerate_log(session), *parsed_length(session)]


_GRAD_NORM = Note(
    "train.py",
    "--gradient-accumulation-steps is above 1: UnboundLocalError for grad_norm at the first step",
    "Insert 'grad_norm = torch.zeros((), device=device)' before the training loop.",
    "train.py: grad_norm is read at every micro-step, and set where gradients are synchronised",
)
_ANY_SHIMS = (compat.ONE_PROCESS, compat.RESUME, compat.REPORT_TO_NONE, compat.DYNAMO_EMA, compat.FRESH_OPTIMIZER)
_SIT_SHIMS = (*_ANY_SHIMS, compat.SIT_S, compat.QK_NORM)
_SILOSS: dict[str, Any] = {
    "convert": convert_siloss,
    "hide": hide_projected,
    "sizes": sizes_of_repa_model,
    "projects": True,
    "log_key": "proj_loss",
    "seams": _seams,
}

_REPA_LOSS = point(
    "loss.py",
    "SILoss.__call__",
    "self model images model_kwargs zs",
    {"67f7145": "5f79f327f7be75e4bcbdd3722c04bd723d606269fad36a4a09f0145d361d7338"},
)

REPA = HostSpec(
    name="repa",
    repository="sihyun-yu/REPA",
    model=point(
        "models/sit.py",
        "SiT.forward",
        "self x t y return_logvar",
        {"67f7145": "e3ebb4f8abd9ee0e11439be1d46572df2c9bba0fa87b7c6187bb8aec43ace052"},
    ),
    loss=_REPA_LOSS,
    points=(
        point(
            "models/sit.py",
            "SiT.__init__",
            "self path_type input_size patch_size in_channels hidden_size decoder_hidden_size encoder_depth depth "
            "num_heads mlp_ratio class_dropout_prob num_classes use_cfg z_dims projector_dim **block_kwargs",
            {"67f7145": "6214bae1b08d5a7970e673460484068fe09ac548bf926fce6a0e13dd179eeca8"},
        ),
    ),
    files=("train.py", "loss.py", "models/sit.py", "models/mmdit.py"),
    insertions=(
        Insertion(
            "train.py",
            "from loss import SILoss",
            apply_line("repa"),
            {"67f7145": "2ab61e7e5267a7ea7cca465c9368a6f6b258e6a4"},
        ),
    ),
    read=read_siloss,
    write=write_siloss,
    notes=(_GRAD_NORM,),
    shims=(*_SIT_SHIMS, compat.NUM_CLASSES),
    **_SILOSS,
)

REPA_T2I = HostSpec(
    name="repa_t2i",
    repository="sihyun-yu/REPA",
    model=point(
        "models/mmdit.py",
        "MMDiT.forward",
        "self x t y context detach",
        {"67f7145": "0b15b89977af05e1a43912af843743831721a5a59a0c7a8c1672d6c832a823d2"},
    ),
    loss=_REPA_LOSS,
    points=(
        point(
            "models/mmdit.py",
            "MMDiT.__init__",
            "self input_size patch_size in_channels depth mlp_ratio learn_sigma adm_in_channels "
            "context_embedder_config register_length attn_mode rmsnorm scale_mod_only swiglu out_channels "
            "pos_embed_scaling_factor pos_embed_offset pos_embed_max_size num_patches qk_norm qkv_bias dtype device "
            "encoder_depth z_dims projector_dim",
            {"67f7145": "f3ce306d857fbac12a1cd1640fb78133be84a65d63413db5aa1bd2f2420df699"},
        ),
    ),
    files=("train_t2i.py", "loss.py", "models/mmdit.py"),
    insertions=(
        Insertion(
            "train_t2i.py",
            "from loss import SILoss",
            apply_line("repa_t2i"),
            {"67f7145": "9253de33e0599eeb818deccb2f3f18ee3fd46be1"},
        ),
    ),
    blocks="joint_blocks",
    read=read_siloss,
    write=write_siloss,
    notes=(
        Note(
            "train_t2i.py",
            "always: the data set gives three items, and the training loop unpacks four",
            "In the training loop, unpack 'raw_image, x, context' only.",
            "train_t2i.py:273 and dataset.py, MSCOCOFeatureDataset",
        ),
    ),
    shims=_ANY_SHIMS,
    **{**_SILOSS, "sizes": sizes_of_mmdit},
)

REG = HostSpec(
    name="reg",
    repository="Martinser/REG",
    model=point(
        "models/sit.py",
        "SiT.forward",
        "self x t y return_logvar cls_token",
        {"021ea2e": "1acb476f800862a170a6078c98126adbcd58548f2b2b90be0d8a7376604295f8"},
    ),
    loss=point(
        "loss.py",
        "SILoss.__call__",
        "self model images model_kwargs zs cls_token time_input noises",
        {"021ea2e": "8a2ad27c6b3a42d0e04615d2cd611ec635c12eaa061956d2d433ca2dbe03ca03"},
    ),
    points=(
        point(
            "models/sit.py",
            "SiT.__init__",
            "self path_type input_size patch_size in_channels hidden_size decoder_hidden_size encoder_depth depth "
            "num_heads mlp_ratio class_dropout_prob num_classes use_cfg z_dims projector_dim cls_token_dim "
            "**block_kwargs",
            {"021ea2e": "648bcb9dad08418e8e613b47f7b57fe0b91487a4d144e95561ff552bf0f378b3"},
        ),
    ),
    files=("train.py", "loss.py", "models/sit.py"),
    insertions=(
        Insertion(
            "train.py",
            "from loss import SILoss",
            apply_line("reg"),
            {"021ea2e": "081182169c8fc56a219fede206fdb1c57c5afddd"},
        ),
    ),
    prefix_tokens=1,
    read=read_siloss,
    write=write_siloss,
    notes=(_GRAD_NORM,),
    shims=_SIT_SHIMS,
    **_SILOSS,
)

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
    points=(
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
    files=("train.py", "loss.py", "projection_loss.py", "models/sit.py"),
    insertions=(
        Insertion(
            "train.py",
            "from loss import SILoss",
            apply_line("irepa"),
            {"99ad4ac": "5ae07f2e6a031e2c76ae9cd1d925bdaa982c65a8"},
        ),
    ),
    read=read_irepa,
    write=write_irepa,
    notes=(_GRAD_NORM,),
    shims=(*_SIT_SHIMS, compat.NUM_CLASSES),
    **_SILOSS,
)

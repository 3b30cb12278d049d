"""REPA's ``train_t2i.py``, on MMDiT. Facts: sihyun-yu/REPA@67f7145."""

from typing import Any

from vrpo_plugin.hosts.base import HostSpec, Note, apply_line, point
from vrpo_plugin.hosts.repa import LOADER, LOSS
from vrpo_plugin.hosts.siloss import SHIMS, SILOSS
from vrpo_plugin.patching.source import Insertion


def sizes(model: Any) -> dict[str, Any]:
    """Sizes of MMDiT, which calls its blocks otherwise and does not keep its encoders' dimensions."""
    return {
        "hidden_dim": model.pos_embed.shape[-1],
        "depth": len(model.joint_blocks),
        "latent_shape": (model.in_channels, *model.x_embedder.img_size),
        "encoder_depth": model.encoder_depth,
        "target_dims": tuple(projector[-1].out_features for projector in model.projectors),
    }


REPA_T2I = HostSpec(
    name="repa_t2i",
    repository="sihyun-yu/REPA",
    model=point(
        "models/mmdit.py",
        "MMDiT.forward",
        "self x t y context detach",
        {"67f7145": "0b15b89977af05e1a43912af843743831721a5a59a0c7a8c1672d6c832a823d2"},
    ),
    loss=LOSS,
    verified=(
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
    insertions=(Insertion("train_t2i.py", "from loss import SILoss", apply_line("repa_t2i")),),
    blocks="joint_blocks",
    encoder_loader=LOADER,
    notes=(
        Note(
            "train_t2i.py",
            "always: the data set gives three items, and the training loop unpacks four",
            "In the training loop, unpack 'raw_image, x, context' only.",
            "train_t2i.py:273 and dataset.py, MSCOCOFeatureDataset",
        ),
    ),
    shims=SHIMS,
    **{**SILOSS, "sizes": sizes},
)

"""REPA's ``train.py``. Facts: sihyun-yu/REPA@67f7145."""

from vrpo_plugin.hosts import compat
from vrpo_plugin.hosts.base import HostSpec, apply_line, point
from vrpo_plugin.hosts.siloss import GRAD_NORM, SILOSS, SIT_SHIMS, encoder_loader
from vrpo_plugin.patching.source import Insertion

LOSS = point(
    "loss.py",
    "SILoss.__call__",
    "self model images model_kwargs zs",
    {"67f7145": "5f79f327f7be75e4bcbdd3722c04bd723d606269fad36a4a09f0145d361d7338"},
)
LOADER = encoder_loader({"67f7145": "62570db621f4926fdf09fe50d8cb55c185892593d292c5111e0ef0a60756e1a2"})

REPA = HostSpec(
    name="repa",
    repository="sihyun-yu/REPA",
    model=point(
        "models/sit.py",
        "SiT.forward",
        "self x t y return_logvar",
        {"67f7145": "e3ebb4f8abd9ee0e11439be1d46572df2c9bba0fa87b7c6187bb8aec43ace052"},
    ),
    loss=LOSS,
    verified=(
        point(
            "models/sit.py",
            "SiT.__init__",
            "self path_type input_size patch_size in_channels hidden_size decoder_hidden_size encoder_depth depth "
            "num_heads mlp_ratio class_dropout_prob num_classes use_cfg z_dims projector_dim **block_kwargs",
            {"67f7145": "6214bae1b08d5a7970e673460484068fe09ac548bf926fce6a0e13dd179eeca8"},
        ),
    ),
    insertions=(Insertion("train.py", "from loss import SILoss", apply_line("repa")),),
    encoder_loader=LOADER,
    notes=(GRAD_NORM,),
    shims=(*SIT_SHIMS, compat.NUM_CLASSES),
    **SILOSS,
)

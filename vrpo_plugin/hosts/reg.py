"""REG, whose model has a class token before the others. Facts: Martinser/REG@021ea2e."""

from vrpo_plugin.hosts.base import HostSpec, apply_line, point
from vrpo_plugin.hosts.siloss import GRAD_NORM, SILOSS, SIT_SHIMS
from vrpo_plugin.patching.source import Insertion

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
    verified=(
        point(
            "models/sit.py",
            "SiT.__init__",
            "self path_type input_size patch_size in_channels hidden_size decoder_hidden_size encoder_depth depth "
            "num_heads mlp_ratio class_dropout_prob num_classes use_cfg z_dims projector_dim cls_token_dim "
            "**block_kwargs",
            {"021ea2e": "648bcb9dad08418e8e613b47f7b57fe0b91487a4d144e95561ff552bf0f378b3"},
        ),
    ),
    insertions=(Insertion("train.py", "from loss import SILoss", apply_line("reg")),),
    prefix_tokens=1,
    needs_encoder="its model generates the encoder's class token, which a critic does not predict",
    notes=(GRAD_NORM,),
    shims=SIT_SHIMS,
    **SILOSS,
)

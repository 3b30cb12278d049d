"""LightningDiT, which trains on latents without their images. Facts: hustvl/LightningDiT@2725fed.

Its time runs from noise (0) to data (1).
"""

from vrpo_plugin.hosts import compat, transport
from vrpo_plugin.hosts.base import HostSpec, Note, apply_line, point
from vrpo_plugin.hosts.libraries import TENSORBOARD
from vrpo_plugin.patching.source import Insertion

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
    verified=(
        point(
            "models/lightningdit.py",
            "LightningDiT.__init__",
            "self input_size patch_size in_channels hidden_size depth num_heads mlp_ratio class_dropout_prob "
            "num_classes learn_sigma use_qknorm use_swiglu use_rope use_rmsnorm wo_shift use_checkpoint",
            {"2725fed": "66dec7a176df0f079925375f0adceaddc5e5cad067dbd1cf40fc0a9ef5f80933"},
        ),
    ),
    insertions=(Insertion("train.py", "from transport import create_transport, Sampler", apply_line("lightningdit")),),
    encoder="critic",
    before_loss=transport.before_loss,
    in_forward=transport.in_forward,
    after_loss=transport.after_loss,
    libraries=(TENSORBOARD,),
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

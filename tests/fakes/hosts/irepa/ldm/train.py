"""Seams of End2End-Diffusion/iREPA, ldm/train.py."""

from fakes.hosts.accelerate_loop import parse_args, train
from loss import SILoss
from models.sit import SiT_models

PROJECTION_LOSS_TYPE, PROJ_COEFF = "cosine", "0.5"


def build(args, encoders, accelerator):
    model = SiT_models[args.model](
        num_classes=args.num_classes,
        z_dims=[encoder.embed_dim for encoder in encoders],
        encoder_depth=2,
        fused_attn=True,
        qk_norm=args.qk_norm,
    )
    return model, SILoss(
        path_type=args.path_type,
        accelerator=accelerator,
        projection_loss_type=PROJECTION_LOSS_TYPE,
        proj_coeff=PROJ_COEFF,
    )


def compute(loss_fn, model, x, y, zs, args):
    loss, proj_loss, _ = loss_fn(model, x, {"y": y}, zs=zs)
    loss_mean, proj_loss_mean = loss.mean(), proj_loss.mean()
    return loss_mean + proj_loss_mean, {"denoising_loss": loss_mean, "proj_loss": proj_loss_mean}


def main(args, watch=None):
    train(args, build=build, compute=compute, watch=watch)


if __name__ == "__main__":
    main(parse_args())

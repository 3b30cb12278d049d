"""Seams of Martinser/REG, train.py."""

import torch
from fakes.hosts.accelerate_loop import parse_args, train
from loss import SILoss
from models.sit import SiT_models


def build(args, encoders, accelerator):
    model = SiT_models[args.model](
        num_classes=args.num_classes,
        z_dims=[encoder.embed_dim for encoder in encoders],
        encoder_depth=2,
        fused_attn=True,
        qk_norm=args.qk_norm,
    )
    return model, SILoss(path_type=args.path_type, encoders=encoders, accelerator=accelerator)


def compute(loss_fn, model, x, y, zs, args):
    cls_token = zs[0].mean(1)
    zs = [torch.cat([z.mean(1, keepdim=True), z], 1) for z in zs]
    loss, proj_loss, _, _, cls_loss = loss_fn(model, x, {"y": y}, zs=zs, cls_token=cls_token)
    loss_mean, proj_loss_mean = loss.mean(), proj_loss.mean()
    total = loss_mean + proj_loss_mean * args.proj_coeff + cls_loss.mean() * 0.03
    return total, {"loss_final": total, "loss": loss_mean, "proj_loss": proj_loss_mean}


def main(args, watch=None):
    args.sampling_steps = 0  # no sampler here
    train(args, build=build, compute=compute, watch=watch, find_unused=True)


if __name__ == "__main__":
    main(parse_args())

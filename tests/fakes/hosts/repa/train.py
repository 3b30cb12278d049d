"""Seams of sihyun-yu/REPA, train.py."""

import json
import sys

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
    loss, proj_loss = loss_fn(model, x, {"y": y}, zs=zs)
    loss_mean, proj_loss_mean = loss.mean(), proj_loss.mean()
    return loss_mean + proj_loss_mean * args.proj_coeff, {"loss": loss_mean, "proj_loss": proj_loss_mean}


def main(args, watch=None):
    from utils import load_encoders  # here: the tests apply VRPO after this file is imported

    train(args, build=build, compute=compute, watch=watch, load=load_encoders)


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__}) + "\n")
    main(parse_args())

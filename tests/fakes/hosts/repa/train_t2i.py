"""Seams of sihyun-yu/REPA, train_t2i.py."""

import torch
from fakes.hosts.accelerate_loop import parse_args, train
from loss import SILoss
from models.mmdit import MMDiT


def build(args, encoders, accelerator):
    model = MMDiT(z_dims=[encoder.embed_dim for encoder in encoders], encoder_depth=2)
    return model, SILoss(path_type=args.path_type, encoders=encoders, accelerator=accelerator)


def compute(loss_fn, model, x, y, zs, args):
    context = torch.nn.functional.one_hot(y, 10).float()[:, None].expand(-1, 5, -1)
    loss, proj_loss = loss_fn(model, x, {"context": context}, zs=zs)
    loss_mean, proj_loss_mean = loss.mean(), proj_loss.mean()
    return loss_mean + proj_loss_mean * args.proj_coeff, {"loss": loss_mean, "proj_loss": proj_loss_mean}


def main(args, watch=None):
    from utils import load_encoders  # here: the tests apply VRPO after this file is imported

    args.sampling_steps = 0  # no sampler for captions here
    train(args, build=build, compute=compute, watch=watch, load=load_encoders)


if __name__ == "__main__":
    main(parse_args())

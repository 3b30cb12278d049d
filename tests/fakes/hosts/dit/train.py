"""Seams of facebookresearch/DiT, train.py."""

import torch
from diffusers.models import AutoencoderKL
from diffusion import create_diffusion
from fakes.hosts.pixel_loop import parse_args, train
from models import DiT_models


def main(args, watch=None):
    diffusion = create_diffusion(timestep_respacing="")

    def losses(model, x, y):
        t = torch.randint(0, diffusion.num_timesteps, (len(x),))
        return diffusion.training_losses(model, x, t, {"y": y})

    train(
        args,
        vae=AutoencoderKL.from_pretrained("fake"),
        build=lambda args: DiT_models["DiT-T/2"](num_classes=10),
        losses=losses,
        watch=watch,
    )


if __name__ == "__main__":
    main(parse_args())

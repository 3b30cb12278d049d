"""Seams of willisma/SiT, train.py."""

import os

import wandb_utils
from diffusers.models import AutoencoderKL
from fakes.hosts.pixel_loop import parse_args, train
from models import SiT_models
from transport import create_transport


def main(args, watch=None):
    entity, project = os.environ["ENTITY"], os.environ["PROJECT"]
    assert isinstance(entity, str) and isinstance(project, str)
    transport = create_transport(args.path_type, args.prediction)
    train(
        args,
        vae=AutoencoderKL.from_pretrained("fake"),
        build=lambda args: SiT_models["SiT-T/2"](num_classes=10),
        losses=lambda model, x, y: transport.training_losses(model, x, {"y": y}),
        log=wandb_utils.log if args.wandb else None,
        watch=watch,
    )


if __name__ == "__main__":
    main(parse_args())

"""The training loop of the fake hosts that encode images as they go: SiT and DiT."""

import argparse
import copy

import torch
import torch.distributed as dist
from fakes.hosts.parts import requires_grad, update_ema
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--global-seed", type=int, default=0)
    parser.add_argument("--path-type", default="Linear")
    parser.add_argument("--prediction", default="velocity")
    parser.add_argument("--wandb", action="store_true")
    return parser.parse_args(argv)


def batches(size, steps, rank=0):
    """(images in [-1, 1], labels)."""
    generator = torch.Generator().manual_seed(11 + rank)
    patterns = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 1.6 - 0.8
    for _ in range(steps):
        y = torch.randint(10, (size,), generator=generator)
        images = F.interpolate(patterns[y], scale_factor=8)
        yield (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(-1, 1), y


def train(args, *, vae, build, losses, log=None, watch=None):
    """Trains as SiT's train.py does, under DDP where there is a process group."""
    watch = watch or (lambda when, **state: None)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(args.global_seed * world + rank)
    model = build(args)
    ema = copy.deepcopy(model)
    requires_grad(ema, False)
    model = DistributedDataParallel(model) if world > 1 else model
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    update_ema(ema, model, decay=0)
    model.train()
    ema.eval()
    watch("start", model=model, ema=ema, optimizer=opt)
    for step, (images, y) in enumerate(batches(args.batch_size // world, args.steps, rank), 1):
        with torch.no_grad():
            x = vae.encode(images).latent_dist.sample().mul_(0.5)
        terms = losses(model, x, y)
        loss = terms["loss"].mean()
        opt.zero_grad()
        loss.backward()
        watch("gradients", model=model, sync=True)
        opt.step()
        update_ema(ema, model)
        if log is not None:
            log({"train loss": loss.item()}, step)
        watch("step", model=model, ema=ema, optimizer=opt, logs={"loss": loss.item()}, images=images)

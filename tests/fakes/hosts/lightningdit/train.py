"""Seams of hustvl/LightningDiT, train.py."""

import argparse
import copy

import torch
from accelerate import Accelerator
from fakes.hosts.accelerate_loop import Images
from fakes.hosts.parts import requires_grad, update_ema
from models.lightningdit import LightningDiT
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from transport import Sampler, create_transport

assert Sampler


def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--use-checkpoint", action="store_true")
    return parser.parse_args(argv)


def main(args, watch=None):
    watch = watch or (lambda when, **state: None)
    accelerator = Accelerator()
    writer = SummaryWriter(log_dir="logs")
    torch.manual_seed(0)
    model = LightningDiT(num_classes=10, use_checkpoint=args.use_checkpoint)
    ema = copy.deepcopy(model)
    requires_grad(ema, False)
    if torch.distributed.is_initialized():
        model = DistributedDataParallel(model)
    transport = create_transport()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    update_ema(ema, model, decay=0)
    model.train()
    ema.eval()
    model, opt = accelerator.prepare(model, opt)
    data = Images()
    watch("start", model=model, ema=ema, optimizer=opt)
    for step in range(1, args.steps + 1):
        chosen = torch.randint(len(data), (args.batch_size,))
        x, y = data.moments[chosen, 0, :4], data.labels[chosen]
        terms = transport.training_losses(model, x, {"y": y})
        loss = terms["cos_loss"].mean() + terms["loss"].mean()
        opt.zero_grad()
        accelerator.backward(loss)
        watch("gradients", model=model, sync=True)
        opt.step()
        update_ema(ema, model)
        writer.add_scalar("Loss/train", loss.item(), step)
        watch("step", model=model, ema=ema, optimizer=opt, logs={"loss": terms["loss"].mean().item()})


if __name__ == "__main__":
    main(parse_args())

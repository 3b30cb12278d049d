"""The training loop of the fake hosts that use accelerate: REPA, REG and iREPA."""

import argparse
import copy
import hashlib
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from fakes.hosts.parts import TOKEN_DIM, requires_grad, update_ema
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class Images(Dataset):
    """(uint8 image, moments of its latent, label), all of them functions of the index."""

    def __init__(self, size=64):
        generator = torch.Generator().manual_seed(7)
        self.labels = torch.randint(10, (size,), generator=generator)
        patterns = torch.randn(10, 4, 8, 8, generator=generator)
        means = patterns[self.labels] + 0.3 * torch.randn(size, 4, 8, 8, generator=generator)
        self.moments = torch.cat([means, torch.full_like(means, 0.1)], 1)[:, None]
        self.images = (F.interpolate(means[:, :3], scale_factor=8) * 60 + 128).clamp(0, 255).byte()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.moments[index], self.labels[index]


class Encoder:
    """A frozen encoder: images to 4 x 4 tokens."""

    def __init__(self, embed_dim=TOKEN_DIM):
        self.embed_dim = embed_dim
        self.weight = torch.randn(3 * 64, embed_dim, generator=torch.Generator().manual_seed(embed_dim))

    def forward_features(self, images):
        pixels = F.avg_pool2d(images.float() / 127.5 - 1, 2)
        return F.unfold(pixels, 8, stride=8).transpose(1, 2) @ self.weight


def load_encoders(enc_type, device, resolution=256):
    encoders = [Encoder(int(dim)) for dim in enc_type.split(",")]
    return encoders, ["fake"] * len(encoders), ["vit"] * len(encoders)


def sample_posterior(moments):
    mean, std = moments.chunk(2, dim=1)
    return mean + std * torch.randn_like(mean)


def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--output-dir", default="exps")
    parser.add_argument("--report-to", default=None)
    parser.add_argument("--sampling-steps", type=int, default=10_000)
    parser.add_argument("--resume-step", type=int, default=0)
    parser.add_argument("--model", default="SiT-T/2")
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--qk-norm", action="store_true")
    parser.add_argument("--path-type", default="linear")
    parser.add_argument("--z-dims", type=int, nargs="+", default=[TOKEN_DIM])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--mixed-precision", default="no")
    parser.add_argument("--max-train-steps", type=int, default=20)
    parser.add_argument("--checkpointing-steps", type=int, default=10_000)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--proj-coeff", type=float, default=0.5)
    return parser.parse_args(argv)


def train(args, *, build, compute, watch=None, find_unused=False, load=None):
    """Trains as REPA's train.py does, and writes one line of JSON per step.

    ``build(args, encoders, accelerator)`` gives the model and the loss; ``compute(loss_fn, model, x, y, zs, args)``
    what is minimised and what is logged; ``watch(when, **state)`` is called with ``"start"``, with ``"gradients"``
    before and with ``"step"`` after each step. ``load(enc_type, device, resolution)`` is REPA's ``load_encoders``.
    """
    watch = watch or (lambda when, **state: None)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
    )
    set_seed(args.seed + accelerator.process_index)
    load = load or load_encoders
    encoders, types, architectures = load(",".join(map(str, args.z_dims)), accelerator.device, 256)
    model, loss_fn = build(args, encoders, accelerator)
    ema = copy.deepcopy(model)
    requires_grad(ema, False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    local_batch = args.batch_size // accelerator.num_processes
    loader = DataLoader(Images(), batch_size=local_batch, shuffle=True, drop_last=True)
    update_ema(ema, model, decay=0)
    model.train()
    ema.eval()
    global_step = 0
    if args.resume_step > 0:
        checkpoint = torch.load(f"{args.output_dir}/{args.resume_step:07d}.pt", map_location="cpu")
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["opt"])
        global_step = checkpoint["steps"]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.init_trackers("fake")
    labels = torch.randint(1000, (4,))
    noise = torch.randn(4, 4, 8, 8)
    watch("start", model=model, ema=ema, optimizer=optimizer, loss_fn=loss_fn)
    while global_step < args.max_train_steps:
        for raw_image, moments, y in loader:
            with torch.no_grad():
                x = sample_posterior(moments.squeeze(1))
                loaded = zip(encoders, types, architectures)  # noqa: B905  as REPA does
                zs = [encoder.forward_features(raw_image) for encoder, *_ in loaded]
            with accelerator.accumulate(model):
                loss, logs = compute(loss_fn, model, x, y, zs, args)
                accelerator.backward(loss)
                watch("gradients", model=model, sync=accelerator.sync_gradients)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if accelerator.sync_gradients:
                    update_ema(ema, model)
            if not accelerator.sync_gradients:
                continue
            global_step += 1
            if global_step % args.checkpointing_steps == 0 and accelerator.is_main_process:
                saved = {"model": model.module.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict()}
                Path(args.output_dir).mkdir(parents=True, exist_ok=True)
                torch.save(saved | {"args": args, "steps": global_step}, f"{args.output_dir}/{global_step:07d}.pt")
            if args.sampling_steps and (global_step == 1 or global_step % args.sampling_steps == 0):
                from samplers import euler_sampler

                with torch.no_grad():
                    euler_sampler(model, noise, labels, num_steps=2, cfg_scale=4.0)
            logs = {name: value.detach().item() for name, value in (logs | {"grad_norm": grad_norm}).items()}
            accelerator.log(logs, step=global_step)
            watch("step", model=model, ema=ema, optimizer=optimizer, logs=logs, loss_fn=loss_fn)
            if accelerator.is_main_process:
                sys.stdout.write(json.dumps({"step": global_step, **logs}) + "\n")
            if global_step >= args.max_train_steps:
                break
    accelerator.wait_for_everyone()  # not end_training, which would take the process group of the next run along
    if accelerator.is_main_process:
        sys.stdout.write(json.dumps({"parameters": digest(model), "random": digest_of(torch.get_rng_state())}) + "\n")


def digest_of(*tensors):
    """A hash of tensors' bytes."""
    return hashlib.sha256(
        b"".join(tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors)
    ).hexdigest()


def digest(model):
    """A hash of a model's own parameters, without those of a ``vrpo`` that somebody hung on it."""
    return digest_of(
        *(p for name, p in model.named_parameters() if not name.removeprefix("module.").startswith("vrpo."))
    )

"""Seams of End2End-Diffusion/REPA-E, train_repae.py."""

import argparse
import copy

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from fakes.hosts.accelerate_loop import Encoder, Images
from fakes.hosts.parts import TOKEN_DIM, requires_grad, update_ema
from models.sit import SiT_models
from torch import nn


class VAE(nn.Module):
    """Images to latents and back."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 8, stride=8), nn.ConvTranspose2d(4, 3, 8, stride=8)

    def forward(self, images):
        z = self.down(images)
        return z, self.up(z)


def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="SiT-T/2")
    parser.add_argument("--qk-norm", action="store_true")
    parser.add_argument("--report-to", default=None)
    parser.add_argument("--continue-train-exp-dir", default="earlier")
    parser.add_argument("--resume-step", type=int, default=0)
    parser.add_argument("--max-train-steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--proj-coeff", type=float, default=0.5)
    parser.add_argument("--vae-align-proj-coeff", type=float, default=1.5)
    parser.add_argument("--path-type", default="linear")
    parser.add_argument("--compile", default=None)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args, watch=None):
    watch = watch or (lambda when, **state: None)
    accelerator = Accelerator(log_with=args.report_to)
    set_seed(args.seed)
    encoders = [Encoder(TOKEN_DIM)]
    model = SiT_models[args.model](z_dims=[TOKEN_DIM], encoder_depth=2, fused_attn=True, qk_norm=args.qk_norm)
    ema = copy.deepcopy(model)
    requires_grad(ema, False)
    vae = VAE()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    vae_optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4)
    update_ema(ema, model, decay=0)
    if args.resume_step > 0:
        checkpoint = torch.load(f"{args.cont_dir}/{args.resume_step:07d}.pt", map_location="cpu")  # no such argument
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["opt"])
    if args.compile:
        model = torch.compile(model, backend=args.compile)
    model, vae, optimizer, vae_optimizer = accelerator.prepare(model, vae, optimizer, vae_optimizer)
    accelerator.init_trackers("fake")
    data = Images()
    watch("start", model=model, ema=ema, optimizer=optimizer)
    for step in range(args.resume_step + 1, args.max_train_steps + 1):
        chosen = torch.randint(len(data), (args.batch_size,))
        raw_image, labels = data.images[chosen], data.labels[chosen]
        zs = [encoder.forward_features(raw_image) for encoder in encoders]
        z, recon = vae(raw_image.float() / 127.5 - 1)
        loss_kwargs = {"path_type": args.path_type, "prediction": "v", "weighting": "uniform"}
        requires_grad(model, False)
        model.eval()
        loss_kwargs["align_only"] = True
        aligned = model(x=z, y=labels, zs=zs, loss_kwargs=loss_kwargs, time_input=None, noises=None)
        vae_loss = (recon - raw_image.float() / 127.5 + 1).square().mean()
        vae_loss = vae_loss + args.vae_align_proj_coeff * aligned["proj_loss"].mean()
        accelerator.backward(vae_loss)
        watch("vae", vae=vae, model=model, align_loss=aligned["proj_loss"].item())
        vae_optimizer.step()
        vae_optimizer.zero_grad(set_to_none=True)
        requires_grad(model, True)
        model.train()
        loss_kwargs["align_only"] = False
        outputs = model(
            x=z.detach(),
            y=labels,
            zs=zs,
            loss_kwargs=loss_kwargs,
            time_input=aligned["time_input"],
            noises=aligned["noises"],
        )
        sit_loss = outputs["denoising_loss"].mean() + args.proj_coeff * outputs["proj_loss"].mean()
        accelerator.backward(sit_loss)
        watch("gradients", model=model, sync=True)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        unwrapped = accelerator.unwrap_model(model)
        update_ema(ema, unwrapped._orig_mod if args.compile else unwrapped)
        logs = {
            "denoising_loss": outputs["denoising_loss"].mean().item(),
            "proj_loss": outputs["proj_loss"].mean().item(),
            "grad_norm_sit": grad_norm.item(),
        }
        accelerator.log(logs, step=step)
        watch("step", model=model, ema=ema, optimizer=optimizer, logs=logs)


if __name__ == "__main__":
    main(parse_args())

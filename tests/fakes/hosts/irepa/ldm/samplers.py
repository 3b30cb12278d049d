"""Seams of End2End-Diffusion/iREPA, ldm/samplers.py."""

import itertools

import torch


def euler_sampler(
    model,
    latents,
    y,
    num_steps=20,
    heun=False,
    cfg_scale=1.0,
    guidance_low=0.0,
    guidance_high=1.0,
    path_type="linear",
):
    """From noise to latents; the null label is 1000, whatever the model's number of classes."""
    null = torch.full_like(y, 1000)
    times = torch.linspace(1, 0, num_steps + 1)
    for now, then in itertools.pairwise(times):
        t = now.expand(2 * len(latents))
        velocity = model(torch.cat([latents, latents]), t, y=torch.cat([y, null]))[0]
        with_label, without = velocity.chunk(2)
        latents = latents + (then - now) * (without + cfg_scale * (with_label - without))
    return latents

"""Counts what the critic costs in a training step, against the transformer it is trained with, and what a run costs.

``python benchmarks/critic_flops.py``: multiply-accumulates (MAC) by torch's FlopCounterMode on meta tensors, no weights
are made and nothing is timed.
"""

import argparse
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vrpo_plugin.modules.critic import LatentCritic
from vrpo_plugin.standalone.sit import create_sit


def count_macs(run: Callable[[], Any]) -> float:
    """MACs of a call, in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9


def critic_step_macs(critic: LatentCritic, latent_shape: tuple[int, int, int]) -> tuple[float, float]:
    """One forward pass, and the whole use in a step: regression on x0, and scoring x0_hat with detached weights."""
    x0 = torch.empty(1, *latent_shape, device="meta")
    x0_hat = torch.empty(1, *latent_shape, device="meta", requires_grad=True)
    frozen = {name: p.detach() for name, p in critic.named_parameters()}

    def step() -> None:
        sum(tokens.sum() for tokens in critic(x0).tokens).backward()
        seen = functional_call(critic, frozen, (x0_hat,))
        sum(x.sum() for x in (*seen.tokens, *seen.features)).backward()

    return count_macs(lambda: critic(x0)), count_macs(step)


def model_step_macs(name: str, latent_shape: tuple[int, int, int]) -> float:
    """Forward and backward pass of a SiT."""
    with torch.device("meta"):
        model = create_sit(name, input_size=latent_shape[-1], in_channels=latent_shape[0])
    x = torch.empty(1, *latent_shape, device="meta")
    t, y = torch.empty(1, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    return count_macs(lambda: model.eval()(x, t, y).sum().backward())


def encoder_macs(name: str, side: int) -> float:
    """Forward pass of one of timm's encoders."""
    with torch.device("meta"):
        encoder = timm.create_model(name, img_size=side, num_classes=0)
        image = torch.empty(1, 3, side, side)
    # The fused attention of the meta device is not counted.
    for module in encoder.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with torch.no_grad():
        return count_macs(lambda: encoder.eval().forward_features(image))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latent-side", type=int, default=32)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--target-dim", type=int, default=768)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--encoder", default="vit_base_patch14_dinov2", help="timm's name")
    parser.add_argument("--image-side", type=int, default=224, help="of the encoder")
    parser.add_argument("--samples", type=float, default=400_000 * 256, help="of the run that is priced")
    parser.add_argument("--tflops", type=float, default=0.4 * 989, help="that a GPU delivers; default: an H100 at 40%%")
    arguments = parser.parse_args()
    side, shape = arguments.latent_side // 2, (arguments.channels, arguments.latent_side, arguments.latent_side)
    with torch.device("meta"):
        critic = LatentCritic(shape, (arguments.target_dim,), (side, side), width=arguments.width)
    forward, step = critic_step_macs(critic, shape)
    print(f"critic {shape} -> {side} x {side} x {arguments.target_dim}, width {arguments.width}")
    print(f"  parameters {sum(p.numel() for p in critic.parameters()) / 1e6:.2f} M")
    print(f"  forward {forward:.3f} GMAC, whole use in a step {step:.3f} GMAC")
    encoder = encoder_macs(arguments.encoder, arguments.image_side)
    print(f"{arguments.encoder} at {arguments.image_side} px: forward {encoder:.1f} GMAC")
    print(f"{arguments.samples:.3g} samples at {arguments.tflops:.0f} TFLOP/s (an estimate; no decoding, no sampling):")
    print("model      step GMAC   critic's share   GPU hours: REPA   VRPO")
    for name in ("SiT-XL/2", "SiT-L/2", "SiT-B/2", "SiT-S/2"):
        model = model_step_macs(name, shape)
        hours = [2e9 * gmacs * arguments.samples / arguments.tflops / 3.6e15 for gmacs in (model + encoder, step)]
        print(f"{name:9s} {model:10.1f}   {step / model:14.2%}   {hours[0]:15.1f}   {sum(hours):4.1f}")


if __name__ == "__main__":
    main()

"""Counts what the critic costs in a training step, against the transformer it is trained with.

``python benchmarks/critic_flops.py``: multiply-accumulates (MAC) by torch's FlopCounterMode on meta tensors, no weights
are made and nothing is timed.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vrpo_plugin.modules.critic import LatentCritic
from vrpo_plugin.reference.sit import create_sit


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latent-side", type=int, default=32)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--target-dim", type=int, default=768)
    parser.add_argument("--width", type=int, default=256)
    arguments = parser.parse_args()
    side, shape = arguments.latent_side // 2, (arguments.channels, arguments.latent_side, arguments.latent_side)
    with torch.device("meta"):
        critic = LatentCritic(shape, (arguments.target_dim,), (side, side), width=arguments.width)
    forward, step = critic_step_macs(critic, shape)
    print(f"critic {shape} -> {side} x {side} x {arguments.target_dim}, width {arguments.width}")
    print(f"  parameters {sum(p.numel() for p in critic.parameters()) / 1e6:.2f} M")
    print(f"  forward {forward:.3f} GMAC, whole use in a step {step:.3f} GMAC")
    print("model      step GMAC   critic's share")
    for name in ("SiT-XL/2", "SiT-L/2", "SiT-B/2", "SiT-S/2"):
        model = model_step_macs(name, shape)
        print(f"{name:9s} {model:10.1f}   {step / model:.2%}")


if __name__ == "__main__":
    main()

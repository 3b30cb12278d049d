"""The method in one file: a small SiT on scikit-learn's digits, in a few minutes on a CPU.

    python examples/minimal_loop.py                 # VRPO
    python examples/minimal_loop.py --reward-coeff 0  # REPA alone

Without several processes, checkpoints and evaluation: those are in examples/train_repa_vrpo.py.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from PIL import Image

from vrpo_plugin import VRPOAligner
from vrpo_plugin.functional.interpolant import noisy_sample
from vrpo_plugin.standalone.sampler import sample
from vrpo_plugin.standalone.sit import create_sit
from vrpo_plugin.standalone.small_training import train_small_features
from vrpo_plugin.standalone.sources import DigitsSource, all_images

BATCH, GRID = 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--reward-coeff", type=float, default=0.12, help="weight of the rewards; 0: REPA alone")
    parser.add_argument("--output", type=Path, default=Path("digits.png"))
    arguments = parser.parse_args()

    # Images (uint8, 8 x 8), and a frozen encoder: here a small classifier of them, elsewhere DINOv2.
    source = DigitsSource()
    pixels, labels = all_images(source)
    images = pixels.float() / 127.5 - 1  # this toy's "latents" are the pixels
    encoder = train_small_features(pixels, labels, seed=0, steps=200)

    torch.manual_seed(0)
    model = create_sit("SiT-Ti/2", input_size=8, in_channels=1, num_classes=10)
    aligner = VRPOAligner.from_model(
        model,
        encoder=(encoder.token_dim,),
        token_grid=encoder.grid,
        critic_width=64,  # beside so small a transformer
        reward_coeff=arguments.reward_coeff,
        reward_release_steps=arguments.steps // 4,  # then a tenth of the weight stays
    )
    aligner.attach(model)  # before the EMA copy and the optimizer
    ema = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)

    began = time.perf_counter()
    for step in range(arguments.steps):
        index = torch.randint(len(images), (BATCH,))
        x0, y = images[index], labels[index]
        with torch.no_grad():
            z = encoder.tokens(pixels[index])

        t = torch.rand(BATCH)  # 0 is data, 1 is noise
        x_t, target = noisy_sample(x0, torch.randn_like(x0), t)
        velocity = model(x_t, t, y)
        out = aligner(z, x0=x0, x_t=x_t, t=t, velocity=velocity, step=step)
        denoising = (velocity - target).square().mean()
        loss = denoising + out.loss

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(parameter, 0.01)
        if step % 50 == 0 or step == arguments.steps - 1:
            rewards = {name: f"{value.nanmean():.3f}" for name, value in out.rewards.items()}
            print(f"step {step}: denoising {denoising:.3f}, rewards {rewards}, {time.perf_counter() - began:.0f} s")

    noise = torch.randn(10 * GRID, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made = sample(ema, noise, torch.arange(10).repeat(GRID), num_steps=25, guidance_scale=1.5)
    picture = ((made.clamp(-1, 1) + 1) * 127.5).byte().reshape(GRID, 10, 8, 8).permute(0, 2, 1, 3).reshape(8 * GRID, 80)
    Image.fromarray(picture.numpy()).resize((640, 64 * GRID), Image.Resampling.NEAREST).save(arguments.output)
    print(f"samples: {arguments.output}")


if __name__ == "__main__":
    main()

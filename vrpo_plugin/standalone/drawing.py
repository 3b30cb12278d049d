"""Images from a trained model: the same ones whatever the number of processes, for grids, evaluations and files."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.standalone.data import LATENTS_SCALE, seeded_generator
from vrpo_plugin.standalone.progress import progress
from vrpo_plugin.standalone.sampler import sample

if TYPE_CHECKING:
    from PIL import Image

Decoder = Callable[[Tensor], Tensor]
DECODED_AT_ONCE = 16  # images; a VAE's activations are far larger than a latent


def image_generators(seed: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """One generator per image, which depends on the seed and the image's number alone."""
    return [seeded_generator("image", seed, number) for number in numbers]


@torch.no_grad()
def draw(
    model: Callable[..., Any],
    noise: Tensor,
    y: Tensor | None,
    *,
    decode: Decoder,
    device: str | torch.device,
    generators: Sequence[torch.Generator],
    **sampling: Any,
) -> Tensor:
    """Samples one batch.

    Args:
        model: see :func:`vrpo_plugin.standalone.sampler.sample`.
        noise: (B, C, H, W), on any device.
        y: labels (B,), or None for an unconditional model.
        decode: what the model makes to pixels in [-1, 1].
        device: where to compute.
        generators: one per image, for the SDE.
        sampling: further arguments of ``sample``.

    Returns:
        Images uint8 (B, C', H', W'), on the CPU.
    """
    labels = None if y is None else y.to(device)
    pixels = decode(sample(model, noise.to(device), labels, generator=generators, **sampling))
    return pixels.add(1).mul(127.5).round().clamp(0, 255).byte().cpu()


def batches_of(count: int, size: int) -> list[range]:
    """Image numbers, in batches that do not depend on the number of processes: neither does then a bit of an image."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def draw_together(
    draw_batch: Callable[[range], Tensor], count: int, batch_size: int, *, description: str = "sampling"
) -> Tensor | None:
    """Shares the batches out to all processes of ``torch.distributed``; every process has to call it.

    Args:
        draw_batch: image numbers to images uint8 (B, C, H, W), on the CPU.
        count: how many images.
        batch_size: images per call.
        description: of the progress bar.

    Returns:
        All images (count, C, H, W) in order, on the first process; None on the others.
    """
    together = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    batches = batches_of(count, batch_size)
    images: list[Tensor] = []
    with progress(count, description, unit="image", enabled=rank == 0) as bar:
        for first in range(0, len(batches), world):
            turn = batches[first : first + world]
            own = draw_batch(turn[rank]) if rank < len(turn) else None
            gathered: list[Any] = [own] * world
            if together:
                dist.gather_object(own, gathered if rank == 0 else None, dst=0)
            images += [part for part in gathered if part is not None]
            bar.update(sum(map(len, turn)))
    return torch.cat(images) if rank == 0 else None


def grid_picture(images: Tensor, columns: int = 10) -> "Image.Image":
    """Images uint8 (N, C, H, W) side by side, row by row; small ones are magnified."""
    from PIL import Image

    rows = -(-len(images) // columns)
    gap = max(1, images.shape[-1] // 16)
    framed = torch.nn.functional.pad(images, (0, gap, 0, gap), value=96)
    missing = framed.new_full((rows * columns - len(images), *framed.shape[1:]), 96)
    tiles = rearrange(torch.cat([framed, missing]), "(r c) k h w -> (r h) (c w) k", r=rows)
    picture = Image.fromarray(tiles.squeeze(-1).numpy() if tiles.shape[-1] == 1 else tiles.numpy())
    scale = max(1, 640 // picture.width)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def keep_pixels(pixels: Tensor) -> Tensor:
    """The decoder of pixel models."""
    return pixels


def load_decoder(vae: str, device: str | torch.device) -> Decoder:
    """The SD-VAE's decoder.

    Args:
        vae: a diffusers folder, or a name that diffusers has or downloads.
        device: where to compute.

    Returns:
        Latents (B, 4, H, W), scaled by 0.18215 as REPA's and SiT's, to pixels (B, 3, 8H, 8W) in [-1, 1].

    Raises:
        ConfigError: diffusers is not installed, or there is no such VAE.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ConfigError(
            "vae", expected="diffusers installed", got=error, do="pip install 'vrpo-plugin[repa]'."
        ) from error
    try:
        network = AutoencoderKL.from_pretrained(vae)
    except (OSError, ValueError) as error:  # what huggingface_hub raises is an OSError or a ValueError
        got = f"{vae!r}: {str(error).strip().splitlines()[0][:200]}"
        do = "Give a folder with config.json and its weights, or a name on a machine that can download it."
        raise ConfigError("vae", expected="a diffusers AutoencoderKL", got=got, do=do) from error
    network = network.to(device).eval().requires_grad_(False)

    def decode(latents: Tensor) -> Tensor:
        parts = latents.split(DECODED_AT_ONCE)
        with torch.autocast(latents.device.type, enabled=False):  # in half precision this VAE overflows
            return torch.cat([network.decode(part / LATENTS_SCALE).sample.float() for part in parts])

    return decode

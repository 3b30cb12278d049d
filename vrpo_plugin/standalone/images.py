"""Image files to pixels of 8 bits: the one reader of every folder that is trained on or measured against."""

import contextlib
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vrpo_plugin.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

BAD_EXIF = (OSError, SyntaxError, ValueError, TypeError, KeyError, ZeroDivisionError, struct.error)


class UnreadableError(DataError):
    """One file is damaged, or of a kind that cannot be shown in 8 bits; the others may be right."""


class Decoded(NamedTuple):
    """An image, and whether transparency was composed on white."""

    image: "Image.Image"
    composed: bool


def open_image(path: Path, *, as_shown: bool = True) -> Decoded:
    """Reads an image file as grey (mode L) or colour (RGB), 8 bits per channel; 16-bit grey is scaled.

    Args:
        path: the file.
        as_shown: as a viewer shows it, turned as its EXIF data says and composed on white where it is transparent;
            False is as it is stored.

    Raises:
        UnreadableError: the file cannot be decoded, or holds floats or integers of 32 bits.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UnreadableError(str(path), expected="a readable image", got=error, do="Replace or remove it.") from error
    if as_shown:
        with contextlib.suppress(*BAD_EXIF):  # it then says nothing of a rotation
            ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        return Decoded(_eight_bits(image, path), False)
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if not as_shown or not (image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info):
        return Decoded(image.convert(mode), False)
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return Decoded(rgba.convert(mode), False)
    return Decoded(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert(mode), True)


def _eight_bits(image: "Image.Image", path: Path) -> "Image.Image":
    """16-bit grey as 8-bit grey; Pillow's own conversion cuts off all above 255. Some versions read it as mode I."""
    from PIL import Image

    pixels = np.asarray(image)
    if image.mode.startswith("F") or pixels.min() < 0 or pixels.max() > 65535:
        got, do = f"mode {image.mode}", "Convert it to 8 or 16 bits."
        raise UnreadableError(str(path), expected="8 or 16 bits per channel", got=got, do=do)
    return Image.fromarray(((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def center_crop(image: "Image.Image", size: int) -> "Image.Image":
    """Halves by box filter while the short side is at least twice ``size``, resizes bicubically, crops.

    Args:
        image: of 8 bits per channel.
        size: side of the result in pixels.

    Returns:
        The centre, ``size`` x ``size``.

    Source: ADM, openai/guided-diffusion@8fb3ad9:guided_diffusion/image_datasets.py.
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: "Image.Image") -> Tensor:
    """uint8 (C, H, W)."""
    pixels = np.array(image)
    return torch.from_numpy(np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)))

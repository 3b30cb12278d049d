"""Sets of images to evaluate: a folder of image files, or an .npz file as ADM writes it."""

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vrpo_plugin.standalone.images import center_crop, open_image, to_tensor
from vrpo_plugin.standalone.source_files import FileList, data_error, names_below
from vrpo_plugin.standalone.sources import open_source

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
SAMPLES_RECORD = "samples.json"  # beside the samples: how they were made
RUN_SETTINGS = "config.json"  # in the folder of a run of the example


class ImageSet(Protocol):
    """Colour images of one size, read one at a time, in a fixed order."""

    resolution: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Image uint8 (3, S, S)."""


class FolderImages:
    """The image files of a folder and its subfolders, in the order of their names.

    Args:
        root: the folder.
        resolution: side in pixels to which the images are brought by ADM's centre crop; None takes them as they are,
            and they must all be of one size.

    Raises:
        DataError: no folder, no image, or a first image that is not square while ``resolution`` is None.
    """

    def __init__(self, root: str | os.PathLike[str], resolution: int | None = None) -> None:
        root, self._crops = Path(root), resolution is not None
        self._files = FileList(root, names_below(root, IMAGE_ENDINGS))
        self.resolution = open_image(self._files.path(0)).image.width if resolution is None else resolution
        if not self._crops:
            self[0]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        """Image uint8 (3, S, S).

        Raises:
            DataError: the file cannot be read, or has another size than the first, or is not square.
        """
        path, side = self._files.path(index), self.resolution
        image = open_image(path).image.convert("RGB")
        if self._crops:
            image = center_crop(image, side)
        elif image.size != (side, side):
            expected = f"{side}x{side} pixels, square and as the first of them"
            do = "Remove what is no sample; samples of another size are not resized."
            raise data_error(path, expected, f"{image.width}x{image.height}", do)
        return to_tensor(image)


class ArrayImages:
    """The images of an .npz file: ``arr_0`` uint8 (N, S, S, C), as ADM; or ``images`` uint8 (N, C, S, S), as ours.

    An uncompressed file is mapped into memory, so that several processes read it once.

    Raises:
        DataError: the file is damaged, has no such array, or one of another kind or shape.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path = Path(path)
        names = array_names(path)
        name = next((one for one in ("arr_0", "images") if one in names), None)
        if name is None:
            expected = "an array arr_0 or images"
            raise data_error(path, expected, f"{', '.join(names) or 'none'}", "Write it as ADM does.")
        self._array, self._channels_last = read_array(path, name), name == "arr_0"
        shape = self._array.shape
        layout, axes = ("(N, S, S, C)", (1, 2, 3)) if self._channels_last else ("(N, C, S, S)", (2, 3, 1))
        height, width, channels = (shape[axis] for axis in axes) if len(shape) == 4 else (0, 0, 0)
        if self._array.dtype != np.uint8 or 0 in shape or channels not in (1, 3):
            raise data_error(path, f"{name} uint8 {layout}", f"{self._array.dtype} {shape}", "Convert the array.")
        if height != width or not height:
            raise data_error(path, "square images", f"{width}x{height}", "Crop them.")
        self.resolution = int(height)

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayImages, (self._path,)  # a worker that is not forked opens the file, in place of a copy of it

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> Tensor:
        """Image uint8 (3, S, S)."""
        pixels = torch.from_numpy(np.array(self._array[index]))
        pixels = rearrange(pixels, "h w c -> c h w") if self._channels_last else pixels
        return pixels.expand(3, -1, -1).contiguous()


class TrainingImages:
    """What a run of the example was trained on.

    Args:
        run: its folder, with config.json.

    Raises:
        DataError: config.json cannot be read, or its images are not where they were.
    """

    def __init__(self, run: Path) -> None:
        file = run / RUN_SETTINGS
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))["settings"]
            data, resolution = settings["data_dir"], settings["resolution"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            do = "Give the folder of a run, or its images."
            raise data_error(file, "the settings of a run of the example", repr(error), do) from error
        self._source = open_source(data, resolution)
        self.resolution = self._source.image_shape[-1]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Tensor:
        """Image uint8 (3, S, S)."""
        return self._source.load(index)[0].expand(3, -1, -1).contiguous()


def open_images(path: str | os.PathLike[str], resolution: int | None = None) -> ImageSet:
    """Opens a folder of images or an .npz file; a folder without images may hold one .npz file instead.

    Args:
        path: the folder or file.
        resolution: see :class:`FolderImages`; an .npz file's images are taken as they are.

    Raises:
        DataError: nothing at ``path``, or nothing that can be read.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(path.glob("*.npz"))
        if len(inside) != 1 or names_below(path, IMAGE_ENDINGS):
            return FolderImages(path, resolution)
        path = inside[0]
    elif path.suffix != ".npz":
        got = "no such file or folder" if not path.exists() else f"a file that ends in {path.suffix or 'nothing'}"
        raise data_error(path, "a folder of images or an .npz file", got, "Check the path.")
    return ArrayImages(path)


def samples_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``samples.json`` says of the samples in a folder, or of ``NAME.npz`` beside it; empty without such a file.

    Raises:
        DataError: it cannot be read.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / SAMPLES_RECORD
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return dict(record)
    except (OSError, ValueError, TypeError) as error:
        raise data_error(file, "the JSON that vrpo sample wrote", error, "Sample again, or remove it.") from error


def array_names(path: Path) -> list[str]:
    """Names of the arrays in an .npz file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise data_error(path, "an .npz file", error, "Write it again.") from error


def read_array(path: Path, name: str) -> np.ndarray:
    """One array of an .npz file; mapped into memory where the file is not compressed.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            stored = archive.getinfo(f"{name}.npy").compress_type == zipfile.ZIP_STORED
            version = np.lib.format.read_magic(member)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(member)
            if stored and not dtype.hasobject:
                start = _data_start(path, archive.getinfo(f"{name}.npy")) + member.tell()
                return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise data_error(path, f"an npz file with an array {name!r}", error, "Write it with numpy.savez.") from error


def _data_start(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its own header, whose two last lengths the directory does not know."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return member.header_offset + 30 + name + extra

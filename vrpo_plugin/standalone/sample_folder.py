"""What ``vrpo sample`` writes: images, a picture of the first ones, ADM's npz, and how they were made."""

import json
import os
import shutil
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vrpo_plugin.errors import ConfigError, DataError
from vrpo_plugin.files import write_file
from vrpo_plugin.standalone.drawing import grid_picture
from vrpo_plugin.standalone.progress import progress

if TYPE_CHECKING:
    from PIL import Image

RECORD, ARRAYS, UNFINISHED = "samples.json", "samples.npz", ".images"
FORMATS = ("folder", "grid", "npz")
ON_GRID = 100  # images at most


class SampleFolder:
    """The folder of one set of samples; refuses samples of other settings, and files of others.

    ``000000.png`` ... and ``samples.json``, ``samples.npz``; the picture stands beside the folder, as ``FOLDER.png``,
    so that whoever reads all images of the folder reads samples alone.

    Args:
        path: of the folder.
        record: how the samples are made, for samples.json; without ``complete``.
        formats: of ``FORMATS``.

    Raises:
        ConfigError: the folder holds something else.
        DataError: its samples.json cannot be read.
    """

    def __init__(self, path: Path, record: dict[str, Any], formats: Sequence[str]) -> None:
        self.path, self.record, self.formats = Path(os.path.abspath(path)), record, formats
        self.count = int(record["num_samples"])
        self.grid = self.path.with_name(f"{self.path.name}.png")
        self._complete = bool((self._read_record() or {}).get("complete"))
        # Images that nobody asked for as files wait in a folder of their own, and go when the others are written.
        kept = "folder" in formats or (self.path / _name(0)).exists()
        self.images = self.path if kept else self.path / UNFINISHED

    def _read_record(self) -> dict[str, Any] | None:
        file = self.path / RECORD
        if not file.exists():
            beside = [self.grid] if "grid" in self.formats and self.grid.exists() else []
            there = [*self.path.iterdir()] if self.path.is_dir() else [self.path] if self.path.exists() else beside
            if there:
                do = "Choose another folder for -o."
                expected = "a new or empty folder, or samples of the same settings"
                raise ConfigError(str(self.path), expected=expected, got=f"{there[0].name} there", do=do)
            return None
        try:
            former = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            do = "Choose another folder for -o."
            raise DataError(str(file), expected="the JSON that vrpo sample wrote", got=error, do=do) from error
        unlike = [f"{k}: {former.get(k)!r} there, {v!r} now" for k, v in self.record.items() if former.get(k) != v]
        if unlike:
            do = "Choose another folder for -o, or repeat those settings to go on."
            raise ConfigError(str(self.path), expected="the settings of its samples", got="; ".join(unlike), do=do)
        return former

    def missing(self) -> set[int]:
        """Numbers of the images that have to be made: none where all that was asked for is there."""
        files = {"grid": self.grid, "npz": self.path / ARRAYS}
        if all(one in files and self._stands(files[one]) for one in self.formats):
            return set()
        entries = os.scandir(self.images) if self.images.is_dir() else ()
        there = {entry.name for entry in entries if entry.stat().st_size}
        return {number for number in range(self.count) if _name(number) not in there}

    def start(self, missing: Collection[int]) -> None:
        """Makes the folder and says what will be in it. One process only.

        Raises:
            ConfigError: the folder cannot be made.
        """
        try:
            self.images.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            do = "Choose another folder for -o."
            raise ConfigError(str(self.path), expected="a folder that can be made", got=error, do=do) from error
        for partial in self.images.glob("*.png.*.partial"):  # of a process that was killed while it wrote
            partial.unlink()
        if missing or not self._complete:
            self._write_record(complete=False)
            self._complete = False

    def write(self, numbers: Sequence[int], images: Tensor) -> None:
        """Writes images uint8 (B, C, H, W); any process, any order."""
        from PIL import Image

        for number, image in zip(numbers, images, strict=True):
            pixels = rearrange(image, "c h w -> h w c").numpy()
            picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels)
            _save(picture, self.images / _name(number), durable=False)

    def finish(self, labels: Tensor | None) -> list[Path]:
        """Writes the other formats from the images, and says that all is there. One process only.

        Args:
            labels: (N,), for the npz.

        Returns:
            What there is now.
        """
        if "grid" in self.formats and not self._stands(self.grid):
            first = np.stack([self._pixels(number) for number in range(min(self.count, ON_GRID))])
            columns = min(10, max(1, round(self.count**0.5)))
            _save(grid_picture(torch.from_numpy(first), columns), self.grid)
        if "npz" in self.formats and not self._stands(self.path / ARRAYS):
            write_file(self.path / ARRAYS, lambda file: self._write_arrays(file, labels))
        self._write_record(complete=True)
        shutil.rmtree(self.path / UNFINISHED, ignore_errors=True)
        paths = {"folder": self.path, "grid": self.grid, "npz": self.path / ARRAYS}
        return [paths[one] for one in FORMATS if one in self.formats]

    def _stands(self, file: Path) -> bool:
        """Whether a file was made of all images already."""
        return self._complete and file.exists()

    def _write_arrays(self, file: IO[bytes], labels: Tensor | None) -> None:
        """As numpy.savez, image by image: 50,000 images do not fit into every memory."""
        first = rearrange(self._pixels(0), "c h w -> h w c")
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *first.shape)}
        with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for number in progress(range(self.count), ARRAYS, unit="image"):
                    member.write(rearrange(self._pixels(number), "c h w -> h w c").tobytes())
            if labels is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, labels.numpy())

    def _pixels(self, number: int) -> np.ndarray:
        """Image uint8 (C, H, W)."""
        from PIL import Image

        path = self.images / _name(number)
        try:
            with Image.open(path) as picture:
                pixels = np.array(picture)
        except OSError as error:
            do = "Remove it, and run the same command again."
            raise DataError(str(path), expected="an image", got=error, do=do) from error
        return pixels[None] if pixels.ndim == 2 else rearrange(pixels, "h w c -> c h w")

    def _write_record(self, *, complete: bool) -> None:
        record = {**self.record, "complete": complete}
        write_file(self.path / RECORD, json.dumps(record, indent=2) + "\n")


def _save(picture: "Image.Image", path: Path, *, durable: bool = True) -> None:
    write_file(path, lambda file: picture.save(file, format="png"), durable=durable)


def _name(number: int) -> str:
    return f"{number:06d}.png"

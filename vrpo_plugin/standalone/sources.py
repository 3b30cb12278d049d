"""Where training images come from: bundled digits, folders of images, one file of arrays, REPA's cached latents."""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.standalone.images import UnreadableError, center_crop, open_image, to_tensor
from vrpo_plugin.standalone.progress import progress
from vrpo_plugin.standalone.source_files import (
    FileFlags,
    FileList,
    OfFiles,
    Remark,
    data_error,
    entries_of,
    evenly_spaced,
    names_below,
)

Shape = tuple[int, ...]
MANY = 2000  # images that may take longer to read than one waits without a bar


class Source(Protocol):
    """Labelled images, read one at a time; for pixel models ``latent_shape`` is ``image_shape``."""

    num_classes: int
    image_shape: Shape
    latent_shape: Shape

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Tensor, Tensor | None, int]:
        """Image uint8 (C, H, W); moments [mean | std] float32 (2C', H', W') or None for pixels; label."""

    def fingerprint(self) -> str:
        """16 hex digits that change with names, labels and file sizes (of large folders, 1,000 sizes)."""


class _InMemory:
    """Labelled pixels in two arrays."""

    _images: Tensor
    _labels: np.ndarray

    def __len__(self) -> int:
        return len(self._labels)

    def load(self, index: int) -> tuple[Tensor, Tensor | None, int]:
        """See :meth:`Source.load`."""
        return self._images[index], None, int(self._labels[index])

    def fingerprint(self) -> str:
        """See :meth:`Source.fingerprint`."""
        return _digest([self._images.numpy().tobytes(), self._labels.tobytes()])


class DigitsSource(_InMemory):
    """The 1,797 handwritten digits that scikit-learn bundles, (1, size, size), upsampled bilinearly from 8x8.

    Args:
        size: side in pixels, at least 8.

    Raises:
        ConfigError: ``size`` is under 8.

    Source: UCI, Optical Recognition of Handwritten Digits, test part; values 0..16 become 0..255.
    """

    num_classes = 10

    def __init__(self, size: int = 8) -> None:
        from sklearn.datasets import load_digits

        if size < 8:
            raise ConfigError("size", expected="at least 8", got=size, do="The digits are 8x8 images.")
        digits = load_digits()
        images = rearrange(torch.from_numpy(digits.images).float() * (255 / 16), "n h w -> n 1 h w")
        self._images = F.interpolate(images, size=(size, size), mode="bilinear").round().to(torch.uint8)
        self._labels = digits.target.astype(np.int64)
        self.image_shape: Shape = (1, size, size)
        self.latent_shape: Shape = self.image_shape


class ImageFolderSource(OfFiles):
    """Class folders as ``torchvision.datasets.ImageFolder`` reads them, or one flat folder as one class.

    Args:
        root: the folder.
        resolution: side in pixels; see :func:`center_crop`.
        channels: 3 (colour) or 1 (grey).

    Raises:
        ConfigError: ``resolution`` is not positive, or ``channels`` is neither 1 nor 3.
        DataError: no folder, no image, an empty class folder, or images beside class folders.
    """

    def __init__(self, root: str | Path, resolution: int, channels: int = 3) -> None:
        from torchvision.datasets import ImageFolder
        from torchvision.datasets.folder import IMG_EXTENSIONS

        if channels not in (1, 3) or resolution < 1:
            got = f"resolution {resolution}, channels {channels}"
            expected = "a positive resolution and 1 or 3 channels"
            raise ConfigError("images", expected=expected, got=got, do="Correct the setting.")
        root = Path(root)
        entries = entries_of(root)
        names = sorted(e.name for e in entries if e.is_file() and e.name.lower().endswith(IMG_EXTENSIONS))
        labels, self.num_classes = [0] * len(names), 1
        if any(entry.is_dir() for entry in entries):
            if names:
                got = f"{names[0]} beside class folders"
                raise data_error(root, "class folders or a flat folder", got, "Move the images into a class.")
            try:
                folder = ImageFolder(str(root))
            except FileNotFoundError as error:
                raise data_error(root, "images in each class folder", error, "Remove empty folders.") from error
            prefix = len(os.path.join(root, ""))
            names, labels = [path[prefix:] for path, _ in folder.samples], folder.targets
            self.num_classes = len(folder.classes)
        self._files, self._labels = FileList(root, names), np.array(labels, np.int64)
        self._flags = FileFlags(len(names))
        self.image_shape: Shape = (channels, resolution, resolution)
        self.latent_shape: Shape = self.image_shape

    def _read(self, index: int) -> tuple[Tensor, Tensor | None, int]:
        image, composed = open_image(self._files.path(index))
        if composed:
            self._flags.set(index, FileFlags.COMPOSED)
        image = center_crop(image.convert("RGB" if self.image_shape[0] == 3 else "L"), self.image_shape[1])
        return to_tensor(image), None, int(self._labels[index])

    def fingerprint(self) -> str:
        """See :meth:`Source.fingerprint`."""
        return _digest([repr(self.image_shape).encode(), *self._files.parts(), self._labels.tobytes()])


class ArraySource(_InMemory):
    """Images that fit into memory, read once: an ``.npz`` file of ``images`` uint8 (N, C, S, S) and ``labels`` (N,).

    Args:
        path: the file, as ``numpy.savez(path, images=images, labels=labels)`` writes it.

    Raises:
        DataError: the file is damaged, lacks an array, or an array is of another kind or shape.
    """

    def __init__(self, path: str | Path) -> None:
        images, labels = (_read_npz(Path(path), name) for name in ("images", "labels"))
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape or images.shape[2] != images.shape[3]:
            raise data_error(path, "images uint8 (N, C, S, S)", f"{images.dtype} {images.shape}", "Convert the array.")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < 0:
            expected, got = f"labels, integers >= 0 ({len(images)},)", f"{labels.dtype} {labels.shape}"
            raise data_error(path, expected, got, "Give each image its class.")
        self._images, self._labels = torch.from_numpy(images), labels.astype(np.int64)
        self.num_classes = int(self._labels.max()) + 1
        self.image_shape: Shape = tuple(images.shape[1:])
        self.latent_shape: Shape = self.image_shape


class RepaSource(OfFiles):
    """REPA's layout: ``images/**`` (images or npy), ``vae-sd/**.npy``, labels in ``vae-sd/dataset.json``.

    Images and features are paired by their sorted names, as REPA pairs them; names need not be equal.

    Args:
        root: the folder that holds ``images`` and ``vae-sd``.

    Raises:
        DataError: a folder is missing or empty, the counts differ, a label is missing, a first file is bad.

    Source: REPA@67f7145:dataset.py, CustomDataset.
    """

    def __init__(self, root: str | Path) -> None:
        from PIL import Image

        Image.init()
        images, features = Path(root) / "images", Path(root) / "vae-sd"
        self._files = FileList(images, names_below(images, (*Image.EXTENSION, ".npy")))
        names = names_below(features, (".npy",))
        self._features = FileList(features, names)
        if len(self._files) != len(self._features):
            got = f"{len(self._files)} images and {len(self._features)} features"
            raise data_error(Path(root), "as many images as features", got, "Encode the images again.")
        self._labels = _read_labels(features / "dataset.json", names)
        self.num_classes = int(self._labels.max()) + 1
        self.image_shape: Shape = tuple(_read_image(self._files.path(0)).shape)
        channels, *sides = _read_moments(self._features.path(0)).shape
        self.latent_shape: Shape = (channels // 2, *sides)
        self._flags = FileFlags(len(names))

    def _read(self, index: int) -> tuple[Tensor, Tensor | None, int]:
        image_path, feature_path = self._files.path(index), self._features.path(index)
        image = _read_image(image_path)
        try:
            moments = _read_moments(feature_path)
        except UnreadableError:
            self._flags.set(index, FileFlags.LATENT)
            raise
        channels, *sides = self.latent_shape
        for path, tensor, shape in (
            (image_path, image, self.image_shape),
            (feature_path, moments, (2 * channels, *sides)),
        ):
            if tensor.shape != shape:
                do = "Bring all files to one size."
                raise data_error(path, f"{shape} as in the first file", tuple(tensor.shape), do)
        return image, moments, int(self._labels[index])

    def _named(self, index: int) -> Path:
        return (self._features if index in self._flags.indices(FileFlags.LATENT) else self._files).path(index)

    def fingerprint(self) -> str:
        """See :meth:`Source.fingerprint`."""
        return _digest([*self._files.parts(), *self._features.parts(), self._labels.tobytes()])


def open_source(data_dir: str | Path | None, resolution: int | None = None) -> Source:
    """Chooses a source: nothing, the digits; an ``.npz`` file; a folder with ``vae-sd`` in it, REPA's layout; else
    image folders.

    Args:
        data_dir: the data, or None.
        resolution: side of the images in pixels; None means 8 for the digits, as stored for a file and REPA's layout.

    Returns:
        The source.

    Raises:
        ConfigError: image folders without a resolution.
        DataError: nothing at ``data_dir``, unusable data, or stored images of another resolution.
    """
    if data_dir is None:
        return DigitsSource(8 if resolution is None else resolution)
    root = Path(data_dir)
    if root.suffix == ".npz":
        return _of_resolution(ArraySource(root), root, resolution)
    entries_of(root)
    if (root / "vae-sd").is_dir():
        return _of_resolution(RepaSource(root), root / "images", resolution)
    if resolution is None:
        do = "Name the side in pixels to which images are brought."
        raise ConfigError("resolution", expected="a number", got=None, do=do)
    return ImageFolderSource(root, resolution)


def _of_resolution(source: Source, where: Path, resolution: int | None) -> Source:
    if resolution is not None and source.image_shape[1:] != (resolution, resolution):
        got = f"{source.image_shape[1]}x{source.image_shape[2]}"
        raise data_error(where, f"{resolution}x{resolution} pixels", got, "Change the resolution.")
    return source


def all_images(source: Source, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """All images of a source in one tensor, for evaluation; files that cannot be read are left out.

    Args:
        source: see :class:`Source`.
        limit: at most so many, evenly spaced.

    Returns:
        Images uint8 (N, C, H, W) and labels int64 (N,).

    Raises:
        ConfigError: ``limit`` is not positive.
    """
    if limit is not None and limit < 1:
        raise ConfigError("limit", expected="a positive number", got=limit, do="Pass None for all.")
    indices = evenly_spaced(len(source), limit or len(source))
    bar = progress(indices, "reading images", unit="image", enabled=len(indices) >= MANY)
    items = [source.load(index) for index in bar]
    if unreadable := {*getattr(source, "unreadable", list)()}:  # another one stood in for it
        items = [item for index, item in zip(indices, items, strict=True) if index not in unreadable] or items
    return torch.stack([image for image, _, _ in items]), torch.tensor([label for _, _, label in items])


def _read_labels(path: Path, names: Sequence[str]) -> np.ndarray:
    try:
        labels = dict(json.loads(path.read_text(encoding="utf-8"))["labels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = '{"labels": [[file name, class], ...]}'
        raise data_error(path, expected, error, "Encode the images with their classes.") from error
    values = [labels.get(name.replace(os.sep, "/")) for name in names]
    for name, value in zip(names, values, strict=True):
        if type(value) is not int or value < 0:
            raise data_error(path, f"a class number >= 0 for {name}", value, "Encode the images again.")
    return np.array(values, np.int64)


def _read_image(path: Path) -> Tensor:
    if path.suffix.lower() != ".npy":
        return to_tensor(open_image(path, as_shown=False).image)  # as the latents beside it were encoded
    array = _read_array(path)
    if array.dtype != np.uint8 or array.ndim < 2:
        raise data_error(path, "uint8 (C, H, W)", f"{array.dtype} {array.shape}", "Convert the file.")
    return torch.from_numpy(array.reshape(-1, *array.shape[-2:]))


def _read_moments(path: Path) -> Tensor:
    array = _read_array(path)
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim != 3 or len(array) % 2 or array.dtype.kind != "f":
        expected = "floating [mean | std] moments (2C, H, W)"
        raise data_error(path, expected, f"{array.dtype} {array.shape}", "Encode the image again.")
    if not np.isfinite(array).all():
        raise data_error(path, "finite moments", "inf or nan", "Encode the image again.")
    return torch.from_numpy(array.astype(np.float32))


def _read_array(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of several arrays")
        return array
    except (OSError, ValueError, EOFError) as error:
        do = "Replace or remove the file."
        raise UnreadableError(str(path), expected="a readable npy file", got=error, do=do) from error


def _read_npz(path: Path, name: str) -> np.ndarray:
    try:
        # Opened here: numpy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise data_error(path, f"an npz file with an array {name!r}", error, "Write it with numpy.savez.") from error


def _digest(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def remarks_on(source: Source) -> list[Remark]:
    """What there is to say of the files that a source has read so far; of a source without files, nothing."""
    remarks: Callable[[], list[Remark]] = getattr(source, "remarks", list)
    return remarks()

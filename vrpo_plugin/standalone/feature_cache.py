"""A folder of encoder tokens of a whole data set, read by memory map while a run trains."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vrpo_plugin.errors import CheckpointError, ConfigError, DataError
from vrpo_plugin.files import write_file

MANIFEST, BASIS = "manifest.json", "basis.safetensors"
FORMAT = 1
CODES = 127  # an int8 code runs from -127 to 127


@dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """What a cache is of: another one of these is another cache.

    Attributes:
        encoder: names of the encoder(s), each with a hash of its weights.
        normalisation: of the pixels that each encoder sees: mean, std and side.
        resolution: side in pixels of the images.
        data: fingerprint of the data set.
        images: how many it has.
        grid: (h, w) of the tokens.
        dims: D of each encoder.
        flips: tokens of the mirrored images are there too.
        pca: components that are kept of each encoder's tokens, as int8; 0 keeps all of them, as fp16.
        shard_images: images of a shard; the last one may hold fewer.
    """

    encoder: str
    normalisation: list[Any]
    resolution: int
    data: str
    images: int
    grid: tuple[int, int]
    dims: tuple[int, ...]
    flips: bool
    pca: int
    shard_images: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Stored numbers per token of each encoder."""
        return tuple(min(self.pca, dim) if self.pca else dim for dim in self.dims)

    @property
    def item_shape(self) -> tuple[int, int, int]:
        """Stored for an image: (views, tokens, numbers); the second view is the mirrored one."""
        return 1 + self.flips, self.grid[0] * self.grid[1], sum(self.widths)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a stored number."""
        return np.dtype(np.int8 if self.pca else np.float16)

    @property
    def item_bytes(self) -> int:
        """Of an image."""
        return int(np.prod(self.item_shape)) * self.dtype.itemsize

    @property
    def shards(self) -> int:
        """Their number."""
        return -(-self.images // self.shard_images)

    def rows(self, shard: int) -> range:
        """Images of a shard."""
        return range(shard * self.shard_images, min(self.images, (shard + 1) * self.shard_images))

    def digest(self) -> str:
        """16 hex digits that change with any of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Basis:
    """Principal components of each encoder's tokens, and the steps of their int8 codes.

    Attributes:
        means: (D,) each.
        components: (K, D) each, orthonormal rows.
        steps: (K,) each: what one step of a code stands for.
    """

    means: tuple[Tensor, ...]
    components: tuple[Tensor, ...]
    steps: tuple[Tensor, ...]

    def to(self, device: torch.device) -> "Basis":
        """The same on a device."""
        return Basis(*(tuple(x.to(device) for x in part) for part in (self.means, self.components, self.steps)))

    def encode(self, tokens: tuple[Tensor, ...]) -> Tensor:
        """Tokens (B, N, D) to int8 codes (B, N, sum of K)."""
        parts = zip(tokens, self.means, self.components, self.steps, strict=True)
        codes = [((z - mean) @ components.T / step) for z, mean, components, step in parts]
        return torch.cat(codes, -1).round().clamp(-CODES, CODES).to(torch.int8)

    def decode(self, codes: Tensor) -> tuple[Tensor, ...]:
        """Codes back to tokens (B, N, D), in float32."""
        split = codes.float().split([len(step) for step in self.steps], -1)
        parts = zip(split, self.means, self.components, self.steps, strict=True)
        return tuple(mean + (code * step) @ components for code, mean, components, step in parts)

    def save(self, path: Path) -> None:
        """Writes the file."""
        from safetensors.torch import save

        named = {"mean": self.means, "components": self.components, "steps": self.steps}
        tensors = {f"{name}.{i}": x.cpu().contiguous() for name, part in named.items() for i, x in enumerate(part)}
        write_file(path, save(tensors))

    @classmethod
    def load(cls, path: Path) -> "Basis":
        """Reads the file.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
            count = len(tensors) // 3
            return cls(*(tuple(tensors[f"{n}.{i}"] for i in range(count)) for n in ("mean", "components", "steps")))
        except (OSError, SafetensorError, KeyError) as error:
            do = "Write the cache again with 'vrpo cache-features'."
            raise CheckpointError(str(path), expected="the basis of a cache", got=repr(error), do=do) from error


class FeatureCache:
    """Reads a finished cache that ``vrpo cache-features`` wrote.

    Args:
        folder: of the cache.

    Attributes:
        identity: what it is of.
        basis: None where the tokens are stored whole.

    Raises:
        DataError: there is no cache, it is not finished, or a shard is missing or of another size.
        CheckpointError: its basis is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None or "shards" not in manifest:
            got = "none" if manifest is None else "one that is not finished"
            do = "Run 'vrpo cache-features' to its end; it goes on where it was cut."
            raise DataError(str(self.folder), expected="a finished cache of features", got=got, do=do)
        self.identity = identity_of(manifest)
        self.hashes: tuple[str, ...] = tuple(manifest["shards"])
        for shard in range(self.identity.shards):
            check_shard(self.folder, self.identity, shard)
        self.basis = Basis.load(self.folder / BASIS) if self.identity.pca else None
        self._maps: dict[int, np.memmap[Any, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a data loader's process maps the files itself

    def __len__(self) -> int:
        return self.identity.images

    def read(self, index: int, flipped: bool = False) -> Tensor:
        """What is stored for an image: (tokens, numbers) in fp16 or int8; see :meth:`decode`.

        Args:
            index: of the image in the data set.
            flipped: of its mirror image.

        Raises:
            DataError: the cache has no mirrored images.
        """
        if flipped and not self.identity.flips:
            do = "Write a cache with flips, or train without them."
            raise DataError(str(self.folder), expected="tokens of mirrored images", got="a cache without", do=do)
        shard, row = divmod(index, self.identity.shard_images)
        if shard not in self._maps:
            shape = (len(self.identity.rows(shard)), *self.identity.item_shape)
            self._maps[shard] = np.memmap(shard_file(self.folder, shard), self.identity.dtype, mode="r", shape=shape)
        return torch.from_numpy(np.array(self._maps[shard][row, int(flipped)]))

    def decode(self, stored: Tensor) -> tuple[Tensor, ...]:
        """A batch of what :meth:`read` gave (B, tokens, numbers) to tokens (B, N, D) in float32, one per encoder."""
        if self.basis is None:
            return tuple(stored.float().split(self.identity.dims, -1))
        if self.basis.means[0].device != stored.device:
            self.basis = self.basis.to(stored.device)
        with torch.autocast(stored.device.type, enabled=False):
            return self.basis.decode(stored)

    def verify(self) -> None:
        """Compares every shard with its hash, which reads them all.

        Raises:
            DataError: one is damaged.
        """
        for shard, expected in enumerate(self.hashes):
            digest = hashlib.sha256()
            with shard_file(self.folder, shard).open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
            found = digest.hexdigest()
            if found != expected:
                do = "Delete it and run 'vrpo cache-features' again."
                raise DataError(str(shard_file(self.folder, shard)), expected=f"sha256 {expected}", got=found, do=do)

    def check(self, *, data: str, images: int, flips: bool) -> None:
        """Refuses a run on other images, or on mirrored ones that the cache has not.

        Raises:
            ConfigError: so it is.
        """
        own = self.identity
        if (own.data, own.images) != (data, images):
            got = f"a cache of {own.images} images with fingerprint {own.data}"
            expected, do = f"one of this data: {images} images, {data}", "Write one with 'vrpo cache-features'."
            raise ConfigError(str(self.folder), expected=expected, got=got, do=do)
        if flips and not own.flips:
            do = "Write a cache with flips, or take --flip-prob 0."
            raise ConfigError(str(self.folder), expected="tokens of mirrored images", got="a cache without", do=do)


def shard_file(folder: Path, shard: int) -> Path:
    """File of a shard: its array, row by row, without a header."""
    return folder / f"shard-{shard:06d}.bin"


def record_file(folder: Path, shard: int) -> Path:
    """File with what is known of a finished shard."""
    return folder / f"shard-{shard:06d}.json"


def check_shard(folder: Path, identity: CacheIdentity, shard: int) -> None:
    """Compares a shard's size.

    Raises:
        DataError: it is missing, or of another size.
    """
    path, expected = shard_file(folder, shard), len(identity.rows(shard)) * identity.item_bytes
    size = path.stat().st_size if path.exists() else None
    if size != expected:
        got = "no file" if size is None else f"{size} bytes"
        do = "Run 'vrpo cache-features' again: it writes what is missing."
        raise DataError(str(path), expected=f"{expected} bytes", got=got, do=do)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None without one.

    Raises:
        DataError: it is damaged, or of another version.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        identity_of(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        do = "Choose another folder, or delete this one."
        raise DataError(str(path), expected=f"a manifest of format {FORMAT}", got=repr(error), do=do) from error
    return manifest


def identity_of(manifest: Mapping[str, Any]) -> CacheIdentity:
    """The identity in a manifest."""
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']}")
    values = dict(manifest["identity"])
    return CacheIdentity(**values | {"grid": tuple(values["grid"]), "dims": tuple(values["dims"])})


def write_manifest(folder: Path, identity: CacheIdentity, **more: Any) -> None:
    """Writes the manifest; with ``shards=`` the hashes, it says that the cache is finished."""
    content = {"format": FORMAT, "identity": asdict(identity), **more}
    write_file(folder / MANIFEST, json.dumps(content, indent=1) + "\n")

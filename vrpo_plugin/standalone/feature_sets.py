"""Features of a set of images in several networks: extracted on all processes, kept in a file."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vrpo_plugin.errors import CheckpointError, DataError
from vrpo_plugin.files import write_file
from vrpo_plugin.standalone.extractors import LOGITS, POOL, Extractor
from vrpo_plugin.standalone.frechet import FeatureStatistics
from vrpo_plugin.standalone.image_sets import ImageSet
from vrpo_plugin.standalone.progress import progress

if TYPE_CHECKING:
    from accelerate import Accelerator

_METADATA = "vrpo_features"
_BUFFERED = 2048  # rows between two updates of the statistics


@dataclass(frozen=True, eq=False)
class Features:
    """What one network says of a set of images.

    Attributes:
        statistics: mean and covariance per part (``pool``, and ``spatial`` of Inception), over all images.
        pool: pooled features (n, D) float32, of all images or of evenly spaced ones; None where none are kept.
        logits: (n, classes) float32 of the same images, of Inception only.
    """

    statistics: Mapping[str, FeatureStatistics]
    pool: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """A set of images as several networks see it.

    Attributes:
        networks: features per network's name.
        count: images; None where an ADM file does not say.
        digest: 16 hexadecimal digits that change with any pixel and with the order, not with file names or formats.
        resolution: side of the images in pixels; None where a file of statistics does not say.
        record: how samples were made, as samples.json says it; empty for a reference.
    """

    networks: Mapping[str, Features]
    count: int | None
    digest: str
    resolution: int | None
    record: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, which :func:`load_features` reads."""
        tensors, networks = {}, []
        for number, (name, features) in enumerate(self.networks.items()):
            for part, statistics in features.statistics.items():
                tensors[f"{number}/{part}/mean"] = torch.from_numpy(statistics.mean)
                tensors[f"{number}/{part}/covariance"] = torch.from_numpy(statistics.covariance)
            rows = {POOL: features.pool, LOGITS: features.logits}
            tensors |= {f"{number}/{part}/rows": row for part, row in rows.items() if row is not None}
            networks.append({"name": name, "parts": list(features.statistics)})
        known = {key: getattr(self, key) for key in ("count", "digest", "resolution")}
        metadata = {"format": 1, "networks": networks, "record": dict(self.record), **known}
        write_file(path, save(tensors, metadata={_METADATA: json.dumps(metadata)}))


def load_features(path: str | os.PathLike[str]) -> FeatureSet:
    """Reads what :meth:`FeatureSet.save` wrote.

    Raises:
        DataError: there is no such file.
        CheckpointError: the file is damaged, or something else.
    """
    if not os.path.isfile(path):
        do = "Check the path."
        raise DataError(str(path), expected="a file of features", got="no such file", do=do)
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()[_METADATA])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        networks = {}
        for number, network in enumerate(metadata["networks"]):
            statistics = {
                part: FeatureStatistics(
                    state[f"{number}/{part}/mean"].numpy(),
                    state[f"{number}/{part}/covariance"].numpy(),
                    metadata["count"],
                )
                for part in network["parts"]
            }
            pool, logits = (state.get(f"{number}/{part}/rows") for part in (POOL, LOGITS))
            networks[network["name"]] = Features(statistics, pool, logits)
        known = {key: metadata[key] for key in ("count", "digest", "resolution", "record")}
        return FeatureSet(networks, **known)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            str(path),
            expected="a file written by vrpo eval --save-reference or --save-samples",
            got=f"{type(error).__name__}: {error}",
            do="Write it again; a network's weights belong to --network.",
        ) from error


class _Running:
    """Mean and covariance of rows that come in batches, in float64."""

    def __init__(self) -> None:
        self.count, self.mean, self.scatter = 0, np.zeros(0), np.zeros((0, 0))
        self._waiting: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= _BUFFERED:
            self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting).astype(np.float64)
        self._waiting.clear()
        mean = rows.mean(0)
        centred = rows - mean
        if not self.count:
            self.count, self.mean, self.scatter = len(rows), mean, centred.T @ centred
            return
        # Chan, Golub and LeVeque (1983): no difference of large sums.
        total, gap = self.count + len(rows), mean - self.mean
        self.scatter += centred.T @ centred + np.outer(gap, gap) * (self.count * len(rows) / total)
        self.mean += gap * (len(rows) / total)
        self.count = total

    def statistics(self) -> FeatureStatistics:
        self._merge()
        return FeatureStatistics(self.mean, self.scatter / (self.count - 1), self.count)


class _Items(Dataset[tuple[Tensor, Tensor] | DataError]):
    """Images with a hash of their pixels."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | DataError:
        try:
            image = self.images[index]
        except DataError as error:
            return error  # raised by a worker it would come with the worker's traceback, as one text
        digest = hashlib.sha256(image.numpy().tobytes()).digest()
        return image, torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def _collate(items: list[tuple[Tensor, Tensor] | DataError]) -> tuple[Tensor, Tensor] | DataError:
    read = []
    for item in items:
        if isinstance(item, DataError):
            return item
        read.append(item)
    return torch.stack([image for image, _ in read]), torch.stack([digest for _, digest in read])


def extract(
    images: ImageSet,
    networks: Sequence[Extractor],
    accelerator: "Accelerator",
    *,
    what: str,
    keep: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    record: Mapping[str, Any] | None = None,
) -> FeatureSet | None:
    """Features of all images in all networks; the images are read once.

    Each process takes every so many-th batch, and the first one gathers them in order, so that any number of
    processes gives the same features.

    Args:
        images: at least 2.
        networks: see :class:`Extractor`.
        accelerator: of the processes.
        what: the images' name beside the progress bar.
        keep: pooled features of at most so many evenly spaced images are kept; None keeps all.
        batch_size: images per call of a network on each process.
        num_workers: processes that read images, for each process; at most as many as there are CPU cores.
        record: how the images were made.

    Returns:
        The features, on the first process; None on the others.

    Raises:
        DataError: an image cannot be read, fewer than 2 images, or a feature is not finite.
    """
    count = len(images)
    if count < 2:
        raise DataError(what, expected="at least 2 images", got=count, do="Give more images.")
    taken = count if keep is None else min(keep, count)
    kept = {i * count // taken for i in range(taken)}
    running: dict[tuple[str, str], _Running] = {}
    rows: dict[tuple[str, str], list[Tensor]] = {}
    digest = hashlib.sha256()
    start, main = 0, accelerator.is_main_process
    with progress(count, what, unit="image", enabled=main) as bar:
        for values, digests in _gathered(images, networks, accelerator, batch_size, num_workers):
            size = len(digests)
            if main:
                digest.update(digests.numpy().tobytes())
                chosen = torch.tensor([i in kept for i in range(start, start + size)])
                for key, value in values.items():
                    if key[1] != LOGITS:
                        running.setdefault(key, _Running()).add(value.numpy())
                    if key[1] in (POOL, LOGITS):
                        rows.setdefault(key, []).append(value[chosen])
            start += size
            bar.update(size)
    if not main:
        return None
    found = {key: one.statistics() for key, one in running.items()}
    kept_rows = {key: torch.cat(parts) for key, parts in rows.items()}
    features = {
        one.name: Features(
            {part: value for (name, part), value in found.items() if name == one.name},
            kept_rows[one.name, POOL],
            kept_rows.get((one.name, LOGITS)),
        )
        for one in networks
    }
    return FeatureSet(features, count, digest.hexdigest()[:16], images.resolution, dict(record or {}))


def _gathered(
    images: ImageSet, networks: Sequence[Extractor], accelerator: "Accelerator", batch_size: int, num_workers: int
) -> Iterator[tuple[dict[tuple[str, str], Tensor], Tensor]]:
    """Each round's features of all processes in order, by network and part, with the hashes; on the CPU."""
    count, world = len(images), accelerator.num_processes
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    rounds = math.ceil(len(batches) / world)
    # A process without a batch in the last round repeats the first, which is left out again below.
    mine = [batches[i] if i < len(batches) else batches[0] for i in _positions(rounds, accelerator)]
    workers = min(num_workers, os.cpu_count() or 1)
    loader = DataLoader(_Items(images), batch_sampler=mine, num_workers=workers, collate_fn=_collate)  # type: ignore[arg-type]
    for number, batch in enumerate(loader):
        if isinstance(batch, DataError):
            raise batch
        pixels, digests = batch
        with torch.no_grad(), torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
            parts = {(one.name, part): value for one in networks for part, value in one.parts(pixels).items()}
        sizes = [value.shape[1] for value in parts.values()]
        whole = torch.cat([value.float() for value in parts.values()], 1)
        sent = (_padded(whole, batch_size), _padded(digests.to(whole.device), batch_size))
        everyone, hashes = (accelerator.gather(one).cpu() for one in sent) if world > 1 else (one.cpu() for one in sent)
        total = sum(len(batch) for batch in batches[number * world : (number + 1) * world])
        # All batches but the very last are full, so what is padding stands at the end.
        everyone = everyone[:total]
        if not everyone.isfinite().all():
            first = number * world * batch_size
            do = "Look at these images, and at the network's weights."
            got = f"NaN or infinity in images {first} to {first + total - 1}"
            raise DataError("features", expected="finite values", got=got, do=do)
        columns = everyone.split(sizes, 1)
        yield dict(zip(parts, columns, strict=True)), hashes[:total]


def _positions(rounds: int, accelerator: "Accelerator") -> range:
    world = accelerator.num_processes
    return range(accelerator.process_index, rounds * world, world)


def _padded(rows: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, size - len(rows)))


def file_digest(path: Path) -> str:
    """16 hexadecimal digits of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()[:16]

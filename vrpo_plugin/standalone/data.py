"""Training samples of which every random part is a pure function of (seed, position).

Position p = 0, 1, 2, ... counts the training samples since the start of a run, so a resumed run, another
number of processes and another number of workers see the same bytes.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.functional.interpolant import PATH_TYPES, PathType
from vrpo_plugin.standalone.source_files import data_error
from vrpo_plugin.standalone.sources import Source

TimeSampling = Literal["uniform", "lognormal"]
TIME_SAMPLINGS: tuple[str, ...] = get_args(TimeSampling)
LATENTS_SCALE = 0.18215


class StoredFeatures(Protocol):
    """What is stored of a source's images: a ``FeatureCache``, or a part of one."""

    def read(self, index: int, flipped: bool = False) -> Tensor:
        """Of an image, or of its mirror image."""
        ...


class TrainingSamples(Dataset[dict[str, Tensor]]):
    """Training samples by position; item p is a pure function of the source, the settings, the seed and p.

    Epoch e = p // n; the image is permutation_e[p mod n]. No setting moves the draws of another: a run
    without flips sees the same noise.

    Args:
        source: see :class:`Source`.
        seed: of everything random.
        flip_prob: chance of a horizontal flip; stored latents are never flipped.
        label_drop_prob: chance of ``drop`` (classifier-free guidance).
        time_sampling: ``uniform``, or ``lognormal``: sigma = exp(normal), t = sigma / (1 + sigma) on the
            linear path, (2 / pi) atan(sigma) on the cosine path.
        path_type: ``linear`` or ``cosine``.
        features: stored tokens of the images, mirrored with them; None without.

    Returns:
        Per item: ``image`` uint8 (C, H, W); ``x0`` float32, pixels in [-1, 1] or a latent drawn from the
        moments and scaled by 0.18215; ``noise`` float32 like ``x0``; ``t`` float32 () in [0, 1];
        ``y`` int64 (); ``drop`` bool (); ``features`` where they are stored.

    Raises:
        ConfigError: a setting is unknown or out of range.
        DataError: an item cannot be read or is not finite.

    Source: times as REPA@67f7145:loss.py, SILoss.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        flip_prob: float = 0.0,
        label_drop_prob: float = 0.1,
        time_sampling: TimeSampling = "uniform",
        path_type: PathType = "linear",
        features: StoredFeatures | None = None,
    ) -> None:
        for name, value in (("flip_prob", flip_prob), ("label_drop_prob", label_drop_prob)):
            if not 0 <= value <= 1:
                raise ConfigError(name, expected="a probability", got=value, do="Choose from 0 to 1.")
        for name, choice, choices in (
            ("time_sampling", time_sampling, TIME_SAMPLINGS),
            ("path_type", path_type, PATH_TYPES),
        ):
            if choice not in choices:
                raise ConfigError(name, expected=f"one of {choices}", got=repr(choice), do="Choose one.")
        self.source, self.seed, self.features = source, seed, features
        self.flip_prob, self.label_drop_prob = flip_prob, label_drop_prob
        self.time_sampling, self.path_type = time_sampling, path_type
        self._permutation: tuple[int, Tensor] | None = None

    def index(self, position: int) -> int:
        """Index in the source of the image at a position."""
        epoch, offset = divmod(position, len(self.source))
        if self._permutation is None or self._permutation[0] != epoch:
            generator = seeded_generator("epoch", self.seed, epoch)
            self._permutation = epoch, torch.randperm(len(self.source), generator=generator)
        return int(self._permutation[1][offset])

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        index = self.index(position)
        image, moments, label = self.source.load(index)
        generator = seeded_generator("sample", self.seed, position)
        flip, drop, uniform = torch.rand(3, generator=generator)
        normal = torch.randn((), generator=generator)
        noise = torch.randn(self.source.latent_shape, generator=generator)
        flipped = moments is None and bool(flip < self.flip_prob)
        if moments is None:
            image = image.flip(-1) if flipped else image
            x0 = image / 127.5 - 1
        else:
            mean, std = moments.chunk(2)
            x0 = (mean + std * torch.randn(mean.shape, generator=generator)) * LATENTS_SCALE
        if not x0.isfinite().all():
            raise data_error(f"sample {index}", "finite latents", "inf or nan", "Encode this image again.")
        stored = {} if self.features is None else {"features": self.features.read(index, flipped)}
        return {
            **stored,
            "image": image,
            "x0": x0,
            "noise": noise,
            "t": uniform if self.time_sampling == "uniform" else self._lognormal_time(normal),
            "y": torch.tensor(label),
            "drop": drop < self.label_drop_prob,
        }

    def _lognormal_time(self, normal: Tensor) -> Tensor:
        sigma = normal.exp()
        return sigma / (1 + sigma) if self.path_type == "linear" else 2 / math.pi * sigma.atan()


class PositionBatchSampler(Sampler[list[int]]):
    """One process's positions of micro step m: b = B / world_size of them, from m B + rank b on.

    Args:
        batch_size: B, samples of one micro step over all processes.
        num_batches: micro steps of the whole run.
        rank: this process.
        world_size: number of processes.
        start_batch: first micro step, for a resumed run.

    Raises:
        ConfigError: ``batch_size`` is not a multiple of ``world_size``, or a number is out of range.
    """

    def __init__(
        self, *, batch_size: int, num_batches: int, rank: int = 0, world_size: int = 1, start_batch: int = 0
    ) -> None:
        if world_size < 1 or batch_size < 1 or batch_size % world_size:
            expected = f"a positive multiple of the {world_size} processes"
            raise ConfigError("batch_size", expected=expected, got=batch_size, do="Change either.")
        if not (0 <= rank < world_size and 0 <= start_batch <= num_batches):
            got = f"rank {rank} of {world_size}, start_batch {start_batch} of {num_batches}"
            raise ConfigError("sampler", expected="numbers in range", got=got, do="Correct them.")
        self._batches = range(start_batch, num_batches)
        self._batch_size, self._rank, self._share = batch_size, rank, batch_size // world_size

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            first = batch * self._batch_size + self._rank * self._share
            yield list(range(first, first + self._share))


def seeded_generator(purpose: str, seed: int, number: int) -> torch.Generator:
    """A generator on the CPU that depends on the three alone."""
    digest = hashlib.blake2b(f"{purpose}/{int(seed)}/{int(number)}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

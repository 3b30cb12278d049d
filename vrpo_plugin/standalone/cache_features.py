"""Writing a cache of encoder tokens, shard by shard, on one process or several."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vrpo_plugin.config import describe_fields
from vrpo_plugin.encoders import FrozenEncoders, Targets
from vrpo_plugin.errors import ConfigError, DataError
from vrpo_plugin.files import write_file
from vrpo_plugin.standalone.feature_cache import (
    BASIS,
    CODES,
    Basis,
    CacheIdentity,
    check_shard,
    identity_of,
    read_manifest,
    record_file,
    shard_file,
    write_manifest,
)
from vrpo_plugin.standalone.sources import Source, open_source
from vrpo_plugin.standalone.targets import SMALL, load_targets

BASIS_IMAGES, SAMPLE_IMAGES = 1024, 64  # that the basis is made of, and that the first cosine is measured on


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Settings of :func:`cache_features`.

    Attributes:
        data: image folder, npz file of images and labels, or REPA's layout.
        output: folder of the cache; one that was cut is gone on with.
        encoder: timm's or REPA's name of the frozen encoder, several joined by commas; or ``small`` with its file.
        encoder_checkpoint: local weights, as many files as names, joined by commas; without it timm's are taken, from
            the local cache or by download.
        resolution: side in pixels to which an image folder's images are brought.
        pca: keep so many principal components of each encoder's tokens, as int8, in place of all channels as fp16; 0
            keeps all.
        flips: store the tokens of the mirrored images too.
        batch_size: images that each process encodes at once.
        num_workers: processes per process that read the images.
        shard_images: images of one file; a run that is killed loses the files that it was writing.

    Raises:
        ConfigError: a value is out of range.
    """

    data: str
    output: str
    encoder: str
    encoder_checkpoint: str | None = None
    resolution: int = 256
    pca: int = 0
    flips: bool = True
    batch_size: int = 64
    num_workers: int = 4
    shard_images: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("resolution", 1), ("pca", 0), ("batch_size", 1), ("num_workers", 0), ("shard_images", 1)):
            if getattr(self, name) < least:
                raise ConfigError(name, expected=f">= {least}", got=getattr(self, name), do="Correct it.")
        if self.encoder == SMALL and self.encoder_checkpoint is None:
            do = "Pass --encoder-checkpoint, or name an encoder of timm."
            raise ConfigError("encoder_checkpoint", expected=f"the file of the encoder {SMALL}", got=None, do=do)


class Images(Dataset[Tensor]):
    """Images of a source, without labels and latents."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, index: int) -> Tensor:
        return self.source.load(index)[0]


def option_texts() -> dict[str, str]:
    """What the docstring says of each setting, with its default."""
    (texts,) = describe_fields(CacheSettings).values()
    defaults = {f.name: f" (default: {f.default})" for f in fields(CacheSettings) if f.default is not MISSING}
    return {name: text + defaults.get(name, "") for name, text in texts.items()}


def cache_features(settings: CacheSettings) -> dict[str, Any]:
    """Writes the cache, or what is missing of it, and returns what is in the manifest beside its identity.

    On one process or under ``accelerate launch``; the files are the same bytes either way.

    Raises:
        ConfigError: the folder holds a cache of another encoder or data set, or of other settings; or a setting is out
            of range.
        DataError: the disk has not the space, or the data cannot be read.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    folder = Path(settings.output)
    source = open_source(settings.data, settings.resolution)
    with accelerator.main_process_first():
        targets = load_targets(
            settings.encoder, source, checkpoint=settings.encoder_checkpoint, device=accelerator.device
        )
    identity = identity_for(settings, source, targets)
    manifest = _claim(folder, identity)
    accelerator.wait_for_everyone()  # every process has looked before the first one writes
    if manifest is not None and "shards" in manifest and not _missing(folder, identity):
        return {**manifest, "new": 0}
    if accelerator.is_main_process:
        _refuse_full_disk(folder, identity)
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob("*.partial"):  # what a kill has left
            partial.unlink()
        write_manifest(folder, identity)
        if identity.pca and not (folder / BASIS).exists():
            fit_basis(identity, source, targets, accelerator.device, settings).save(folder / BASIS)
    accelerator.wait_for_everyone()
    basis = Basis.load(folder / BASIS).to(accelerator.device) if identity.pca else None
    missing = _missing(folder, identity)
    if accelerator.is_main_process:
        accelerator.print(_plan(identity, missing, _first_cosine(identity, source, targets, basis, accelerator)))
    accelerator.wait_for_everyone()  # the list of what is missing is made before anybody writes
    own = missing[accelerator.process_index :: accelerator.num_processes]
    _write_shards(folder, identity, source, targets, basis, own, settings, accelerator)
    accelerator.wait_for_everyone()
    records = [json.loads(record_file(folder, i).read_text("utf-8")) for i in range(identity.shards)]
    cosine = sum(r["cosine"] * len(identity.rows(i)) for i, r in enumerate(records)) / identity.images
    result = {
        "shards": [r["sha256"] for r in records],
        "cosine": cosine,
        "bytes": identity.images * identity.item_bytes,
    }
    if accelerator.is_main_process:
        write_manifest(folder, identity, **result)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return {**result, "new": len(missing)}


def identity_for(settings: CacheSettings, source: Source, targets: Targets) -> CacheIdentity:
    """What the settings make a cache of."""
    assert targets.identify is not None  # both kinds of encoders have it
    encoders = targets.encode.encoders if isinstance(targets.encode, FrozenEncoders) else ()
    return CacheIdentity(
        encoder=targets.identify(),
        normalisation=[encoder.normalisation for encoder in encoders],
        resolution=source.image_shape[-1],
        data=source.fingerprint(),
        images=len(source),
        grid=targets.grid,
        dims=targets.dims,
        flips=settings.flips,
        pca=settings.pca,
        shard_images=settings.shard_images,
    )


@torch.no_grad()
def fit_basis(
    identity: CacheIdentity, source: Source, targets: Targets, device: torch.device, settings: CacheSettings
) -> Basis:
    """Principal components of the tokens of evenly spaced images; every second one is mirrored, where flips are stored.

    The step of a component's code is its largest value over 127, in a quarter of these images.
    """
    wanted = [i * len(source) // min(len(source), BASIS_IMAGES) for i in range(min(len(source), BASIS_IMAGES))]

    def batches(every: int) -> Iterator[tuple[Tensor, ...]]:
        chosen = wanted[::every]
        size = settings.batch_size
        for n, images in enumerate(
            _loader(source, [chosen[i : i + size] for i in range(0, len(chosen), size)], settings)
        ):
            yield targets.encode(images.to(device).flip(-1) if n % 2 and identity.flips else images.to(device))

    count = 0
    sums = [torch.zeros(dim, dtype=torch.float64) for dim in identity.dims]
    squares = [torch.zeros(dim, dim, dtype=torch.float64) for dim in identity.dims]
    for tokens in batches(1):
        rows = [rearrange(z, "b n d -> (b n) d") for z in tokens]
        count += len(rows[0])
        for total, square, z in zip(sums, squares, rows, strict=True):
            total += z.sum(0).cpu()
            square += (z.T @ z).cpu()
    means = [total / count for total in sums]
    components = []
    for square, mean, width in zip(squares, means, identity.widths, strict=True):
        _, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
        components.append(vectors.flip(1)[:, :width].T.float().contiguous())
    basis = Basis(tuple(m.float() for m in means), tuple(components), tuple(torch.ones(len(c)) for c in components))
    largest = [torch.zeros(width) for width in identity.widths]
    on_device = basis.to(device)
    for tokens in batches(4):
        for i, z in enumerate(tokens):
            values = ((z - on_device.means[i]) @ on_device.components[i].T).abs().amax((0, 1)).cpu()
            largest[i] = torch.maximum(largest[i], values)
    return Basis(basis.means, basis.components, tuple(x.clamp(min=1e-6) / CODES for x in largest))


def _claim(folder: Path, identity: CacheIdentity) -> dict[str, Any] | None:
    """The manifest of a cache that is to be gone on with; refuses what is another."""
    manifest = read_manifest(folder)
    if manifest is None:
        if folder.exists() and any(folder.iterdir()):
            do = "Choose another --output."
            raise ConfigError(str(folder), expected="a new or empty folder, or a cache", got="other files", do=do)
        return None
    former, now = asdict(identity_of(manifest)), asdict(identity)
    unlike = [f"{key} {former[key]} then, {now[key]} now" for key in now if former[key] != now[key]]
    if unlike:
        do = "Use them, or choose another --output."
        raise ConfigError(
            str(folder), expected="the encoder, data and settings of this cache", got="; ".join(unlike), do=do
        )
    return manifest


def _missing(folder: Path, identity: CacheIdentity) -> list[int]:
    def is_there(shard: int) -> bool:
        try:
            check_shard(folder, identity, shard)
        except DataError:
            return False
        return record_file(folder, shard).exists()

    return [shard for shard in range(identity.shards) if not is_there(shard)]


def _refuse_full_disk(folder: Path, identity: CacheIdentity) -> None:
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    wanted = sum(len(identity.rows(shard)) for shard in _missing(folder, identity)) * identity.item_bytes
    free = shutil.disk_usage(place).free
    if wanted > free:
        do = "Take --pca, leave the flips out by --no-flips, or choose another disk."
        raise DataError(str(folder), expected=f"{_size(wanted)} of free space", got=_size(free), do=do)


def _loader(source: Source, batches: list[list[int]], settings: CacheSettings) -> DataLoader[Tensor]:
    return DataLoader(Images(source), batch_sampler=batches, num_workers=settings.num_workers)


def _stored(tokens: tuple[Tensor, ...], basis: Basis | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What is stored of tokens, and the tokens that a reader gets of it."""
    if basis is not None:
        codes = basis.encode(tokens)
        return codes, basis.decode(codes)
    half = torch.cat(tokens, -1).half()
    if not half.isfinite().all():
        do = "Take --pca, which scales them, or another encoder."
        raise DataError("tokens", expected="numbers that fp16 holds", got="larger ones, or none", do=do)
    return half, half.float().split([z.shape[-1] for z in tokens], -1)


def _cosine(tokens: tuple[Tensor, ...], read: tuple[Tensor, ...]) -> Tensor:
    """Mean over encoders and tokens, per image (B,)."""
    cosines = [F.cosine_similarity(z, r, dim=-1).mean(1) for z, r in zip(tokens, read, strict=True)]
    return torch.stack(cosines).mean(0)


@torch.no_grad()
def _first_cosine(
    identity: CacheIdentity, source: Source, targets: Targets, basis: Basis | None, accelerator: Any
) -> float:
    """Of a few images between those that the basis was made of, where there are such."""
    count = min(len(source), SAMPLE_IMAGES)
    indices = [(2 * i + 1) * len(source) // (2 * count) for i in range(count)]
    tokens = targets.encode(torch.stack([source.load(i)[0] for i in indices]).to(accelerator.device))
    return _cosine(tokens, _stored(tokens, basis)[1]).mean().item()


@torch.no_grad()
def _write_shards(
    folder: Path,
    identity: CacheIdentity,
    source: Source,
    targets: Targets,
    basis: Basis | None,
    shards: list[int],
    settings: CacheSettings,
    accelerator: Any,
) -> None:
    size = settings.batch_size
    of_shard = {
        shard: [list(identity.rows(shard)[i : i + size]) for i in range(0, len(identity.rows(shard)), size)]
        for shard in shards
    }
    images = iter(_loader(source, [batch for batches in of_shard.values() for batch in batches], settings))
    total = sum(len(identity.rows(shard)) for shard in shards)
    bar = tqdm(total=total, desc="images", disable=not accelerator.is_local_main_process)
    for shard, batches in of_shard.items():
        digest, cosines = hashlib.sha256(), []

        def write(file: IO[bytes], batches: list[list[int]] = batches) -> None:
            for batch in batches:
                pixels = next(images).to(accelerator.device)
                views, agreement = _views(pixels, identity, targets.encode, basis)
                content = views.cpu().numpy().tobytes()
                digest.update(content)  # noqa: B023  written before the loop goes on
                cosines.append(agreement.cpu())  # noqa: B023
                file.write(content)
                bar.update(len(batch))

        write_file(shard_file(folder, shard), write)
        record = {"sha256": digest.hexdigest(), "cosine": torch.cat(cosines).mean().item()}
        write_file(record_file(folder, shard), json.dumps(record) + "\n")
    bar.close()


def _views(
    pixels: Tensor, identity: CacheIdentity, encode: Callable[[Tensor], tuple[Tensor, ...]], basis: Basis | None
) -> tuple[Tensor, Tensor]:
    """What is stored of a batch (B, views, tokens, numbers), and its cosine to the original (B,)."""
    stored, cosines = [], []
    for view in (pixels, pixels.flip(-1))[: 1 + identity.flips]:
        tokens = encode(view)
        numbers, read = _stored(tokens, basis)
        stored.append(numbers)
        cosines.append(_cosine(tokens, read))
    return torch.stack(stored, 1), torch.stack(cosines).mean(0)


def _plan(identity: CacheIdentity, missing: list[int], cosine: float) -> str:
    views, tokens, numbers = identity.item_shape
    whole = views * tokens * sum(identity.dims) * 2
    return (
        f"{identity.images:,} images x {views} views x {tokens} tokens x {numbers} numbers of {identity.dtype}: "
        f"{_size(identity.item_bytes)} an image, {_size(identity.images * identity.item_bytes)} in all "
        f"({_size(identity.images * whole)} as fp16); mean cosine to the original {cosine:.4f} on a few images; "
        f"{len(missing)} of {identity.shards} files to write"
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

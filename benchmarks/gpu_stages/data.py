"""Images as arrays, made on the spot from a folder or an archive of image files, or from noise."""

import io
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from gpu_stages.stage import cpu_count
from vrpo_plugin.standalone.images import center_crop

File = tuple[str, bytes]  # name from train/ or test/ on, content
SPLITS = ("train", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
CHUNK = 500


def unpack(data: Path | None, resolution: int, output: Path, *, limit: int | None = None) -> Path:
    """Writes ``train.npz`` and ``test.npz`` for ``open_source``, unless they are there.

    Args:
        data: a folder with ``train/<class>/*`` and ``test/<class>/*``, or a tar archive of one; None makes noise, 512
            images of ten classes, for stages that only need pixels.
        resolution: side in pixels.
        output: folder to write to.
        limit: of each split at most so many images, evenly spaced.

    Returns:
        The folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    if all((output / f"{split}.npz").exists() for split in SPLITS):
        return output
    if data is None:
        rng = np.random.default_rng(0)
        for split in SPLITS:
            images = rng.integers(0, 256, (512, 3, resolution, resolution), dtype=np.uint8)
            np.savez(output / f"{split}.npz", images=images, labels=np.arange(512) % 10)
        return output
    files = sorted(_files(data))
    for split in SPLITS:
        chosen = [file for file in files if file[0].startswith(f"{split}/")]
        if limit is not None and len(chosen) > limit:
            chosen = [chosen[i * len(chosen) // limit] for i in range(limit)]
        classes = {name: number for number, name in enumerate(sorted({name.split("/")[1] for name, _ in chosen}))}
        labels = np.array([classes[name.split("/")[1]] for name, _ in chosen], np.int64)
        np.savez(output / f"{split}.npz", images=_decode([content for _, content in chosen], resolution), labels=labels)
    return output


def _files(data: Path) -> Iterator[File]:
    if data.is_dir():
        for split in SPLITS:
            for path in (data / split).glob("*/*"):
                if path.suffix.lower() in EXTENSIONS:
                    yield path.relative_to(data).as_posix(), path.read_bytes()
        return
    with tarfile.open(data) as archive:
        for member in archive:
            # Only names are taken from the archive, and nothing is written.
            parts = Path(member.name).parts[-3:]
            if member.isfile() and len(parts) == 3 and parts[0] in SPLITS:
                content = archive.extractfile(member)
                assert content is not None  # a file
                yield "/".join(parts), content.read()


def _decode(contents: list[bytes], resolution: int) -> np.ndarray:
    chunks = [(contents[i : i + CHUNK], resolution) for i in range(0, len(contents), CHUNK)]
    if len(chunks) < 3:
        return np.concatenate([_decode_chunk(*chunk) for chunk in chunks])
    with ProcessPoolExecutor(cpu_count()) as pool:
        return np.concatenate(list(pool.map(_decode_chunk, *zip(*chunks, strict=True))))


def _decode_chunk(contents: Iterable[bytes], resolution: int) -> np.ndarray:
    from PIL import Image

    crops = (center_crop(Image.open(io.BytesIO(content)).convert("RGB"), resolution) for content in contents)
    return np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops])

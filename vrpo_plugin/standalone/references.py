"""What samples are compared with, and the samples: images, ADM's reference files, or stored features."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vrpo_plugin.errors import ConfigError, DataError
from vrpo_plugin.standalone.extractors import INCEPTION, POOL, SPATIAL
from vrpo_plugin.standalone.feature_sets import Features, FeatureSet, file_digest, load_features
from vrpo_plugin.standalone.frechet import FeatureStatistics
from vrpo_plugin.standalone.image_sets import (
    RUN_SETTINGS,
    SAMPLES_RECORD,
    FolderImages,
    ImageSet,
    TrainingImages,
    array_names,
    open_images,
    read_array,
    samples_record,
)


@dataclass(frozen=True, eq=False)
class Images:
    """Images whose features are still to be extracted.

    Attributes:
        images: of one size.
        what: their name beside a progress bar.
        description: one line that says what they are.
        record: of samples, what samples.json says.
        statistics: of Inception's features, where an ADM file brings its own, which may be of more images.
        digest: of that file.
    """

    images: ImageSet
    what: str
    description: str
    record: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, FeatureStatistics] = field(default_factory=dict)
    digest: str | None = None

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""
        return self.images.resolution

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.images)


def open_samples(path: str) -> Images | FeatureSet:
    """Opens samples: a folder of images, an .npz file, or the .safetensors file that ``--save-samples`` wrote.

    Raises:
        DataError: there are none, they are incomplete, or another number or size than samples.json says.
        CheckpointError: the .safetensors file is something else.
    """
    if Path(path).suffix == ".safetensors":
        return _stored_samples(path)
    images, record = open_images(path), samples_record(path)
    if record.get("complete") is False:
        do = "Run vrpo sample again, which goes on where it stopped."
        raise DataError(path, expected="complete samples", got=f"complete: false in {SAMPLES_RECORD}", do=do)
    found = {"num_samples": len(images), "resolution": images.resolution}
    wrong = {key: value for key, value in found.items() if record.get(key, value) != value}
    if wrong:
        expected = f"{ {key: record[key] for key in wrong} }, as {SAMPLES_RECORD} says"
        raise DataError(path, expected=expected, got=wrong, do="Sample again into a new folder.")
    size = f"{images.resolution}x{images.resolution}"
    return Images(images, "features of samples", f"samples: {len(images)} images of {size} pixels in {path}", record)


def _stored_samples(path: str) -> FeatureSet:
    stored = load_features(path)
    for features in stored.networks.values():
        if features.pool is None or len(features.pool) != stored.count:
            kept = 0 if features.pool is None else len(features.pool)
            got, do = f"those of {kept}", "Write the samples' features by --save-samples."
            raise DataError(path, expected=f"features of all {stored.count} images", got=got, do=do)
    return stored


def open_reference(path: str, resolution: int | None) -> Images | FeatureSet:
    """Opens a reference: images in a folder or .npz file, ADM's statistics, a stored one, or a run's training images.

    Args:
        path: the folder or file.
        resolution: side in pixels of the samples; a folder's images are brought to it by ADM's centre crop. None
            takes all images as they are.

    Returns:
        Images, or their features.

    Raises:
        DataError: nothing at ``path``, or nothing that can be read.
        ConfigError: images of another size than the samples.
        CheckpointError: a .safetensors file is something else.
    """
    if Path(path).suffix == ".safetensors":
        stored = load_features(path)
        _check_resolution(path, stored.resolution, resolution)
        return stored
    if Path(path).suffix == ".npz" and Path(path).is_file() and "mu" in array_names(Path(path)):
        return _open_adm(Path(path), resolution)
    if (Path(path) / RUN_SETTINGS).is_file():
        trained = TrainingImages(Path(path))
        _check_resolution(path, trained.resolution, resolution)
        return Images(trained, "features of reference", f"reference: the {len(trained)} training images of {path}")
    images = open_images(path, resolution)
    _check_resolution(path, images.resolution, resolution)
    brought = "center-cropped to" if isinstance(images, FolderImages) and resolution is not None else "of"
    described = f"reference: {len(images)} images {brought} {images.resolution}x{images.resolution} pixels in {path}"
    return Images(images, "features of reference", described)


def _open_adm(path: Path, resolution: int | None) -> Images | FeatureSet:
    names, digest = array_names(path), file_digest(path)
    statistics = {POOL: FeatureStatistics.load(path)}
    if {"mu_s", "sigma_s"} <= set(names):
        statistics[SPATIAL] = FeatureStatistics(read_array(path, "mu_s"), read_array(path, "sigma_s"))
    if "arr_0" not in names:
        return FeatureSet({INCEPTION: Features(statistics)}, statistics[POOL].count, digest, None)
    images = open_images(path)
    _check_resolution(str(path), images.resolution, resolution)
    described = f"reference: statistics of Inception and {len(images)} images in {path}"
    return Images(images, "features of reference", described, statistics=statistics, digest=digest)


def with_statistics(found: FeatureSet, images: Images) -> FeatureSet:
    """Extracted features with the statistics that the file brought, in place of those of its images."""
    if not images.statistics:
        return found
    networks = {
        name: dataclasses.replace(features, statistics=images.statistics) if is_inception(name) else features
        for name, features in found.networks.items()
    }
    count = images.statistics[POOL].count
    return dataclasses.replace(found, networks=networks, count=count, digest=images.digest or found.digest)


def holds(stored: FeatureSet, name: str) -> bool:
    """Whether stored features are of a network; ADM's files are of Inception and do not say which weights."""
    return name in stored.networks or (INCEPTION in stored.networks and is_inception(name))


def of_networks(one: Images | FeatureSet, names: Sequence[str], path: str) -> Images | FeatureSet:
    """Stored features of exactly these networks; images are returned as they are.

    Raises:
        ConfigError: the features of a network are missing.
    """
    if isinstance(one, Images):
        return one
    if missing := [name for name in names if not holds(one, name)]:
        expected = f"a feature network that the file is of: {', '.join(one.networks)}"
        do = "Give that network by --network, or a folder of images in place of the file."
        raise ConfigError(path, expected=expected, got=", ".join(missing), do=do)
    return dataclasses.replace(
        one, networks={name: one.networks.get(name) or one.networks[INCEPTION] for name in names}
    )


def is_inception(name: str) -> bool:
    """Whether a network's name is of an Inception."""
    return name.startswith(f"{INCEPTION}-")


def _check_resolution(path: str, found: int | None, wanted: int | None) -> None:
    if found is not None and wanted is not None and found != wanted:
        do = "Give a reference of that size, or a folder of images, which are cropped to it."
        raise ConfigError(path, expected=f"images of {wanted}x{wanted} pixels, as the samples", got=found, do=do)

"""What ``vrpo eval`` is told, and what it writes on every number."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vrpo_plugin._version import __version__
from vrpo_plugin.errors import ConfigError, DataError
from vrpo_plugin.settings import build
from vrpo_plugin.standalone.evaluate import UNKNOWN, EvalProtocol
from vrpo_plugin.standalone.feature_sets import FeatureSet
from vrpo_plugin.standalone.image_sets import SAMPLES_RECORD

KERNEL_SUBSET_SIZE = 1000


@dataclass(frozen=True)
class EvalSettings:
    """What ``vrpo eval`` is told; see its ``--help``.

    Raises:
        ConfigError: a number is out of range, or there are samples to write without samples.
    """

    reference: str
    samples: str | None = None
    networks: tuple[str, ...] = ()
    resolution: int | None = None
    reference_features: int = 10_000
    k: int = 3
    batch_size: int = 64
    num_workers: int = 4
    results: str | None = None
    baseline: str | None = None
    save_reference: str | None = None
    save_samples: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "networks", tuple(self.networks))
        least = {"reference_features": self.k + 1, "k": 1, "batch_size": 1, "num_workers": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(option, expected=f">= {bound}", got=getattr(self, name), do="Correct it.")
        if self.samples is None and (self.save_reference is None or self.save_samples or self.baseline):
            expected = "a folder or file of samples; without one, --save-reference alone"
            raise ConfigError("SAMPLES", expected=expected, got="none", do="Name the samples.")

    @property
    def results_path(self) -> Path:
        """Where the results go: ``evaluations.jsonl`` in the samples' folder, or beside their file."""
        if self.results is not None:
            return Path(self.results)
        samples = Path(self.samples or ".")
        return samples / "evaluations.jsonl" if samples.is_dir() else samples.with_suffix(".evaluations.jsonl")


def protocol_of(name: str, real: FeatureSet, generated: FeatureSet, settings: EvalSettings) -> EvalProtocol:
    """Everything that moves the numbers of one feature network and is not the model."""
    ours, theirs = generated.networks[name].pool, real.networks[name].pool
    rows = [len(one) for one in (ours, theirs) if one is not None]
    values = {
        "num_samples": generated.count,
        "feature_network": name,
        "reference": settings.reference,
        "num_reference": real.count,
        "k": settings.k,
        "reference_hash": real.digest,
        "reference_features": None if theirs is None else len(theirs),
        "kernel_subset_size": min(KERNEL_SUBSET_SIZE, *rows) if len(rows) == 2 else None,
        "resolution": generated.resolution,
    }
    return build(EvalProtocol, _made(generated.record) | values, SAMPLES_RECORD)


def check_counts(settings: EvalSettings, samples: int | None, reference: int | None) -> None:
    """Refuses sets that are too small; None is not known.

    Raises:
        DataError: not more than ``settings.k`` images in one of them.
    """
    for what, count in (("samples", samples), ("reference images", reference)):
        if count is not None and count <= settings.k:
            do = "Give more images, or a smaller --k."
            raise DataError(what, expected=f"more than k = {settings.k}", got=count, do=do)


def check_record(record: Mapping[str, Any]) -> None:
    """Refuses what samples.json says before an image is read for its features.

    Raises:
        ConfigError: a value is of another kind, or out of range.
    """
    rest = {"num_samples": 100, "feature_network": "", "reference": "", "num_reference": 100}
    build(EvalProtocol, _made(record) | rest, SAMPLES_RECORD)


def _made(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a protocol that say how the samples were made; unknown ones where there is no record."""
    numbers = ("num_steps", "guidance_scale", "guidance_interval", "ema", "seed")
    made = {key: record.get(key) for key in numbers}
    return made | {key: _text(record, key) for key in ("solver", "labels", "guide", "mixed_precision")}


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key, UNKNOWN)
    if value is None:  # as samples.json writes it: no guide
        return "none"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def origin_of(generated: FeatureSet, settings: EvalSettings) -> dict[str, Any]:
    """What was evaluated, when, and the settings that evaluate it again."""
    again = ("reference", "samples", "networks", "resolution", "reference_features", "k", "batch_size")
    told = {name: getattr(settings, name) for name in again}
    told |= {name: os.path.abspath(told[name]) for name in ("reference", "samples")}
    told["networks"] = [_absolute(spec) for spec in settings.networks]
    model = {key: generated.record.get(key) for key in ("model", "checkpoint_sha256", "step")}
    return {
        **model,
        "samples_hash": generated.digest,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "vrpo_plugin": __version__,
        "settings": told,
    }


def _absolute(spec: str) -> str:
    """A network's option with its file's path from the root."""
    name, equals, file = spec.rpartition("=")
    if os.path.isfile(spec):
        return os.path.abspath(spec)
    return f"{name}={os.path.abspath(file)}" if equals else spec

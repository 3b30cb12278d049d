"""``vrpo eval``: samples against a reference, in one or several feature networks, on all processes."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.standalone.evaluate import (
    EvalProtocol,
    EvalResult,
    append_results,
    frechet_ratios,
    read_results,
)
from vrpo_plugin.standalone.extractors import ENCODER_RESOLUTION, INCEPTION, POOL, SPATIAL, Extractor, open_extractors
from vrpo_plugin.standalone.feature_sets import Features, FeatureSet, extract
from vrpo_plugin.standalone.frechet import frechet_distance
from vrpo_plugin.standalone.metrics import inception_score, kernel_distance
from vrpo_plugin.standalone.precision_recall import precision_recall
from vrpo_plugin.standalone.progress import progress
from vrpo_plugin.standalone.references import (
    Images,
    holds,
    is_inception,
    of_networks,
    open_reference,
    open_samples,
    with_statistics,
)
from vrpo_plugin.standalone.stamp import EvalSettings, check_counts, check_record, origin_of, protocol_of

if TYPE_CHECKING:
    from accelerate import Accelerator

KERNEL_SUBSETS = 100
SPLITS = 10


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        results: one per feature network; none on processes other than the first.
        path: the file that they were added to.
        ratios: Frechet distances divided by the baseline's, by network.
    """

    results: tuple[EvalResult, ...] = ()
    path: Path | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)


def run_evaluation(settings: EvalSettings, say: Callable[[str], object] = lambda line: None) -> Evaluation:
    """Measures samples against a reference, and adds the results to a file.

    Runs on one process or under ``accelerate launch``; every process calls it. Everything that can be refused is
    refused before the first image is read for its features.

    Args:
        settings: see :class:`EvalSettings`.
        say: called on the first process with lines that say what is being done.

    Returns:
        The results; with a baseline, the ratios.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsNotFoundError: a setting, an image, a file or a network cannot
            be used, or the baseline's protocol is another.
    """
    from accelerate import Accelerator

    _check_outputs(settings)
    samples = None if settings.samples is None else open_samples(settings.samples)
    given = None if samples is None else samples.resolution
    check_record({} if samples is None else samples.record)
    if settings.resolution is not None and given is not None and given != settings.resolution:
        do = "Leave --resolution out, or sample at that size: samples are never resized."
        raise ConfigError("--resolution", expected=f"{given}, that of the samples", got=settings.resolution, do=do)
    reference = open_reference(settings.reference, given or settings.resolution)
    check_counts(settings, None if samples is None else samples.count, reference.count)
    accelerator = Accelerator()
    heard = say if accelerator.is_main_process else lambda line: None
    done = _evaluate(settings, samples, reference, accelerator, heard)
    accelerator.end_training()
    return done


def _evaluate(
    settings: EvalSettings,
    samples: Images | FeatureSet | None,
    reference: Images | FeatureSet,
    accelerator: "Accelerator",
    say: Callable[[str], object],
) -> Evaluation:
    networks = _open_networks(settings, samples, reference, accelerator)
    names = [one if isinstance(one, str) else one.name for one in networks]
    reference = of_networks(reference, names, settings.reference)
    samples = None if samples is None else of_networks(samples, names, settings.samples or "")
    baseline = [] if settings.baseline is None else _read_baseline(settings.baseline, names)
    real = _features(reference, networks, settings, accelerator, say, keep=settings.reference_features)
    if settings.save_reference is not None and real is not None:
        real.save(settings.save_reference)
        say(f"wrote {settings.save_reference}: statistics of {real.count} images in {', '.join(real.networks)}")
    generated = None if samples is None else _features(samples, networks, settings, accelerator, say, keep=None)
    if real is None or generated is None:  # no samples, or not the first process
        return Evaluation()
    if settings.save_samples is not None:
        generated.save(settings.save_samples)
        say(f"wrote {settings.save_samples}: features of {generated.count} samples")
    specs = dict(zip(names, settings.networks or (INCEPTION,), strict=False))
    results = tuple(
        _measure(name, real, generated, settings, accelerator.device, specs.get(name, name)) for name in names
    )
    append_results(settings.results_path, results)
    return Evaluation(results, settings.results_path, frechet_ratios(baseline, results) if baseline else {})


def _check_outputs(settings: EvalSettings) -> None:
    new = {"--save-reference": settings.save_reference, "--save-samples": settings.save_samples}
    for option, path in new.items():
        if path is None:
            continue
        if os.path.exists(path):
            raise ConfigError(option, expected="a new file", got=f"{path}, which exists", do="Choose another name.")
        if not path.endswith(".safetensors"):
            raise ConfigError(option, expected="a name that ends in .safetensors", got=path, do="Correct it.")
    folders = [Path(path).parent for path in new.values() if path is not None]
    if settings.samples is not None:
        folders.append(settings.results_path.parent)
    for folder in folders:
        if not os.access(folder, os.W_OK | os.X_OK):
            do = "Make it, or choose another file by --results, --save-reference or --save-samples."
            raise ConfigError(str(folder), expected="a folder that can be written", got="none", do=do)


def _open_networks(
    settings: EvalSettings,
    samples: Images | FeatureSet | None,
    reference: Images | FeatureSet,
    accelerator: "Accelerator",
) -> Sequence[Extractor | str]:
    """The feature networks; their names alone where both sides are features already."""
    stored = [one for one in (samples, reference) if isinstance(one, FeatureSet)]
    if not settings.networks:
        shared = [name for name in (stored[0].networks if stored else ()) if all(holds(one, name) for one in stored)]
        if isinstance(samples, FeatureSet) and isinstance(reference, FeatureSet) and shared:
            return shared
        if stored and not any(name == INCEPTION or is_inception(name) for name in shared):
            expected = f"the network that the stored features are of ({', '.join(stored[0].networks)})"
            do = "Name its file, or timm's name for it."
            raise ConfigError("--network", expected=expected, got="none", do=do)
    resolution = next((one.resolution for one in (samples, reference) if one is not None and one.resolution), None)
    if resolution is None:  # two files of features
        resolution = ENCODER_RESOLUTION
    with accelerator.local_main_process_first():  # one process downloads
        return open_extractors(settings.networks or (INCEPTION,), resolution=resolution, device=str(accelerator.device))


def _read_baseline(path: str, names: Sequence[str]) -> list[EvalResult]:
    baseline = read_results(path)
    found = {one.protocol.feature_network for one in baseline}
    if missing := [name for name in names if name not in found]:
        do = "Evaluate the baseline in the same networks, with the same --reference."
        raise ConfigError(path, expected=f"results of {', '.join(missing)}", got=", ".join(sorted(found)), do=do)
    return baseline


def _features(
    one: Images | FeatureSet,
    networks: Sequence[Extractor | str],
    settings: EvalSettings,
    accelerator: "Accelerator",
    say: Callable[[str], object],
    *,
    keep: int | None,
) -> FeatureSet | None:
    """Features as they are stored, or extracted now; None on all processes but the first."""
    if isinstance(one, FeatureSet):
        return one if accelerator.is_main_process else None
    say(one.description)
    opened = [network for network in networks if isinstance(network, Extractor)]
    found = extract(
        one.images,
        opened,
        accelerator,
        what=one.what,
        keep=keep,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        record=one.record,
    )
    return None if found is None else with_statistics(found, one)


def _measure(
    name: str, real: FeatureSet, generated: FeatureSet, settings: EvalSettings, device: torch.device, spec: str
) -> EvalResult:
    ours, theirs = generated.networks[name], real.networks[name]
    protocol = protocol_of(name, real, generated, settings)
    parts = [part for part in (POOL, SPATIAL) if part in ours.statistics and part in theirs.statistics]
    distances = {}
    for part in progress(parts, f"Frechet distance ({name})", unit="distance"):
        distances[part] = frechet_distance(theirs.statistics[part], ours.statistics[part])
    measured: dict[str, Any] = {"precision": None, "recall": None} | _neighbours(name, ours, theirs, protocol, device)
    if ours.logits is not None:
        score = inception_score(ours.logits, splits=min(SPLITS, len(ours.logits)))
        measured |= {"inception_score": score.mean, "inception_score_std": score.std}
    return EvalResult(
        protocol,
        distances[POOL],
        spatial_frechet_distance=distances.get(SPATIAL),
        origin={"network": spec, **origin_of(generated, settings)},
        **measured,
    )


def _neighbours(
    name: str, ours: Features, theirs: Features, protocol: EvalProtocol, device: torch.device
) -> dict[str, float]:
    """Precision, recall and kernel distance: what needs the reference's features, not their statistics alone."""
    if ours.pool is None or theirs.pool is None or protocol.kernel_subset_size is None:
        return {}
    generated, real = ours.pool.to(device), theirs.pool.to(device)
    with progress(KERNEL_SUBSETS, f"kernel distance ({name})", unit="subset") as bar:
        kernel = kernel_distance(
            generated, real, subsets=KERNEL_SUBSETS, subset_size=protocol.kernel_subset_size, on_subset=bar.update
        )
    with progress(len(real) + 2 * len(generated), f"precision and recall ({name})", unit="row") as bar:
        both = precision_recall(real, generated, k=protocol.k, on_rows=bar.update)
    return {**asdict(both), "kernel_distance": kernel.mean, "kernel_distance_std": kernel.std}

"""How samples were made and measured, written on every result, so that only like is compared with like."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.settings import build
from vrpo_plugin.standalone.features import FeatureNetwork, extract_features
from vrpo_plugin.standalone.frechet import FeatureStatistics, frechet_distance
from vrpo_plugin.standalone.precision_recall import precision_recall

UNKNOWN = "unknown"


@dataclass(frozen=True)
class EvalProtocol:
    """Everything that moves a Frechet distance and is not the model.

    Attributes:
        solver: ``euler``, ``heun``, ``sde``, ...
        num_steps: solver steps.
        num_samples: generated images.
        feature_network: name of the network, with a hash or file of its weights; see its ``name``.
        reference: which real images.
        num_reference: how many of them.
        guidance_scale: 1 is without guidance.
        guidance_interval: times in [0, 1] (0 = data) at which guidance acts.
        ema: False for the raw weights, True or the decay for averaged ones.
        labels: ``balanced``, ``uniform``, ``data``, ``none``, ...: how the labels were chosen.
        seed: of the sampling noise.
        k: neighbours of precision and recall.
        reference_hash: of the real images' pixels, or of the file of their statistics.
        reference_features: how many real images kernel distance, precision and recall were measured with.
        kernel_subset_size: samples per subset of the kernel distance.
        resolution: side of the images in pixels.
        guide: settings of the reward guide, or ``none``.
        mixed_precision: that the sampler computed in: ``no``, ``bf16``, ``fp16``.

    None, or ``unknown`` for a text, says that nothing is known; such values are equal only to each other.

    Raises:
        ConfigError: a value is out of range.
    """

    solver: str
    num_steps: int | None
    num_samples: int
    feature_network: str
    reference: str
    num_reference: int | None
    guidance_scale: float | None = 1.0
    guidance_interval: tuple[float, float] | None = (0.0, 1.0)
    ema: bool | float | None = True
    labels: str = "balanced"
    seed: int | None = 0
    k: int = 3
    reference_hash: str = UNKNOWN
    reference_features: int | None = None
    kernel_subset_size: int | None = None
    resolution: int | None = None
    guide: str = "none"
    mixed_precision: str = UNKNOWN

    def __post_init__(self) -> None:
        if self.guidance_interval is not None:
            object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        start, end = self.guidance_interval or (0, 1)
        ranges = {
            "num_steps": (self.num_steps is None or self.num_steps >= 1, ">= 1"),
            "num_samples": (self.num_samples > self.k, f"> k = {self.k}"),
            "num_reference": (self.num_reference is None or self.num_reference > self.k, f"> k = {self.k}"),
            "guidance_scale": (self.guidance_scale is None or self.guidance_scale >= 0, ">= 0"),
            "guidance_interval": (0 <= start <= end <= 1, "0 <= start <= end <= 1"),
            "ema": (self.ema is None or 0 <= self.ema <= 1, "a bool, or a decay in [0, 1]"),
            "k": (self.k >= 1, ">= 1"),
        }
        for name, (valid, expected) in ranges.items():
            if not valid:
                raise ConfigError(name, expected=expected, got=getattr(self, name), do="Correct the protocol.")

    @property
    def name(self) -> str:
        """Short name of the metric, such as ``fd2k_euler50_cfg1.0``; :func:`compare` checks the rest."""
        thousands, rest = divmod(self.num_samples, 1000)
        count = str(self.num_samples) if rest else f"{thousands}k"
        start, end = self.guidance_interval or (0, 1)
        guidance = "" if self.guidance_scale is None else f"_cfg{float(self.guidance_scale)}"
        interval = "" if (start, end) == (0, 1) or self.guidance_scale in (1, None) else f"_t{start:g}-{end:g}"
        return f"fd{count}_{self.solver}{self.num_steps or ''}{guidance}{interval}"

    @property
    def unknown(self) -> list[str]:
        """Names of the fields that say how the samples were made, where nothing is known."""
        made = ("solver", "num_steps", "guidance_scale", "guidance_interval", "ema", "labels", "seed", "guide")
        return [name for name in (*made, "mixed_precision") if getattr(self, name) in (None, UNKNOWN)]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        interval = self.guidance_interval
        return asdict(self) | {"guidance_interval": None if interval is None else list(interval)}


@dataclass(frozen=True)
class EvalResult:
    """What one feature network measured, with the protocol it was measured under.

    Attributes:
        protocol: how the samples were made and measured.
        frechet_distance: FID where the network is Inception.
        precision, recall: None where the reference has statistics only.
        kernel_distance, kernel_distance_std: KID where the network is Inception; None likewise.
        spatial_frechet_distance: sFID; of Inception alone.
        inception_score, inception_score_std: of Inception alone.
        origin: what was evaluated, when, and by which command: the samples' folder and hash, the model, its step.
    """

    protocol: EvalProtocol
    frechet_distance: float
    precision: float | None
    recall: float | None
    kernel_distance: float | None = None
    kernel_distance_std: float | None = None
    spatial_frechet_distance: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The measured numbers by name."""
        names = (f.name for f in fields(self) if f.name not in ("protocol", "origin"))
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to_json(self, *, indent: int | None = 2) -> str:
        """The result and its protocol, one JSON object; of one line if ``indent`` is None."""
        return json.dumps(asdict(self) | {"protocol": self.protocol.to_dict()}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> "EvalResult":
        """Reads what :meth:`to_json` wrote.

        Raises:
            ConfigError: the text is something else.
        """
        try:
            return build(cls, json.loads(text), "evaluation result")
        except (json.JSONDecodeError, ConfigError) as error:
            raise ConfigError(
                "evaluation result",
                expected="the JSON that EvalResult.to_json wrote",
                got=f"{type(error).__name__}: {error}",
                do="Evaluate again with this version.",
            ) from error


def compare(a: EvalResult, b: EvalResult) -> dict[str, float]:
    """Differences b - a of two results that were measured alike.

    Args:
        a: the baseline.
        b: the other.

    Returns:
        ``frechet_distance``, ``precision``, ``recall`` and what else both measured, each b - a.

    Raises:
        ConfigError: the protocols differ; every differing field is named. The reference's name may differ where its
            hash is known to be the same.
    """
    ours, theirs = a.protocol.to_dict(), b.protocol.to_dict()
    if ours["reference_hash"] == theirs["reference_hash"] != UNKNOWN:
        del ours["reference"]
    unlike = [f"{name} ({ours[name]} and {theirs[name]})" for name in ours if ours[name] != theirs[name]]
    if unlike:
        raise ConfigError(
            "compare",
            expected="two results of one protocol",
            got=f"different {', '.join(unlike)}",
            do="Evaluate both under one protocol.",
        )
    measured = a.metrics
    return {name: value - measured[name] for name, value in b.metrics.items() if name in measured}


def frechet_ratios(baseline: Iterable[EvalResult], results: Iterable[EvalResult]) -> dict[str, float]:
    """Frechet distance of each result divided by the baseline's in the same feature network.

    An improvement in one network that the others do not see is no improvement of the images: their geometric mean
    (``statistics.geometric_mean``) is the summary.

    Args:
        baseline: one or more results per network; the last of each counts.
        results: one per network.

    Returns:
        Ratios by name of the network; under 1 is better than the baseline.

    Raises:
        ConfigError: a network that the baseline lacks, a distance of 0 in it, or different protocols.
    """
    former = {one.protocol.feature_network: one for one in baseline}
    ratios = {}
    for one in results:
        name = one.protocol.feature_network
        if name not in former or former[name].frechet_distance <= 0:
            raise ConfigError(
                "baseline",
                expected=f"a Frechet distance above 0 in {name}",
                got=f"results of {', '.join(former) or 'no network'}",
                do="Evaluate the baseline in the same networks.",
            )
        compare(former[name], one)
        ratios[name] = one.frechet_distance / former[name].frechet_distance
    return ratios


def append_results(path: str | os.PathLike[str], results: Iterable[EvalResult]) -> None:
    """Adds results to a file, one JSON object per line; nothing in it is replaced."""
    text = "".join(one.to_json(indent=None) + "\n" for one in results)
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            # A line that a full disk cut off stays a line of its own.
            text = text if file.read(1) == b"\n" else f"\n{text}"
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_results(path: str | os.PathLike[str]) -> list[EvalResult]:
    """Reads an evaluation.json of a run's folder, or an evaluations.jsonl, in order.

    Raises:
        ConfigError: the file is missing, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        do = "Check the path."
        raise ConfigError(str(path), expected="a file of results", got=error, do=do) from error
    try:
        return [EvalResult.from_json(text)]
    except ConfigError:
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines or not lines[0].rstrip().endswith("}"):
            raise
        return [EvalResult.from_json(line) for line in lines]


def evaluate(
    network: FeatureNetwork,
    real_images: Tensor | Iterable[Tensor],
    generated_images: Tensor | Iterable[Tensor],
    protocol: EvalProtocol,
) -> EvalResult:
    """Frechet distance, precision and recall of generated images.

    Args:
        network: images uint8 (B, C, H, W) -> features (B, D).
        real_images: the reference, one tensor or batches.
        generated_images: the samples, likewise.
        protocol: how they were made; what it says of counts and network is checked.

    Returns:
        The result, stamped with the protocol.

    Raises:
        ConfigError: another number of images, or another network, than the protocol says.
        DataError: a feature is not finite.
    """
    real, generated = extract_features(network, real_images), extract_features(network, generated_images)
    found: dict[str, object] = {"num_samples": len(generated), "num_reference": len(real)}
    if isinstance(name := getattr(network, "name", None), str):
        found["feature_network"] = name
    promised = protocol.to_dict()
    wrong = {key: value for key, value in found.items() if promised[key] != value}
    if wrong:
        raise ConfigError(
            "evaluate",
            expected={key: promised[key] for key in wrong},
            got=wrong,
            do="Correct the protocol, or what is evaluated.",
        )
    distance = frechet_distance(FeatureStatistics.from_features(real), FeatureStatistics.from_features(generated))
    neighbourhoods = precision_recall(real, generated, k=protocol.k)
    return EvalResult(protocol, distance, neighbourhoods.precision, neighbourhoods.recall)

"""How samples were made and measured, written on every result, so that only like is compared with like."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.settings import build
from vrpo_plugin.standalone.features import FeatureNetwork, extract_features
from vrpo_plugin.standalone.frechet import FeatureStatistics, frechet_distance
from vrpo_plugin.standalone.precision_recall import precision_recall


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

    Raises:
        ConfigError: a value is out of range.
    """

    solver: str
    num_steps: int
    num_samples: int
    feature_network: str
    reference: str
    num_reference: int
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    ema: bool | float = True
    labels: str = "balanced"
    seed: int = 0
    k: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        start, end = self.guidance_interval
        ranges = {
            "num_steps": (self.num_steps >= 1, ">= 1"),
            "num_samples": (self.num_samples > self.k, f"> k = {self.k}"),
            "num_reference": (self.num_reference > self.k, f"> k = {self.k}"),
            "guidance_scale": (self.guidance_scale >= 0, ">= 0"),
            "guidance_interval": (0 <= start <= end <= 1, "0 <= start <= end <= 1"),
            "ema": (0 <= self.ema <= 1, "a bool, or a decay in [0, 1]"),
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
        start, end = self.guidance_interval
        interval = "" if (start, end) == (0, 1) or self.guidance_scale == 1 else f"_t{start:g}-{end:g}"
        return f"fd{count}_{self.solver}{self.num_steps}_cfg{float(self.guidance_scale)}{interval}"

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return asdict(self) | {"guidance_interval": list(self.guidance_interval)}


@dataclass(frozen=True)
class EvalResult:
    """Measured distance, precision and recall, with the protocol they were measured under."""

    protocol: EvalProtocol
    frechet_distance: float
    precision: float
    recall: float

    def to_json(self) -> str:
        """The result and its protocol, one JSON object."""
        return json.dumps(asdict(self) | {"protocol": self.protocol.to_dict()}, indent=2)

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
        ``frechet_distance``, ``precision`` and ``recall``, each b - a.

    Raises:
        ConfigError: the protocols differ; every differing field is named.
    """
    ours, theirs = a.protocol.to_dict(), b.protocol.to_dict()
    unlike = [f"{name} ({ours[name]} and {theirs[name]})" for name in ours if ours[name] != theirs[name]]
    if unlike:
        raise ConfigError(
            "compare",
            expected="two results of one protocol",
            got=f"different {', '.join(unlike)}",
            do="Evaluate both under one protocol.",
        )
    metrics = (f.name for f in fields(EvalResult) if f.name != "protocol")
    return {name: getattr(b, name) - getattr(a, name) for name in metrics}


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

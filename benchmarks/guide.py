"""Guided sampling against classifier-free guidance: distances, precision and recall by transformer calls a step.

``python benchmarks/guide.py --weights EMA.safetensors [...] --data CIFAR10 --output OUT.json`` samples from weights
that ``benchmarks/gpu.py`` has brought back; ``--runs FOLDER --recipe NAME`` from runs of ``benchmarks/convergence``. It
prints one table. Each point is kept in OUT.json as it comes: the command can be interrupted, and adds to what is
there. 500 images take about a minute on one CPU core.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from convergence.parts import Benchmark, Run
from convergence.recipe import JUDGES, read_recipe
from convergence.run import SAMPLING_SEED, evenly_spaced
from safetensors.torch import load_file
from torch import Tensor, nn

from vrpo_plugin.errors import ConfigError, DataError
from vrpo_plugin.files import write_file
from vrpo_plugin.modules.guide import RewardGuide
from vrpo_plugin.modules.guide_parts import GuideParts, build_projectors, group, load_critic
from vrpo_plugin.standalone.checkpoint import load_checkpoint
from vrpo_plugin.standalone.features import extract_features
from vrpo_plugin.standalone.frechet import FeatureStatistics, frechet_distance
from vrpo_plugin.standalone.precision_recall import precision_recall
from vrpo_plugin.standalone.sampler import sample
from vrpo_plugin.standalone.sit import SIT_MODELS, SiT, create_sit
from vrpo_plugin.standalone.sources import all_images

BENCHMARKS = Path(__file__).resolve().parent
BATCH = 50


@dataclass(frozen=True)
class Point:
    """One way of sampling.

    Attributes:
        cfg: classifier-free guidance scale; 1 is none.
        cfg_interval: where it acts.
        strength: of the guide; 0 is none.
        interval: where that acts.
    """

    cfg: float = 1.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    strength: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    @property
    def name(self) -> str:
        """Of its row."""
        parts = [f"CFG {self.cfg:g}{_where(self.cfg_interval)}"] if self.cfg > 1 else []
        parts += [f"guide {self.strength:g}{_where(self.interval)}"] if self.strength else []
        return " + ".join(parts) or "none"

    def calls(self, steps: int) -> float:
        """Rows that the transformer sees, per image and step."""
        low, high = self.cfg_interval
        times = [1 - step / steps for step in range(steps)]
        return 1 + (sum(low <= t <= high for t in times) / steps if self.cfg > 1 else 0)


def _where(interval: tuple[float, float]) -> str:
    return "" if interval == (0.0, 1.0) else f" on [{interval[0]:g}, {interval[1]:g}]"


POINTS = (
    Point(),
    Point(cfg=1.5),
    Point(strength=0.3, interval=(0.65, 1.0)),
    Point(cfg=1.25),
    Point(cfg=2.0),
    Point(strength=0.1),
    Point(strength=0.2, interval=(0.65, 1.0)),
    Point(strength=0.2, interval=(0.5, 1.0)),
    Point(strength=0.2),
    Point(cfg=1.25, strength=0.3, interval=(0.65, 1.0)),
)


class Shipped(Benchmark):
    """The recipe with the networks of ``benchmarks/networks``."""

    def network_file(self, name: str) -> Path:
        """Where a network is kept."""
        return self.output / f"{name}.safetensors"


class Measure:
    """Feature networks and their features of real images.

    Args:
        benchmark: data and networks.
        samples: images of a point.
        device: that samples.
    """

    def __init__(self, benchmark: Benchmark, samples: int, device: str) -> None:
        self.benchmark, self.samples, self.device = benchmark, samples, torch.device(device)
        self.source = benchmark.source()
        real, _ = all_images(self.source, benchmark.recipe.evaluation.reference)
        self.networks = {name: benchmark.network(name) for name in JUDGES}
        self.real = {name: extract_features(network, real) for name, network in self.networks.items()}
        (critic,) = benchmark.recipe.networks.critics
        self.critic, _ = load_critic(benchmark.network_file(critic))

    def model(self, weights: Mapping[str, Tensor]) -> tuple[SiT, GuideParts]:
        """The transformer and the guide's parts of a run's weights."""
        channels, side, _ = self.source.latent_shape
        model = create_sit(
            self.benchmark.recipe.training["model"],
            input_size=side,
            in_channels=channels,
            num_classes=self.source.num_classes,
        )
        model.load_state_dict({name: w.float() for name, w in weights.items() if not name.startswith("vrpo.")})
        projectors = build_projectors(
            {name: w.float() for name, w in group(weights, "vrpo.projectors.").items()}, self.critic
        )
        layer = SIT_MODELS[self.benchmark.recipe.training["model"]]["encoder_depth"]
        parts = GuideParts(self.critic, projectors, (layer,)).to(self.device)
        return model.to(self.device), parts

    def images(self, model: nn.Module, parts: GuideParts, point: Point) -> Tensor:
        """uint8 images of balanced labels, from the same noise at every point."""
        generator = torch.Generator().manual_seed(SAMPLING_SEED)
        noise = torch.randn((self.samples, *self.source.latent_shape), generator=generator)
        labels = torch.arange(self.samples) % self.source.num_classes
        guide = None
        if point.strength:
            guide = RewardGuide(model, parts, strength=point.strength, interval=point.interval)
        settings: dict[str, Any] = {
            "num_steps": self.benchmark.recipe.evaluation.solver_steps,
            "guidance_scale": point.cfg,
            "guidance_interval": point.cfg_interval,
            "guide": guide,
        }
        half = self.benchmark.recipe.evaluation.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            batches = zip(noise.to(self.device).split(BATCH), labels.to(self.device).split(BATCH), strict=True)
            pixels = torch.cat([sample(model, n, y, **settings) for n, y in batches])
        return pixels.add(1).mul(127.5).round().clamp(0, 255).byte().cpu()

    def scores(self, images: Tensor) -> dict[str, dict[str, float]]:
        """Distance, precision and recall in each network."""
        found = {}
        for name, network in self.networks.items():
            features, real = extract_features(network, images), self.real[name]
            one, other = (FeatureStatistics.from_features(f) for f in (real, features))
            near = precision_recall(evenly_spaced(real, len(features)), features)
            found[name] = {
                "fd": frechet_distance(one, other),
                "precision": near.precision,
                "recall": near.recall,
            }
        return found


def trained_runs(benchmark: Benchmark, methods: list[str], seeds: list[int]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """``METHOD-seedN`` and the weights at its end, of a folder of ``benchmarks/convergence``.

    Raises:
        DataError: one is not trained to its end.
    """
    for method in methods:
        for seed in seeds:
            run = Run(benchmark, method, seed)
            tensors, _ = load_checkpoint(run.checkpoint(benchmark.recipe.evaluation.steps[-1]))
            projectors = {k: v for k, v in tensors["model"].items() if k.startswith("vrpo.projectors.")}
            yield run.folder.name, {**tensors["ema"], **projectors}


def runs_of(files: list[Path], methods: list[str], seeds: list[int]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """``METHOD-seedN`` and its weights, of all files.

    Raises:
        DataError: none is of these methods and seeds.
    """
    wanted, found = {f"{method}-seed{seed}" for method in methods for seed in seeds}, set()
    for file in files:
        tensors = load_file(file)
        for name in sorted({key.split("/")[0] for key in tensors} & wanted):
            found.add(name)
            yield name, group(tensors, f"{name}/")
    if not found:
        raise DataError("--weights", expected=f"runs {sorted(wanted)}", got="none of them", do="Name others.")


def table(points: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, the mean over seeds of each method and way of sampling.

    Args:
        points: of the output file; the last column says of which seeds a row is.
    """
    header = ["model", "sampling", "calls a step", *(f"FD ({name})" for name in JUDGES), "precision", "recall", "seeds"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    rows: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for key, value in points.items():
        run, sampling = key.split("/", 1)
        method, seed = run.rsplit("-seed", 1)
        rows.setdefault((method, sampling), {})[seed] = value
    for (method, sampling), by_seed in sorted(rows.items(), key=lambda item: item[0][0]):
        values = list(by_seed.values())
        mean = {
            (name, score): statistics.mean(value["scores"][name][score] for value in values)
            for name in JUDGES
            for score in ("fd", "precision", "recall")
        }
        cells = [method, sampling, f"{values[0]['calls']:g}", *(f"{mean[name, 'fd']:.3f}" for name in JUDGES)]
        cells += [f"{mean[JUDGES[0], score]:.2f}" for score in ("precision", "recall")]
        lines.append(f"| {' | '.join([*cells, ', '.join(sorted(by_seed))])} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--weights", type=Path, nargs="+", help="ema_*.safetensors of benchmarks/gpu.py")
    models.add_argument("--runs", type=Path, help="output folder of benchmarks/convergence, with its own networks")
    parser.add_argument("--data", type=Path, help="folder with train/<class>/* images; none: the digits")
    parser.add_argument("--output", type=Path, required=True, help="file of the points, .json; it is added to")
    parser.add_argument("--recipe", default="cifar16_floor", help="of the weights; a name in benchmarks/recipes")
    parser.add_argument("--networks", default="cifar16", help="a folder in benchmarks/networks")
    parser.add_argument("--methods", nargs="+", help="of the recipe; by default its baseline and candidate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of these runs")
    parser.add_argument("--device", default="cpu", help="that samples: cpu, cuda")
    parser.add_argument("--samples", type=int, default=1000, help="images of a point")
    parser.add_argument(
        "--points",
        type=json.loads,
        help='other ways of sampling, JSON: [{"strength": 0.3, "interval": [0.5, 1]}, {"cfg": 1.5}]',
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    recipe = read_recipe(BENCHMARKS / "recipes" / f"{options.recipe}.yaml")
    given = [{k: tuple(v) if isinstance(v, list) else v for k, v in p.items()} for p in options.points or []]
    wanted = [Point(**p) for p in given] or list(POINTS)
    methods = options.methods or [recipe.baseline, recipe.candidate]
    if options.runs is not None:
        benchmark = Benchmark(recipe, options.data, options.runs)
        runs = trained_runs(benchmark, methods, options.seeds)
    else:
        benchmark = Shipped(recipe, options.data, BENCHMARKS / "networks" / options.networks)
        runs = runs_of(options.weights, methods, options.seeds)
    measure = Measure(benchmark, options.samples, options.device)
    protocol = {
        "recipe": options.recipe,
        "samples": options.samples,
        "steps": recipe.evaluation.solver_steps,
        "networks": {name: network.name for name, network in measure.networks.items()},
        "data": measure.source.fingerprint(),
    }
    record: dict[str, Any] = {"protocol": protocol, "points": {}}
    if options.output.exists():
        record = json.loads(options.output.read_text(encoding="utf-8"))
        if record["protocol"] != protocol:
            do = "Choose another --output."
            raise ConfigError(str(options.output), expected=protocol, got=record["protocol"], do=do)
    for name, weights in runs:
        model, parts = measure.model(weights)
        for point in wanted:
            if f"{name}/{point.name}" in record["points"]:
                continue
            start = time.perf_counter()
            scores = measure.scores(measure.images(model, parts, point))
            record["points"][f"{name}/{point.name}"] = {
                **asdict(point),
                "calls": point.calls(protocol["steps"]),
                "scores": scores,
            }
            write_file(options.output, json.dumps(record, indent=1) + "\n")
            first = scores[JUDGES[0]]
            took = time.perf_counter() - start
            print(
                f"{name}, {point.name}: FD {first['fd']:.3f}, recall {first['recall']:.3f} ({took:.0f} s)", flush=True
            )
    print(table(record["points"]))


if __name__ == "__main__":
    main()

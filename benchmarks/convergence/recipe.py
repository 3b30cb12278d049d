"""What a convergence benchmark compares: data, training, judges and methods, read from a YAML recipe."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vrpo_plugin.config import check_keys
from vrpo_plugin.settings import build, read_mapping

OUTPUT = "OUTPUT"  # stands for the output folder in a method's critic_checkpoint
JUDGES = ("classes", "rotation", "denoising")  # trained on the images; the first one decides the ratios


@dataclass(frozen=True, kw_only=True)
class NetworkRecipe:
    """The networks that are trained before the runs.

    Attributes:
        encoder: width and steps of the aligned one; or ``name`` and ``pca`` of a pretrained one, whose tokens ``vrpo
            cache-features`` stores once.
        judges: width and steps of the others.
        pretrained: names of further judges, files of ``benchmarks/pretrained.py`` in ``OUTPUT/networks``.
        images: that these are trained on, at most.
        critics: name to settings of ``vrpo train-critic``. A method uses one by its file,
            ``critic_checkpoint: OUTPUT/networks/NAME.safetensors``.
    """

    encoder: Mapping[str, Any] = field(default_factory=dict)
    judges: Mapping[str, Any] = field(default_factory=dict)
    pretrained: tuple[str, ...] = ()
    images: int = 20_000
    critics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """When and how samples are judged.

    Attributes:
        steps: training steps at which they are; the last one is the end of the run.
        samples: how many.
        reference: real images, at most.
        solver: and ``solver_steps``, of the sampler.
        guidance: scales that are tried at the last step, besides 1.
        held_out: validation images of the denoising loss and of the held-out reward.
        precision: of the sampler's forward passes, ``no`` or ``bf16``.
    """

    steps: tuple[int, ...]
    samples: int = 2000
    reference: int = 10_000
    solver: str = "euler"
    solver_steps: int = 25
    guidance: tuple[float, ...] = ()
    held_out: int = 512
    precision: str = "no"

    def points(self) -> list[tuple[int, float]]:
        """(step, guidance scale) of all that is judged."""
        return [(step, 1.0) for step in self.steps] + [(self.steps[-1], float(scale)) for scale in self.guidance]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One benchmark.

    Attributes:
        name: of its results.
        resolution: side in pixels.
        training: options of ``examples/train_repa_vrpo.py`` that all methods share.
        networks, evaluation: see there.
        methods: name to the options that make the method.
        baseline: the method that the others are compared with.
        candidate: the method that the summary is about.
        seeds: of the runs.
    """

    name: str
    resolution: int
    training: Mapping[str, Any]
    evaluation: EvaluationRecipe
    methods: Mapping[str, Mapping[str, Any]]
    baseline: str
    candidate: str
    seeds: tuple[int, ...] = (0, 1, 2)
    networks: NetworkRecipe = field(default_factory=NetworkRecipe)

    @property
    def judges(self) -> tuple[str, ...]:
        """All of them, the deciding one first."""
        return (*JUDGES, *self.networks.pretrained)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what is empty: results were stored before there were pretrained judges."""
        plain = asdict(self)
        if not self.networks.pretrained:
            del plain["networks"]["pretrained"]
        return plain


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Raises:
        ConfigError: the file is missing, a key is unknown or missing, a value is of another kind, or the baseline is no
            method.
    """
    recipe = build(Recipe, read_mapping(path, "a YAML recipe"), str(path))
    for key in ("baseline", "candidate"):
        check_keys([getattr(recipe, key)], recipe.methods, subject=f"{path}: {key}, a method's")
    # Another critic's training could not be counted.
    critics = [f"{OUTPUT}/networks/{name}.safetensors" for name in recipe.networks.critics]
    for name, options in recipe.methods.items():
        given = options.get("critic_checkpoint")
        check_keys([given] if given else [], critics, subject=f"{path}: {name}: critic_checkpoint, a critic's")
    return recipe

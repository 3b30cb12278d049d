"""What a guide needs besides the transformer, and ``guide.safetensors``, which holds it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vrpo_plugin.errors import CheckpointError, ConfigError
from vrpo_plugin.files import write_file
from vrpo_plugin.modules.aligner import VRPOAligner
from vrpo_plugin.modules.critic import LatentCritic, load_critic_weights, read_critic
from vrpo_plugin.modules.projector import build_projector

KEY = "vrpo_guide"
MADE_BY = "Write one with 'vrpo export CKPT OUT --guide GUIDE.safetensors', or RewardGuide.save."


@dataclass(frozen=True)
class GuideParts:
    """What a guide needs besides the transformer.

    Attributes:
        critic: from latents to encoder tokens; None for a reward of your own.
        projectors: from a block's hidden tokens to encoder tokens, one per layer and encoder, layers first.
        layers: 1-based numbers of the blocks that the projectors read.
        prefix_tokens: hidden tokens before the grid.
        prototypes: mean encoder tokens of the classes, one (classes, N, D) per encoder, on the critic's token grid.
        record: where critic and weights come from, plain data.
    """

    critic: LatentCritic | None = None
    projectors: Sequence[nn.Module] = ()
    layers: tuple[int, ...] = ()
    prefix_tokens: int = 0
    prototypes: tuple[Tensor, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, critic: LatentCritic | str | Path | None = None) -> "GuideParts":
        """The parts that a trained model holds: of its aligner, or of a host that projects its tokens itself (REPA).

        Args:
            model: with an aligner as ``model.vrpo``, or with ``projectors`` and ``encoder_depth``.
            critic: a critic, or its file; by default the aligner's.

        Raises:
            ConfigError: no critic, or no projectors.
            CheckpointError: the critic's file is missing or damaged.
        """
        aligner = getattr(model, "vrpo", None)
        aligner = aligner if isinstance(aligner, VRPOAligner) else None
        record: dict[str, Any] = {}
        if critic is None and aligner is not None:
            critic = aligner.critic
        if isinstance(critic, (str, Path)):
            critic, record = load_critic(Path(critic))
        if critic is None:
            do = "Pass critic=, a file of 'vrpo train-critic' for the encoder that the model was aligned with."
            raise ConfigError("critic", expected="a critic", got="a model that was trained without one", do=do)
        prefix = 0 if aligner is None else aligner.grids.prefix
        if aligner is not None and len(aligner.projectors):
            return cls(critic, tuple(aligner.projectors), aligner.layers, prefix, record=record)
        own: Any = getattr(model, "projectors", ())
        if not len(own):
            do = "Take a model with its projectors, as the training script saved it."
            raise ConfigError("projectors", expected="model.vrpo's or model.projectors", got="none", do=do)
        return cls(critic, tuple(own), (int(getattr(model, "encoder_depth", 0)),), prefix, record=record)

    @classmethod
    def of_weights(
        cls,
        critic: LatentCritic,
        projectors: Mapping[str, Tensor],
        layers: tuple[int, ...],
        prefix_tokens: int,
        record: dict[str, Any],
        *,
        do: str,
    ) -> "GuideParts":
        """The parts of a checkpoint's weights.

        Args:
            critic: frozen.
            projectors: tensors ``<number>.*``.
            layers, prefix_tokens, record: see the class.
            do: what to do where the numbers do not fit.

        Raises:
            ConfigError: not one projector per layer and encoder.
        """
        built, encoders = build_projectors(projectors, critic), len(critic.target_dims)
        if len(built) != len(layers) * encoders:
            expected = f"one projector for each of the blocks {layers} and {encoders} encoder(s)"
            raise ConfigError("layers", expected=expected, got=len(built), do=do)
        return cls(critic, built, layers, prefix_tokens, record=record)

    def to(self, device: torch.device) -> "GuideParts":
        """Moves all parts, in place where they are modules."""
        for part in (self.critic, *self.projectors):
            if part is not None:
                part.to(device)
        return replace(self, prototypes=tuple(z.to(device) for z in self.prototypes))

    def save(self, path: Path) -> None:
        """Writes the parts, whole or not at all.

        Raises:
            ConfigError: there is no critic.
            OSError: the file cannot be written; an old one is as it was.
        """
        from safetensors.torch import save

        if self.critic is None:
            raise ConfigError("guide file", expected="a critic", got="none", do="A reward of yours stays in your code.")

        tensors = {f"critic.{name}": value for name, value in self.critic.state_dict().items()}
        for number, projector in enumerate(self.projectors):
            tensors |= {f"projectors.{number}.{name}": value for name, value in projector.state_dict().items()}
        tensors |= {f"prototypes.{number}": z for number, z in enumerate(self.prototypes)}
        about = {
            "critic": self.critic.sizes(),
            "layers": list(self.layers),
            "prefix_tokens": self.prefix_tokens,
            "record": self.record,
        }
        plain = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        write_file(path, save(plain, metadata={KEY: json.dumps(about)}))

    @classmethod
    def load(cls, path: Path) -> "GuideParts":
        """Reads what :meth:`save` wrote; all parts frozen, on the CPU.

        Raises:
            CheckpointError: the file is missing, damaged or another.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})[KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            critic = build_critic(about["critic"], group(tensors, "critic."))
            prototypes = group(tensors, "prototypes.")
            return cls(
                critic,
                build_projectors(group(tensors, "projectors."), critic),
                tuple(int(layer) for layer in about["layers"]),
                int(about["prefix_tokens"]),
                tuple(prototypes[str(number)] for number in range(len(prototypes))),
                dict(about["record"]),
            )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            got = f"{type(error).__name__}: {error}"[:200]
            raise CheckpointError(str(path), expected="a guide file", got=got, do=MADE_BY) from error


def class_prototypes(batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> Tensor:
    """Mean encoder tokens of each class, for ``reward="prototype"``.

    Args:
        batches: pairs of an encoder's tokens (B, N, D), on the critic's grid, and labels (B,).
        num_classes: how many; one without an image gets zeros, and no guide.

    Returns:
        Prototypes (num_classes, N, D), float32.

    Raises:
        ConfigError: there is no batch.
    """
    total: Tensor | None = None
    count = torch.zeros(num_classes)
    for tokens, labels in batches:
        if total is None:
            total = torch.zeros(num_classes, *tokens.shape[1:])
        total.index_add_(0, labels.cpu(), tokens.float().cpu())
        count += torch.bincount(labels.cpu(), minlength=num_classes)
    if total is None:
        raise ConfigError("batches", expected="at least one", got="none", do="Give tokens with their labels.")
    return total / count.clamp(min=1)[:, None, None]


def load_critic(path: Path) -> tuple[LatentCritic, dict[str, Any]]:
    """A frozen critic in eval mode, and the record of its training.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    critic = _critic(read_critic(path)[0])
    record = load_critic_weights(critic, path)
    return critic.eval().requires_grad_(False), record


def build_critic(sizes: Mapping[str, Any], weights: Mapping[str, Tensor]) -> LatentCritic:
    """A frozen critic of :meth:`LatentCritic.sizes` with these weights."""
    critic = _critic(sizes)
    critic.load_state_dict(weights)
    return critic.eval().requires_grad_(False)


def _critic(sizes: Mapping[str, Any]) -> LatentCritic:
    channels, height, width = sizes["latent_shape"]
    rows, columns = sizes["token_grid"]
    shape, dims = (channels, height, width), tuple(sizes["target_dims"])
    with torch.random.fork_rng(devices=[]):
        return LatentCritic(shape, dims, (rows, columns), width=sizes["width"])


def build_projectors(tensors: Mapping[str, Tensor], critic: LatentCritic) -> tuple[nn.Module, ...]:
    """Frozen projectors of the tensors ``<number>.*``, their kind and sizes read off their weights."""
    weights: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, rest = name.partition(".")
        weights.setdefault(int(number), {})[rest] = value
    return tuple(_projector(weights[number], critic) for number in sorted(weights))


def _projector(weights: Mapping[str, Tensor], critic: LatentCritic) -> nn.Module:
    conv = "projection_layer.weight" in weights
    first, last = (weights["projection_layer.weight"],) * 2 if conv else (weights["0.weight"], weights["4.weight"])
    with torch.random.fork_rng(devices=[]):
        projector = build_projector(
            "conv" if conv else "mlp",
            first.shape[1],
            last.shape[0],
            projector_dim=first.shape[0],
            sides=(critic.latent_shape[1], critic.latent_shape[2]),
        )
    projector.load_state_dict(weights)
    return projector.eval().requires_grad_(False)


def group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

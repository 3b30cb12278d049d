"""Guided sampling: one gradient step on the clean estimate through the critic, with no second pass of the model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vrpo_plugin.errors import ConfigError, HostNotFoundError, ShapeError
from vrpo_plugin.functional.guidance import guided_change
from vrpo_plugin.functional.interpolant import time_like
from vrpo_plugin.functional.rewards import semantic_reward
from vrpo_plugin.functional.tensors import grid_like, promote, resample_tokens
from vrpo_plugin.modules.critic import LatentCritic
from vrpo_plugin.modules.guide_parts import GuideParts
from vrpo_plugin.modules.guided_model import GuidedModel
from vrpo_plugin.modules.parametrisation import Parametrisation

GuideReward = Literal["self", "prototype"] | Callable[[Tensor, Tensor, Tensor | None], Tensor]
PIXEL_STD, LATENT_STD = 0.5, 1.0
# Of the settings tried on CIFAR-10 (docs/guide.md): more, or lower noise levels too, overshoots in class features.
DEFAULT_STRENGTH = 0.3
DEFAULT_INTERVAL = (0.65, 1.0)


class RewardGuide:
    """Raises a reward of the clean estimate while sampling (equation 20).

    Each call of the transformer gives x0_hat, and on its way the hidden tokens h of an early block. With the reward
    r(x) = mean_n cos(C(x)_n, P(h)_n) of the critic C and the projector P, x0_hat moves along grad r, and the velocity
    follows. The gradient passes the critic alone.

    Args:
        model: the transformer that samples.
        parts: what it was aligned with; by default what the model holds, see :meth:`GuideParts.of`.
        critic: or its file, for a model without one; with ``parts`` it replaces theirs.
        reward: ``self`` (the model's own projected tokens are the target), ``prototype`` (mean encoder tokens of the
            class), or a callable (x0_hat, t, y) -> (B,), differentiable in x0_hat, t being the noise level in [0, 1].
        strength: length of the step as a share of the estimate's expected error, at least 0; 0 is the plain sampler,
            bitwise.
        interval: lowest and highest noise level, both included, at which is guided.
        data_std: standard deviation of the latents; by default 0.5 where they have 1 or 3 channels (pixels in
            [-1, 1]), else 1.

    Raises:
        ConfigError: a setting is unknown or out of range, or a part is missing.
        HostNotFoundError: the model has no such blocks.

    Source: the target is that of projector guidance (arXiv 2601.22468) and REPA-G (2602.03753); the critic on latents,
        and the gradient through it alone, are ours (docs/guide.md).
    """

    def __init__(
        self,
        model: nn.Module,
        parts: GuideParts | None = None,
        *,
        critic: LatentCritic | str | Path | None = None,
        reward: GuideReward = "self",
        strength: float = DEFAULT_STRENGTH,
        interval: tuple[float, float] = DEFAULT_INTERVAL,
        data_std: float | None = None,
    ) -> None:
        if parts is None:
            parts = GuideParts() if callable(reward) else GuideParts.of(model, critic)
        elif critic is not None:
            raise ConfigError("critic", expected="None with parts=", got="both", do="Put it into GuideParts.")
        if data_std is None:
            channels = getattr(model, "in_channels", 0) if parts.critic is None else parts.critic.latent_shape[0]
            data_std = PIXEL_STD if channels in (1, 3) else LATENT_STD
        _check_settings(reward, strength, interval, data_std)
        if not callable(reward) and parts.critic is None:
            raise ConfigError("critic", expected=f"one, for reward={reward!r}", got=None, do="Pass critic=.")
        if reward == "prototype" and not parts.prototypes:
            do = "Pass GuideParts(prototypes=...), see class_prototypes."
            raise ConfigError("reward='prototype'", expected="prototypes", got="none", do=do)
        self.model, self.parts, self.reward, self.data_std = model, parts, reward, float(data_std)
        self.strength, self.interval = float(strength), (float(interval[0]), float(interval[1]))
        self._blocks = _blocks(model, parts.layers) if reward == "self" else []
        if reward == "self" and not (parts.layers and len(parts.projectors) == len(parts.layers) * self.encoders):
            expected = f"{self.encoders} projector(s) for each of the layers {parts.layers}"
            do = "Give one projector per layer and encoder."
            raise ConfigError("projectors", expected=expected, got=len(parts.projectors), do=do)

    @property
    def encoders(self) -> int:
        """How many encoders the critic predicts."""
        return 0 if self.parts.critic is None else len(self.parts.critic.target_dims)

    @contextmanager
    def watch(self) -> Iterator[list[Tensor]]:
        """Collects the hidden tokens (B, N, D) of the model's calls inside, one per layer; leaves no hook behind."""
        hidden: list[Tensor] = []
        # At strength 0 the model runs as it is, down to its hooks.
        blocks = self._blocks if self.strength else []
        handles = [block.register_forward_hook(partial(_keep, hidden)) for block in blocks]
        try:
            yield hidden
        finally:
            for handle in handles:
                handle.remove()

    def guide(
        self,
        output: Tensor,
        x_t: Tensor,
        t: Tensor,
        y: Tensor | None,
        hidden: Sequence[Tensor],
        parametrisation: Parametrisation,
        *,
        start: Tensor | None = None,
    ) -> Tensor:
        """The model's output after the step on its clean estimate.

        Args:
            output: of the model (B, C, H, W), after classifier-free guidance where there is any.
            x_t: the noisy latents that it saw (B, C, H, W).
            t: times (B,), in the model's units.
            y: labels (B,).
            hidden: what :meth:`watch` collected; of more rows than B, the first B.
            parametrisation: of the output.
            start: times (B,) that the interval is about, where a solver's step has several; by default ``t``.

        Returns:
            The guided output, of its shape and dtype; itself at strength 0, bitwise the same outside the interval.
        """
        if self.strength == 0:
            return output
        moved = promote(output)
        x0_hat, level, slope = parametrisation.estimate(x_t.to(moved.dtype), moved, t.to(moved.dtype))
        target = self._target(hidden, y, len(output))
        change = guided_change(
            self._gradient(x0_hat, level, y, target), level, strength=self.strength, data_std=self.data_std
        )
        low, high = self.interval
        # A little slack: 0.7 of a schedule in float32 is not the 0.7 that somebody typed.
        started = level if start is None else parametrisation.level(start.to(moved.dtype))
        inside = (started >= low - 1e-6) & (started <= high + 1e-6)
        return torch.where(time_like(inside, output), (moved + slope * change).to(output.dtype), output)

    def wrap(self, model: nn.Module | None = None, **settings: Any) -> GuidedModel:
        """The model for a host's own sampler, see :class:`vrpo_plugin.modules.guided_model.GuidedModel`."""
        if model is not None and model is not self.model:
            raise ConfigError("wrap", expected="the guide's own model", got="another", do="Make a guide of that model.")
        return GuidedModel(self, **settings)

    def save(self, path: str | Path) -> None:
        """Writes ``guide.safetensors``: projectors, critic, layers, sizes and prototypes, but no transformer.

        Raises:
            OSError: the file cannot be written; an old one is as it was.
        """
        self.parts.save(Path(path))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, **settings: Any) -> "RewardGuide":
        """A guide of what :meth:`save` or ``vrpo export --guide`` wrote, on the model's device.

        Args:
            path: the file.
            model: the transformer whose projectors these are.
            **settings: ``reward``, ``strength`` and ``interval``, as for the constructor.

        Raises:
            CheckpointError: the file is missing or damaged.
            ConfigError: as the constructor.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return cls(model, GuideParts.load(Path(path)).to(device), **settings)

    def _target(self, hidden: Sequence[Tensor], y: Tensor | None, batch: int) -> list[list[Tensor]]:
        """Target tokens on the critic's grid: a list per layer with one (B, N, D) per encoder; none for a callable."""
        if callable(self.reward):
            return []
        if self.reward == "prototype":
            if y is None:
                raise ConfigError("reward='prototype'", expected="labels y", got=None, do="Pass labels.")
            return [[_prototype(z, y.to(z.device)) for z in self.parts.prototypes]]
        if len(hidden) != len(self.parts.layers):
            raise HostNotFoundError(
                "hidden tokens",
                expected=f"blocks {self.parts.layers} to run once in the guided call",
                got=f"{len(hidden)} outputs",
                do="Guide the model that the guide was made of, not a compiled or wrapped copy.",
            )
        with torch.no_grad():
            return [
                [self._projected(p, h[:batch]) for p in self.parts.projectors[i * self.encoders :][: self.encoders]]
                for i, h in enumerate(hidden)
            ]

    def _projected(self, projector: nn.Module, hidden: Tensor) -> Tensor:
        z = projector(hidden.to(next(projector.parameters()).dtype))[:, self.parts.prefix_tokens :]
        critic = self.parts.critic
        assert critic is not None
        if z.shape[1] == critic.token_grid[0] * critic.token_grid[1]:
            return z
        return resample_tokens(
            z, grid_like(z.shape[1], (critic.latent_shape[1], critic.latent_shape[2])), critic.token_grid
        )

    def _gradient(self, x0_hat: Tensor, level: Tensor, y: Tensor | None, target: list[list[Tensor]]) -> Tensor:
        """d reward / d x0_hat, (B, C, H, W); a sample whose gradient is not finite has none."""
        # A host may sample under no_grad, inference_mode or autocast.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x0_hat.device.type, enabled=False):
            x = x0_hat.detach().clone().requires_grad_()
            if callable(self.reward):
                rewards = self.reward(x, level, y)
                if rewards.shape != (len(x),):
                    do = "Return one reward per sample."
                    raise ShapeError("reward", expected=(len(x),), got=tuple(rewards.shape), do=do)
            else:
                assert self.parts.critic is not None
                tokens = self.parts.critic(x).tokens
                rewards = torch.stack([semantic_reward(tokens, [z.clone() for z in zs]) for zs in target]).mean(0)
            (gradient,) = torch.autograd.grad(rewards.sum(), x)
        return torch.nan_to_num(gradient, 0.0, 0.0, 0.0)


def _keep(hidden: list[Tensor], module: nn.Module, args: Any, output: Any) -> None:
    hidden.append(output[-1] if isinstance(output, tuple) else output)


def _prototype(prototypes: Tensor, y: Tensor) -> Tensor:
    """Of each label (B, N, D); zeros, which guide nowhere, for one that has none, as the null label."""
    known = y < len(prototypes)
    return torch.where(known[:, None, None], prototypes[torch.where(known, y, 0)], 0)


def _blocks(model: nn.Module, layers: Sequence[int]) -> list[nn.Module]:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not all(1 <= layer <= len(blocks) for layer in layers):
        raise HostNotFoundError(
            "model.blocks",
            expected=f"an nn.ModuleList with blocks {tuple(layers)}",
            got=f"{len(blocks)} blocks" if isinstance(blocks, nn.ModuleList) else type(blocks).__name__,
            do="Give the model itself, and the layers that its projectors read.",
        )
    return [blocks[layer - 1] for layer in layers]


def _check_settings(reward: Any, strength: Any, interval: Any, data_std: Any) -> None:
    if not (callable(reward) or reward in ("self", "prototype")):
        raise ConfigError("reward", expected="self, prototype or a callable", got=repr(reward), do="Choose one.")
    if not 0 <= strength < float("inf"):
        raise ConfigError("strength", expected="at least 0", got=strength, do="0 is no guide.")
    if not 0 < data_std < float("inf"):
        raise ConfigError(
            "data_std", expected="above 0", got=data_std, do="Give the standard deviation of the latents."
        )
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ConfigError("interval", expected="0 <= low <= high <= 1", got=(low, high), do="Correct it.")

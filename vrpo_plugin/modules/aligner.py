"""VRPOAligner: the module that a training loop calls."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vrpo_plugin.config import VRPOConfig, check_keys
from vrpo_plugin.errors import ConfigError, HostNotFoundError, PatchConflictError, ShapeError
from vrpo_plugin.functional.interpolant import clean_estimate
from vrpo_plugin.functional.rewards import RewardState
from vrpo_plugin.functional.schedules import schedule_left
from vrpo_plugin.functional.tensors import finite_or_zero, finite_samples, promote, zero_unless
from vrpo_plugin.modules.actions import Reward
from vrpo_plugin.modules.checks import (
    CallChecks,
    Given,
    check_sizes,
    sizes_of_encoder,
    sizes_of_model,
    warn_without_gradient,
)
from vrpo_plugin.modules.critic import (
    CriticOutput,
    CriticPurpose,
    LatentCritic,
    check_purpose,
    load_critic_weights,
    read_critic,
)
from vrpo_plugin.modules.features import FeaturesOutput, TokenGrids, align_features
from vrpo_plugin.modules.generation import GenerationReadout
from vrpo_plugin.modules.projector import build_projector
from vrpo_plugin.modules.standstill import (
    RewardsEnd,
    UpdateWatch,
    say_what_is_over,
    say_what_settings_do,
    wrapped_too_early,
)
from vrpo_plugin.modules.statistics import update_buffer
from vrpo_plugin.modules.taps import Taps, resolve_layers

logger = logging.getLogger("vrpo_plugin")
CRITIC_COEFF = 0.1  # only the critic learns by it, and Adam minds no factor; small, for a host's clipping of all norms


@dataclass(frozen=True)
class VRPOOutput:
    """What one call of the aligner returns.

    Attributes:
        loss: scalar to add to the denoising loss: policy_loss + 0.1 * critic_loss.
        policy_loss: scalar, all that reaches the generator:
            proj_coeff * release * features_loss + reward_coeff * reward_release * generation_loss.
        features_loss: scalar, the negative reward of the features readout; REPA's projection loss.
        release: share of the features part that its schedule has left, in [0, 1].
        generation_loss: scalar, the policy loss of the generation readout.
        reward_release: share of the generation part that its schedule has left, in [0, 1]; 0 after a fallback.
        critic_loss: scalar, 1 - mean cosine of the critic on clean latents.
        rewards: name to (B,), without gradient; NaN where a reward is not finite or did not score the sample, and once
            the rewards have lost their weight for good: then neither they nor the critic are run in training mode
            (with ``targets="critic"`` the critic still is, on clean latents).
        weights: name to (B,), the share of each optimised reward at each sample's noise level.
        advantages: (B,), of each sample against what its noise level is remembered for.
        metrics: log name to scalar tensor on the device, without gradient.
    """

    loss: Tensor
    policy_loss: Tensor
    features_loss: Tensor
    release: Tensor | float
    generation_loss: Tensor
    reward_release: Tensor | float
    critic_loss: Tensor
    rewards: dict[str, Tensor]
    weights: dict[str, Tensor]
    advantages: Tensor
    metrics: dict[str, Tensor]


@runtime_checkable
class HasPurpose(Protocol):
    """An encoder that says what a critic of it is for, as :class:`vrpo_plugin.encoders.Targets`."""

    def critic_purpose(self) -> CriticPurpose: ...


class VRPOAligner(nn.Module):
    """Reward-guided, group-relative alignment of a diffusion transformer (equation 16).

    Holds the projector heads, the critic and the running reward statistics. Everything is created under a
    forked random state, so that adding an aligner changes no other initialisation.

    Args:
        hidden_dim: width of the transformer's tokens.
        target_dims: D of each frozen encoder.
        depth: number of transformer blocks.
        latent_shape: (C, H, W) of the latents; needed where a critic is made.
        token_grid: (h, w) that the encoder tokens come in; by default half the latent's sides, the grid of a
            patch-2 transformer and of REPA's encoders. Other counts of tokens are read as a grid of this aspect, those
            of the transformer as one of the latents' aspect; where neither is given, as a square.
        encoder_depth: the host's own aligned block, 1-based; used by ``layers="early"``.
        own_projectors: False where the host projects its tokens itself; ``forward`` then takes ``z_tilde``, and
            there are no projectors and no taps here.
        prefix_tokens: tokens before the grid, in the encoder's tokens and the transformer's alike (REG's class
            token: 1). The features readout aligns them; the generation readout does not see them.
        critic_purpose: what the run's encoder and data are; a ``critic_checkpoint`` made for others is refused.
        config: the objective; further keywords override its fields.
        rewards: differentiable rewards of your own, name to callable (RewardState) -> (B,), or a pair with a
            mask of the samples that were scored. The gradient reaches ``x0_hat`` alone, no parameter of a reward.
        black_box_rewards: the same without a gradient; ``forward`` then needs ``generator=``.
        **overrides: fields of :class:`VRPOConfig`.

    Raises:
        ConfigError: a setting is unknown, contradictory, or lacks what it needs.
        CheckpointError: ``critic_checkpoint`` does not fit.

    Source: our derivation (docs/equations.md).
    """

    step: Tensor
    says_collapse = True  # False where somebody else does, who reads the metrics

    def __init__(
        self,
        *,
        hidden_dim: int,
        target_dims: Sequence[int],
        depth: int,
        latent_shape: Sequence[int] | None = None,
        token_grid: tuple[int, int] | None = None,
        encoder_depth: int | None = None,
        own_projectors: bool = True,
        prefix_tokens: int = 0,
        critic_purpose: CriticPurpose | None = None,
        config: VRPOConfig | None = None,
        rewards: Mapping[str, Reward] | None = None,
        black_box_rewards: Mapping[str, Reward] | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        check_keys(overrides, VRPOConfig.__dataclass_fields__, subject="VRPOConfig")
        self.config = replace(config or VRPOConfig(), **overrides)
        self.hidden_dim = hidden_dim
        self.target_dims = check_sizes(hidden_dim, target_dims, depth, latent_shape, token_grid, prefix_tokens)
        for name, given in {"rewards": rewards, "black_box_rewards": black_box_rewards}.items():
            if given is not None and not isinstance(given, Mapping):
                do = "Name built-in rewards in config=VRPOConfig(rewards=...)."
                raise ConfigError(name, expected="a mapping from name to callable", got=repr(given), do=do)
        self.depth = depth
        self.own_projectors = own_projectors
        self.layers = resolve_layers(self.config.layers, depth, encoder_depth=encoder_depth)
        self.grids = TokenGrids.of(latent_shape, token_grid, prefix_tokens)
        self.taps = Taps(self.layers)
        self.target_critic: LatentCritic | None = None
        if self.config.targets == "critic" and prefix_tokens:
            _refuse("targets", f"'encoder' with {prefix_tokens} tokens before the grid: a critic has none", "critic")
        self._watch = UpdateWatch()
        self._end = RewardsEnd()
        with torch.random.fork_rng(devices=[]):
            self.projectors = self._build_projectors()
            purpose = replace(critic_purpose or CriticPurpose(), target_norm=self.config.target_norm)
            self.generation = self._build_generation(latent_shape, purpose, rewards or {}, black_box_rewards or {})
            if self.config.targets == "critic" and self.critic is None:  # no reward needs it, but the targets do
                self.target_critic = self._build_critic(latent_shape, purpose)
        self._checks = CallChecks(
            self.target_dims,
            self.layers,
            hidden_dim,
            projects_itself=self.config.features == "policy" and not own_projectors,
            generates=self.generation is not None,
        )
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        if self.generation is not None:
            say_what_settings_do(self.config)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._end = RewardsEnd()  # of another moment

    def _build_projectors(self) -> nn.ModuleList:
        if self.config.features != "policy" or not self.own_projectors:
            return nn.ModuleList()
        if self.config.projector == "conv" and self.grids.prefix:
            _refuse("projector", f"'mlp' with {self.grids.prefix} tokens before the grid", self.config.projector)
        return nn.ModuleList(
            build_projector(
                self.config.projector,
                self.hidden_dim,
                dim,
                projector_dim=self.config.projector_dim,
                sides=self.grids.latent or self.grids.encoder,
            )
            for _ in self.layers
            for dim in self.target_dims
        )

    def _build_generation(
        self,
        latent_shape: Sequence[int] | None,
        purpose: CriticPurpose,
        rewards: Mapping[str, Reward],
        black_box_rewards: Mapping[str, Reward],
    ) -> GenerationReadout | None:
        if self.config.reward_coeff == 0:
            return None
        if not (self.config.rewards or rewards or black_box_rewards):
            _refuse("rewards", "at least one, or reward_coeff=0", ())
        critic = None
        if {"semantic", "perceptual"} & set(self.config.rewards):
            critic = self._build_critic(latent_shape, purpose)
        return GenerationReadout(self.config, critic, rewards, black_box_rewards)

    def _build_critic(self, latent_shape: Sequence[int] | None, purpose: CriticPurpose) -> LatentCritic:
        tokens = self.grids.tokens
        if latent_shape is None or tokens is None:
            _refuse("latent_shape", "(C, H, W), for the critic", latent_shape)
        channels, height, side = latent_shape
        critic = LatentCritic((channels, height, side), self.target_dims, tokens, width=self.config.critic_width)
        if self.config.critic_checkpoint is not None:
            path = Path(self.config.critic_checkpoint)
            check_purpose(path, load_critic_weights(critic, path), purpose)
        return critic.requires_grad_(self.config.critic_trainable)

    @property
    def critic(self) -> LatentCritic | None:
        """The critic, where one is made."""
        scoring = None if self.generation is None else self.generation.critic
        return self.target_critic if scoring is None else scoring

    @classmethod
    def from_model(cls, model: nn.Module, encoder: Any = None, **kwargs: Any) -> "VRPOAligner":
        """Infers the sizes from a SiT- or DiT-like model and an encoder, and logs what it chose.

        Args:
            model: has ``blocks``, ``pos_embed`` (1, N, D), ``in_channels`` and ``x_embedder.img_size``.
            encoder: has ``dims`` (or ``dim``) and ``grid``, as ``vrpo_plugin.encoders.load_encoder`` gives; or
                the dimensions themselves. With ``targets="critic"`` None: the critic's file says them.
            **kwargs: passed to the constructor, taking precedence.

        Raises:
            HostNotFoundError: the model lacks one of these.
            CheckpointError: there is no encoder, and the critic's file is missing or damaged.
        """
        config = kwargs.get("config") or VRPOConfig()
        checkpoint = kwargs.get("critic_checkpoint", config.critic_checkpoint)
        if encoder is not None:
            sizes = sizes_of_encoder(encoder)
        elif kwargs.get("targets", config.targets) == "critic" and checkpoint is not None:
            of_file, _ = read_critic(Path(checkpoint))
            sizes = {"target_dims": tuple(of_file["target_dims"]), "token_grid": tuple(of_file["token_grid"])}
        else:
            _refuse("encoder", "the frozen encoder, or targets='critic' with a critic_checkpoint", encoder)
        chosen = {**sizes_of_model(model), **sizes, **kwargs}
        if checkpoint is not None and isinstance(encoder, HasPurpose) and "critic_purpose" not in chosen:
            chosen["critic_purpose"] = encoder.critic_purpose()
        aligner = cls(**chosen)
        logger.info("VRPOAligner.from_model: %s, taps on blocks %s", chosen, aligner.layers)
        return aligner

    def attach(self, model: nn.Module, blocks: nn.ModuleList | None = None) -> "VRPOAligner":
        """Installs the taps and registers the aligner as ``model.vrpo``.

        Do this once, before the EMA copy, DDP and the optimizer: all of them then cover the aligner.

        Args:
            model: the transformer.
            blocks: its blocks, where they are not ``model.blocks``.

        Returns:
            The aligner.

        Raises:
            HostNotFoundError: there are no blocks, or fewer than ``depth``.
            PatchConflictError: another aligner is attached, or DDP has wrapped the model.
        """
        if isinstance(model, DistributedDataParallel):
            raise wrapped_too_early(model)
        if getattr(model, "vrpo", None) is self:
            return self
        if hasattr(model, "vrpo"):
            raise PatchConflictError(
                "model.vrpo", expected="no aligner", got="another one", do="Call its detach(model)."
            )
        blocks = getattr(model, "blocks", None) if blocks is None else blocks
        if not isinstance(blocks, nn.ModuleList) or len(blocks) != self.depth:
            raise HostNotFoundError(
                "model.blocks",
                expected=f"an nn.ModuleList of depth={self.depth} blocks",
                got=f"{len(blocks)} blocks" if isinstance(blocks, nn.ModuleList) else type(blocks).__name__,
                do="Set depth= to the model's, or pass blocks=.",
            )
        if len(self.projectors):
            self.taps.install(model, blocks)
        elif dist.is_available() and dist.is_initialized():
            self.taps.watch_calls(model)
        model.vrpo = self
        self._watch = UpdateWatch(model, self)
        return self

    def detach(self, model: nn.Module) -> None:
        """Removes the taps and ``model.vrpo``; the model is then as it was.

        Raises:
            HostNotFoundError: this aligner is not attached to the model.
        """
        if getattr(model, "vrpo", None) is not self:
            raise HostNotFoundError(
                "model.vrpo", expected="this aligner", got="none or another", do="Detach its own model."
            )
        del model.vrpo
        self.taps.uninstall(model)
        self._watch = UpdateWatch()

    def forward(
        self,
        z: Tensor | Sequence[Tensor] | None = None,
        *,
        x0: Tensor | None = None,
        x_t: Tensor | None = None,
        t: Tensor | None = None,
        velocity: Tensor | None = None,
        x0_hat: Tensor | None = None,
        hidden: Tensor | Sequence[Tensor] | None = None,
        z_tilde: Tensor | Sequence[Tensor] | None = None,
        y: Tensor | None = None,
        step: int | None = None,
        generator: torch.Generator | None = None,
    ) -> VRPOOutput:
        """Rewards of one batch and the loss they give (equation 16).

        Args:
            z: frozen tokens of the clean images, (B, N, D) or one per encoder; None with ``targets="critic"``, whose
                tokens of ``x0`` they are then.
            x0: clean latents (B, C, H, W).
            x_t: noisy latents (B, C, H, W).
            t: times (B,), 0 = data, 1 = noise.
            velocity: the model's prediction (B, C, H, W), pointing from data to noise; gives x0_hat.
            x0_hat: clean estimates (B, C, H, W), for models of another parametrisation.
            hidden: tokens (B, N, hidden_dim) per tapped block; by default what the taps kept.
            z_tilde: projected tokens (B, N, D), one per encoder, with ``own_projectors=False``.
            y: labels (B,), passed on to your rewards.
            step: training step; by default the calls in training mode are counted.
            generator: for black-box rewards.

        Returns:
            :class:`VRPOOutput`.

        Raises:
            ShapeError: on the first call with such shapes, where they do not fit together.
            HostNotFoundError: the taps did not fire.
            ConfigError: a black-box reward without ``generator``; times outside [0, 1], on the first call; a call that
                DDP cannot see under ``find_unused_parameters=True``.
        """
        clean = self._look_at_clean(z, x0) if self.config.targets == "critic" else None
        z = z if clean is None else clean.tokens
        given = self._given(z, hidden, z_tilde, x0=x0, x_t=x_t, t=t, estimate=velocity if x0_hat is None else x0_hat)
        self._check(given, step)
        targets, batch = given.targets, len(given.targets[0])
        if self.config.target_norm == "spatial":
            targets = tuple(self.grids.normalised(target) for target in targets)
        zero = torch.zeros((), device=targets[0].device)

        features = FeaturesOutput(zero, {}, {})
        if given.tokens or given.projected:
            features = align_features(self.projectors, given.tokens, given.projected, targets, self.grids)
        release = self._left("release", step)
        policy_loss = self.config.proj_coeff * release * features.loss
        reward_release = self._left("reward_release", step, floor=self.config.reward_floor)
        if self.generation is None:
            return VRPOOutput(
                loss=policy_loss,
                policy_loss=policy_loss,
                features_loss=features.loss,
                release=release,
                generation_loss=zero,
                reward_release=reward_release,
                critic_loss=zero,
                rewards=features.rewards,
                weights={},
                advantages=zero.new_zeros(batch),
                metrics=features.metrics,
            )

        if self.training and self._has_ended(reward_release):
            generated = self.generation.idle(batch)
        else:
            generated = self.generation(self._state(given, targets, velocity, x0_hat, y, step), generator, clean)
        if self.config.fallback:
            reward_release = reward_release * self.generation.watch.share
        weight = self.config.reward_coeff * reward_release
        policy_loss = policy_loss + weight * generated.loss
        metrics = features.metrics | generated.metrics | {"vrpo/reward_share": zero + reward_release}
        if "vrpo/gradient_ratio" in metrics:
            metrics["vrpo/gradient_ratio"] = weight * metrics["vrpo/gradient_ratio"]
        return VRPOOutput(
            loss=policy_loss + CRITIC_COEFF * generated.critic_loss,
            policy_loss=policy_loss,
            features_loss=features.loss,
            release=release,
            generation_loss=generated.loss,
            reward_release=reward_release,
            critic_loss=generated.critic_loss,
            rewards=features.rewards | generated.rewards,
            weights=generated.weights,
            advantages=generated.advantages,
            metrics=metrics,
        )

    def _look_at_clean(self, z: object, x0: Tensor | None) -> CriticOutput:
        """What the frozen critic sees in the clean latents: its tokens are the targets, its features a reward's."""
        critic = self.critic
        assert critic is not None  # made in the constructor
        if z is not None:
            _refuse("z", "none with targets='critic'", type(z).__name__, "Leave it out, or set targets='encoder'.")
        if not isinstance(x0, Tensor):
            raise ShapeError("x0", expected="clean latents, for targets='critic'", got=x0, do="Pass x0=.")
        with torch.no_grad():
            # A sample that is not finite is left out by its latents; its tokens would spoil a gradient.
            return critic(zero_unless(finite_samples(x0), x0))

    def _given(self, z: Any, hidden: Any, z_tilde: Any, **latents: Tensor | None) -> Given:
        tokens: tuple[Tensor, ...] = ()
        if len(self.projectors):
            tokens = self.taps.take() if hidden is None else _tuple(hidden)
        projects_itself = self.config.features == "policy" and not self.own_projectors
        return Given(_tuple(z), tokens, _tuple(z_tilde) if projects_itself else (), **latents)

    def _check(self, given: Given, step: int | None) -> None:
        """Checks a first call of its kind, says what makes a run stand still, and counts."""
        compiling = torch.compiler.is_compiling()
        if self._checks.is_new(given):
            self._checks.check(given, next(self.projectors.parameters()).dtype if given.tokens else None)
            if not compiling:
                self._say_standstill(given, step)
                self._checks.remember(given)
        if self.training and not compiling:
            self._watch.look(self)
            self.taps.wrapper.leave()
        if self.training:
            update_buffer(self, "step", self.step + 1)

    def _say_standstill(self, given: Given, step: int | None) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        tokens = [*given.tokens, *given.projected]
        if self.generation is not None and (self._watch.attached or any(h.requires_grad for h in tokens)):
            warn_without_gradient(given.estimate)
        if not self._checks.seen:
            parts = ["release"] * bool(tokens) + ["reward_release"] * (self.generation is not None)
            say_what_is_over(self.config, parts, self.step if step is None else step, restored=step is None)

    def _state(
        self,
        given: Given,
        targets: tuple[Tensor, ...],
        velocity: Tensor | None,
        x0_hat: Tensor | None,
        y: Tensor | None,
        step: int | None,
    ) -> RewardState:
        x0, x_t, t = given.x0, given.x_t, given.t
        assert x0 is not None and x_t is not None and t is not None  # the first call has checked
        if x0_hat is None:
            assert velocity is not None
            # The velocity's gradient has the time as its factor: NaN, though the sample is left out.
            x0_hat = clean_estimate(promote(x_t), promote(velocity), finite_or_zero(t), self.config.path_type)
        return RewardState(x0_hat, x0, x_t, t, tuple(self.grids.on_grid(target) for target in targets), y, step)

    def _left(self, part: str, step: int | None, *, floor: float = 0.0) -> Tensor | float:
        """Share that a part's schedule has left; a tensor where the aligner counts itself."""
        schedule, steps = getattr(self.config, part), getattr(self.config, f"{part}_steps")
        return schedule_left(schedule, steps, self.step - 1 if step is None else step, floor=floor)

    def _has_ended(self, reward_release: Tensor | float) -> bool:
        """Whether the weight is known to be 0 for good: at once by the loop's own step, else a little later."""
        assert self.generation is not None
        if not torch.compiler.is_compiling():
            reason = self.generation.watch.reason if self.config.fallback else None
            self._end.look(reward_release, reason, say=self.says_collapse)
        return self._end.reached or (not isinstance(reward_release, Tensor) and reward_release == 0)


def _tuple(tensors: Any) -> tuple[Tensor, ...]:
    return tuple(tensors) if isinstance(tensors, (list, tuple)) else () if tensors is None else (tensors,)


def _refuse(name: str, expected: str, got: object, do: str = "Correct it.") -> NoReturn:
    raise ConfigError(name, expected=expected, got=repr(got), do=do)

"""The generation readout: rewards of the one-step clean estimate, and the policy loss they give."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.functional.advantages import inverse_scale
from vrpo_plugin.functional.levels import level_differs, level_variance, noise_levels
from vrpo_plugin.functional.policy import at_estimate, pathwise_policy_loss
from vrpo_plugin.functional.rewards import RewardState, semantic_reward
from vrpo_plugin.functional.tensors import (
    finite_or_zero,
    finite_samples,
    is_finite,
    masked_mean,
    promote,
    unused,
    zero_unless,
)
from vrpo_plugin.functional.weights import inverse_variance_weights, noise_gate
from vrpo_plugin.modules.actions import Reward, black_box_loss, score_actions
from vrpo_plugin.modules.collapse import CollapseWatch
from vrpo_plugin.modules.critic import CriticOutput, LatentCritic
from vrpo_plugin.modules.rewards import RewardTable
from vrpo_plugin.modules.statistics import RewardStatistics

NONFINITE = "vrpo/nonfinite"
SMALLEST_ERROR = 1e-12  # of an estimate, that is divided by


@dataclass(frozen=True)
class GenerationOutput:
    """Losses and records of the generation readout; ``VRPOOutput`` gives the shapes."""

    loss: Tensor
    critic_loss: Tensor
    rewards: dict[str, Tensor]
    weights: dict[str, Tensor]
    advantages: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Levels:
    """What the memory says of the K optimised rewards at L noise levels, each (K, L).

    Attributes:
        mean: the value baseline; NaN where a reward is not remembered, or always the same.
        weights: sum to 1 over the rewards.
        coefficients: weight over scale, the factor of each reward's gradient.
    """

    mean: Tensor
    weights: Tensor
    coefficients: Tensor


class GenerationReadout(nn.Module):
    """Scores x0_hat, compares with the noise level's memory, weighs, and returns the policy loss (equations 4 to 15).

    Args:
        config: the objective.
        critic: None where no reward needs one.
        rewards: differentiable rewards of the user, name to callable.
        black_box_rewards: rewards without a gradient, name to callable.

    Raises:
        ConfigError: two rewards share a name, or fixed weights do not name exactly the rewards.
    """

    shares: Tensor | None

    def __init__(
        self,
        config: VRPOConfig,
        critic: LatentCritic | None,
        rewards: Mapping[str, Reward],
        black_box_rewards: Mapping[str, Reward],
    ) -> None:
        super().__init__()
        self.config = config
        self.critic = critic
        # A frozen critic's view of x0 is the other side of ``perceptual``; nothing else asks for it. Where its tokens
        # are the targets, the aligner has looked already, and agreement with itself is no news.
        needed = critic is not None and (config.critic_trainable or "perceptual" in config.rewards)
        self.sees_clean = needed and config.targets == "encoder"
        # No module: the user's frozen networks must not reach the EMA, the optimizer or the checkpoint.
        self.table = RewardTable(config, rewards, black_box_rewards, agreement=self.sees_clean)
        self.statistics = RewardStatistics(self.table.rows)
        self.watch = CollapseWatch()
        self.register_buffer("shares", self.table.shares(config), persistent=False)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # Shares that a host's cast to bfloat16 has rounded would not sum to 1.
        super()._apply(fn, recurse)
        if self.shares is not None:
            self.shares = self.table.shares(self.config).to(self.shares.device)  # type: ignore[union-attr]
        return self

    def forward(
        self, state: RewardState, generator: torch.Generator | None = None, clean: CriticOutput | None = None
    ) -> GenerationOutput:
        """Scores a batch.

        Args:
            state: what the rewards look at; samples that are not finite are left out.
            generator: for the policy's actions, needed with black-box rewards.
            clean: what the critic sees in ``state.x0``, where its tokens are the targets; finite.

        Raises:
            ConfigError: black-box rewards without a generator.
            ShapeError: a reward is not (B,).
        """
        state, sound = _without_nonfinite(state)
        table, estimate = self.table, state.x0_hat
        agreement, clean = self._look_at_clean(state) if clean is None else (state.t, clean)
        # Compiled code plans its memory itself, and cannot take a gradient inside a forward pass.
        early = estimate.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        leaf = estimate.detach().requires_grad_() if early else estimate
        # A view: hooks on a module's inputs, as torch's flop counter has them, take no leaf.
        values = table.differentiable(replace(state, x0_hat=leaf.view_as(leaf)), self.critic, clean)
        actions = score_actions(table.black_boxes, state, self.config, generator) if table.black_boxes else None
        with torch.no_grad():
            rewards = table.all(values, state, actions, agreement)
            valid = is_finite(rewards) & sound
            level = noise_levels(state.t)
            added = self.statistics.update(rewards, level, valid)
            levels, variance = self._levels()
            weights, coefficients = levels.weights[:, level], levels.coefficients[:, level]
            deviations = rewards[: table.optimised] - levels.mean[:, level]
            known = valid[: table.optimised] & ~deviations.isnan()
            advantages = torch.where(known, coefficients * deviations, 0).sum(0)
            of_this_process = [advantages.abs().mean(), (~sound | torch.isinf(rewards).any(0)).sum()]
            metrics = self._metrics(added, variance, levels.weights, of_this_process)
            self._look_for_a_collapse(levels, variance)
            gate = noise_gate(state.t, self.config.noise_gate, self.config.noise_gate_end)
        split = table.pathwise
        loss = pathwise_policy_loss(values, coefficients[:split] * gate, valid=valid[:split])
        if early and split:
            loss, gradient = at_estimate(loss, leaf, estimate)
            metrics["vrpo/gradient_ratio"] = _gradient_ratio(gradient, -rewards[table.fidelity], state.t)
        if actions is not None:
            shares, scored = weights[split:] * gate, rewards[split : table.optimised]
            loss = loss + black_box_loss(actions, shares, scored, sound, estimate, self.config)
        learns = self.sees_clean and self.config.critic_trainable
        return GenerationOutput(
            loss=loss,
            critic_loss=1 - masked_mean(agreement, sound) if learns else loss.new_zeros(()),
            rewards=dict(zip(table.watched, torch.where(valid, rewards, torch.nan), strict=False)),
            weights=dict(zip(table.names, weights, strict=True)),
            advantages=advantages,
            metrics=metrics | {"vrpo/fallback": self.watch.reason.float()},
        )

    def _look_at_clean(self, state: RewardState) -> tuple[Tensor, CriticOutput | None]:
        """The critic's agreement with the encoder on clean latents (B,), the only place where its weights learn."""
        if not self.sees_clean:
            return state.t, None
        assert self.critic is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.critic_trainable):
            clean = self.critic(state.x0)
            return semantic_reward(clean.tokens, state.z), clean

    def _levels(self) -> tuple[Levels, Tensor]:
        """What the memory says of the optimised rewards, and the variance of every row (R, L)."""
        moments, count = self.statistics.moments, self.table.optimised
        variance = level_variance(moments)
        scale = self.config.scale
        if self.shares is not None:
            weights = self.shares.expand(count, variance.shape[1])
        else:
            own = variance[:count]
            # Advantages over their own deviation have variance 1.
            weights = inverse_variance_weights(torch.where(own > 0, 1, own) if scale == "group" else own)
        coefficients = weights if scale == "none" else weights * inverse_scale(variance[:count], scale=scale)
        remembered = (variance[:count] > 0) & (moments[0, :count] > 0)
        mean = torch.where(remembered, moments[1, :count], torch.nan)
        return Levels(mean, weights, coefficients), variance

    def idle(self, batch: int) -> GenerationOutput:
        """What :meth:`forward` gives once the rewards have lost their weight for good, with nothing run."""
        zero = self.statistics.moments.new_zeros(())
        unknown = torch.full_like(zero, torch.nan)
        metrics = {name: zero if name == NONFINITE else unknown for name in self._metric_names()}
        if torch.is_grad_enabled() and self.table.pathwise and not torch.compiler.is_compiling():
            metrics["vrpo/gradient_ratio"] = unknown
        return GenerationOutput(
            loss=zero,
            critic_loss=unused(self.parameters(), zero),
            rewards=dict.fromkeys(self.table.watched, unknown.expand(batch)),
            weights=dict.fromkeys(self.table.names, unknown.expand(batch)),
            advantages=zero.expand(batch),
            metrics=metrics | {"vrpo/fallback": self.watch.reason.float()},
        )

    def _metric_names(self) -> list[str]:
        names = [f"vrpo/{kind}/{name}" for kind in ("reward", "std") for name in self.table.watched]
        names += [f"vrpo/weight/{name}" for name in self.table.names]
        names += ["vrpo/critic_cos"] * self.sees_clean
        return [*names, "vrpo/frac_reward_zero_std", "vrpo/advantage_abs", NONFINITE]

    def _metrics(
        self, added: Tensor, variance: Tensor, weights: Tensor, of_this_process: list[Tensor]
    ) -> dict[str, Tensor]:
        """Of what a call has added on all processes, and of this one."""
        count, mean, _ = added
        total = count.sum(1)
        share = count / total.clamp(min=1)[:, None]
        optimised, of_all = self.table.optimised, share[self.table.fidelity]  # every sound sample has a fidelity
        means = (share * mean).sum(1) / (total > 0)  # NaN where a reward scored nothing
        stds = (share * torch.nan_to_num(variance)).sum(1).sqrt()
        mean_weights = (of_all * weights).sum(1)
        alike = ((count[:optimised] >= 2) > level_differs(added[:, :optimised])).all(0)
        single = torch.stack([(of_all * alike).sum(), *of_this_process])
        watched = len(self.table.watched)
        values = torch.cat([means[:watched], stds[:watched], mean_weights, means[watched:], single])
        return dict(zip(self._metric_names(), values.unbind(), strict=True))

    def _look_for_a_collapse(self, levels: Levels, variance: Tensor) -> None:
        """Hands the watch what the memory says, which is the same on every process."""
        if not (self.training and self.config.fallback):
            return
        count, mean, _ = self.statistics.moments
        means = mean.sum(1) / (count > 0).sum(1)  # over levels; NaN where nothing was ever seen
        weights, variance = levels.weights, variance[: self.table.optimised]
        unknown = torch.full_like(means[0], torch.nan)
        self.watch.update(
            agreement=means[-1] if self.sees_clean else unknown,
            spread=(weights.square() * variance).sum(0).mean().sqrt(),
            fidelity=unknown if "fidelity" in self.table.names else means[self.table.fidelity],
            reward=(weights.mean(1) * means[: self.table.optimised]).sum(),
        )


def _gradient_ratio(gradient: Tensor, error: Tensor, t: Tensor) -> Tensor:
    """Mean over samples of |dL_gen / dx0_hat| over |dL_denoising / dx0_hat|, 0-dim (equation 16c).

    Args:
        gradient: of the generation loss (B, C, H, W).
        error: mean squared error of the estimates (B,).
        t: (B,).
    """
    size = torch.linalg.vector_norm(promote(gradient).flatten(1), dim=1)
    ratio = size * promote(t).square() * error.clamp(min=SMALLEST_ERROR).rsqrt()
    return ratio.mean() * (gradient.numel() / 2 / gradient[0].numel() ** 0.5)


def _without_nonfinite(state: RewardState) -> tuple[RewardState, Tensor]:
    """The state with zeros for samples that hold NaN or inf, and which samples are sound."""
    sound = finite_samples(state.x0_hat, state.x0, state.x_t, state.t[:, None], *state.z)
    return (
        replace(
            state,
            x0_hat=zero_unless(sound, state.x0_hat),
            x0=zero_unless(sound, state.x0),
            x_t=zero_unless(sound, state.x_t),
            t=finite_or_zero(state.t),
            z=tuple(zero_unless(sound, z) for z in state.z),
        ),
        sound,
    )

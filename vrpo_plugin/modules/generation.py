"""The generation readout: rewards of the one-step clean estimate, and the policy loss they give."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from vrpo_plugin.config import BUILTIN_REWARDS, VRPOConfig
from vrpo_plugin.errors import ConfigError, ShapeError, explain
from vrpo_plugin.functional.advantages import GroupMoments, combine_rewards, group_moments
from vrpo_plugin.functional.groups import Groups, image_groups, noise_strata
from vrpo_plugin.functional.interpolant import time_like
from vrpo_plugin.functional.policy import (
    action_noise,
    at_estimate,
    coarse_sides,
    pathwise_policy_loss,
    score_function_gradient,
)
from vrpo_plugin.functional.rewards import RewardState, feature_distance, fidelity_reward, semantic_reward
from vrpo_plugin.functional.tensors import finite_or_zero, finite_samples, masked_mean, promote, zero_unless
from vrpo_plugin.functional.weights import inverse_variance_weights, noise_gate
from vrpo_plugin.modules.collapse import CollapseWatch
from vrpo_plugin.modules.critic import CriticOutput, LatentCritic
from vrpo_plugin.modules.inputs import described
from vrpo_plugin.modules.statistics import RewardStatistics

SMALLEST_ACTION_TIME = 0.05

Reward = Callable[[RewardState], Tensor | tuple[Tensor, Tensor]]


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
class Actions:
    """K actions of each state, for rewards without a gradient.

    Attributes:
        noise: directions (K, B, C, H, W).
        std: of each state's actions (B,).
        rewards: (R, K, B), marked as :func:`_marked` says.
    """

    noise: Tensor
    std: Tensor
    rewards: Tensor


class GenerationReadout(nn.Module):
    """Scores x0_hat, compares within groups, weighs, and returns the policy loss (equations 4 to 15).

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
        # Plain dicts, not modules: frozen networks must not reach the EMA, the optimizer or the checkpoint.
        self.custom_rewards, self.black_box_rewards = dict(rewards), dict(black_box_rewards)
        clash = ({*rewards, *black_box_rewards} & {*BUILTIN_REWARDS}) | ({*rewards} & {*black_box_rewards})
        if clash:
            raise ConfigError(
                explain("rewards", expected="distinct names", got=sorted(clash), do="Rename your reward.")
            )
        self.pathwise_names = (*config.rewards, *rewards)
        self.names = (*self.pathwise_names, *black_box_rewards)
        self.watched = self.names if "fidelity" in self.names else (*self.names, "fidelity")
        self.statistics = RewardStatistics(len(self.watched), decay=config.variance_decay)
        self.watch = CollapseWatch()
        self.register_buffer("shares", self._fixed_shares(), persistent=False)

    def _fixed_shares(self) -> Tensor | None:
        if self.config.reward_weights == "inverse_variance":
            return None
        shares = dict(self.config.reward_weights)
        if set(shares) != set(self.names):
            raise ConfigError(
                explain(
                    "reward_weights",
                    expected=f"one share for each of {self.names}",
                    got=shares,
                    do="Name every reward.",
                )
            )
        # In Python's float64, where shares of any size have a sum, and in units of the largest, where theirs is finite.
        largest = max(shares.values())
        values = [shares[name] / largest for name in self.names]
        return rearrange(torch.tensor([value / sum(values) for value in values]), "k -> k 1 1")

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # Shares that a host's cast to bfloat16 has rounded would not sum to 1.
        super()._apply(fn, recurse)
        if self.shares is not None:
            self.shares = self._fixed_shares().to(self.shares.device)  # type: ignore[union-attr]
        return self

    def forward(self, state: RewardState, generator: torch.Generator | None = None) -> GenerationOutput:
        """Scores a batch.

        Args:
            state: what the rewards look at; samples that are not finite are left out.
            generator: for the policy's actions, needed with black-box rewards.

        Raises:
            ConfigError: black-box rewards without a generator.
            ShapeError: a reward is not (B,).
        """
        state, sound = _without_nonfinite(state)
        critic_loss, clean, agreement = self._learn(state, sound)
        estimate = state.x0_hat
        # Compiled code plans its memory itself, and cannot take a gradient inside a forward pass.
        early = estimate.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        leaf = estimate.detach().requires_grad_() if early else estimate
        # A view: hooks on a module's inputs, as torch's flop counter has them, take no leaf.
        values = self._pathwise_rewards(replace(state, x0_hat=leaf.view_as(leaf)), clean)
        actions = self._score_actions(state, generator) if self.black_box_rewards else None
        with torch.no_grad():
            rewards = self._all_rewards(values, state, actions)
            valid = torch.isfinite(rewards) & sound
            groups = self._groups(state)
            moments = group_moments(groups.split(torch.where(valid, rewards, torch.nan)), mask=groups.mask)
            self._remember(state.t, groups, moments, valid)
            weights = self._weights(state.t, groups, moments)
            advantages, coefficients = self._combine(moments, weights, slice(0, len(self.names)))
            gate = noise_gate(state.t, self.config.noise_gate, self.config.noise_gate_end)
            coefficients = groups.join(coefficients.expand(-1, *groups.index.shape)) * gate
        split = len(self.pathwise_names)
        loss = pathwise_policy_loss(values, coefficients[:split], valid=valid[:split])
        if early and split:
            loss = at_estimate(loss, leaf, estimate)
        if actions is not None:
            shares = groups.join(weights.expand(-1, *groups.index.shape))[split:] * gate
            loss = loss + self._black_box_loss(actions, shares, rewards[split : len(self.names)], sound, estimate)
        metrics = self._metrics(rewards, valid, moments, weights, advantages, sound) | agreement
        self._watch(metrics)
        return GenerationOutput(
            loss=loss,
            critic_loss=critic_loss,
            rewards=dict(zip(self.watched, torch.where(valid, rewards, torch.nan), strict=True)),
            weights=dict(zip(self.names, weights.squeeze(-1), strict=True)),
            advantages=groups.join(advantages),
            metrics=metrics | {"vrpo/fallback": self.watch.reason.float()},
        )

    def _learn(self, state: RewardState, sound: Tensor) -> tuple[Tensor, CriticOutput | None, dict[str, Tensor]]:
        """The critic's regression on clean latents, the only place where its weights get a gradient."""
        zero = state.x0_hat.new_zeros((), dtype=torch.float32)
        trainable = self.config.critic_trainable
        # A frozen critic's view of x0 is the other side of ``perceptual``; nothing else asks for it.
        if self.critic is None or not (trainable or "perceptual" in self.config.rewards):
            return zero, None, {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
            clean = self.critic(state.x0)
            cosine = masked_mean(semantic_reward(clean.tokens, state.z), sound)
        return (1 - cosine if trainable else zero), clean, {"vrpo/critic_cos": cosine.detach()}

    def _pathwise_rewards(self, state: RewardState, clean: CriticOutput | None) -> Tensor:
        """Differentiable rewards (K, B), marked as :func:`_marked` says."""
        built_in: dict[str, Tensor] = {}
        if self.critic is not None:
            # Detached weights: the generator cannot teach its critic leniency.
            frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
            seen = functional_call(self.critic, frozen, (state.x0_hat,))
            built_in["semantic"] = semantic_reward(seen.tokens, state.z)
            if "perceptual" in self.config.rewards:
                assert clean is not None
                built_in["perceptual"] = -feature_distance(seen.features, [f.detach() for f in clean.features])
        if "fidelity" in self.pathwise_names:
            built_in["fidelity"] = fidelity_reward(state.x0_hat, state.x0)
        values = [built_in[name] for name in self.config.rewards]
        if self.custom_rewards:
            values += self._custom_rewards(state)
        return torch.stack(values) if values else state.x0_hat.new_zeros((0, len(state.t)), dtype=torch.float32)

    def _custom_rewards(self, state: RewardState) -> list[Tensor]:
        values = []
        for name, reward in self.custom_rewards.items():
            x0_hat = state.x0_hat.view_as(state.x0_hat)
            if x0_hat.requires_grad:
                # A reward that is NaN is left out of the loss, and 0 times its gradient would be NaN again.
                # One view per reward, so that the gradients of the others stay.
                x0_hat.register_hook(finite_or_zero)
            value, scored = _call_reward(name, reward, replace(state, x0_hat=x0_hat))
            if x0_hat.requires_grad and not value.requires_grad:
                raise ConfigError(
                    explain(
                        f"reward {name!r}",
                        expected="a value with a gradient to state.x0_hat",
                        got="none",
                        do="Pass it in black_box_rewards=.",
                    )
                )
            values.append(_marked(value, scored))
        return values

    @torch.no_grad()
    def _score_actions(self, state: RewardState, generator: torch.Generator | None) -> Actions:
        """Every black-box reward at K actions of each state."""
        if generator is None:
            raise ConfigError(
                explain(
                    "generator",
                    expected="a torch.Generator, for the actions that black-box rewards score",
                    got=None,
                    do="Pass aligner(..., generator=torch.Generator(device).manual_seed(seed)).",
                )
            )
        config, mean = self.config, state.x0_hat.detach()
        noise = action_noise(mean, config.actions, config.action_grid, generator)
        # Near the data an estimate hardly errs, and is hardly varied; at t = 0 a direction still needs a length.
        std = config.action_std * promote(state.t).clamp(min=SMALLEST_ACTION_TIME)
        rows = []
        for direction in noise:  # over actions, not samples: a reward is called with a batch at a time
            acted = replace(state, x0_hat=mean + time_like(std, mean) * direction.to(mean.dtype))
            rows.append(torch.stack([_marked(*_call_reward(n, r, acted)) for n, r in self.black_box_rewards.items()]))
        return Actions(noise, std, torch.stack(rows, 1))

    def _black_box_loss(
        self, actions: Actions, shares: Tensor, rewards: Tensor, sound: Tensor, x0_hat: Tensor
    ) -> Tensor:
        """Equation 14: what the rewards are, with the gradient that their actions tell."""
        rows, columns = coarse_sides(x0_hat, self.config.action_grid)
        cell = x0_hat[0, 0].numel() / (rows * columns)
        loss = x0_hat.new_zeros((), dtype=torch.float32)
        for scored, share, reward in zip(actions.rewards, shares, rewards, strict=True):
            gradient, usable = score_function_gradient(
                torch.where(sound, scored, torch.nan),
                actions.noise,
                actions.std,
                cell=cell,
                normalize=self.config.scale != "none",
                eps=self.config.scale_eps,
            )
            count = usable.sum().clamp(min=1)
            weight = torch.where(usable, share, 0) / count
            value = -(weight * torch.where(usable, reward, 0)).sum()
            # A sample that is not finite is zeros here, and has no gradient.
            moved = (time_like(weight, x0_hat) * gradient * (x0_hat - x0_hat.detach())).sum()
            loss = loss + value - moved
        return loss

    def _all_rewards(self, values: Tensor, state: RewardState, actions: Actions | None) -> Tensor:
        """Every watched reward (K, B), without gradient, in the order of ``watched``; a black box's is a mean."""
        rows = [values.detach()]
        if actions is not None:
            rows.append(_mean_of_actions(actions.rewards))
        if "fidelity" not in self.names:
            rows.append(fidelity_reward(state.x0_hat, state.x0)[None])
        return torch.cat(rows)

    def _groups(self, state: RewardState) -> Groups:
        if self.config.group == "image":
            return image_groups(len(state.t), self.config.group_size, device=state.t.device)
        return noise_strata(state.t, self.config.group_size)

    def _remember(self, t: Tensor, groups: Groups, moments: GroupMoments, valid: Tensor) -> None:
        if not self.training:
            return
        unbiased = moments.count / (moments.count - 1).clamp(min=1)
        comparable = groups.join((moments.count >= 2).expand_as(moments.deviation))
        self.statistics.update(t, groups.join(moments.deviation.square() * unbiased), valid & comparable)

    def _weights(self, t: Tensor, groups: Groups, moments: GroupMoments) -> Tensor:
        """Weights (K, S, 1) of the optimised rewards."""
        count = len(self.names)
        if self.shares is not None:
            return self.shares.expand(count, len(groups.index), 1)
        variance = groups.split(self.statistics.variance(t))[:count]
        variance = torch.where(groups.mask, variance, 0).sum(-1, keepdim=True) / groups.mask.sum(-1, keepdim=True)
        variance = torch.where(torch.isnan(variance), moments.variance[:count], variance)
        return inverse_variance_weights(variance, floor=self.config.variance_floor, cap=self.config.weight_cap)

    def _combine(self, moments: GroupMoments, weights: Tensor, which: slice) -> tuple[Tensor, Tensor]:
        chosen = GroupMoments(**{f.name: getattr(moments, f.name)[which] for f in fields(moments)})
        return combine_rewards(
            chosen,
            weights,
            scale=self.config.scale,
            aggregation=self.config.aggregation,
            eps=self.config.scale_eps,
        )

    def _metrics(
        self,
        rewards: Tensor,
        valid: Tensor,
        moments: GroupMoments,
        weights: Tensor,
        advantages: Tensor,
        sound: Tensor,
    ) -> dict[str, Tensor]:
        means = torch.where(valid, rewards, 0).sum(1) / valid.sum(1)
        stds = moments.variance.mean((1, 2)).sqrt()
        metrics = {f"vrpo/reward/{n}": m for n, m in zip(self.watched, means, strict=True)}
        metrics |= {f"vrpo/std/{n}": s for n, s in zip(self.watched, stds, strict=True)}
        metrics |= {f"vrpo/weight/{n}": w for n, w in zip(self.names, weights.mean((1, 2)), strict=True)}
        metrics["vrpo/advantage_abs"] = advantages.abs().sum() / valid[0].numel()
        metrics["vrpo/frac_reward_zero_std"] = 1 - moments.live[: len(self.names)].any(0).float().mean()
        metrics["vrpo/nonfinite"] = (~sound | torch.isinf(rewards).any(0)).sum().float()
        return metrics

    def _watch(self, metrics: dict[str, Tensor]) -> None:
        if not (self.training and self.config.fallback):
            return
        weighted = [metrics[f"vrpo/weight/{name}"] * metrics[f"vrpo/reward/{name}"] for name in self.names]
        fidelity = metrics["vrpo/reward/fidelity"]
        unknown = torch.full_like(fidelity, torch.nan)
        # Without one finite sample every group is dead and every mean 0, which says nothing of critic and rewards.
        some = torch.isfinite(fidelity)
        self.watch.update(
            agreement=torch.where(some, metrics.get("vrpo/critic_cos", unknown), torch.nan),
            live=torch.where(some, 1 - metrics["vrpo/frac_reward_zero_std"], torch.nan),
            fidelity=unknown if "fidelity" in self.names else fidelity,
            reward=torch.stack(weighted).sum(),
        )


def _call_reward(name: str, reward: Reward, state: RewardState) -> tuple[Tensor, Tensor | None]:
    result = reward(state)
    value, scored = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    right = isinstance(value, Tensor) and value.shape == state.t.shape and not value.is_complex()
    if scored is not None:
        right = right and isinstance(scored, Tensor) and scored.shape == state.t.shape and scored.dtype == torch.bool
    if not right:
        raise ShapeError(
            explain(
                f"reward {name!r}",
                expected=f"values (B={len(state.t)},), higher is better, and an optional boolean mask of that shape",
                got=[described(x) for x in (result if isinstance(result, tuple) else (result,))],
                do="Return one value per sample.",
            )
        )
    return value, scored


def _mean_of_actions(rewards: Tensor) -> Tensor:
    """Means (R, B) over the finite of K actions (R, K, B); where fewer than two are, inf or NaN as in ``_marked``."""
    finite = torch.isfinite(rewards)
    count = finite.sum(1)
    mean = torch.where(finite, rewards, 0).sum(1) / count.clamp(min=1)
    return torch.where(count >= 2, mean, torch.where(torch.isinf(rewards).any(1), torch.inf, torch.nan))


def _marked(value: Tensor, scored: Tensor | None) -> Tensor:
    """Inf for a reward that is not finite, which is counted; NaN where the reward did not score the sample."""
    value = torch.where(torch.isfinite(value), value, torch.inf)
    return value if scored is None else torch.where(scored, value, torch.nan)


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

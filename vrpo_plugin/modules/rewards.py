"""The rewards of a run, in one order: a table of who scores what."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call

from vrpo_plugin.config import BUILTIN_REWARDS, VRPOConfig
from vrpo_plugin.errors import ConfigError
from vrpo_plugin.functional.rewards import RewardState, feature_distance, fidelity_reward, semantic_reward
from vrpo_plugin.functional.tensors import finite_or_zero
from vrpo_plugin.modules.actions import Actions, Reward, call_reward, marked, mean_of_actions
from vrpo_plugin.modules.critic import CriticOutput, LatentCritic


class RewardTable:
    """Rows of every (R, B) tensor of rewards: those with a gradient, those without, and what is measured alone.

    Args:
        config: the objective; its ``rewards`` come first.
        rewards: differentiable rewards of the user, name to callable.
        black_box_rewards: rewards without a gradient.
        agreement: the critic's agreement with the encoder on clean latents is measured too, in the last row.

    Attributes:
        names: of the optimised rewards.
        watched: of these and of ``fidelity``, which is always measured.
        pathwise: how many have a gradient; they stand first.
        optimised: how many are optimised.
        fidelity: its row.
        rows: R.

    Raises:
        ConfigError: two rewards share a name.
    """

    def __init__(
        self,
        config: VRPOConfig,
        rewards: Mapping[str, Reward],
        black_box_rewards: Mapping[str, Reward],
        *,
        agreement: bool,
    ) -> None:
        clash = ({*rewards, *black_box_rewards} & {*BUILTIN_REWARDS}) | ({*rewards} & {*black_box_rewards})
        if clash:
            raise ConfigError("rewards", expected="distinct names", got=sorted(clash), do="Rename your reward.")
        self.built_in, self.custom, self.black_boxes = config.rewards, dict(rewards), dict(black_box_rewards)
        self.names = (*self.built_in, *self.custom, *self.black_boxes)
        self.watched = self.names if "fidelity" in self.names else (*self.names, "fidelity")
        self.pathwise, self.optimised = len(self.built_in) + len(self.custom), len(self.names)
        self.fidelity, self.agreement = self.watched.index("fidelity"), agreement
        self.rows = len(self.watched) + agreement

    def shares(self, config: VRPOConfig) -> Tensor | None:
        """Fixed weights (K, 1), which sum to 1; None for inverse variance.

        Raises:
            ConfigError: they do not name exactly the rewards.
        """
        if config.reward_weights == "inverse_variance":
            return None
        shares = dict.fromkeys(self.names, 1.0)
        if config.reward_weights != "equal":
            shares = dict(config.reward_weights)
        if set(shares) != set(self.names):
            expected = f"one share for each of {self.names}"
            raise ConfigError("reward_weights", expected=expected, got=shares, do="Name every reward.")
        # In Python's float64, where shares of any size have a sum, and in units of the largest, where theirs is finite.
        largest = max(shares.values())
        values = [shares[name] / largest for name in self.names]
        return torch.tensor([[value / sum(values)] for value in values])

    def differentiable(self, state: RewardState, critic: LatentCritic | None, clean: CriticOutput | None) -> Tensor:
        """The first rows (pathwise, B), with their gradient by ``state.x0_hat``, marked as ``marked`` says."""
        found: dict[str, Tensor] = {}
        if critic is not None:
            # Detached weights: the generator cannot teach its critic leniency.
            frozen = {name: p.detach() for name, p in critic.named_parameters()}
            seen = functional_call(critic, frozen, (state.x0_hat,))
            found["semantic"] = semantic_reward(seen.tokens, state.z)
            if "perceptual" in self.built_in:
                assert clean is not None
                found["perceptual"] = -feature_distance(seen.features, [f.detach() for f in clean.features])
        if "fidelity" in self.built_in:
            found["fidelity"] = fidelity_reward(state.x0_hat, state.x0)
        values = [found[name] for name in self.built_in]
        values += [_with_gradient(name, reward, state) for name, reward in self.custom.items()]
        return torch.stack(values) if values else state.x0_hat.new_zeros((0, len(state.t)), dtype=torch.float32)

    def all(self, values: Tensor, state: RewardState, actions: Actions | None, agreement: Tensor) -> Tensor:
        """All rows (R, B), without gradient; a black box's is the mean over its actions."""
        rows = [values.detach()]
        if actions is not None:
            rows.append(mean_of_actions(actions.rewards))
        if "fidelity" not in self.names:
            rows.append(fidelity_reward(state.x0_hat, state.x0)[None])
        if self.agreement:
            rows.append(agreement.detach()[None])
        return torch.cat(rows)


def _with_gradient(name: str, reward: Reward, state: RewardState) -> Tensor:
    x0_hat = state.x0_hat.view_as(state.x0_hat)
    if x0_hat.requires_grad:
        # A reward that is NaN is left out of the loss, and 0 times its gradient would be NaN again.
        # One view per reward, so that the gradients of the others stay.
        x0_hat.register_hook(finite_or_zero)
    value, scored = call_reward(name, reward, replace(state, x0_hat=x0_hat))
    if x0_hat.requires_grad and not value.requires_grad:
        expected = "a value with a gradient to state.x0_hat"
        raise ConfigError(f"reward {name!r}", expected=expected, got="none", do="Pass it in black_box_rewards=.")
    return marked(value, scored)

"""What rewards are at each noise level: running means and variances, the same on every process."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vrpo_plugin.functional.levels import LEVELS, level_moments, merge_moments, remember


def update_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    """Gives a buffer its next value: in place, but in compiled code as a new tensor.

    What a forward pass makes of a buffer, torch.compile may make again in the backward pass (seen in torch 2.15). A
    buffer that was updated in place in between is then one update ahead, and the gradient wrong.
    """
    if torch.compiler.is_compiling():
        setattr(module, name, value)
    else:
        getattr(module, name).copy_(value)


class RewardStatistics(nn.Module):
    """Moments of each reward at ten levels of noise, with a memory (equations 8 and 11).

    Args:
        num_rewards: K.

    Attributes:
        moments: (3, K, 10), as ``vrpo_plugin.functional.levels`` describes them.

    Source: our derivation.
    """

    moments: Tensor

    def __init__(self, num_rewards: int) -> None:
        super().__init__()
        self.register_buffer("moments", torch.zeros(3, num_rewards, LEVELS))

    @torch.no_grad()
    def update(self, rewards: Tensor, level: Tensor, valid: Tensor) -> Tensor:
        """Adds a batch of each process; in evaluation mode it changes nothing, and asks no other process.

        Args:
            rewards: (K, B).
            level: of each sample (B,).
            valid: (K, B); False leaves a reward out.

        Returns:
            Moments (3, K, 10) of what was added.
        """
        new = level_moments(rewards, level, valid).to(self.moments.dtype)
        if not self.training:
            return new
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # The objective's one collective. A gather, as a sum with zeros: all backends and torch.compile have that.
            parts = new.new_zeros(dist.get_world_size(), *new.shape)
            parts[dist.get_rank()] = new
            dist.all_reduce(parts)
            new = merge_moments(parts)
        update_buffer(self, "moments", remember(self.moments, new))
        return new

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # A host that casts its model to bfloat16 must not round away an update of one percent.
        super()._apply(fn, recurse)
        self.moments = self.moments.float()
        return self

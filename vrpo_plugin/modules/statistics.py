"""Running variances of rewards, per noise level and the same on every process."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

NOISE_BINS = 10


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
    """Exponentially weighted variance of each reward in ten bins of t (equation 11).

    Fixed bins, because strata move with the batch: they give every group size, batch size and number of
    processes one memory. The sums are reduced over processes, with no transfer to the host.

    Args:
        num_rewards: K.
        decay: per-update decay of a bin that got a sample, in [0, 1).

    Source: our derivation.
    """

    square_sum: Tensor
    count: Tensor

    def __init__(self, num_rewards: int, *, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("square_sum", torch.zeros(num_rewards, NOISE_BINS))
        self.register_buffer("count", torch.zeros(num_rewards, NOISE_BINS))

    @torch.no_grad()
    def update(self, t: Tensor, square_deviation: Tensor, valid: Tensor) -> None:
        """Adds a batch, reduced over all processes.

        Args:
            t: times (B,).
            square_deviation: squared deviations from the group's mean (K, B), times n / (n - 1).
            valid: (K, B); False leaves a sample out.
        """
        member = self._bins(t)[:, None] == torch.arange(NOISE_BINS, device=t.device)
        taken = (valid[:, :, None] & member).to(self.count.dtype)
        new = torch.stack([(taken * square_deviation[:, :, None]).sum(1), taken.sum(1)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(new)
        decay = torch.where(new[1] > 0, self.decay, 1.0)
        update_buffer(self, "square_sum", self.square_sum * decay + new[0])
        update_buffer(self, "count", self.count * decay + new[1])

    def variance(self, t: Tensor) -> Tensor:
        """Variance of each reward at each sample's noise level (K, B); NaN where nothing was ever seen."""
        return (self.square_sum / self.count)[:, self._bins(t)]

    def _bins(self, t: Tensor) -> Tensor:
        return (t * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # A host that casts its model to bfloat16 must not round away an update of one percent.
        super()._apply(fn, recurse)
        self.square_sum, self.count = self.square_sum.float(), self.count.float()
        return self

"""Watching whether the rewards still mean something, without asking the device."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vrpo_plugin.modules.statistics import update_buffer

DECAY = 0.99
WARM_UP = 200  # updates before anything is judged: a critic that learns beside the model starts from nothing
SMALLEST_ERROR = 1e-4  # squared errors below it count as it
# What each signal may lose of its best before that is a collapse, the best below which it is noise and not judged, and
# what a collapse means.
SIGNALS = (
    (0.5, 0.1, "the critic's agreement with the encoder (vrpo/critic_cos) has fallen to less than half of its best"),
    (0.05, 0.1, "the rewards no longer tell the samples of a group apart (vrpo/frac_reward_zero_std)"),
    (
        2 / 3,
        0.0,
        "fidelity, which is not optimised, has worsened by half (vrpo/reward/fidelity) while the rewards have not",
    ),
)


class CollapseWatch(nn.Module):
    """Remembers the best of each signal, and notes for good when one has collapsed (equation 18).

    Signals are exponentially weighted means, reduced over processes: every process decides alike.

    Attributes:
        reason: 0-dim int64 on the device; 0, or one more than the index in ``SIGNALS`` of the first collapse.

    Source: our derivation.
    """

    total: Tensor
    weight: Tensor
    best: Tensor
    reward_at_best: Tensor
    updates: Tensor
    reason: Tensor
    limits: Tensor
    floors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(len(SIGNALS) + 1))
        self.register_buffer("weight", torch.zeros(len(SIGNALS) + 1))
        self.register_buffer("best", torch.zeros(len(SIGNALS)))
        self.register_buffer("reward_at_best", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("reason", torch.zeros((), dtype=torch.int64))
        self.register_buffer("limits", torch.tensor([limit for limit, _, _ in SIGNALS]), persistent=False)
        self.register_buffer("floors", torch.tensor([floor for _, floor, _ in SIGNALS]), persistent=False)

    @torch.no_grad()
    def update(self, agreement: Tensor, live: Tensor, fidelity: Tensor, reward: Tensor) -> None:
        """Adds a batch; NaN where a signal is not there.

        Args:
            agreement: mean cosine of the critic with the encoder on clean latents, 0-dim.
            live: share of groups whose rewards differ, 0-dim.
            fidelity: mean of the fidelity reward, which must not be optimised, 0-dim.
            reward: weighted mean of the optimised rewards, 0-dim.
        """
        values = torch.stack([agreement, live, -fidelity, reward]).float()
        seen = torch.isfinite(values)
        sums = torch.stack([torch.where(seen, values, 0), seen.float()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        new = torch.where(sums[1] > 0, 1 - DECAY, 0)
        total = self.total * (1 - new) + new * sums[0] / sums[1].clamp(min=1)
        weight = self.weight * (1 - new) + new
        agreement, live, error, reward = (total / weight).unbind()  # NaN where nothing was ever seen
        signals = torch.stack([agreement, live, 1 / error.clamp(min=SMALLEST_ERROR)])
        ready = self.updates >= WARM_UP
        better = ready & (signals > self.best)
        best = torch.where(better, signals, self.best)
        reward_at_best = torch.where(better[-1], reward, self.reward_at_best)
        # A critic that has never agreed with the encoder, untrained or in a long warm-up, has nothing to lose.
        fallen = ready & (best >= self.floors) & (signals < self.limits * best)
        # Where the rewards have fallen too, it is the training that went wrong: letting go of them would cure nothing.
        parted = torch.stack([fallen[0], fallen[1], fallen[2] & (reward >= reward_at_best)])
        found = torch.where(parted.any(), parted.float().argmax() + 1, 0)
        update_buffer(self, "reason", torch.where(self.reason > 0, self.reason, found))
        update_buffer(self, "total", total)
        update_buffer(self, "weight", weight)
        update_buffer(self, "best", best)
        update_buffer(self, "reward_at_best", reward_at_best)
        update_buffer(self, "updates", self.updates + (sums[1] > 0).any())

    @property
    def share(self) -> Tensor:
        """What is left of the rewards' weight, 0-dim: 1, and 0 after a collapse."""
        return (self.reason == 0).float()

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # As in RewardStatistics: bfloat16 would round away an update of one percent.
        super()._apply(fn, recurse)
        for name in ("total", "weight", "best", "reward_at_best", "limits", "floors"):
            setattr(self, name, getattr(self, name).float())
        return self


def describe_collapse(reason: float) -> str:
    """What to tell the user of a reason that is not 0."""
    return (
        f"{SIGNALS[int(reason) - 1][2]}: the rewards have lost their weight for the rest of this run, and the static "
        "alignment goes on alone. Look at these curves; to go on with the rewards, resume with fallback=False."
    )

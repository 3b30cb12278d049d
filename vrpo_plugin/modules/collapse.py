"""Watching whether the rewards still mean something, without asking the device."""

import torch
from torch import Tensor, nn

from vrpo_plugin.functional.tensors import is_finite
from vrpo_plugin.modules.statistics import update_buffer

WARM_UP = 200  # updates before anything is judged: a critic that learns beside the model starts from nothing
SMALLEST_ERROR = 1e-4  # squared errors below it count as it
# What each signal may lose of its best before that is a collapse, the best below which it is noise and not judged, and
# what a collapse means.
SIGNALS = (
    (0.5, 0.1, "the critic's agreement with the encoder (vrpo/critic_cos) has fallen to less than half of its best"),
    (0.05, 0.0, "the rewards no longer tell the samples of a noise level apart (vrpo/std/*)"),
    (
        2 / 3,
        0.0,
        "fidelity, which is not optimised, has worsened by half (vrpo/reward/fidelity) while the rewards have not",
    ),
)


class CollapseWatch(nn.Module):
    """Remembers the best of each signal, and notes for good when one has collapsed (equation 18).

    Signals are what the rewards' memory says, the same on every process: every process decides alike.

    Attributes:
        reason: 0-dim int64 on the device; 0, or one more than the index in ``SIGNALS`` of the first collapse.

    Source: our derivation.
    """

    best: Tensor
    reward_at_best: Tensor
    updates: Tensor
    reason: Tensor
    limits: Tensor
    floors: Tensor
    alone: Tensor  # signals that are judged whatever the rewards do
    codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        limits, floors, _ = zip(*SIGNALS, strict=True)
        self.register_buffer("best", torch.zeros(len(SIGNALS)))
        self.register_buffer("reward_at_best", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("reason", torch.zeros((), dtype=torch.int64))
        self.register_buffer("limits", torch.tensor(limits), persistent=False)
        self.register_buffer("floors", torch.tensor(floors), persistent=False)
        self.register_buffer("alone", torch.tensor([True, True, False]), persistent=False)
        self.register_buffer("codes", torch.tensor([1, 2, 3]), persistent=False)

    @torch.no_grad()
    def update(self, agreement: Tensor, spread: Tensor, fidelity: Tensor, reward: Tensor) -> None:
        """Looks once; NaN where a signal is not there.

        Args:
            agreement: mean cosine of the critic with the encoder on clean latents, 0-dim.
            spread: standard deviation of the weighted reward within a noise level, 0-dim.
            fidelity: mean of the fidelity reward, which must not be optimised, 0-dim.
            reward: weighted mean of the optimised rewards, 0-dim.
        """
        signals = torch.stack([agreement, spread, -1 / fidelity.clamp(max=-SMALLEST_ERROR)])
        ready = self.updates >= WARM_UP
        better = ready & (signals > self.best)
        best = torch.where(better, signals, self.best)
        reward_at_best = torch.where(better[-1], reward, self.reward_at_best)
        # A critic that has never agreed with the encoder, untrained or in a long warm-up, has nothing to lose.
        fallen = ready & (best >= self.floors) & (signals < self.limits * best)
        # Where the rewards have fallen too, it is the training that went wrong: letting go of them would cure nothing.
        parted = fallen & (self.alone | (reward >= reward_at_best))
        found = torch.where(parted, self.codes, len(SIGNALS) + 1).amin() % (len(SIGNALS) + 1)
        update_buffer(self, "reason", torch.where(self.reason > 0, self.reason, found))
        update_buffer(self, "best", best)
        update_buffer(self, "reward_at_best", reward_at_best)
        update_buffer(self, "updates", self.updates + is_finite(signals).any())

    @property
    def share(self) -> Tensor:
        """What is left of the rewards' weight, 0-dim: 1, and 0 after a collapse."""
        return (self.reason == 0).float()

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # As in RewardStatistics: bfloat16 would round away an update of one percent.
        super()._apply(fn, recurse)
        for name in ("best", "reward_at_best", "limits", "floors"):
            setattr(self, name, getattr(self, name).float())
        return self


def describe_collapse(reason: float) -> str:
    """What to tell the user of a reason that is not 0."""
    return (
        f"{SIGNALS[int(reason) - 1][2]}: the rewards have lost their weight for the rest of this run, and the static "
        "alignment goes on alone. Look at these curves; to go on with the rewards, resume with fallback=False."
    )

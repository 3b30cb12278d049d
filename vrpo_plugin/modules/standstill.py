"""Noticing that something is not trained, without waiting for the device on every step."""

import logging
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.errors import ConfigError, PatchConflictError
from vrpo_plugin.modules.checks import holds
from vrpo_plugin.modules.collapse import describe_collapse

logger = logging.getLogger("vrpo_plugin")

ZERO_STEPS = 100  # in a row, before they are said to be a standstill
ZERO_LOOK = 50  # steps between looks at that count
END_LOOK = 50  # calls between looks at the rewards' weight
LARGE_SCALED_COEFF = 0.3  # of scaled advantages: more than twice the default
FIRST_LOOK = 16  # calls; then at twice as many, until the model itself has been updated


class UpdateWatch:
    """Warns where an optimizer updates the model and never its aligner: it was made before ``attach``.

    It compares a few small parameters with what they were, at the 16th, 32nd, ... call, and reads the answer at a later
    call, when the device has it. As soon as the model has changed, it never looks again. A plain object, of which a
    deep copy (an EMA model) watches nothing.

    Args:
        model: what the aligner is attached to; None watches nothing.
        aligner: whose parameters should change with the model's.
    """

    def __init__(self, model: nn.Module | None = None, aligner: nn.Module | None = None) -> None:
        self.attached = model is not None
        self.calls = 0
        self._model = None if model is None else weakref.ref(model)
        self._before: tuple[list[Tensor], list[Tensor]] | None = None
        self._answer: LaterRead | None = None
        self._done = model is None or aligner is None

    def __getstate__(self) -> dict[str, Any]:
        return {**UpdateWatch().__dict__, "attached": self.attached}

    def look(self, aligner: nn.Module) -> None:
        """Counts a call in training mode."""
        model = self._model() if self._model is not None and not self._done and torch.is_grad_enabled() else None
        if model is None:
            return
        self.calls += 1
        if self._answer is not None and self._answer.is_there():
            self._conclude(*self._answer.values())
        if self._done or (self.calls != 1 and (self.calls < FIRST_LOOK or self.calls & (self.calls - 1))):
            return
        own = {id(p) for p in aligner.parameters()}
        watched = _small(p for p in model.parameters() if id(p) not in own), _small(aligner.parameters())
        if not all(watched):
            self._done = True
            return
        now = ([p.detach().clone() for p in watched[0]], [p.detach().clone() for p in watched[1]])
        if self._before is None:
            self._before = now
            return
        self._answer = LaterRead(torch.stack([_changed(a, b) for a, b in zip(self._before, now, strict=True)]))

    def _conclude(self, host: bool, ours: bool) -> None:
        self._answer, self._done = None, bool(host)
        if host:
            self._before = None
        if host and not ours:
            warnings.warn(
                f"vrpo_plugin: after {self.calls} calls the model has been updated and its aligner has not. Was the "
                "optimizer made before aligner.attach(model)? Make it afterwards, or add aligner.parameters() to it.",
                stacklevel=4,
            )


class LaterRead:
    """A small tensor on its way to the host; nothing waits for it.

    Args:
        values: on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._copied: Any = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def is_there(self) -> bool:
        """Whether :meth:`values` can be had without waiting; on other devices than CUDA always."""
        return self._copied is None or self._copied.query()

    def values(self) -> list[Any]:
        """The numbers; where :meth:`is_there` was not asked, it waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class RewardsEnd:
    """Notices that the rewards have lost their weight for good, without waiting for the device.

    It asks at every 50th call and reads the answer 25 calls later, on every process alike: what is not run any more
    holds a collective. A plain object, whose copy begins afresh.

    Attributes:
        reached: the weight is 0 for good.
    """

    def __init__(self) -> None:
        self.reached = False
        self._calls = 0
        self._answer: LaterRead | None = None

    def __getstate__(self) -> dict[str, Any]:
        return RewardsEnd().__dict__

    def look(self, share: Tensor | float, reason: Tensor | None, *, say: bool) -> None:
        """Counts a call in training mode.

        Args:
            share: what the schedule has left; a number is no question.
            reason: :class:`CollapseWatch`'s; None where a collapse changes nothing.
            say: the first process says a collapse, once, in words.
        """
        asked = [x for x in (share, reason) if isinstance(x, Tensor)]
        if self.reached or not asked or asked[0].is_meta:
            return
        self._calls += 1
        if self._calls % END_LOOK == 0:
            left = share if isinstance(share, Tensor) else torch.full_like(asked[0], share, dtype=torch.float32)
            found = torch.zeros_like(left) if reason is None else reason
            self._answer = LaterRead(torch.stack([left.float(), found.float()]))
        elif self._answer is not None and self._calls % END_LOOK == END_LOOK // 2:
            (left, found), self._answer = self._answer.values(), None
            self.reached = bool(found) or left == 0
            if found and say and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
                logger.warning("vrpo_plugin: %s", describe_collapse(found))


def say_what_settings_do(config: VRPOConfig) -> None:
    """Warns of a weight that means something else than its number says, and of rewards that nobody lets go of."""
    large = config.reward_coeff > LARGE_SCALED_COEFF
    if large == (config.scale == "group"):
        logger.warning(
            "reward_coeff=%g with scale=%s: advantages over their deviation are about ten times as large as those "
            "without a scale, so %g is like the default.",
            config.reward_coeff,
            config.scale,
            VRPOConfig.reward_coeff * (1 if config.scale == "group" else 10),
        )
    if config.reward_release == "linear" and not config.reward_release_steps:
        logger.warning(
            "the length of the run is not known, so the rewards have %g of their weight from the start to the end. Set "
            "reward_release_steps to a quarter of the run's steps (in a host VRPO_REWARD_RELEASE_STEPS).",
            config.reward_floor or 1,
        )


def say_what_is_over(config: VRPOConfig, parts: Iterable[str], begun: Tensor | int, *, restored: bool) -> None:
    """Warns of a part of the objective whose schedule is over before the first call.

    Args:
        config: the objective.
        parts: ``release``, ``reward_release`` or both.
        begun: the first step.
        restored: a checkpoint says so.
    """
    for name in parts:
        schedule, steps = getattr(config, name), getattr(config, f"{name}_steps")
        if schedule == "none" or not steps or (name == "reward_release" and config.reward_floor):
            continue
        if (not begun.is_meta and holds(begun >= steps)) if isinstance(begun, Tensor) else begun >= steps:
            logger.warning(
                "%s_steps=%d is over before the first call, at %s: that part of the objective has no weight. To "
                "train with it from here on, add this step to %s_steps.",
                name,
                steps,
                "the step that a checkpoint has restored" if restored else f"step {begun}",
                name,
            )


class WrapperCheck:
    """Refuses what DistributedDataParallel cannot train: parameters it does not know, and calls it does not see.

    A plain object, whose deep copy begins afresh.
    """

    def __init__(self) -> None:
        self._covered = False
        self._unseen = False

    def __getstate__(self) -> dict[str, Any]:
        return WrapperCheck().__dict__

    def enter(self, model: nn.Module) -> None:
        """In a call of the model.

        Raises:
            PatchConflictError: the aligner was attached after DDP had wrapped the model.
        """
        wrapper = _active_wrapper()
        self._unseen = wrapper is not None and wrapper.find_unused_parameters and not wrapper.static_graph
        if self._covered or wrapper is None:
            return
        reduced = {id(p) for p in getattr(wrapper, "_module_parameters", wrapper.module.parameters())}
        trained = [p for p in model.get_submodule("vrpo").parameters() if p.requires_grad]
        ignored = getattr(wrapper, "parameters_to_ignore", ())  # somebody's own choice
        if not ignored and any(id(p) not in reduced for p in trained):
            raise wrapped_too_early(wrapper)
        self._covered = True

    def leave(self) -> None:
        """In a call of the aligner.

        Raises:
            ConfigError: DDP looks for unused parameters, and has taken the aligner's for such.
        """
        if self._unseen and torch.is_grad_enabled() and _active_wrapper() is None:
            raise ConfigError(
                "DistributedDataParallel(find_unused_parameters=True)",
                expected="the aligner to be called inside the wrapped module's forward",
                got="a call outside, whose parameters count as unused",
                do="Take find_unused_parameters=False: all are used. Or wrap a module whose forward calls both, as "
                "TrainingStep in examples/train_parts.py.",
            )


def wrapped_too_early(wrapper: nn.Module) -> PatchConflictError:
    """The error of an aligner that is attached to a model that DDP has wrapped."""
    return PatchConflictError(
        "aligner.attach(model)",
        expected=f"a call before {type(wrapper).__name__} wraps the model",
        got="one after it: the processes would train aligners of their own",
        do="Attach first; then make the EMA copy, DDP and the optimizer.",
    )


def _active_wrapper() -> DistributedDataParallel | None:
    """The DDP whose forward is running."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


class ZeroGradients:
    """Warns where the gradients are all zero, step after step: fp16 whose loss scale has sunk, a detached loss."""

    def __init__(self) -> None:
        self.in_a_row: Tensor | None = None
        self._steps, self._said = 0, False
        self._answer: LaterRead | None = None

    def add(self, norms: Tensor) -> None:
        """Takes the gradient norms (K,) of one step; nothing waits for the device."""
        if self._said:
            return
        zero = (norms == 0).all()
        self.in_a_row = torch.where(zero, 1 if self.in_a_row is None else self.in_a_row + 1, 0)
        self._steps += 1
        if self._steps % ZERO_LOOK == 0:
            self._answer = LaterRead(self.in_a_row[None])
        elif self._answer is not None and self._answer.is_there():
            (count,), self._answer = self._answer.values(), None
            if count >= ZERO_STEPS:
                self._said = True
                warnings.warn(
                    f"vrpo_plugin: all gradients have been 0 for {count} steps: training stands still. Under fp16 the "
                    "loss scale may have sunk until they underflow: begin with a larger one, or take bf16. Else look "
                    "for a loss that was detached.",
                    stacklevel=3,
                )


def _small(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The last few biases and the like, as they are cheap to keep; none of a sharded model."""
    trained = [p for p in parameters if p.requires_grad]
    if any(type(p.data) is not Tensor or p.is_meta for p in trained):
        return []
    return sorted(trained, key=lambda p: p.numel())[:8]


def _changed(before: list[Tensor], now: list[Tensor]) -> Tensor:
    """Whether any differs, 0-dim."""
    device = now[0].device
    if [x.shape for x in before] != [x.shape for x in now] or [x.device for x in before] != [x.device for x in now]:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.stack([(a != b).any().to(device) for a, b in zip(before, now, strict=True)]).any()

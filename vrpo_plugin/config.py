"""The one configuration of the objective. Standard library only."""

import difflib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from vrpo_plugin.errors import ConfigError, explain

BUILTIN_REWARDS = ("semantic", "perceptual", "fidelity")


def check_keys(keys: Iterable[str], known: Iterable[str], *, subject: str) -> None:
    """Refuses unknown keys.

    Raises:
        ConfigError: a key is unknown; the message names the nearest known one.
    """
    known = sorted(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else "Remove it."
            raise ConfigError(explain(f"{subject} key", expected=f"one of {', '.join(known)}", got=repr(key), do=hint))


@dataclass(frozen=True, kw_only=True)
class VRPOConfig:
    """What the aligner optimises. docs/equations.md defines every symbol.

    docs/results.md says what was measured; where it is silent, the default follows a small prototype that is not part
    of this repository.

    Attributes:
        features: who aligns the tokens of an early block: ``policy`` (this package, REPA's cosine as a reward),
            ``host`` (the host's own loss, untouched) or ``none``.
        proj_coeff: weight of the features part; REPA's own default.
        layers: blocks that are tapped: ``early`` (one, the host's encoder depth where it names one, else at a
            third of the depth), ``middle`` (one, at half), ``all``, or explicit 1-based block numbers.
        projector: head from hidden tokens to encoder tokens, ``mlp`` (REPA's) or ``conv`` (3x3, iREPA's).
        projector_dim: width of the ``mlp`` projector.
        target_norm: ``none``, or ``spatial`` (iREPA's normalisation of the encoder tokens).
        release: schedule of the features part: ``none``, ``linear`` (down to 0 at release_steps) or ``stop``
            (HASTE: off from release_steps on).
        release_steps: in training steps, as ``forward(step=...)`` counts them, else in calls.
        reward_coeff: weight of the generation part (at its begin, where it is let go of); 0 makes no critic. 0.8 to 1.6
            ended within an eighth of each other in docs/results.md; more is slower at first.
        reward_release: schedule of the generation part, as ``release``. ``linear`` ended at the lowest distances in
            docs/results.md: a constant reward acts like guidance that is built in. Its end is the best moment: trained
            on without rewards, the lead fades there.
        reward_release_steps: as ``release_steps``. 0: the length of the run, which :meth:`for_run` fills in; where
            nobody does, nothing is let go of.
        reward_floor: share of ``reward_coeff`` that the schedule of the generation part ends at, in [0, 1]. Above 0 not
            measured.
        noise_gate: weight of the rewards by the sample's noise: ``none``; ``linear``, 2 (1 - t); ``cut``, 1 up to
            noise_gate_end and 0 beyond, as PixelGen does. Not measured.
        noise_gate_end: a time in (0, 1].
        rewards: built-in rewards that are optimised on the generation readout. ``fidelity`` is measured always;
            naming it optimises it a second time, next to the denoising loss.
        reward_weights: ``inverse_variance`` (by noise level), ``equal``, or a mapping from reward to share (normalised
            to sum 1).
        scale: what a reward's advantages are divided by: its deviation in the ``group``, which is the noise level, or
            ``none``. With ``group`` the reward's unit does not matter, and ``inverse_variance`` gives equal shares.
        actions: of each state, that a reward without a gradient is asked for; at least 2. With 8 the estimated gradient
            has a cosine of about sqrt(7 / n) with the true one, n = C * action_grid^2.
        action_std: standard deviation of the actions around x0_hat at t = 1, in latent units; at t it is t times that.
        action_grid: sides of the coarse grid on which actions differ; 0: every pixel by itself. Coarse actions tell
            more of a gradient that is coarse, and nothing of what is finer.
        critic_width: channels at the token grid.
        critic_checkpoint: safetensors file written by ``vrpo train-critic``; None starts from scratch.
        critic_trainable: False freezes the critic (needs ``critic_checkpoint``).
        fallback: where the critic or the rewards collapse (equation 18), the rewards lose their weight for the rest of
            the run, and the features part goes on as REPA's static alignment.
        path_type: ``linear`` or ``cosine`` interpolant, for x0_hat.

    Raises:
        ConfigError: a key is unknown, a value is out of range, or two settings contradict each other.

    Source: our derivation (docs/equations.md); REPA, arXiv 2410.06940, for the features part.
    """

    features: Literal["policy", "host", "none"] = "policy"
    proj_coeff: float = 0.5
    layers: Literal["early", "middle", "all"] | tuple[int, ...] = "early"
    projector: Literal["mlp", "conv"] = "mlp"
    projector_dim: int = 2048
    target_norm: Literal["none", "spatial"] = "none"
    release: Literal["none", "linear", "stop"] = "none"
    release_steps: int = 0
    reward_coeff: float = 1.2
    reward_release: Literal["none", "linear", "stop"] = "linear"
    reward_release_steps: int = 0
    reward_floor: float = 0.0
    noise_gate: Literal["none", "linear", "cut"] = "none"
    noise_gate_end: float = 0.8
    rewards: tuple[str, ...] = ("semantic", "perceptual")
    reward_weights: Literal["inverse_variance", "equal"] | tuple[tuple[str, float], ...] = "inverse_variance"
    scale: Literal["group", "none"] = "none"
    actions: int = 8
    action_std: float = 0.1
    action_grid: int = 4
    critic_width: int = 256
    critic_checkpoint: str | None = None
    critic_trainable: bool = True
    fallback: bool = True
    path_type: Literal["linear", "cosine"] = "linear"

    def __new__(cls, *args: Any, **kwargs: Any) -> "VRPOConfig":
        # Before the generated __init__, whose TypeError would not name the nearest key.
        check_keys(kwargs, (f.name for f in fields(cls)), subject="VRPOConfig")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.reward_weights, str):
            object.__setattr__(self, "reward_weights", _sorted_shares(self.reward_weights))
        if isinstance(self.critic_checkpoint, os.PathLike):
            object.__setattr__(self, "critic_checkpoint", os.fspath(self.critic_checkpoint))
        for name in ("rewards", "layers"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_choices()
        self._check_ranges()
        self._check_consistency()

    def _check_choices(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            options = [o for part in (hint, *get_args(hint)) if get_origin(part) is Literal for o in get_args(part)]
            is_tuple = isinstance(value, tuple) and any(get_origin(part) is tuple for part in get_args(hint))
            if options and not is_tuple and value not in options:
                _fail(name, f"one of {options}", value)

    def _check_ranges(self) -> None:
        for f in fields(self):
            value, default = getattr(self, f.name), f.default
            if isinstance(default, bool):
                if not isinstance(value, bool):
                    _fail(f.name, "True or False", value)
            elif isinstance(default, (int, float)) and not _is_number(value, type(default)):
                _fail(f.name, f"a finite {type(default).__name__} >= 0", value)
        for name in ("projector_dim", "critic_width", "action_std", "noise_gate_end"):
            if getattr(self, name) <= 0:
                _fail(name, "> 0", getattr(self, name))
        for name in ("noise_gate_end", "reward_floor"):
            if getattr(self, name) > 1:
                _fail(name, "at most 1", getattr(self, name))
        if self.actions < 2:
            _fail("actions", ">= 2, to compare", self.actions)

    def _check_consistency(self) -> None:
        if not isinstance(self.rewards, tuple):
            _fail("rewards", "a tuple of names", self.rewards)
        for name in self.rewards:
            if name not in BUILTIN_REWARDS:
                _fail(
                    "rewards",
                    f"names among {BUILTIN_REWARDS}",
                    name,
                    "Pass callables as VRPOAligner(rewards=...).",
                )
        if len(set(self.rewards)) != len(self.rewards):
            _fail("rewards", "distinct names", self.rewards)
        if isinstance(self.layers, tuple) and not (
            self.layers and all(isinstance(i, int) and not isinstance(i, bool) and i >= 1 for i in self.layers)
        ):
            _fail("layers", '"early", "middle", "all" or block numbers from 1', self.layers)
        for name in ("release", "reward_release"):
            schedule, steps = getattr(self, name), getattr(self, f"{name}_steps")
            unset = name == "reward_release" and schedule == "linear"  # see for_run
            if schedule != "none" and steps < 1 and not unset:
                _fail(f"{name}_steps", f">= 1 with {name}={schedule!r}", steps)
        if not isinstance(self.reward_weights, str):
            shares = [w for _, w in self.reward_weights]
            if not all(_is_number(w, float) for w in shares) or not 0 < sum(shares) < math.inf:
                _fail("reward_weights", "shares >= 0 with a sum > 0", self.reward_weights)
        if not isinstance(self.critic_checkpoint, (str, type(None))):
            _fail("critic_checkpoint", "a path or None", self.critic_checkpoint)
        if not self.critic_trainable and self.critic_checkpoint is None:
            _fail(
                "critic_checkpoint",
                "a file with critic_trainable=False",
                None,
                "Train one with 'vrpo train-critic'.",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VRPOConfig":
        """Builds a configuration from plain data, for instance a YAML or JSON mapping.

        Raises:
            ConfigError: as the constructor.
        """
        if not isinstance(values, Mapping):
            _fail("VRPOConfig.from_dict", "a mapping from key to value", values)
        check_keys(values, (f.name for f in fields(cls)), subject="VRPOConfig")  # a key that is no text too
        return cls(**values)

    def for_run(self, total_steps: int) -> "VRPOConfig":
        """Gives the linear release of the rewards the run's length, where it has none of its own.

        Args:
            total_steps: training steps of the run, as ``forward(step=...)`` counts them, else calls.
        """
        unset = self.reward_release == "linear" and not self.reward_release_steps
        return replace(self, reward_release_steps=total_steps) if unset else self

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` turns back into an equal configuration."""
        values = json.loads(json.dumps(asdict(self)))
        if not isinstance(self.reward_weights, str):
            values["reward_weights"] = dict(self.reward_weights)
        return values


def _is_number(value: object, kind: type) -> bool:
    """A finite number >= 0 that a float can hold; True and False are none."""
    kinds = (int, float) if kind is float else int
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _sorted_shares(shares: Any) -> tuple[tuple[str, float], ...]:
    """One order for every way of writing them, so that equal configurations compare equal."""
    try:
        named = dict(shares)
        distinct = len(named) == len(shares) and all(isinstance(name, str) for name in named)
    except (TypeError, ValueError):
        distinct = False
    if not distinct:
        _fail("reward_weights", '"inverse_variance", "equal" or a mapping from distinct names to shares', shares)
    return tuple(sorted(named.items()))


def _fail(name: str, expected: str, got: object, do: str = "Correct it.") -> NoReturn:
    raise ConfigError(explain(name, expected=expected, got=repr(got), do=do))

"""The one configuration of the objective. Standard library only."""

import difflib
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from vrpo_plugin.errors import ConfigError

BUILTIN_REWARDS = ("semantic", "perceptual", "fidelity")
RUN_SHARE = 4  # the schedule of the rewards is a quarter of the run


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
            raise ConfigError(f"{subject} key", expected=f"one of {', '.join(known)}", got=repr(key), do=hint)


@dataclass(frozen=True, kw_only=True)
class VRPOConfig:
    """What the aligner optimises. Set the first six; the other fields are for experiments.

    docs/equations.md defines every symbol. *When* says when to change a field; *Measured* gives Frechet distances (FD,
    class features, lower is better) on CIFAR-10 at 16 px. Those of [floor] are of this version, after 6,000 steps, two
    seeds; the others of version 0.1, which had a weight of 1.2 without scale, decaying to 0: one seed where no other
    number is given, and differences below 0.1 are noise. A word in brackets names the section of docs/results.md.

    Attributes: Set these six
        reward_coeff: Weight of the rewards at the start, from where it decays to ``reward_floor``. 0 makes no critic.
            When: lower it if ``vrpo/gradient_ratio`` stays far above the range of docs/healthy-run.md; with
            ``scale="none"`` take ten times as much. Measured: 0.12 with scale and 1.2 without end alike, 0.36 [floor].
            Version 0.1, decaying from 0.4, 0.8, 1.2, 1.6 and 3.2: 0.97, 0.86, 0.82, 0.77 and 0.79; a higher weight is
            slower at first [schedule].
        reward_release_steps: Training steps over which the reward weight decays to its floor, as ``forward(step=...)``
            counts them, else calls in training mode. 0 is a quarter of the run's length, where the loop or the host
            tells it (``VRPOConfig.for_run``); where nobody does, the weight is at its floor from the start. When: for
            SiT, DiT, LightningDiT and a loop of your own; and to keep the old schedule where a run is made longer.
            Measured: 1,500 of 6,000 steps, 0.36, REPA 0.92 [floor].
        critic_checkpoint: Safetensors file of a critic that ``vrpo train-critic`` wrote; None trains one from scratch
            beside the transformer. When: for every run that is worth a pretraining (docs/critic.md). Measured:
            pretrained 1.25, from scratch 1.56, after 600 steps [ablations].
        critic_trainable: False freezes the critic (needs ``critic_checkpoint``). When: set it to False with a
            pretrained critic. Measured: with the checkpoint, as above; a pretrained critic that is trained further is
            not measured.
        layers: Blocks whose tokens are aligned: ``early`` (one block: the host's encoder depth, else at a third of the
            depth), ``middle`` (one, at half), ``all``, or block numbers from 1. When: your REPA baseline uses another
            block. Measured: early 1.25, middle 1.27, all 1.45 at 37% more compute [ablations].
        proj_coeff: Weight of the alignment of those tokens, REPA's ``--proj-coeff``. A host that has this option uses
            its own. When: your REPA baseline uses another one. Measured: REPA alone at 0.5 and 1: 1.94 and 1.90
            [settings].

    Attributes: To tinker with
        features: Who aligns the tokens: ``policy`` (this package, REPA's cosine as a reward), ``host`` (the host's own
            loss, untouched) or ``none``. When: ``host`` to keep another loss of the host; ``none`` for rewards alone.
            Measured: ``none`` 1.40 at 7% less compute, ``policy`` 1.25 [ablations].
        projector: Head from hidden tokens to encoder tokens: ``mlp`` (REPA's) or ``conv`` (3x3, iREPA's). When: to
            compare with iREPA. Measured: only in iREPA without rewards, 2.33, as REPA's 2.33 [ablations].
        projector_dim: Width of the ``mlp`` projector; REPA's. When: the model is tiny. Not measured.
        targets: What the tokens are aligned with: the ``encoder``'s tokens of the image, or what the pretrained, frozen
            ``critic`` predicts of them from the clean latent; then no encoder and no images are needed. Needs
            ``critic_checkpoint`` and ``critic_trainable=False``. When: ``critic`` where the encoder takes a good share
            of the step, or the loop has no images (docs/critic.md). Not measured with this version.
        target_norm: ``none``, or ``spatial`` (iREPA's normalisation of the encoder tokens). When: to compare with
            iREPA. Measured: only in iREPA without rewards, as for ``projector`` [ablations].
        release: Schedule of the alignment of tokens: ``none``, ``linear`` (down to 0 at ``release_steps``) or ``stop``
            (0 from ``release_steps`` on, as in HASTE). When: to compare with HASTE. Measured: ``linear`` 1.26,
            ``none`` 1.25; without rewards ``linear`` 2.25, ``stop`` 2.32, ``none`` 2.33 [ablations].
        release_steps: Training steps of ``release``, counted as ``reward_release_steps``. When: with ``release``. Not
            measured.
        rewards: Built-in rewards that are optimised: ``semantic``, ``perceptual``, ``fidelity``. ``fidelity`` is
            always logged, and the denoising loss optimises it already. When: to study one reward; fewer rewards save
            little. Measured: both 1.25, without ``semantic`` 1.59, without ``perceptual`` 1.45 [ablations].
        reward_weights: ``inverse_variance`` (within a noise level), ``equal``, or a mapping from reward to share
            (normalised to sum 1). When: rewards of your own get too much or too little weight. Measured: halves 1.35,
            ``inverse_variance`` 1.25; one seed cannot show a difference [ablations].
        scale: What advantages are divided by: the reward's standard deviation at its noise level (``group``), or
            nothing (``none``). With ``group`` the reward's unit does not matter and ``inverse_variance`` gives equal
            shares. When: ``none`` to weigh rewards in their own units; use about ten times ``reward_coeff`` with it.
            Measured: ``group`` 0.36, ``none`` with ten times the weight 0.36, at a higher validation loss [floor].
        reward_release: Schedule of the rewards: ``none``, ``linear`` or ``stop``, as ``release``. When: ``none`` to
            study a constant weight. Measured: ``linear`` 1.25, ``none`` 1.90, after 600 steps [ablations]; after 1,500
            steps ``linear`` 0.86, ``stop`` at half 1.45, ``none`` 1.19, all from 0.8 [schedule].
        reward_floor: Share of ``reward_coeff`` at which the schedule of the rewards ends, in [0, 1]. When: a run is
            many times as long as those measured: try a lower one; with 0 what the rewards brought is lost. Measured:
            without scale 0, 0.05, 0.1, 0.25 and 0.5 end at 0.93, 0.37, 0.36, 0.57 and 0.84; with it 0.1 at 0.36, 0.25
            at 0.51 [floor].
        noise_gate: Weight of the rewards by the sample's noise: ``none``; ``linear``, 2 (1 - t); ``cut``, 1 up to
            ``noise_gate_end`` and 0 beyond, as PixelGen does. When: rewards of very noisy estimates mislead. Measured:
            without scale, at floor 0.25, ``none`` 0.57, ``cut`` at 0.8 0.55, ``linear`` 0.64 [floor].
        noise_gate_end: Time in (0, 1] for ``noise_gate="cut"``. When: with ``noise_gate``. Measured: 0.8 only, above.
        critic_width: Channels of the critic at the token grid; with ``critic_checkpoint`` the width it was trained
            with. When: a smaller transformer needs a cheaper critic. Measured: trained from scratch, width 32 at 1.73
            and 64 at 1.28, after 1,000 steps [settings].
        actions: Variations of each estimate that a reward without a gradient is asked for; at least 2. With 8 the
            estimated gradient has a cosine of about sqrt(7 / n) with the true one, n = C * action_grid^2. When: you
            have such a reward and its signal is noisy. Not measured.
        action_std: Standard deviation of the variations around x0_hat at t = 1, in latent units; at t it is t times
            that. When: such a reward does not react to them. Not measured.
        action_grid: Sides of the coarse grid on which variations differ; 0: every pixel by itself. When: such a reward
            looks at fine detail. Not measured.
        fallback: Set the reward weight to 0 for the rest of the run if critic or rewards collapse (equation 18). When:
            False to go on after a false alarm. Not measured: no run has collapsed yet.
        path_type: ``linear`` or ``cosine`` interpolant, for x0_hat. A host uses its own. When: your loop's path is the
            cosine one. Not measured with ``cosine``.

    Raises:
        ConfigError: a key is unknown, a value is out of range, or two settings contradict each other.

    Source: our derivation (docs/equations.md); REPA, arXiv 2410.06940, for the features part.
    """

    # Set these six.
    reward_coeff: float = 0.12
    reward_release_steps: int = 0
    critic_checkpoint: str | None = None
    critic_trainable: bool = True
    layers: Literal["early", "middle", "all"] | tuple[int, ...] = "early"
    proj_coeff: float = 0.5
    # To tinker with.
    features: Literal["policy", "host", "none"] = "policy"
    projector: Literal["mlp", "conv"] = "mlp"
    projector_dim: int = 2048
    targets: Literal["encoder", "critic"] = "encoder"
    target_norm: Literal["none", "spatial"] = "none"
    release: Literal["none", "linear", "stop"] = "none"
    release_steps: int = 0
    rewards: tuple[str, ...] = ("semantic", "perceptual")
    reward_weights: Literal["inverse_variance", "equal"] | tuple[tuple[str, float], ...] = "inverse_variance"
    scale: Literal["group", "none"] = "group"
    reward_release: Literal["none", "linear", "stop"] = "linear"
    reward_floor: float = 0.1
    noise_gate: Literal["none", "linear", "cut"] = "none"
    noise_gate_end: float = 0.8
    critic_width: int = 256
    actions: int = 8
    action_std: float = 0.1
    action_grid: int = 4
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
        if self.targets == "critic" and self.critic_trainable:
            _fail(
                "critic_trainable",
                "False, and a critic_checkpoint, with targets='critic'",
                True,
                "A critic that learns from its own tokens learns nothing: pretrain one with 'vrpo train-critic'.",
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
        """Makes the schedule of the rewards a quarter of the run, where it has no length of its own.

        Args:
            total_steps: training steps of the run, as ``forward(step=...)`` counts them, else calls.
        """
        unset = self.reward_release == "linear" and not self.reward_release_steps
        return replace(self, reward_release_steps=max(total_steps // RUN_SHARE, 1)) if unset else self

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` turns back into an equal configuration."""
        values = json.loads(json.dumps(asdict(self)))
        if not isinstance(self.reward_weights, str):
            values["reward_weights"] = dict(self.reward_weights)
        return values


def describe_fields(owner: type) -> dict[str, dict[str, str]]:
    """What a dataclass's docstring says of each field, by its groups, in the docstring's order.

    Args:
        owner: has one or more ``Attributes:`` sections in Google style.

    Returns:
        Title of the section ("" without one) to the name of a field to its text, on one line.
    """
    groups: dict[str, dict[str, str]] = {}
    for title, body in re.findall(
        r"^Attributes:[ ]?(.*)\n((?:[ ]{4}.*\n|\n)*)", f"{inspect.getdoc(owner)}\n", flags=re.M
    ):
        entries = re.findall(r"^[ ]{4}(\w+): (.*(?:\n[ ]{8}.*)*)", body, flags=re.M)
        groups[title] = {name: " ".join(text.split()) for name, text in entries}
    return groups


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
    raise ConfigError(name, expected=expected, got=repr(got), do=do)

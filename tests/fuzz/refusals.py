"""What must be refused: configurations of any junk, sizes that are none, tensors and rewards that do not fit."""

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from fuzz.cases import Case, call, cases, inputs, settings
from fuzz.draws import Property, refused
from vrpo_plugin import RewardState, VRPOAligner, VRPOConfig, VRPOError

KEYS = tuple(f.name for f in fields(VRPOConfig))
FIXED = {"reward_weights": {"semantic": 1, "mine": 2.5}}
WORDS = ("policy", "host", "none", "early", "all", "mlp", "linear", "semantic", "group", "equal", "cut")


def junk_configs(values: Any) -> str:
    """Any plain data is a configuration that survives a round trip, or a ConfigError."""
    try:
        config = VRPOConfig.from_dict(values)
    except VRPOError:
        return "refused with ConfigError"
    assert VRPOConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(VRPOConfig.from_dict(values))
    assert config.for_run(10).for_run(20) == config.for_run(10)
    return "computed a configuration"


def sound_configs(values: dict[str, Any]) -> str:
    fixed = values["reward_weights"] == "fixed"
    values = {**values, **(FIXED if fixed else {})}
    config = VRPOConfig.from_dict(values)
    assert VRPOConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    return "computed a configuration"


def sizes(values: dict[str, Any]) -> str:
    """An aligner of any sizes is made, or refused with a typed error."""
    small = {"projector_dim": 4, "critic_width": 4}
    try:
        aligner = VRPOAligner(**{**small, **values})
    except VRPOError:
        return "refused a construction"
    assert all(torch.isfinite(x).all() for x in aligner.state_dict().values())
    assert all(1 <= layer <= values["depth"] for layer in aligner.layers)
    return "computed a construction"


# ---- calls ----

CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "missing": lambda x: None,
    "one sample": lambda x: x[0],
    "a dimension more": lambda x: x[None],
    "another batch": lambda x: torch.cat([x, x]),
    "another width": lambda x: torch.cat([x, x], -1) if x.ndim > 1 else x[:, None],
    "a scalar": lambda x: x.sum(),
    "whole numbers": lambda x: x.detach().long(),
    "booleans": lambda x: x.detach() > 0,
    "complex": lambda x: x.detach().to(torch.complex64),
    "a list": lambda x: x.tolist(),
    "text": lambda x: "tensor",
}


def wrong_calls(drawn: tuple[Case, str, str, bool]) -> str:
    """One argument of a call that fits is changed into what cannot fit."""
    case, name, change, in_list = drawn
    aligner = case.aligner()
    batch = inputs(case, aligner)
    latents = ("x0", "x_t", "t", "x0_hat" if case.estimate else "velocity") if case.generates else ()
    tokens = ("z_tilde" if case.route == "projected" else "hidden",) if case.aligns else ()
    # Of another batch than what? Where the tokens are all that is used, any batch is right.
    assume(name in (*latents, *tokens, "z") and (latents or tokens or change not in ("another batch",)))
    given, changed = batch[name], CHANGES[change]
    if isinstance(given, list):  # one of them is changed, or all that there are
        batch[name] = [changed(given[0]), *given[1:]] if in_list else changed(given[0])
        assume(in_list or len(given) > 1 or change not in ("a list",))
    else:
        batch[name] = changed(given)
    return refused(lambda: call(case, aligner, batch), f"{name}: {change}")


def other_precision(drawn: tuple[Case, str]) -> str:
    """Hidden tokens of another precision than the projectors, without an autocast that would level them."""
    case, precision = drawn
    aligner = case.aligner()
    batch = inputs(case, aligner)
    dtype = getattr(torch, precision)
    own = next(aligner.projectors.parameters()).dtype
    assume(dtype != own and (case.precision != "autocast" or precision == "float64"))
    batch["hidden"] = [x.detach().to(dtype) for x in batch["hidden"]]
    return refused(lambda: call(case, aligner, batch), "hidden tokens of another precision")


REWARDS: dict[str, Callable[[RewardState], Any]] = {
    "a column": lambda s: s.x0_hat.flatten(1).mean(1, keepdim=True),
    "a mean": lambda s: s.x0_hat.mean(),
    "a number": lambda s: 1.0,
    "nothing": lambda s: None,
    "text": lambda s: "reward",
    "a list": lambda s: [1.0] * len(s.t),
    "three": lambda s: (s.t, s.t > 0, s.t),
    "an empty tuple": lambda s: (),
    "a mask of numbers": lambda s: (s.x0_hat.flatten(1).mean(1), s.t),
    "a mask of another shape": lambda s: (s.x0_hat.flatten(1).mean(1), s.t[:, None] > 0),
    "a mask that is a list": lambda s: (s.x0_hat.flatten(1).mean(1), [True] * len(s.t)),
    "complex": lambda s: s.x0_hat.flatten(1).mean(1).to(torch.complex64),
    "one too many": lambda s: torch.cat([s.x0_hat, s.x0_hat[:1]]).flatten(1).mean(1),
}


def fitting(case: Case) -> Case:
    """The case with grids that fit, so that it is the change that is refused."""
    chosen = {**case.settings, "target_norm": "none", "projector": "mlp"}
    return replace(case, settings=chosen, model_grid=case.grid)


def with_tokens(case: Case) -> Case:
    """The case with hidden tokens and projectors of its own."""
    route = "hidden" if case.route == "projected" else case.route
    return replace(fitting(case), settings={**fitting(case).settings, "features": "policy"}, route=route)


def with_built_in(case: Case) -> Case:
    """The case with built-in rewards alone, so that it is the wrong one that is refused."""
    case = fitting(case)
    chosen = {**case.settings, "reward_weights": "inverse_variance", "reward_coeff": 1.0}
    return replace(case, own=(), boxes=(), settings=chosen)


def wrong_rewards(drawn: tuple[Case, str, bool]) -> str:
    case, reward, black_box = drawn
    given = {"black_box_rewards" if black_box else "rewards": {"mine": REWARDS[reward]}}
    aligner = case.aligner(**given)
    return refused(lambda: call(case, aligner, inputs(case, aligner)), f"a reward that returns {reward}")


def without_generator(case: Case) -> str:
    assume(case.boxes and case.generates)
    aligner = case.aligner()
    batch = inputs(case, aligner) | {"generator": None}
    return refused(lambda: call(case, aligner, batch), "a black box without a generator")


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=5),
)
nested = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
)
shares = st.dictionaries(st.sampled_from(("semantic", "perceptual", "mine")), st.floats() | st.integers(), max_size=3)
names = st.lists(st.sampled_from(("semantic", "perceptual", "fidelity", "other")), max_size=3)
junk = st.dictionaries(st.sampled_from(KEYS), plain | names | shares | nested, max_size=2)
spoiled = st.tuples(settings(3), junk).map(
    lambda pair: {**pair[0], **({} if pair[0]["reward_weights"] != "fixed" else FIXED), **pair[1]}
)
unknown = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8) | st.integers(), plain, max_size=3)

number = st.integers(-1, 6)
odd = st.sampled_from((None, "a", 1.5, True, (), math.nan))
mine = {"mine": lambda state: state.t}
right_sizes = st.fixed_dictionaries(
    {
        "hidden_dim": st.integers(1, 9),
        "target_dims": st.lists(st.integers(1, 6), min_size=1, max_size=3),
        "depth": st.integers(1, 6),
        "latent_shape": st.tuples(*3 * [st.integers(1, 9)]),
    },
    optional={
        "token_grid": st.tuples(*2 * [st.integers(1, 5)]),
        "encoder_depth": st.just(1),
        "prefix_tokens": st.integers(0, 2),
        "layers": st.sampled_from(("early", "middle", "all", (1,), [1])),
        "rewards": st.sampled_from((None, {}, mine)),
        "reward_coeff": st.sampled_from((0, 1.0)),
    },
)
wrong_sizes = st.fixed_dictionaries(
    {},
    optional={
        "hidden_dim": number | odd,
        "target_dims": st.lists(number | odd) | odd | number,
        "depth": number | odd,
        "latent_shape": st.lists(number | odd, max_size=4) | odd,
        "token_grid": st.lists(number | odd, max_size=3) | odd,
        "encoder_depth": number | odd,
        "prefix_tokens": number | odd,
        "layers": st.sampled_from(([2, 1], (9,), (0,), None)),
        "rewards": st.sampled_from(({"semantic": max}, {"mine": 3}, {3: max}, {"mine": None}, "a", ())),
        "black_box_rewards": st.sampled_from((mine, {"mine": 3}, "a")),
        "reward_weights": st.sampled_from(
            ({"semantic": 1, "perceptual": 1}, {"semantic": 1e-60, "perceptual": 2e-60}, {"mine": 1})
        ),
        "critic_checkpoint": st.sampled_from(("/nowhere/critic.safetensors", "")),
    },
)


@st.composite
def some_sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes that fit, with one of them or none changed."""
    wrong = draw(wrong_sizes)
    chosen = draw(st.sampled_from([None, *sorted(wrong)]))
    return draw(right_sizes) | ({} if chosen is None else {chosen: wrong[chosen]})


REFUSALS: dict[str, Property] = {
    "configurations of junk": Property(junk | spoiled, junk_configs, 8),
    "configurations of unknown keys": Property(unknown | nested, junk_configs, 3),
    "configurations": Property(settings(3), sound_configs, 3),
    "constructions": Property(some_sizes(), sizes, 4),
    "wrong calls": Property(
        st.tuples(
            cases().map(fitting),
            st.sampled_from(("z", "hidden", "z_tilde", "x0", "x_t", "t", "velocity", "x0_hat")),
            st.sampled_from(sorted(CHANGES)),
            st.booleans(),
        ),
        wrong_calls,
        6,
    ),
    "wrong precision": Property(
        st.tuples(cases().map(with_tokens), st.sampled_from(("float32", "float64", "bfloat16"))), other_precision, 1
    ),
    "wrong rewards": Property(
        st.tuples(cases().map(with_built_in), st.sampled_from(sorted(REWARDS)), st.booleans()), wrong_rewards, 2
    ),
    "no generator": Property(cases().map(fitting), without_generator, 1),
}

"""Properties of the pure functions, for random calls."""

import itertools

import torch
from hypothesis import strategies as st
from reliability_draws import FILLS, Property, Values, close, finite, holes, refused, seeds, sides, values
from torch import Tensor

from vrpo_plugin.functional.advantages import (
    SCALES,
    combine_rewards,
    group_moments,
    group_relative_advantages,
    inverse_scale,
)
from vrpo_plugin.functional.alignment import cosine_alignment, spatial_normalize
from vrpo_plugin.functional.groups import image_groups, noise_strata
from vrpo_plugin.functional.interpolant import clean_estimate, estimate_from_noise, noise_level, noisy_sample
from vrpo_plugin.functional.policy import action_noise, pathwise_policy_loss, score_function_gradient
from vrpo_plugin.functional.rewards import feature_distance, fidelity_reward, semantic_reward
from vrpo_plugin.functional.tensors import finite_samples, masked_mean, resample_tokens, square_grid, zero_unless
from vrpo_plugin.functional.weights import inverse_variance_weights

epsilons = st.sampled_from((0.0, 1e-4, 1.0))
scales = st.sampled_from((*SCALES, "other"))


def dead(rewards: Tensor, valid: Tensor) -> Tensor:
    """Groups (..., S) whose valid rewards are all the same number, or fewer than two."""
    high = torch.where(valid, rewards, -torch.inf).amax(-1)
    low = torch.where(valid, rewards, torch.inf).amin(-1)
    return (valid.sum(-1) < 2) | (high == low)


def check_advantages(advantages: Tensor, rewards: Tensor, valid: Tensor) -> None:
    """Finite; exactly 0 in dead groups and for what is left out; of mean 0 in the others."""
    assert advantages.shape == rewards.shape and finite(advantages)
    assert not advantages[~valid].any() and not advantages[dead(rewards, valid)].any()
    kept = torch.where(valid, rewards, 0).double()
    size = kept.abs().amax(-1)
    spread = (torch.where(valid, kept, -torch.inf).amax(-1) - torch.where(valid, kept, torch.inf).amin(-1)).abs()
    # Where rewards are far closer to each other than to 0, their mean is known as badly as they are.
    known = (spread > 1e-3 * size) & ~dead(rewards, valid)
    total, most = advantages.double().sum(-1).abs(), advantages.double().abs().amax(-1)
    assert bool((total <= 1e-2 * most + 1e-30)[known].all()), "a group's advantages have another mean than 0"


def group_advantages(case: tuple[Values, int | None, str, float]) -> str:
    given, mask_seed, scale, eps = case
    rewards = given.tensor()
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        return refused(lambda: group_relative_advantages(rewards), "rewards without groups")
    if scale == "other":
        return refused(lambda: group_relative_advantages(rewards, scale=scale), "an unknown scale")  # type: ignore
    mask = None if mask_seed is None else Values(given.shape, seed=mask_seed).tensor() > 0
    advantages = group_relative_advantages(rewards, mask=mask, scale=scale, eps=eps)
    valid = torch.isfinite(rewards) if mask is None else torch.isfinite(rewards) & mask
    assert advantages.dtype == (torch.float64 if given.dtype == "float64" else torch.float32)
    check_advantages(advantages, rewards, valid)
    if given.fill == "whole":
        shifted = group_relative_advantages(rewards.double() + 7, mask=mask, scale=scale, eps=eps)
        assert close(shifted, group_relative_advantages(rewards.double(), mask=mask, scale=scale, eps=eps))
    return "computed"


def combined_rewards(case: tuple[Values, float, float, str, str, float]) -> str:
    given, floor, cap, scale, aggregation, eps = case
    rewards = given.tensor()
    moments = group_moments(rewards)
    weights = inverse_variance_weights(moments.variance, floor=floor, cap=cap)
    options = {"scale": scale, "aggregation": aggregation, "eps": eps}
    if scale == "other":
        return refused(lambda: combine_rewards(moments, weights, **options), "an unknown scale")
    advantages, coefficients = combine_rewards(moments, weights, **options)
    assert advantages.shape == rewards.shape[1:] and coefficients.shape == (*rewards.shape[:2], 1)
    assert finite(advantages) and finite(coefficients) and bool((coefficients >= 0).all())
    valid = torch.isfinite(rewards)
    assert not advantages[~valid.any(0)].any() and not advantages[dead(rewards, valid).all(0)].any()
    assert finite(inverse_scale(moments, scale=scale, eps=eps))
    if given.fill == "whole" and given.dtype == "float64":
        shifted = combine_rewards(group_moments(rewards + 7), weights, **options)
        assert close(shifted[0], advantages) and close(shifted[1], coefficients)
    return "computed"


def strata(case: tuple[Values, int]) -> str:
    given, group_size = case
    t = given.tensor()
    if t.ndim != 1 or len(t) == 0 or group_size < 1:
        return refused(lambda: noise_strata(t, group_size), "no times or no size")
    groups = noise_strata(t, group_size)
    assert sorted(groups.index[groups.mask].tolist()) == list(range(len(t)))
    assert groups.mask.sum(1).tolist()[:-1] == [group_size] * (max(len(t) // group_size, 1) - 1)
    assert close(groups.join(groups.split(t)), t, atol=0)
    if finite(t):
        parts = [t[index[mask]] for index, mask in zip(groups.index, groups.mask, strict=True)]
        assert all(a.max() <= b.min() for a, b in itertools.pairwise(parts))
    return "computed"


def draws_of_images(case: tuple[int, int]) -> str:
    batch, group_size = case
    if group_size < 1 or batch < 1 or batch % group_size:
        return refused(lambda: image_groups(batch, group_size), "no whole groups")
    groups = image_groups(batch, group_size)
    assert groups.index.flatten().tolist() == list(range(batch)) == groups.slot.tolist() and groups.mask.all()
    return "computed"


def weights_of_rewards(case: tuple[Values, float, float]) -> str:
    given, floor, cap = case
    variance = given.tensor().abs()
    if not 0 < cap <= 1 or not floor > 0 or variance.ndim == 0 or len(variance) == 0:
        return refused(lambda: inverse_variance_weights(variance, floor=floor, cap=cap), "floor, cap or no reward")
    weights = inverse_variance_weights(variance, floor=floor, cap=cap)
    live = torch.isfinite(variance) & (variance > 0)
    assert weights.shape == variance.shape and finite(weights) and bool((weights >= 0).all())
    assert close(weights.sum(0), torch.ones(()), rtol=1e-5)
    assert not weights[~live & live.any(0)].any()
    limit = (1 / live.sum(0).clamp(min=1)).clamp(min=cap)
    assert bool((weights <= limit * 1.0001)[live].all())
    order = torch.where(live, variance.clamp(min=floor), torch.inf).argsort(0)
    assert bool((weights.gather(0, order).diff(dim=0) <= 1e-6).all()), "a reward of more variance weighs more"
    return "computed"


def token_rewards(case: tuple[Values, Values]) -> str:
    left, right = case
    a, b = left.tensor().requires_grad_(), right.tensor()
    if a.shape != b.shape or a.ndim != 3:
        return refused(lambda: cosine_alignment(a, b), "other shapes")
    reward = cosine_alignment(a, b)
    assert reward.shape == a.shape[:1] and bool((reward.abs() <= 1 + 1e-5).all())
    assert close(semantic_reward([a, a], [b, b]), reward, rtol=1e-5, atol=1e-6)
    reward.sum().backward()
    # The gradient at a token of exactly 0 is 1e12, as in REPA's loss: more than float16 holds.
    assert a.grad is not None and (finite(a.grad) or left.dtype == "float16")
    if a.shape[1] < 2:
        return refused(lambda: spatial_normalize(b), "one token")
    normal = spatial_normalize(b, alpha=1.0)
    assert normal.shape == b.shape and finite(normal)
    return "computed"


def latent_rewards(case: tuple[Values, Values]) -> str:
    left, right = case
    a, b = left.tensor().requires_grad_(), right.tensor()
    if a.shape != b.shape:
        return refused(lambda: fidelity_reward(a, b), "other shapes")
    fidelity, distance = fidelity_reward(a, b), feature_distance([a, 2 * a], [b, 2 * b])
    assert fidelity.shape == distance.shape == a.shape[:1]
    assert bool((fidelity <= 0).all() and (distance >= 0).all() and (distance <= 4 + 1e-5).all())
    (fidelity.sum() + distance.sum()).backward()
    assert a.grad is not None and (finite(a.grad) or left.dtype == "float16")
    assert not fidelity_reward(b, b).any() and not feature_distance([b], [b]).any()
    return "computed"


def pathwise(case: tuple[Values, Values, int | None]) -> str:
    given, factors, valid_seed = case
    rewards, coefficients = given.tensor().requires_grad_(), factors.tensor()
    if rewards.shape != coefficients.shape or rewards.ndim != 2:
        return refused(lambda: pathwise_policy_loss(rewards, coefficients), "other shapes")
    valid = None if valid_seed is None else Values(given.shape, seed=valid_seed).tensor() > 0
    loss = pathwise_policy_loss(rewards, coefficients, valid=valid)
    loss.backward()
    taken = torch.isfinite(rewards) if valid is None else valid & torch.isfinite(rewards)
    assert loss.ndim == 0 and finite(loss) and rewards.grad is not None and finite(rewards.grad)
    assert not rewards.grad[~taken].any()
    return "computed"


def compared_actions(case: tuple[Values, int, bool]) -> str:
    given, seed, normalize = case
    rewards, generator = given.tensor(), torch.Generator().manual_seed(seed)
    count, states = (*rewards.shape, 1, 1)[:2]
    std = torch.rand(states, generator=generator) + 0.01
    if rewards.ndim != 2:
        noise = torch.zeros(count, states, 1, 2, 2)
        return refused(lambda: score_function_gradient(rewards, noise, std), "no actions of states")
    noise = action_noise(torch.zeros(states, 2, 4, 4), count, 2, generator)
    gradient, usable = score_function_gradient(rewards, noise, std, normalize=normalize)
    assert gradient.shape == (states, 2, 4, 4) and finite(gradient)
    assert torch.equal(usable, torch.isfinite(rewards).sum(0) >= 2) and not gradient[~usable].any()
    return "computed"


def interpolants(case: tuple[Values, Values, int, float | None, str]) -> str:
    data, noisy, seed, end, path_type = case
    x0, noise = data.tensor(), noisy.tensor()
    t = torch.rand(len(x0), generator=torch.Generator().manual_seed(seed), dtype=x0.dtype)
    t = t if end is None else torch.full_like(t, end)
    if path_type == "other" or x0.shape != noise.shape:
        return refused(lambda: noisy_sample(x0, noise, t, path_type), "an unknown path, or other shapes")  # type: ignore
    x_t, velocity = noisy_sample(x0, noise, t, path_type)  # type: ignore[arg-type]
    assert x_t.shape == velocity.shape == x0.shape and finite(x_t)
    assert close(clean_estimate(x_t, velocity, t, path_type), x0, rtol=1e-9, atol=1e-9)  # type: ignore[arg-type]
    level = noise_level(1 - t, t)
    assert bool((level >= 0).all() and (level <= 1).all())
    if not bool((t == 1).any()):
        alpha, sigma = ((1 - t).reshape(-1, 1, 1, 1), t.reshape(-1, 1, 1, 1))
        assert finite(estimate_from_noise(alpha * x0 + sigma * noise, noise, alpha, sigma))
    return "computed"


def grids(case: tuple[Values, tuple[int, int], tuple[int, int]]) -> str:
    given, grid, target = case
    z = given.tensor()
    if z.shape[1] != grid[0] * grid[1] or min(*grid, *target) < 1:
        return refused(lambda: resample_tokens(z, grid, target), "another grid")
    out = resample_tokens(z, grid, target)
    assert out.shape == (len(z), target[0] * target[1], z.shape[2]) and finite(out)
    assert float(out.max()) <= float(z.max()) + 1e-2 and float(out.min()) >= float(z.min()) - 1e-2
    return "computed"


def squares(tokens: int) -> str:
    if tokens < 1 or int(tokens**0.5 + 0.5) ** 2 != tokens:
        return refused(lambda: square_grid(tokens), "no square")
    height, width = square_grid(tokens)
    assert height == width and height * width == tokens
    return "computed"


def samples(given: Values) -> str:
    x = given.tensor()
    sound = finite_samples(x, x)
    assert sound.tolist() == [finite(row) for row in x]
    clean = zero_unless(sound, x)
    assert finite(clean) and close(clean[sound], x[sound], atol=0) and not clean[~sound].any()
    assert finite(masked_mean(clean[:, 0, 0].double(), sound))
    return "computed"


no_hole = st.none()
moderate = ("normal", "small", "whole", "constant", "zero")
some_shape = st.lists(sides, min_size=0, max_size=3).map(tuple)
with_nothing = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)
three, four = st.tuples(sides, sides, sides), st.tuples(sides, sides, sides, sides)
rewards_in_groups = st.tuples(st.integers(1, 4), sides, sides)
batches = st.integers(1, 24).map(lambda b: (b,))
whole_groups = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda c: (c[0] * c[1], c[1]))
maybe_seed = st.none() | seeds
floors = st.sampled_from((1e-40, 1e-8, 1.0))
caps = st.sampled_from((0.3, 0.9, 1.0))
orders = st.sampled_from(("sum_then_normalize", "normalize_then_sum"))
one_to_four = st.tuples(st.integers(1, 4), st.integers(0, 4))


def alike(*fills: tuple[str, ...], shape: st.SearchStrategy = some_shape, **options: object) -> st.SearchStrategy:
    """Tensors of one shape, and now and then of several."""
    same = shape.flatmap(lambda s: st.tuples(*(values(st.just(s), fills=f, **options) for f in fills)))  # type: ignore
    other = st.tuples(*(values(shape, fills=f, **options) for f in fills))  # type: ignore[arg-type]
    return st.one_of(same, same, same, other)


def flat(pair: tuple) -> tuple:
    return (*pair[0], *pair[1:])


FUNCTIONAL: dict[str, Property] = {
    "advantages": Property(st.tuples(values(with_nothing), maybe_seed, scales, epsilons), group_advantages, 10),
    "several rewards": Property(
        st.tuples(values(rewards_in_groups), floors, caps, scales, orders, epsilons), combined_rewards, 10
    ),
    "noise strata": Property(st.tuples(values(with_nothing | batches), st.integers(-1, 8)), strata, 6),
    "image groups": Property(st.tuples(st.integers(-2, 40), st.integers(-1, 10)) | whole_groups, draws_of_images, 2),
    "weights": Property(
        st.tuples(values(some_shape), floors, caps)
        | st.tuples(values(with_nothing), floors | st.just(0.0), caps | st.just(2.0)),
        weights_of_rewards,
        8,
    ),
    "rewards of tokens": Property(alike(FILLS, FILLS, shape=three, hole=no_hole), token_rewards, 6),
    "rewards of latents": Property(alike(FILLS, FILLS, shape=four, hole=no_hole), latent_rewards, 6),
    "pathwise loss": Property(
        st.tuples(alike(FILLS, moderate, shape=st.tuples(sides, sides), hole=no_hole), maybe_seed).map(flat),
        pathwise,
        3,
    ),
    "pathwise loss with holes": Property(
        st.tuples(values(st.just((3, 5))), values(st.just((3, 5)), fills=moderate, hole=no_hole), maybe_seed),
        pathwise,
        3,
    ),
    "compared actions": Property(
        st.tuples(
            values(st.tuples(sides, sides) | some_shape, fills=moderate, hole=holes), st.integers(0, 99), st.booleans()
        ),
        compared_actions,
        10,
    ),
    "interpolants": Property(
        st.tuples(
            alike(moderate, moderate, shape=four, hole=no_hole, dtypes=("float64",)),
            seeds,
            st.sampled_from((None, 0.0, 1.0)),
            st.sampled_from(("linear", "cosine", "other")),
        ).map(flat),
        interpolants,
        6,
    ),
    "token grids": Property(
        st.tuples(one_to_four, one_to_four, st.booleans(), seeds).map(
            lambda c: (Values((2, c[0][0] * c[0][1] + c[2], 3), seed=c[3]), c[0], c[1])
        ),
        grids,
        3,
    ),
    "square grids": Property(st.integers(-5, 2000) | st.integers(1, 40).map(lambda side: side * side), squares, 1),
    "samples": Property(values(st.tuples(sides, sides, sides), fills=moderate), samples, 3),
}

"""Properties of the pure functions, for random calls."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from fuzz.draws import FILLS, Property, Values, close, finite, holes, refused, seeds, sides, values
from vrpo_plugin.functional.advantages import (
    SCALES,
    group_relative_advantages,
    inverse_scale,
)
from vrpo_plugin.functional.alignment import cosine_alignment, spatial_normalize
from vrpo_plugin.functional.interpolant import clean_estimate, estimate_from_noise, noise_level, noisy_sample
from vrpo_plugin.functional.levels import LEVELS, level_moments, level_variance, merge_moments, noise_levels, remember
from vrpo_plugin.functional.policy import action_noise, pathwise_policy_loss, score_function_gradient
from vrpo_plugin.functional.rewards import feature_distance, fidelity_reward, semantic_reward
from vrpo_plugin.functional.tensors import finite_samples, masked_mean, resample_tokens, square_grid, zero_unless
from vrpo_plugin.functional.weights import inverse_variance_weights

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


def group_advantages(case: tuple[Values, int | None, str]) -> str:
    given, mask_seed, scale = case
    rewards = given.tensor()
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        return refused(lambda: group_relative_advantages(rewards), "rewards without groups")
    if scale == "other":
        return refused(lambda: group_relative_advantages(rewards, scale=scale), "an unknown scale")  # type: ignore
    mask = None if mask_seed is None else Values(given.shape, seed=mask_seed).tensor() > 0
    advantages = group_relative_advantages(rewards, mask=mask, scale=scale)
    valid = torch.isfinite(rewards) if mask is None else torch.isfinite(rewards) & mask
    assert advantages.dtype == (torch.float64 if given.dtype == "float64" else torch.float32)
    check_advantages(advantages, rewards, valid)
    if given.fill == "whole":
        shifted = group_relative_advantages(rewards.double() + 7, mask=mask, scale=scale)
        assert close(shifted, group_relative_advantages(rewards.double(), mask=mask, scale=scale))
    return "computed"


def memories(case: tuple[Values, int, int]) -> str:
    """Moments of any rewards are finite, do not depend on how samples are split, and never tell equal rewards apart."""
    given, seed, parts = case
    rewards = given.tensor()
    t = Values((given.shape or (1,))[-1:], seed=seed).tensor()
    if rewards.ndim != 2:
        return refused(lambda: level_moments(rewards, noise_levels(t), torch.isfinite(rewards)), "no rewards (K, B)")
    level, valid = noise_levels(t), torch.isfinite(rewards)
    whole = level_moments(rewards, level, valid)
    assert (
        whole.shape == (3, len(rewards), LEVELS) and whole[0].sum() == valid.sum() and bool((whole[[0, 2]] >= 0).all())
    )
    if given.fill == "whole":
        size = max(1, -(-len(t) // parts))
        cut = zip(rewards.split(size, -1), level.split(size), valid.split(size, -1), strict=True)
        assert close(merge_moments(torch.stack([level_moments(*part) for part in cut])), whole, rtol=1e-4, atol=1e-4)
    memory = remember(torch.zeros_like(whole), whole)
    assert close(memory, whole, atol=0)
    scale = inverse_scale(level_variance(memory))
    assert finite(scale) and bool((scale >= 0).all())
    same = torch.where(valid, rewards, 0).sum(1, keepdim=True).expand_as(rewards)
    variance = level_variance(level_moments(same, level, torch.ones_like(valid)))
    assert not (variance > 0).any(), "equal rewards have a variance"
    return "computed"


def weights_of_rewards(given: Values) -> str:
    variance = given.tensor().abs()
    if variance.ndim == 0 or len(variance) == 0:
        return refused(lambda: inverse_variance_weights(variance), "no reward")
    weights = inverse_variance_weights(variance)
    live = torch.isfinite(variance) & (variance > 0)
    assert weights.shape == variance.shape and finite(weights) and bool((weights >= 0).all())
    assert close(weights.sum(0), torch.ones(()), rtol=1e-5)
    assert not weights[~live & live.any(0)].any()
    order = torch.where(live, variance, torch.inf).argsort(0)
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
batches = st.tuples(st.integers(1, 4), st.integers(1, 40))
maybe_seed = st.none() | seeds
one_to_four = st.tuples(st.integers(1, 4), st.integers(0, 4))


def alike(*fills: tuple[str, ...], shape: st.SearchStrategy = some_shape, **options: object) -> st.SearchStrategy:
    """Tensors of one shape, and now and then of several."""
    same = shape.flatmap(lambda s: st.tuples(*(values(st.just(s), fills=f, **options) for f in fills)))  # type: ignore
    other = st.tuples(*(values(shape, fills=f, **options) for f in fills))  # type: ignore[arg-type]
    return st.one_of(same, same, same, other)


def flat(pair: tuple) -> tuple:
    return (*pair[0], *pair[1:])


FUNCTIONAL: dict[str, Property] = {
    "advantages": Property(st.tuples(values(with_nothing), maybe_seed, scales), group_advantages, 14),
    "memories": Property(st.tuples(values(with_nothing | batches), seeds, st.integers(1, 4)), memories, 14),
    "weights": Property(values(some_shape) | values(with_nothing), weights_of_rewards, 8),
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

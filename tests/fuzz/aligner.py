"""Properties of whole steps of the aligner, for random calls."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fuzz.cases import Case, Host, call, cases, inputs
from fuzz.draws import Property, finite, refused
from vrpo_plugin import VRPOAligner, VRPOOutput
from vrpo_plugin.functional.levels import LEVELS, noise_levels


def steps(case: Case) -> str:
    """A few training steps: outputs, gradients and statistics after each."""
    if not case.rewards or cannot_fit(case):

        def misfit() -> None:
            aligner = case.aligner()
            call(case, aligner, inputs(case, aligner))

        return refused(misfit, "grids that do not fit")
    before = torch.get_rng_state()
    aligner = case.aligner()
    assert torch.equal(torch.get_rng_state(), before), "construction drew from the global generator"
    host = _host(case, aligner)
    before = torch.get_rng_state()
    for step in range(case.steps):
        batch = inputs(case, aligner, step)
        versions = [x._version for x in _tensors(batch)]
        out = call(case, aligner, batch, step, host)
        features, generation = _sound(case, aligner, batch)
        ended = _has_ended(case, step)
        _check_output(case, out, features, generation & (not ended), ended)
        if case.generates and not ended:
            _check_levels(case, out, batch["t"], step)
        if out.loss.requires_grad:
            out.loss.backward()
            _check_gradients(case, aligner, batch, features, generation)
        assert [x._version for x in _tensors(batch)] == versions, "an input was changed"
        assert all(finite(x) for x in aligner.state_dict().values()), "the state is not finite"
    assert torch.equal(torch.get_rng_state(), before), "a step drew from the global generator"
    return f"computed a step in {case.mode} mode"


def shifted(case: Case) -> str:
    """A shift of a reward of one's own changes no advantage, weight or gradient."""
    case = replace(case, own=("steep",), boxes=(), holes=(), alike=False, precision="float64", mode="train")
    chosen = {"reward_coeff": 1.0, "rewards": ("fidelity",), "features": "none", "target_norm": "none"}
    chosen |= {"scale": "none"}  # what a deviation of nearly nothing divides is as large as its rounding
    case = replace(case, settings={**case.settings, **chosen})
    results = []
    for shift in (0, 4):  # a power of two: it rounds the rewards, by as much as a reward of size 8 may be rounded

        def reward(state: Any, shift: int = shift) -> Tensor:
            return shift + (state.x0_hat.double() - state.x0).square().mean((1, 2, 3)).clamp(max=4)

        aligner = case.aligner(rewards={"steep": reward})
        batch = inputs(case, aligner)
        out = call(case, aligner, batch, host=_host(case, aligner))
        out.generation_loss.backward()
        made = batch["x0_hat" if case.estimate else "velocity"]
        results.append((out.advantages, torch.stack([*out.weights.values()]), made.grad))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-5), "a shift changed something"
    return "computed with a shift"


def _host(case: Case, aligner: VRPOAligner) -> Host | None:
    if case.route != "taps" or not case.aligns:
        return None
    with torch.random.fork_rng(devices=[]):
        host = Host(case.depth).to(next(aligner.projectors.parameters()).dtype)
    aligner.attach(host)
    return host


def cannot_fit(case: Case) -> bool:
    """What is refused by design: model grids of another aspect than the latents."""
    tokens, own = math.prod(case.grid), math.prod(case.model_grid)
    if case.settings["target_norm"] == "spatial" and tokens < 2:
        return True
    if not case.aligns:
        return False
    fits = any(h * w == own and h * case.latent[2] == w * case.latent[1] for h in range(1, 5) for w in range(1, 5))
    if case.settings["projector"] == "conv" and case.route != "projected" and (case.prefix or not fits):
        return True
    return own != tokens and not fits


def _tensors(batch: dict[str, Any]) -> list[Tensor]:
    given = [x for value in batch.values() for x in (value if isinstance(value, list) else [value])]
    return [x for x in given if isinstance(x, Tensor)]


def _whole_samples(*tensors: Tensor) -> Tensor:
    return torch.stack([torch.isfinite(x.detach().flatten(1)).all(1) for x in tensors]).all(0)


def _sound(case: Case, aligner: VRPOAligner, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Samples (B,) without NaN or inf in what the features readout sees, and in what the generation readout sees."""
    taken = batch["z_tilde"] if case.route == "projected" else batch["hidden"]
    if case.route == "taps":
        taken = taken[:1]  # the model's input
    seen = [z[:, case.prefix :] for z in batch["z"]]
    made = batch["x0_hat" if case.estimate else "velocity"]
    latents = (batch["x0"], batch["x_t"], batch["t"][:, None], made)
    return _whole_samples(*taken, *batch["z"]), _whole_samples(*latents, *seen)


def _has_ended(case: Case, step: int) -> bool:
    """Whether the rewards have lost their weight, by the loop's own step: then they are not run."""
    schedule, steps = case.settings["reward_release"], case.settings["reward_release_steps"]
    lets_go = schedule != "none" and case.settings["reward_floor"] == 0
    return case.mode == "train" and not case.own_counter and lets_go and step >= steps


def _check_output(case: Case, out: VRPOOutput, features: Tensor, generation: Tensor, ended: bool) -> None:
    """Shapes as documented; finite, but for the rewards of what is left out, which are NaN."""
    for name in ("loss", "policy_loss", "features_loss", "generation_loss", "critic_loss"):
        assert getattr(out, name).shape == () and finite(getattr(out, name)), name
    expected = {"semantic_features": features} if case.aligns else {}
    rows = torch.arange(case.batch)
    if case.generates:
        special = {"masked": rows % 2 == 0, "box_masked": rows % 2 == 0, "broken": rows > 0, "box_broken": rows > 0}
        taken = {name: generation & special.get(name, rows >= 0) for name in (*case.rewards, "fidelity")}
        expected |= taken
        assert set(out.weights) == set(case.rewards)
    assert set(out.rewards) == set(expected)
    for name, reward in out.rewards.items():
        assert reward.shape == (case.batch,) and not reward.requires_grad
        assert torch.equal(torch.isfinite(reward), expected[name]), f"reward {name} of other samples"
        assert not torch.isinf(reward).any()
    for name in ("semantic", "semantic_features"):
        assert bool((out.rewards.get(name, rows * 0.0).nan_to_num().abs() <= 1 + 1e-5).all())
    assert all(metric.shape == () and not metric.requires_grad for metric in out.metrics.values())
    scored = {f"vrpo/reward/{name}" for name, reward in out.rewards.items() if bool(reward.isfinite().any())}
    scored |= {"vrpo/critic_cos"} if bool(generation.any()) else set()
    for name, metric in out.metrics.items():
        may_be_unknown = name.startswith("vrpo/reward/") or name == "vrpo/critic_cos"
        if ended and name.startswith(("vrpo/std/", "vrpo/weight/", "vrpo/adv", "vrpo/frac", "vrpo/gradient")):
            may_be_unknown = True
        assert finite(metric) == (name in scored or not may_be_unknown), name
    assert out.advantages.shape == (case.batch,) and finite(out.advantages)
    assert not out.advantages[~generation].any(), "a sample that is not finite has an advantage"


def _check_levels(case: Case, out: VRPOOutput, t: Tensor, step: int) -> None:
    """Weights sum to 1; a first batch's advantages are of mean 0 at each noise level, and 0 where nothing is known."""
    weights = torch.stack([out.weights[name] for name in case.rewards]).double()
    assert weights.shape == (len(case.rewards), case.batch) and bool((weights >= 0).all())
    assert torch.allclose(weights.sum(0), torch.ones((), dtype=torch.float64), atol=1e-5)
    if case.mode != "train":
        assert not out.advantages.any(), "an advantage over nothing that is known"
    rewards = torch.stack([out.rewards[name] for name in case.rewards]).double()
    level = noise_levels(torch.where(torch.isfinite(t), t, 0))
    for group in (torch.nonzero(level == number).flatten() for number in range(LEVELS)):
        if not len(group):
            continue
        assert bool((weights[:, group] == weights[:, group[:1]]).all()), "one level has several weights"
        advantages = out.advantages[group].double()
        spreads = [_spread(row[group]) for row in rewards]
        size = float(rewards[:, group].nan_to_num().abs().max())
        if step or case.settings["scale"] != "none":
            continue
        if all(spread == 0 for spread, _ in spreads):
            assert bool((advantages.abs() <= 1e-5 * size).all()), "a level whose rewards are alike has an advantage"
        if all(spread > 1e-3 * size for spread, size in spreads):
            total = sum(spread for spread, _ in spreads)
            assert abs(float(advantages.sum())) <= 1e-2 * total, "a level's advantages have another mean than 0"


def _spread(reward: Tensor) -> tuple[float, float]:
    kept = reward[torch.isfinite(reward)]
    return (float(kept.max() - kept.min()), float(kept.abs().max())) if len(kept) > 1 else (0.0, 0.0)


def _check_gradients(
    case: Case, aligner: VRPOAligner, batch: dict[str, Any], features: Tensor, generation: Tensor
) -> None:
    """Every trainable parameter has a finite gradient, and samples that are not finite have none."""
    for name, parameter in aligner.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and finite(parameter.grad), f"the gradient of {name}"
            parameter.grad = None
    for name, sound in {"hidden": features, "z_tilde": features, "velocity": generation, "x0_hat": generation}.items():
        made = batch.get(name, [])
        for x in made if isinstance(made, list) else [made]:
            if x.grad is not None:
                assert finite(x.grad) and not x.grad[~sound].any(), f"the gradient to {name}"


ALIGNER: dict[str, Property] = {
    "aligner steps": Property(cases(), steps, 14),
    "shifted rewards": Property(cases(), shifted, 2),
}

"""Whole steps of the aligner as random calls make them: what is drawn, and the tensors of one step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fuzz.draws import HOLES, seeds
from vrpo_plugin import RewardState, VRPOAligner, VRPOConfig
from vrpo_plugin.functional.interpolant import noisy_sample

WIDTH, PROJECTOR, CRITIC = 8, 8, 8


def smooth(state: RewardState) -> Tensor:
    return -state.x0_hat.square().mean((1, 2, 3))


def steep(state: RewardState) -> Tensor:
    return -(state.x0_hat - state.x0).square().mean((1, 2, 3)).sqrt()  # an infinite gradient at x0


def constant(state: RewardState) -> Tensor:
    return 0 * state.x0_hat.sum((1, 2, 3)) + 3


def broken(state: RewardState) -> Tensor:
    return torch.where(torch.arange(len(state.t)) == 0, torch.nan, smooth(state))


def masked(state: RewardState) -> tuple[Tensor, Tensor]:
    return smooth(state), torch.arange(len(state.t)) % 2 == 0


def whole(state: RewardState) -> Tensor:
    return (state.x0_hat > 0).sum((1, 2, 3))


OWN: dict[str, Callable[[RewardState], Any]] = {
    "smooth": smooth,
    "steep": steep,
    "constant": constant,
    "broken": broken,
    "masked": masked,
}
BOXES: dict[str, Callable[[RewardState], Any]] = {"box": whole, "box_masked": masked, "box_broken": broken}
HELD = ("x0", "x_t", "t", "velocity", "z", "hidden")


@dataclass(frozen=True)
class Case:
    """A configuration, the sizes of a model, and what a batch holds.

    Attributes:
        settings: of VRPOConfig.
        own, boxes: names among OWN and BOXES.
        grid: of the encoder's tokens; the model's is ``model_grid``.
        precision: of the aligner and its model, or ``autocast``.
        given: dtypes of the latents, of the encoder's tokens and of the times.
        route: how the hidden tokens come: by ``taps``, as ``hidden``, or ``projected`` by the host.
        estimate: x0_hat is given in place of the velocity.
        alike: samples are copies of one, so that every reward is constant.
        holes: (what, sample, position, value) of numbers that are not finite.
        mode: ``train``, ``eval``, or ``no_grad``.
    """

    settings: dict[str, Any]
    own: tuple[str, ...]
    boxes: tuple[str, ...]
    batch: int
    latent: tuple[int, int, int]
    grid: tuple[int, int]
    model_grid: tuple[int, int]
    dims: tuple[int, ...]
    depth: int
    prefix: int
    precision: str
    given: tuple[str, str, str]
    route: str
    estimate: bool
    alike: bool
    holes: tuple[tuple[str, int, int, float], ...]
    mode: str
    steps: int
    own_counter: bool
    seed: int

    @property
    def rewards(self) -> tuple[str, ...]:
        return (*self.settings["rewards"], *self.own, *self.boxes)

    @property
    def generates(self) -> bool:
        return self.settings["reward_coeff"] > 0

    @property
    def aligns(self) -> bool:
        return self.settings["features"] == "policy"

    def aligner(self, **changes: Any) -> VRPOAligner:
        shares = {name: 1.0 + i for i, name in enumerate(self.rewards)}
        fixed = {"reward_weights": shares} if self.settings["reward_weights"] == "fixed" else {}
        sizes = {
            "hidden_dim": WIDTH,
            "target_dims": self.dims,
            "depth": self.depth,
            "latent_shape": self.latent,
            "token_grid": self.grid,
            "own_projectors": self.route != "projected",
            "prefix_tokens": self.prefix,
            "rewards": {name: OWN[name] for name in self.own},
            "black_box_rewards": {name: BOXES[name] for name in self.boxes},
        }
        config = VRPOConfig(**{**self.settings, **fixed}, projector_dim=PROJECTOR, critic_width=CRITIC)
        aligner = VRPOAligner(**{**sizes, "config": config, **changes})
        kinds = {"float64": torch.float64, "bfloat16": torch.bfloat16}
        return aligner.to(kinds.get(self.precision, torch.float32)).train(self.mode == "train")


class Host(nn.Module):
    """The least that taps can be installed on."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def inputs(case: Case, aligner: VRPOAligner, step: int = 0) -> dict[str, Any]:
    """One step's tensors by the names of ``VRPOAligner.forward``; what the model made is a leaf with a gradient."""
    generator = torch.Generator().manual_seed(case.seed + step)

    def random(*shape: int) -> Tensor:
        x = torch.randn(1 if case.alike else case.batch, *shape, generator=generator)
        return x.repeat(case.batch, *(1 for _ in shape)) if case.alike else x

    latents, tokens, times = (getattr(torch, name) for name in case.given)
    own = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(case.precision, torch.float32)
    x0, noise = random(*case.latent), random(*case.latent)
    t = (
        torch.rand(1, generator=generator).repeat(case.batch)
        if case.alike
        else torch.rand(x0.shape[:1], generator=generator)
    )
    x_t, target = noisy_sample(x0, noise, t, case.settings["path_type"])
    made = x0 + 0.1 * random(*case.latent) if case.estimate else target + 0.1 * random(*case.latent)
    count = case.prefix + case.model_grid[0] * case.model_grid[1]
    batch: dict[str, Any] = {
        "x0": x0.to(latents),
        "x_t": x_t.to(latents),
        "t": t.to(times),
        "velocity": made.to(own),
        "z": [random(case.prefix + case.grid[0] * case.grid[1], dim).to(tokens) for dim in case.dims],
        "hidden": [random(count, WIDTH).to(own) for _ in aligner.layers],
        "z_tilde": [random(count, dim).to(own) for dim in case.dims],
        "y": torch.arange(case.batch),
        "generator": generator,
    }
    for name, sample, position, value in case.holes:
        where = batch["z_tilde" if name == "hidden" and case.route == "projected" else name]
        where = where[-1] if isinstance(where, list) else where
        where[sample % case.batch].view(-1)[position * (where[0].numel() - 1) // 2] = value
    return _of_route(case, batch)


def _of_route(case: Case, batch: dict[str, Any]) -> dict[str, Any]:
    if case.estimate:
        batch["x0_hat"] = batch.pop("velocity")
    for name in ("hidden",) if case.route == "projected" else ("z_tilde",):
        del batch[name]
    for name in ("velocity", "x0_hat", "hidden", "z_tilde"):
        made = batch.get(name, [])
        for x in made if isinstance(made, list) else [made]:
            x.requires_grad_(case.mode != "no_grad")
    return batch


def call(case: Case, aligner: VRPOAligner, batch: dict[str, Any], step: int = 0, host: Host | None = None) -> Any:
    """The aligner's call as a training loop makes it."""
    batch = dict(batch)
    with (
        torch.set_grad_enabled(case.mode != "no_grad"),
        torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "autocast"),
    ):
        if host is not None:
            host(batch.pop("hidden")[0])
        return aligner(batch.pop("z"), step=None if case.own_counter else step, **batch)


def _subset(names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(names), unique=True, max_size=len(names)).map(tuple)


@st.composite
def settings(draw: st.DrawFn, depth: int) -> dict[str, Any]:
    """Settings of VRPOConfig that do not contradict each other, all choices among them."""

    def pick(*options: Any) -> Any:
        return draw(st.sampled_from(options))

    return {
        "features": pick("policy", "policy", "host", "none"),
        "proj_coeff": pick(0.0, 0.5, 2.0),
        "layers": pick("early", "middle", "all", (depth,), tuple(range(1, depth + 1))),
        "projector": pick("mlp", "mlp", "conv"),
        "target_norm": pick("none", "spatial"),
        "release": pick("none", "linear", "stop"),
        "release_steps": pick(1, 2, 100),
        "reward_coeff": pick(1.2, 1.2, 0.1, 0.0),
        "reward_release": pick("none", "linear", "stop"),
        "reward_release_steps": pick(1, 2, 100),
        "reward_floor": pick(0.0, 0.1, 1.0),
        "rewards": draw(_subset(("semantic", "perceptual", "fidelity"))),
        "reward_weights": pick("inverse_variance", "equal", "fixed"),
        "scale": pick("group", "none"),
        "actions": pick(2, 8),
        "action_std": pick(1e-3, 0.1, 2.0),
        "action_grid": pick(0, 4),
        "path_type": pick("linear", "cosine"),
    }


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Calls that fit together, but for grids that cannot be resampled."""

    def pick(*options: Any) -> Any:
        return draw(st.sampled_from(options))

    depth, mode = draw(st.integers(1, 3)), pick("train", "train", "train", "eval", "no_grad")
    chosen, own, boxes = draw(settings(depth)), draw(_subset(tuple(OWN))), draw(_subset(tuple(BOXES)))
    if not (own or boxes or chosen["rewards"]):
        chosen["rewards"] = ("semantic",)
    batch = draw(st.integers(1, 9) | st.just(40))
    grid, precision = (
        pick((2, 2), (4, 4), (2, 3), (1, 1), (3, 1)),
        pick("float32", "float32", "bfloat16", "float64", "autocast"),
    )
    hole = st.tuples(st.sampled_from(HELD), st.integers(0, 7), st.integers(0, 2), st.sampled_from(HOLES))
    return Case(
        settings=chosen,
        own=own,
        boxes=boxes,
        batch=batch,
        latent=pick((4, 8, 8), (3, 6, 10), (2, 4, 4), (1, 5, 7), (1, 1, 1)),
        grid=grid,
        model_grid=pick(grid, grid, grid, (2, 2), (3, 3)),
        dims=pick((5,), (5, 3), (1,)),
        depth=depth,
        prefix=pick(0, 0, 1, 2),
        precision=precision,
        given=(
            pick("float32", "bfloat16", "float64"),
            pick("float32", "bfloat16"),
            pick("float32", "bfloat16", "float64"),
        ),
        route="hidden" if mode == "no_grad" else pick("taps", "hidden", "projected"),
        estimate=draw(st.booleans()),
        alike=pick(False, False, False, True),
        holes=tuple(draw(st.lists(hole, max_size=2))),
        mode=mode,
        steps=draw(st.integers(1, 2)),
        own_counter=draw(st.booleans()),
        seed=draw(seeds),
    )

"""vrpo_plugin.standalone.sampler, against Gaussian data, whose velocity and score are known."""

import importlib.util
import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.standalone.sampler import SOLVERS, sample
from vrpo_plugin.standalone.sit import SiT

PATHS = ("linear", "cosine")
MEANS = (1.5, -0.5, 0.25)  # of class 0, class 1, and the null label 2
STD = 0.6


def gaussian(t: float, path_type: str) -> tuple[float, float, float, float]:
    """alpha, alpha', the variance of x_t, and half its derivative, for data N(m, STD^2)."""
    if path_type == "linear":
        alpha, sigma, alpha_dot, sigma_dot = 1 - t, t, -1.0, 1.0
    else:
        alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
        alpha_dot, sigma_dot = -math.pi / 2 * sigma, math.pi / 2 * alpha
    variance = alpha**2 * STD**2 + sigma**2
    return alpha, alpha_dot, variance, alpha * alpha_dot * STD**2 + sigma * sigma_dot


class GaussianModel(nn.Module):
    """The exact velocity for data N(MEANS[y], STD^2); keeps what it was called with."""

    null_label = 2

    def __init__(self, path_type: str = "linear") -> None:
        super().__init__()
        self.path_type = path_type
        self.calls: list[tuple[float, int, torch.dtype, torch.dtype]] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        assert not torch.is_grad_enabled()
        time = float(t[0])
        assert (t == t[0]).all()
        self.calls.append((time, len(x), x.dtype, t.dtype))
        mean = torch.tensor(MEANS, dtype=x.dtype)[y].view(-1, 1, 1, 1)
        alpha, alpha_dot, variance, half_slope = gaussian(time, self.path_type)
        return alpha_dot * mean + half_slope / variance * (x - alpha * mean), []


def noise_and_labels(size: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    noise = torch.randn(size, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise.to(dtype), torch.arange(size) % 2


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def class_means(y: Tensor) -> Tensor:
    return torch.tensor(MEANS, dtype=torch.float64)[y].view(-1, 1, 1, 1)


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_ode_reaches_the_exact_solution_at_the_solver_s_order(solver: str, order: int, path_type: str) -> None:
    noise, y = noise_and_labels()
    exact = class_means(y) + STD * noise  # along the flow, (x_t - mean) / std stays what it was at t = 1
    errors = []
    for num_steps in (40, 80, 160):
        x = sample(GaussianModel(path_type), noise, y, num_steps=num_steps, solver=solver)
        errors.append((x - exact).abs().max().item())
    assert errors[-1] < (0.05 if order == 1 else 1e-3)
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("path_type", PATHS)
def test_sde_reaches_mean_and_std_of_the_data(path_type: str) -> None:
    noise = torch.randn(4000, 2, 3, 3, generator=seeded(1))
    y = torch.zeros(len(noise), dtype=torch.long)
    x = sample(
        GaussianModel(path_type),
        noise,
        y,
        num_steps=200,
        solver="euler_maruyama",
        path_type=path_type,
        generator=seeded(),
    )
    assert x.mean().item() == pytest.approx(MEANS[0], abs=0.02)
    assert x.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_sde_is_the_recursion_with_the_exact_score(path_type: str, guidance_scale: float) -> None:
    noise, y = noise_and_labels()
    generator, x = seeded(), noise
    times = [1 - 0.96 * i / 6 for i in range(7)] + [0.0]
    for t, t_next in pairwise(times):
        alpha, alpha_dot, variance, half_slope = gaussian(t, path_type)
        drifts = []
        for mean in (class_means(y), MEANS[2]):
            score = -(x - alpha * mean) / variance
            drifts.append(alpha_dot * mean - half_slope * score - t * score)
        drift = drifts[1] + guidance_scale * (drifts[0] - drifts[1])
        x = x - (t - t_next) * drift
        if t_next > 0:
            shock = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x = x + math.sqrt(2 * t * (t - t_next)) * shock
    ours = sample(
        GaussianModel(path_type),
        noise,
        y,
        num_steps=7,
        solver="euler_maruyama",
        path_type=path_type,
        guidance_scale=guidance_scale,
        generator=seeded(),
    )
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_guided_ode_ends_at_the_extrapolated_class_mean(solver: str) -> None:
    """Guidance moves the velocity by a function of t alone here, so means extrapolate and spread stays."""
    noise, y = noise_and_labels()
    extrapolated = MEANS[2] + 3.0 * (class_means(y) - MEANS[2])
    x = sample(GaussianModel(), noise, y, num_steps=400, solver=solver, guidance_scale=3.0)
    torch.testing.assert_close(x, extrapolated + STD * noise, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("solver", "times"),
    [
        ("euler", [1.0, 0.75, 0.5, 0.25]),
        ("heun", [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]),
        ("euler_maruyama", [1.0, 0.68, 0.36, 0.04]),
    ],
)
def test_model_is_called_at_these_times_guided_only_in_the_interval(solver: str, times: list[float]) -> None:
    noise, y = noise_and_labels(size=4)
    starts = {"heun": [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25]}.get(solver, times)
    low, high = {"euler_maruyama": (0.3, 0.7)}.get(solver, (0.5, 0.75))  # the ends count as inside
    for interval, guided in (((low, high), [low <= t <= high for t in starts]), ((0.0, 1.0), [True] * len(times))):
        model = GaussianModel()
        sample(
            model,
            noise,
            y,
            num_steps=4,
            solver=solver,
            guidance_scale=2.0,
            guidance_interval=interval,
            generator=seeded(),
        )
        assert [t for t, *_ in model.calls] == pytest.approx(times)
        assert [size for _, size, *_ in model.calls] == [8 if inside else 4 for inside in guided]


@pytest.mark.parametrize("solver", SOLVERS)
def test_scale_one_is_unguided(solver: str) -> None:
    model = GaussianModel()
    noise, y = noise_and_labels(size=4)
    sample(model, noise, y, num_steps=3, solver=solver, guidance_scale=1.0, generator=seeded())
    assert {size for _, size, *_ in model.calls} == {4}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_is_called_in_the_dtype_of_the_noise_and_the_state_is_float64(solver: str, dtype: torch.dtype) -> None:
    """With a constant velocity every step is exact in float64; a bfloat16 state would lose the small steps."""
    seen: set[torch.dtype] = set()

    def constant(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen.update((x.dtype, t.dtype))
        return torch.full_like(x, 2**-3)

    noise = torch.full((1, 1, 2, 2), 8.0, dtype=dtype)
    x = sample(constant, noise, num_steps=500, solver=solver, generator=seeded())
    assert x.dtype == dtype
    assert seen == {dtype}
    if solver != "euler_maruyama":
        assert torch.equal(x, torch.full_like(noise, 7.875))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_low_precision_velocity_is_integrated_in_float64(solver: str) -> None:
    """As under autocast: the velocity's own rounding stays, the integration adds none."""
    noise, _ = noise_and_labels()
    x = sample(lambda x, t, y: torch.full_like(x, 0.3, dtype=torch.bfloat16), noise, num_steps=13, solver=solver)
    rounded = float(torch.tensor(0.3, dtype=torch.bfloat16))
    torch.testing.assert_close(x, noise - rounded, rtol=0, atol=1e-12)


def test_same_generator_state_gives_the_same_sample_and_leaves_the_global_one_alone() -> None:
    noise, y = noise_and_labels()
    state = torch.get_rng_state()

    def draw(seed: int) -> Tensor:
        return sample(GaussianModel(), noise, y, num_steps=5, solver="euler_maruyama", generator=seeded(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_of_the_submodules_are_restored(fails: bool) -> None:
    model = SiT(input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=2, in_channels=2).train()
    model.blocks[0].eval()
    before = [m.training for m in model.modules()]
    during: list[bool] = []
    model.register_forward_pre_hook(lambda m, _: during.extend(s.training for s in m.modules()))
    noise = torch.randn(1, 2, 4, 4, generator=seeded())
    if fails:
        with pytest.raises(ConfigError, match="labels"):
            sample(model, noise, None, num_steps=1)
    else:
        sample(model, noise, torch.zeros(1, dtype=torch.long), num_steps=1)
    assert during
    assert not any(during)
    assert [m.training for m in model.modules()] == before


def test_null_label_may_be_given_for_a_plain_function() -> None:
    noise, y = noise_and_labels()
    model = GaussianModel()
    expected = sample(model, noise, y, num_steps=3, guidance_scale=2.0)

    def plain(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t, y)[0]

    assert torch.equal(sample(plain, noise, y, num_steps=3, guidance_scale=2.0, null_label=2), expected)
    with pytest.raises(ConfigError, match="null_label"):
        sample(plain, noise, y, num_steps=3, guidance_scale=2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "dopri5"}, "solver: expected one of .*euler_maruyama.*, got 'dopri5'"),
        ({"path_type": "vp"}, "path_type: expected one of .*, got 'vp'"),
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"num_steps": 2.5}, "num_steps: expected at least 1, got 2.5"),
        ({"guidance_scale": 0.5}, "guidance_scale: expected at least 1, got 0.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected at least 1, got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale: expected at least 1, got inf"),
        *(
            ({"guidance_interval": interval}, r"guidance_interval: expected 0 <= low <= high <= 1, got \(")
            for interval in ((0.7, 0.2), (-0.1, 1.0), (0.0, 1.5), (float("nan"), 1.0), (250, 1000))
        ),
        ({"solver": "euler_maruyama"}, "generator: expected a torch.Generator, got None"),
        ({"guidance_scale": 2.0, "y": None}, "y missing"),
    ],
)
def test_settings_that_raise(settings: dict[str, object], message: str) -> None:
    noise, y = noise_and_labels()
    model = GaussianModel()
    with pytest.raises(ConfigError, match=message):
        sample(model, noise, **{"y": y, **settings})
    assert model.calls == []


@pytest.fixture
def repa_samplers() -> ModuleType:
    if "VRPO_HOSTS_DIR" not in os.environ:
        pytest.skip("VRPO_HOSTS_DIR is unset: no REPA checkout to compare with")
    path = Path(os.environ["VRPO_HOSTS_DIR"]) / "REPA" / "samplers.py"
    spec = importlib.util.spec_from_file_location("repa_samplers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.host
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize(("scale", "interval"), [(1.0, (0.0, 1.0)), (1.8, (0.0, 1.0)), (1.8, (0.2, 0.7))])
def test_equals_repa(
    repa_samplers: ModuleType, solver: str, path_type: str, scale: float, interval: tuple[float, float]
) -> None:
    # REPA's null label is always 1000.
    model = SiT(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=1000).double().eval()
    for parameter in model.parameters():
        parameter.data = 0.15 * torch.randn(parameter.shape, generator=seeded(), dtype=torch.float64)
    noise = torch.randn(3, 4, 8, 8, generator=seeded(), dtype=torch.float64)
    y = torch.tensor([0, 500, 999])
    theirs: Callable[..., Tensor] = (
        repa_samplers.euler_maruyama_sampler if solver == "euler_maruyama" else repa_samplers.euler_sampler
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = theirs(
            lambda x, t, y: (model(x, t, y),),
            noise,
            y,
            num_steps=9,
            heun=solver == "heun",
            cfg_scale=scale,
            guidance_low=interval[0],
            guidance_high=interval[1],
            path_type=path_type,
        )
    ours = sample(
        model,
        noise,
        y,
        num_steps=9,
        solver=solver,
        path_type=path_type,
        guidance_scale=scale,
        guidance_interval=interval,
        generator=seeded(7),
    )
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


class NoFloat64(TorchDispatchMode):
    """A device that refuses float64 tensors, as MPS does; numbers (0-dim) stay on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.ndim and x.dtype == torch.float64 for x in tree_leaves(out)):
            raise TypeError(f"Cannot convert a MPS Tensor to float64 ({func})")
        return out


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("path_type", PATHS)
def test_a_device_without_float64_samples_in_float32(solver: Any, path_type: Any) -> None:
    noise, y = noise_and_labels(dtype=torch.float32)
    settings: dict[str, Any] = {"num_steps": 4, "solver": solver, "path_type": path_type, "guidance_scale": 2.0}

    class Float32Model(GaussianModel):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
            mean = torch.tensor(MEANS)[y].view(-1, 1, 1, 1)
            return 0.5 * (x - mean), []

    with NoFloat64():
        model = SiT(input_size=4, patch_size=2, hidden_size=16, depth=1, num_heads=2, num_classes=2)
        sample(model, noise[:, :1].repeat(1, 4, 2, 2)[..., :4, :4], y, num_steps=2)
        narrow = sample(Float32Model(), noise, y, generator=seeded(), **settings)
    if solver != "euler_maruyama":  # whose noise is drawn in another dtype
        torch.testing.assert_close(narrow, sample(Float32Model(), noise, y, **settings), rtol=1e-5, atol=1e-5)

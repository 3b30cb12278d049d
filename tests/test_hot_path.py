"""A training step: nothing waits for the device, nothing loops over samples, and it compiles in one graph."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

import pytest
import torch
from fakes.tiny_sit import Batch, TinySiT, align, denoising_loss, gradients, make_batch, tiny_aligner
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vrpo_plugin.functional.rewards import RewardState
from vrpo_plugin.modules.aligner import VRPOAligner, VRPOOutput
from vrpo_plugin.modules.guard import NonFiniteGuard

# Operators whose result, or its shape, the host must wait for.
WAITING = {"aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero"}
WAITING |= {f"aten::{name}" for name in ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive")}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# On a CPU tensor these make no operator call at all, so they are caught where Python calls them.
TO_HOST = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}


class HostSyncError(AssertionError):
    """Something waited for the device."""


class _Operators(TorchDispatchMode):
    def __init__(self, allowed: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.allowed = allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in WAITING and not self.allowed(args[0]):
            raise HostSyncError(name)
        if name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise HostSyncError(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TO_HOST or (func is Tensor.to and "cpu" in map(str, (*args[1:], *(kwargs or {}).values()))):
            raise HostSyncError(str(func))
        return func(*args, **(kwargs or {}))


class NoHostSync(AbstractContextManager[None]):
    """Fails on everything that would make the host wait for the device, as seen from the CPU.

    Args:
        allowed: tensors that live on the host anyway.
    """

    def __init__(self, allowed: Callable[[Tensor], bool] = lambda _: False) -> None:
        self.allowed = allowed
        self.stack = ExitStack()

    def __enter__(self) -> None:
        self.stack.enter_context(_Operators(self.allowed))
        self.stack.enter_context(_Calls())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()


class OperatorCount(TorchDispatchMode):
    """Counts operator calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def smoothness(state: RewardState) -> Tensor:
    return -state.x0_hat.diff(dim=-1).square().mean((1, 2, 3))


def every_other(state: RewardState) -> tuple[Tensor, Tensor]:
    return smoothness(state), torch.arange(len(state.t), device=state.t.device) % 2 == 0


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "group scale": {"scale": "group"},
    "fixed weights": {"reward_weights": {"semantic": 1, "perceptual": 2}},
    "equal weights": {"reward_weights": "equal", "scale": "group"},
    "rewards let go of": {"reward_release": "stop", "reward_release_steps": 1},
    "fidelity": {"built_in": ("semantic", "perceptual", "fidelity")},
    "own reward": {"rewards": {"mine": smoothness}},
    "own reward with a mask": {"rewards": {"mine": every_other}},
    "black box": {"black_box_rewards": {"box": smoothness}},
    "black box alone": {"built_in": (), "black_box_rewards": {"box": every_other}},
    "all layers, two encoders": {"layers": "all", "target_dims": (12, 7)},
    "conv, spatial": {"projector": "conv", "target_norm": "spatial"},
    "cosine path": {"path_type": "cosine"},
    "linear release": {"release": "linear", "release_steps": 3},
    "reward release": {"reward_release": "linear", "reward_release_steps": 3},
    "stop release": {"release": "stop", "release_steps": 2},
    "features alone": {"reward_coeff": 0.0},
    "features alone, released": {"reward_coeff": 0.0, "release": "linear", "release_steps": 3},
    "generation alone": {"features": "none"},
}


def step(
    model: nn.Module,
    aligner: VRPOAligner,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    generator: torch.Generator | None = None,
) -> VRPOOutput:
    velocity = model(batch.x_t, batch.t, batch.y)
    out = aligner(
        batch.z,
        x0=batch.x0,
        x_t=batch.x_t,
        t=batch.t,
        velocity=velocity,
        y=batch.y,
        generator=generator or torch.Generator().manual_seed(0),
    )
    (denoising_loss(velocity, batch) + out.loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    return out


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_waits_for_nothing(setting: str) -> None:
    model = TinySiT()
    aligner = tiny_aligner(**SETTINGS[setting]).attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    batch = make_batch(16, dims=aligner.target_dims)

    def is_step_counter(x: Tensor) -> bool:
        # torch keeps AdamW's counters of steps on the host and reads them there.
        return any(x.data_ptr() == state["step"].data_ptr() for state in optimizer.state.values())

    for _ in range(3):
        with NoHostSync(is_step_counter):
            out = step(model, aligner, optimizer, batch)
        assert torch.isfinite(out.loss)


@pytest.mark.parametrize("bad", [False, True])
def test_leaving_a_step_out_waits_for_nothing(bad: bool) -> None:
    model = TinySiT()
    aligner = tiny_aligner().attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    guard = NonFiniteGuard(optimizer, model)
    batch = make_batch(16)
    if bad:
        batch.x0[0] = torch.nan
    with NoHostSync():
        guard.keep()
        out = align(model, aligner, batch)
        out.loss.backward()
        # What clip_grad_norm_ computes, without its move to the "cpu" device, which here is no move.
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        skipped = guard.check([norm], [out.metrics["vrpo/nonfinite"]])
    optimizer.step()  # torch's own; it moves the decision to the parameters' device, the "cpu"
    assert float(skipped) == bad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_on_a_gpu_waits_for_nothing(setting: str, precision: torch.dtype) -> None:
    model = TinySiT()
    aligner = tiny_aligner(**SETTINGS[setting]).attach(model)
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    batch = make_batch(16, dims=aligner.target_dims).to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for call in range(4):
        torch.cuda.set_sync_debug_mode("error" if call else "default")  # the first call loads kernels
        try:
            with torch.autocast("cuda", precision, enabled=precision != torch.float32):
                out = step(model, aligner, optimizer, batch, generator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert out.loss.is_cuda and torch.isfinite(out.loss)


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 0),
    "float": lambda x: float(x[0]),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "any": lambda x: any(x > 0),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask": lambda x: x[x > 0],
    "set by mask": lambda x: x.__setitem__(x > 0, x[:2]),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "to device": lambda x: x.to(device=torch.device("cpu")),
    "numpy": lambda x: x.numpy(),
    "tolist": lambda x: x.tolist(),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_guard_catches_what_waits(name: str) -> None:
    x = torch.tensor([1.0, -1.0, 2.0])
    with pytest.raises(HostSyncError), NoHostSync():
        WAITS[name](x)
    with NoHostSync():
        torch.where(x > 0, x, 0).sum() + x[torch.tensor([0, 2])].sum() + x.to(torch.float64).sum()


def test_the_guard_sees_into_the_aligner() -> None:
    aligner, batch = tiny_aligner(rewards={"mine": lambda s: smoothness(s) * float(s.t[0])}), make_batch(8)
    with pytest.raises(HostSyncError, match="_local_scalar_dense"), NoHostSync():
        aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=batch.velocity, hidden=torch.randn(8, 16, 32))


@pytest.mark.parametrize("setting", [name for name in SETTINGS if not name.startswith("black box")])
def test_a_step_on_a_device_without_values(setting: str) -> None:
    # A meta tensor has no values to wait for, and does not mix with tensors made on the CPU by mistake.
    model = TinySiT()
    aligner = tiny_aligner(**SETTINGS[setting]).attach(model)
    model.to("meta")
    out = align(model, aligner, make_batch(16, dims=aligner.target_dims).to("meta"))
    out.loss.backward()
    tensors = [out.loss, out.advantages, *out.rewards.values(), *out.weights.values(), *out.metrics.values()]
    assert {x.device.type for x in tensors} == {"meta"}
    assert all(p.grad is not None and p.grad.is_meta for p in aligner.parameters())


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_number_of_operators_does_not_grow_with_the_batch(setting: str) -> None:
    aligner = tiny_aligner(**SETTINGS[setting])
    counts = []
    for size, tokens in ((16, 16), (16, 16), (64, 16), (16, 64)):  # the first call also checks shapes
        batch = make_batch(size, dims=aligner.target_dims, tokens=16)
        hidden = [torch.randn(size, tokens, 32, requires_grad=True) for _ in aligner.layers]
        if tokens != 16:
            batch = Batch(
                x0=batch.x0, noise=batch.noise, t=batch.t, y=batch.y, z=tuple(z.repeat(1, 4, 1) for z in batch.z)
            )
        velocity = batch.velocity.requires_grad_()
        given = {"x0": batch.x0, "x_t": batch.x_t, "t": batch.t, "velocity": velocity, "y": batch.y}
        with OperatorCount() as count:
            out = aligner(batch.z, hidden=hidden, generator=torch.Generator().manual_seed(0), **given)
            out.loss.backward()
        counts.append(count.calls)
    assert counts[1] == counts[2] and counts[1].total() > 50
    # Four times the tokens are resampled to the critic's grid, once per encoder, there and back: no loop over tokens.
    assert counts[3].total() - counts[1].total() <= 20 * len(aligner.target_dims)


# ---- compilation ----


class Step(nn.Module):
    """What a compiled training step calls: the model, then the aligner."""

    def __init__(self, model: TinySiT, aligner: VRPOAligner) -> None:
        super().__init__()
        self.model, self.aligner = model, [aligner]

    def forward(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        x0, x_t, t, y, z = batch
        out = self.aligner[0](z, x0=x0, x_t=x_t, t=t, velocity=self.model(x_t, t, y), y=y)
        return out.loss, out.metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "backend"),
    [
        ("default", "aot_eager"),
        ("group scale", "eager"),
        ("own reward", "eager"),
        ("linear release", "aot_eager"),
        ("reward release", "aot_eager"),
        ("equal weights", "aot_eager"),
        ("features alone, released", "aot_eager"),
    ],
)
def test_compiled_equals_eager_in_one_graph(setting: str, backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses, grads = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = TinySiT(depth=2)
        aligner = tiny_aligner(depth=2, **SETTINGS[setting]).attach(model)
        step_: Callable[..., Any] = Step(model, aligner)
        if compiled:
            step_ = torch.compile(step_, backend=backend, fullgraph=True)
        for seed in range(3):
            batch = make_batch(16, seed=seed)
            model.zero_grad()
            loss, _ = step_((batch.x0, batch.x_t, batch.t, batch.y, batch.z[0]))
            loss.backward()
            losses.append(loss.detach())
        grads.append(gradients(model))
    # The same operators in the same order, apart from aot_eager's decompositions.
    torch.testing.assert_close(losses[3:], losses[:3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # one more after the first call's checks


def test_taps_of_a_compiled_model_keep_its_tokens() -> None:
    torch._dynamo.reset()
    batch = make_batch(8)
    grads = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = TinySiT(depth=2)
        aligner = tiny_aligner(depth=2, layers="all").attach(model)
        called: Any = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        for _ in range(2):
            model.zero_grad()
            align(called, aligner, batch).policy_loss.backward()
        assert all(tap.hidden is None for tap in aligner.taps.taps)
        grads.append(gradients(model))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-7)

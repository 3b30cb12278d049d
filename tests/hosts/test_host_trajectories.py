"""Training runs of the fake hosts, patched against unpatched, step by step."""

import copy
import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.gloo import in_new_process, on_two_processes
from fakes.host_folders import (
    PROJECTING,
    SCRIPTS,
    FakeHost,
    RecordingTracker,
    Run,
    fake_host,
    own_parameters,
)
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from vrpo_plugin import apply_vrpo
from vrpo_plugin.hosts.aligner import HostAligner

HOSTS = tuple(SCRIPTS)
DENOISING = {"irepa": "denoising_loss", "repae": "denoising_loss"}
STEPS = {"sit": "--steps", "dit": "--steps", "lightningdit": "--steps"}


def train(host: FakeHost, steps: int, *argv: object, **kwargs: Any) -> Run:
    return host.train(STEPS.get(host.name, "--max-train-steps"), steps, *argv, **kwargs)


# ---- nothing is changed ----


@pytest.mark.parametrize("name", HOSTS)
def test_zero_weight_is_bitwise_baseline(name: str, tmp_path: Path) -> None:
    with fake_host(name) as host:
        plain = train(host, 20)
        with host.apply(tmp_path, reward_coeff=0.0, features="host" if name in PROJECTING else "none"):
            patched = train(host, 20)
    assert len(plain.logs) == 20 and len({*plain.parameters}) == 20  # it trained
    assert patched.bits == plain.bits
    assert not any("vrpo" in key for key in patched.model.state_dict())


@pytest.mark.parametrize("name", HOSTS)
def test_the_plugin_draws_nothing_from_the_hosts_random_state(name: str, tmp_path: Path) -> None:
    with fake_host(name) as host:
        plain = train(host, 3)
        with host.apply(tmp_path):
            patched = train(host, 3)
    assert patched.random_states == plain.random_states
    key = DENOISING.get(name, "loss")
    assert patched.logs[0][key] == plain.logs[0][key]  # the same weights, batch, times and noise
    assert patched.parameters[0] != plain.parameters[0]


# ---- the host's cosine as a reward ----


@pytest.mark.parametrize(
    ("name", "argv"),
    [*((name, ()) for name in PROJECTING), ("repa", ("--z-dims", 12, 7)), ("repa", ("--path-type", "cosine"))],
)
def test_policy_features_are_the_hosts_own_loss(name: str, argv: tuple[object, ...], tmp_path: Path) -> None:
    with fake_host(name) as host:
        plain, compared = train(host, 20, *argv), host.compared
        with host.apply(tmp_path, reward_coeff=0.0):
            patched = train(host, 20, *argv)
        encoders = 2 if "--z-dims" in argv else 1
        vae_pass = 16 * 20 if name == "repae" else 0  # its alignment of the VAE is the host's own
        assert compared == 16 * 20 * encoders + vae_pass
        # iREPA's cosine sees one token of one sample, and so does one iteration of the others' loops.
        assert host.compared - compared == 20 * encoders + vae_pass
    for key in plain.logs[0]:
        torch.testing.assert_close(patched.log_of(key), plain.log_of(key), rtol=0, atol=1e-6)
    assert plain.log_of("proj_loss")[-1] < plain.log_of("proj_loss")[0] - 1e-2


# ---- the defaults ----


@pytest.mark.parametrize("name", HOSTS)
def test_defaults_train_everything(name: str, tmp_path: Path) -> None:
    followed: dict[str, Tensor] = {}
    start: dict[str, Tensor] = {}

    def follow(when: str, **state: Any) -> None:
        if when == "start":
            start.update(own_parameters(state["model"]))
            followed.update({k: p.clone() for k, p in start.items()})
            assert all(torch.equal(p, followed[k]) for k, p in own_parameters(state["ema"]).items())
        if when == "step":
            for k, p in own_parameters(state["model"]).items():
                followed[k].lerp_(p, 0.01)

    with fake_host(name) as host:
        plain = train(host, 40)
        with host.apply(tmp_path) as handle:
            run = train(host, 40, watch=follow)
        assert all(handle.fired[label] for label in host.spec.must_run)
    assert run.without_gradient == [[]] * 40
    end, ema = own_parameters(run.model), own_parameters(run.ema)
    frozen = {"pos_embed"} | {k for k in end if k.startswith("vrpo.generation.critic.") and name == "lightningdit"}
    moved = {k for k in end if not torch.equal(end[k], start[k])}
    assert moved == end.keys() - (frozen - {"pos_embed"} if name == "repae" else frozen)  # REPA-E unfreezes it
    assert any(k.startswith("vrpo.generation.critic.") for k in end)
    assert any("projectors." in k for k in end)
    torch.testing.assert_close({k: ema[k] for k in end}, followed, rtol=1e-5, atol=1e-6)
    losses = run.log_of(DENOISING.get(name, "loss"))
    assert losses[-8:].mean() < 0.95 * losses[:8].mean()
    assert run.logs != plain.logs


@pytest.mark.parametrize("name", PROJECTING)
def test_metrics_reach_the_hosts_tracker(name: str, tmp_path: Path) -> None:
    with fake_host(name) as host, host.apply(tmp_path):
        tracker = RecordingTracker()
        run = train(host, 3, report_to=tracker)
    ours = [{k: v for k, v in logged.items() if k.startswith("vrpo/")} for logged in tracker.logged]
    assert [{k: v for k, v in logged.items() if k not in ours[0]} for logged in tracker.logged] == run.logs
    expected = {"reward/semantic", "weight/perceptual", "advantage_abs", "critic_cos", "align_cos", "norm/x0_hat"}
    assert {f"vrpo/{key}" for key in expected} <= ours[0].keys()
    assert len({logged["vrpo/norm/x0_hat"] for logged in ours}) == 3  # of each step anew
    for logged, own in zip(ours, run.logs, strict=True):
        assert logged["vrpo/align_cos"] == pytest.approx(-own["proj_loss"] * (2 if name == "irepa" else 1), rel=1e-6)


def reward_releases(host: FakeHost, steps: int, *options: object) -> list[float]:
    """The share of the rewards that each call of the aligner kept."""
    shares: list[float] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(module, HostAligner):
            shares.append(float(output.reward_release))

    with register_module_forward_hook(keep):
        train(host, steps, *options)
    return shares


@pytest.mark.parametrize("name", PROJECTING)
def test_rewards_are_let_go_of_over_the_hosts_run(name: str, tmp_path: Path) -> None:
    with fake_host(name) as host:
        with host.apply(tmp_path):
            assert reward_releases(host, 8) == pytest.approx([1, 0.55, *[0.1] * 6])
        with host.apply(tmp_path, reward_release_steps=2, reward_floor=0.0):
            assert reward_releases(host, 3) == pytest.approx([1, 0.5, 0])


def test_a_host_that_accumulates_calls_the_aligner_more_often(tmp_path: Path) -> None:
    with fake_host("repa") as host, host.apply(tmp_path):
        shares = reward_releases(host, 4, "--gradient-accumulation-steps", 2)
    assert shares == pytest.approx([1, 0.55, *[0.1] * 6])


def test_where_a_host_does_not_say_its_length_the_weight_is_at_its_floor_and_it_is_said(
    tmp_path: Path, caplog: Any
) -> None:
    with fake_host("sit") as host, host.apply(tmp_path):
        assert reward_releases(host, 3) == pytest.approx([0.1, 0.1, 0.1])
    advice = "Set reward_release_steps to a quarter of the run's steps (in a host VRPO_REWARD_RELEASE_STEPS)"
    assert any(advice in text for *_, text in caplog.record_tuples)


# ---- other settings ----

SETTINGS: dict[str, dict[str, Any]] = {
    "no features": {"features": "none"},
    "all layers": {"layers": "all"},
    "conv projector": {"projector": "conv"},
    "conv projector on all layers": {"layers": "all", "projector": "conv"},
    "host features": {"features": "host"},
    "no features, no reward": {"features": "none", "reward_coeff": 0.0},
    "released": {"release": "stop", "release_steps": 2},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["repa", "reg", "repae"])
def test_every_parameter_has_a_gradient(name: str, setting: str, tmp_path: Path) -> None:
    if name == "reg" and "projector" in SETTINGS[setting]:
        pytest.skip("a class token stands on no grid")
    with fake_host(name) as host, host.apply(tmp_path, **SETTINGS[setting]):
        run = train(host, 4)
    assert run.without_gradient == [[]] * 4
    aligned = run.log_of("proj_loss") != 0
    if SETTINGS[setting].get("features") == "none":
        assert not aligned.any()
    elif setting == "released":
        assert aligned.tolist() == [True, True, False, False]
    else:
        assert aligned.all()


def test_host_features_are_the_hosts_own(tmp_path: Path) -> None:
    with fake_host("repa") as host:
        with host.apply(tmp_path, features="host"):
            run = train(host, 2)
        assert host.compared == 2 * 16
        plain = train(host, 2)
    assert run.logs[0]["proj_loss"] == plain.logs[0]["proj_loss"]
    assert run.gradients[0] != plain.gradients[0]


# ---- processes ----


def ddp_runs(rank: int, world_size: int) -> dict[str, Any]:
    """Runs of REPA and REG on this process, with what has to agree."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    folder = Path()  # REPA and REG need no files
    runs: dict[str, Any] = {}
    for name in ("repa", "reg"):
        with fake_host(name) as host:
            runs[name, "plain"] = train(host, 20)
            assert type(runs[name, "plain"].model).__name__ == "DistributedDataParallel"
            with host.apply(folder, reward_coeff=0.0, features="host"):
                runs[name, "zero"] = train(host, 20)
            with host.apply(folder):
                runs[name, "default"] = train(host, 8)
            if name == "repa":
                for setting, values in SETTINGS.items():
                    with host.apply(folder, **values):
                        runs[name, setting] = train(host, 3)
    return {
        f"{name} {setting}": {
            "logs": [{k: v for k, v in log.items() if k == "grad_norm"} for log in run.logs],
            "own logs": run.logs,
            "bits": [*run.gradients, *run.parameters, *run.random_states],
            "parameters": own_parameters(run.model),
        }
        for (name, setting), run in runs.items()
    }


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    first, second = on_two_processes(ddp_runs, tmp_path)
    for name in ("repa", "reg"):
        for rank in (first, second):
            assert rank[f"{name} zero"]["bits"] == rank[f"{name} plain"]["bits"]
            assert rank[f"{name} zero"]["own logs"] == rank[f"{name} plain"]["own logs"]
        assert first[f"{name} plain"]["own logs"] != second[f"{name} plain"]["own logs"]  # each has its own data
    for run, result in first.items():
        other = second[run]
        assert result["logs"] == other["logs"]
        assert result["parameters"].keys() == other["parameters"].keys()
        without = ("plain", "zero", "no features, no reward")
        assert any(k.startswith("vrpo.") for k in result["parameters"]) == (run.partition(" ")[2] not in without)
        unequal = [k for k, p in result["parameters"].items() if not torch.equal(p, other["parameters"][k])]
        assert unequal == [], run


# ---- compilation, precision, accumulation ----


def one_step(host: FakeHost, called: Any, model: torch.nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Loss and gradients of one batch, by the host's own loss."""
    batch = host.module("fakes.hosts.accelerate_loop").Images()
    torch.manual_seed(seed)
    z = [torch.randn(16, 16, 12)]
    loss_fn = host.module("loss").SILoss()
    denoising, projection = loss_fn(called, batch.moments[:16, 0, :4], {"y": batch.labels[:16]}, zs=z)
    loss = denoising.mean() + 0.5 * projection.mean()
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def build(host: FakeHost) -> torch.nn.Module:
    torch.manual_seed(0)
    model = host.module("models.sit").SiT_models["SiT-T/2"](qk_norm=False)
    model.y_embedder.dropout_prob = 0.0
    return model.train()


def compiled_repa(folder: Path) -> dict[str, Any]:
    with fake_host("repa") as host, host.apply(folder):
        eager, model = build(host), build(host)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        losses = {
            "eager": [one_step(host, eager, eager, seed) for seed in range(3)],
            "compiled": [one_step(host, compiled, model, seed) for seed in range(3)],
        }
    return {**losses, "breaks": dict(counters()["graph_break"]), "graphs": counters()["stats"]["unique_graphs"]}


def compiled_repae(folder: Path) -> dict[str, Any]:
    tracker = RecordingTracker()
    with fake_host("repae") as host, host.apply(folder):
        eager = train(host, 3)
        compiled = train(host, 3, compile="aot_eager", report_to=tracker)
    return {
        "eager": {key: eager.log_of(key) for key in eager.logs[0]},
        "compiled": {key: compiled.log_of(key) for key in eager.logs[0]},
        "breaks": dict(counters()["graph_break"]),
        "metrics": [logged["vrpo/norm/x0_hat"] for logged in tracker.logged],
    }


def compiled_aligner(name: str, folder: Path) -> dict[str, Any]:
    """The ``compile`` option, with a backend that tests can wait for."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    with fake_host(name) as host:
        with host.apply(folder) as handle:
            config, options = handle.config
            eager = train(host, 3)
        with apply_vrpo(host.spec, config, options=replace(options, compile=True)):
            run = train(host, 3)
    (aligner,) = (module for module in run.model.modules() if hasattr(module, "taps"))
    return {
        "eager": {key: eager.log_of(key) for key in eager.logs[0]},
        "compiled": {key: run.log_of(key) for key in eager.logs[0]},
        "frames": counters()["frames"]["ok"],
        "is_compiled": aligner._compiled_call_impl is not None,
    }


def counters() -> Any:
    return torch._dynamo.utils.counters


@pytest.mark.slow
def test_compiled_equals_eager_without_graph_breaks(tmp_path: Path) -> None:
    run = in_new_process(compiled_repa, tmp_path)
    torch.testing.assert_close(run["compiled"], run["eager"], rtol=1e-4, atol=1e-6)
    assert run["breaks"] == {} and run["graphs"] <= 2  # one more after the first call's checks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repa", "dit"])
def test_a_compiled_aligner_equals_the_eager_one(name: str, tmp_path: Path) -> None:
    run = in_new_process(functools.partial(compiled_aligner, name), tmp_path)
    torch.testing.assert_close(run["compiled"], run["eager"], rtol=1e-4, atol=1e-6)
    assert run["is_compiled"] and run["frames"] > 0


@pytest.mark.slow
def test_compiled_repae_equals_eager_without_graph_breaks(tmp_path: Path) -> None:
    # REPA-E compiles by default, and its losses are inside.
    run = in_new_process(compiled_repae, tmp_path)
    torch.testing.assert_close(run["compiled"], run["eager"], rtol=1e-4, atol=1e-6)
    assert run["breaks"] == {}
    assert len({*run["metrics"]}) == 3


def test_bf16_is_close_to_fp32(tmp_path: Path) -> None:
    with fake_host("repa") as host, host.apply(tmp_path):
        exact = train(host, 20)
        rounded = train(host, 20, "--mixed-precision", "bf16")
    for key in exact.logs[0]:
        # bf16 rounds to 2^-9 of a value, and each loss is a mean over some 1000 of them.
        torch.testing.assert_close(rounded.log_of(key), exact.log_of(key), rtol=2**-8, atol=2**-10)
    assert rounded.parameters[0] != exact.parameters[0]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in own_parameters(rounded.model).values())


@pytest.mark.filterwarnings("ignore:vrpo_plugin. a batch of one sample")
def test_eight_batches_of_one_are_one_batch_of_eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times, noises, z = torch.rand(8, 1, 1, 1), torch.randn(8, 4, 8, 8), torch.randn(8, 16, 12)
    settings = {"scale": "none", "reward_weights": {"semantic": 0.25, "perceptual": 0.75}}
    with fake_host("repa") as host, host.apply(tmp_path, **settings):
        loss_module, data = host.module("loss"), host.module("fakes.hosts.accelerate_loop").Images()
        model = build(host)
        chosen = slice(0, 8)
        drawn = copy.copy(vars(torch)) | {"rand": lambda _: times[chosen], "randn_like": lambda _: noises[chosen]}
        monkeypatch.setattr(loss_module, "torch", type("Drawn", (), drawn))
        gradients = []
        for size in (8, 1):
            model.zero_grad()
            for start in range(0, 8, size):
                chosen = slice(start, start + size)
                denoising, projection = loss_module.SILoss()(
                    model, data.moments[chosen, 0, :4], {"y": data.labels[chosen]}, zs=[z[chosen]]
                )
                ((denoising.mean() + 0.5 * projection.mean()) * size / 8).backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]["vrpo.generation.critic.heads.0.weight"].abs().max() > 1e-4
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)

"""Each cure by itself: the breakage without it, the cure and its one report, and nothing where nothing is broken."""

import argparse
import logging
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes.host_folders import FakeHost, Run, fake_host
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.hosts import compat
from vrpo_plugin.hosts.compat import Shim
from vrpo_plugin.hosts.known import HOSTS
from vrpo_plugin.patching.handle import active_handles

LOGGED = ["vrpo_plugin", logging.WARNING]
SHIMS = {value.name: value for value in vars(compat).values() if isinstance(value, Shim)}


@dataclass(frozen=True)
class Case:
    """A breakage of a fake host.

    Attributes:
        error, message: how it breaks.
        breaks: the script's arguments with which it breaks; "{folder}" is the checkpoint's.
        works: similar ones with which it does not.
        seam: (owner, attribute) that the cure replaces, where it replaces one.
        saved_by: whether the checkpoint to resume from is of a "plain" or a "patched" run.
        environ: variables with which it breaks; None takes one away. It works without that change.
        checks: what else is so where it is cured.
        told: the log says when it was used; not where torch's own list of safe types does it.
    """

    host: str
    error: type[Exception]
    message: str
    breaks: tuple[object, ...] = ()
    works: tuple[object, ...] = ()
    seam: Callable[[FakeHost], tuple[Any, str]] | None = None
    saved_by: str | None = None
    environ: Mapping[str, str | None] = field(default_factory=dict)
    checks: Callable[[Path, Run], None] = lambda folder, run: None
    told: bool = True


RESUMED = ("--resume-step", 1, "--output-dir", "{folder}")


def has_saved(folder: Path, run: Run) -> None:
    checkpoint = torch.load(folder / "0000002.pt", weights_only=False)
    torch.testing.assert_close(checkpoint["model"], dict(run.model.state_dict()), rtol=0, atol=0)


def has_layer_norms(folder: Path, run: Run) -> None:
    assert type(run.model.blocks[-1].attn.q_norm) is type(run.model.blocks[-1].attn.k_norm) is nn.LayerNorm


def has_followed(folder: Path, run: Run) -> None:
    assert isinstance(run.model, OptimizedModule) and len({*run.emas}) == 2


CASES = {
    "one_process": Case(
        "repa",
        AttributeError,
        "'SiT' object has no attribute 'module'",
        ("--checkpointing-steps", 2, "--output-dir", "{folder}"),
        seam=lambda host: (host.model_class, "module"),
        checks=has_saved,
    ),
    "resume": Case(
        "repa",
        pickle.UnpicklingError,
        "GLOBAL argparse.Namespace was not an allowed global",
        RESUMED,
        RESUMED,
        saved_by="patched",
        told=False,
    ),
    "sit_s": Case("repa", RuntimeError, "shapes cannot be multiplied", ("--model", "SiT-S/2")),
    "qk_norm": Case(
        "repa",
        AssertionError,
        "qk_norm without norm_layer",
        ("--qk-norm",),
        seam=lambda host: (host.module("models.sit"), "Attention"),
        checks=has_layer_norms,
    ),
    "num_classes": Case(
        "repa",
        IndexError,
        "index out of range",
        ("--num-classes", 10, "--sampling-steps", 1),
        ("--sampling-steps", 1),
        seam=lambda host: (host.module("samplers"), "euler_sampler"),
    ),
    "report_to_none": Case(
        "repa",
        ValueError,
        "Unsupported logging capability: none",
        ("--report-to", "none"),
        seam=lambda host: (argparse.ArgumentParser, "parse_args"),
    ),
    "dynamo_ema": Case(
        "repa",
        KeyError,
        "_orig_mod.",
        seam=lambda host: (OptimizedModule, "named_parameters"),
        environ={"ACCELERATE_DYNAMO_BACKEND": "eager"},
        checks=has_followed,
    ),
    "wandb_entity": Case("sit", KeyError, "ENTITY", environ={"ENTITY": None, "PROJECT": None}),
    "cont_dir": Case(
        "repae",
        AttributeError,
        "'Namespace' object has no attribute 'cont_dir'",
        ("--resume-step", 1, "--continue-train-exp-dir", "{folder}"),
        seam=lambda host: (argparse.ArgumentParser, "parse_args"),
        saved_by="patched",
    ),
    "fresh_optimizer": Case(
        "repa",
        ValueError,
        "doesn't match the size",
        RESUMED,
        RESUMED,
        seam=lambda host: (torch.optim.Optimizer, "load_state_dict"),
        saved_by="plain",
    ),
}


@dataclass
class Broken:
    """A fake host about to break."""

    case: Case
    host: FakeHost
    folder: Path

    def train(self, argv: tuple[object, ...]) -> Run:
        few = ("--steps" if self.host.name == "sit" else "--max-train-steps", 2, "--batch-size", 4)
        return self.host.train(*few, *(str(one).format(folder=self.folder) for one in argv))

    def train_and_break(self) -> None:
        with pytest.raises(self.case.error, match=re.escape(self.case.message)):
            self.train(self.case.breaks)

    def apply(self, which: Any, **settings: Any) -> Any:
        return self.host.apply(self.folder, compat=which, **settings)

    def save(self, **more: Any) -> None:
        run = self.host.train("--max-train-steps", 1, "--batch-size", 4)
        saved = {"model": run.model.state_dict(), "ema": run.ema.state_dict(), "opt": run.optimizer.state_dict()}
        torch.save({**saved, "steps": 1, **more}, self.folder / "0000001.pt")


@contextmanager
def about_to_break(name: str, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Broken]:
    case = CASES[name]
    with fake_host(case.host) as host, torch.compiler.set_stance("force_eager"), patch.context() as environment:
        broken = Broken(case, host, folder)
        with broken.apply("none") if case.saved_by == "patched" else nullcontext():
            if case.saved_by:
                broken.save(**({"args": host.arguments()} if name == "resume" else {}))
        for variable, value in case.environ.items():
            environment.delenv(variable) if value is None else environment.setenv(variable, value)
        yield broken


def reports(caplog: Any) -> list[str]:
    return [text for *logged, text in caplog.record_tuples if "compat" in text and logged == LOGGED]


@pytest.mark.parametrize("left", ["none", "others"])
@pytest.mark.parametrize("name", CASES)
def test_without_the_cure_the_host_breaks(name: str, left: str, tmp_path: Path, monkeypatch: Any) -> None:
    others = [shim.name for shim in HOSTS[CASES[name].host].shims if shim.name != name]
    with about_to_break(name, tmp_path, monkeypatch) as broken, broken.apply(others if left == "others" else "none"):
        broken.train_and_break()


def assert_cured(broken: Broken, name: str, run: Run, caplog: Any) -> None:
    broken.case.checks(broken.folder, run)
    assert len(run.logs) == (1 if broken.case.saved_by else 2)
    message = f"vrpo_plugin compat {name}: {SHIMS[name].reason} ({SHIMS[name].issue})"
    assert reports(caplog) == ([message] if broken.case.told else [])


@pytest.mark.parametrize("name", CASES)
def test_the_cure_alone_is_told_once_and_goes(name: str, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    case = CASES[name]
    with about_to_break(name, tmp_path, monkeypatch) as broken:
        owner, attribute = case.seam(broken.host) if case.seam else (object, "none")
        before = vars(owner).get(attribute)
        caplog.clear()
        handle = broken.apply([name])
        assert (vars(owner).get(attribute) is not before) == (case.seam is not None)
        assert_cured(broken, name, broken.train(case.breaks), caplog)
        handle.remove()
        assert vars(owner).get(attribute) is before and (attribute in vars(owner)) == (before is not None)
        with broken.apply("none"):
            broken.train_and_break()


@pytest.mark.parametrize("name", CASES)
def test_of_all_cures_the_one_is_told(name: str, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    with about_to_break(name, tmp_path, monkeypatch) as broken:
        caplog.clear()
        with broken.apply("all"):
            assert_cured(broken, name, broken.train(CASES[name].breaks), caplog)


@pytest.mark.parametrize(
    ("name", "which"),
    [(name, "alone") for name in CASES] + [(name, "all") for name in ("num_classes", "resume", "wandb_entity")],
)
def test_where_nothing_is_broken_nothing_is_changed(name: str, which: str, tmp_path: Path, caplog: Any) -> None:
    case = CASES[name]
    with fake_host(case.host) as host:
        broken = Broken(case, host, tmp_path)
        if case.works == RESUMED:
            broken.save()
        plain = broken.train(case.works)
        features = "none" if host.spec.encoder == "pixels" else "host"
        with broken.apply([name] if which == "alone" else "all", reward_coeff=0.0, features=features):
            cured = broken.train(case.works)
    assert len(plain.logs) == (1 if case.works == RESUMED else 2)
    assert cured.bits == plain.bits
    assert reports(caplog) == []


@pytest.mark.parametrize("wrappers", [(), ("module",), ("_orig_mod", "module")])
def test_preview_labels_stay_below_the_number_of_classes(wrappers: tuple[str, ...], tmp_path: Path) -> None:
    seen = []

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(y.tolist())
        return (x,)

    inner: Any = model
    for wrapper in wrappers:
        setattr(inner, wrapper, SimpleNamespace())
        inner = getattr(inner, wrapper)
    inner.num_classes = 10
    with fake_host("repa") as host, host.apply(tmp_path, compat="num_classes"):
        labels = torch.tensor([0, 9, 10, 999])
        host.module("samplers").euler_sampler(model, torch.zeros(4, 4, 8, 8), labels, num_steps=1)
    assert seen == [[0, 9, 0, 9, 10, 10, 10, 10]]


def test_the_width_that_upstream_assumes_is_not_reported(tmp_path: Path, caplog: Any) -> None:
    with fake_host("repa") as host, host.apply(tmp_path, compat="sit_s"):
        host.model_class(hidden_size=768, depth=3, qk_norm=False)
    assert reports(caplog) == []


@pytest.mark.parametrize(
    ("host", "named", "said"),
    [
        ("repa", "num_class", "got 'num_class'. Did you mean 'num_classes'?"),
        ("repa", "report-to-none", "Did you mean 'report_to_none'?"),
        ("sit", "wandb_entty", "Did you mean 'wandb_entity'?"),
        ("lightningdit", "fresh_optimiser", "Did you mean 'fresh_optimizer'?"),
        ("repae", ("resume", "cont_dirs"), "got 'cont_dirs'. Did you mean 'cont_dir'?"),
        ("dit", ("resume", "qk_norm"), "got 'qk_norm'. Remove it."),  # another host's
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(host: str, named: Any, said: str, tmp_path: Path) -> None:
    with fake_host(host) as fake:
        before = dict(vars(fake.model_class))
        with pytest.raises(ConfigError, match=f"compat of {host} key: .*{re.escape(said)}"):
            fake.apply(tmp_path, compat=named)
        assert dict(vars(fake.model_class)) == before and active_handles() == ()


def test_every_cure_has_a_case_and_a_host() -> None:
    assert CASES.keys() == SHIMS.keys()
    assert {shim.name for spec in HOSTS.values() for shim in spec.shims} == SHIMS.keys()
    assert all(SHIMS[name] in HOSTS[case.host].shims for name, case in CASES.items())


@pytest.mark.parametrize("name", SHIMS)
def test_every_cure_says_why_where_and_until_when(name: str) -> None:
    shim = SHIMS[name]
    assert shim.reason.strip() and shim.until.strip()
    assert re.search(r"https://\S+|[\w/]+\.py:\d+", shim.issue), shim.issue

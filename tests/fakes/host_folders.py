"""The fake hosts, imported as their own scripts import them, and records of their training."""

import argparse
import importlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn

from fakes.hosts.accelerate_loop import digest, digest_of
from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.hosts.apply import apply_vrpo
from vrpo_plugin.hosts.base import HostSpec
from vrpo_plugin.hosts.known import find_spec
from vrpo_plugin.hosts.options import HostOptions
from vrpo_plugin.modules.critic import LatentCritic, save_critic
from vrpo_plugin.patching.fingerprint import SourcePoint, find_definition, fingerprint, read_tree
from vrpo_plugin.patching.handle import PatchHandle

ROOT = Path(__file__).parent / "hosts"
PACKAGES = ROOT / "packages"  # stand-ins for what CI does not install
SCRIPTS = {
    "repa": "repa/train.py",
    "repa_t2i": "repa/train_t2i.py",
    "reg": "reg/train.py",
    "irepa": "irepa/ldm/train.py",
    "sit": "sit/train.py",
    "dit": "dit/train.py",
    "repae": "repae/train_repae.py",
    "lightningdit": "lightningdit/train.py",
}
PROJECTING = ("repa", "repa_t2i", "reg", "irepa", "repae")
SMALL: dict[str, Any] = {"critic_width": 16, "projector_dim": 24}
ENCODER = "test_vit.r160_in1k"  # the smallest of timm's vision transformers


def fake_spec(name: str) -> HostSpec:
    """A host's own spec with the fingerprints of the fake's source; signatures stay those of the real host."""
    spec, folder = find_spec(name), (ROOT / SCRIPTS[name]).parent

    def here(point: SourcePoint) -> SourcePoint:
        node = find_definition(read_tree(folder / point.file), point.name)
        assert node is not None, point
        return replace(point, fingerprints={"fake": fingerprint(node)})

    return replace(
        spec,
        model=here(spec.model),
        loss=None if spec.loss is None else here(spec.loss),
        verified=tuple(here(point) for point in spec.verified),
        encoder_loader=None if spec.encoder_loader is None else here(spec.encoder_loader),
    )


@dataclass(frozen=True)
class FakeHost:
    """A fake host that can be imported."""

    name: str
    folder: Path
    script: types.ModuleType
    spec: HostSpec

    def module(self, name: str) -> types.ModuleType:
        return importlib.import_module(name)

    @property
    def model_class(self) -> type[nn.Module]:
        return getattr(self.module(self.spec.model.module), self.spec.model_class)

    @property
    def compared(self) -> int:
        """Samples that the host's own alignment loop has seen."""
        if self.name == "irepa":
            return self.module("projection_loss").compared
        return (self.model_class if self.name == "repae" else self.module("loss").SILoss).compared

    def arguments(self, *argv: object) -> argparse.Namespace:
        return self.script.parse_args([str(one) for one in argv])

    def apply(self, folder: Path, *, compat: Any = "all", **settings: Any) -> PatchHandle:
        """Applies VRPO in small sizes; in ``folder`` lie the files that a host without an encoder needs."""
        options = HostOptions(compat=compat)
        if self.spec.encoder == "pixels" and settings.get("targets") != "critic":
            options = replace(options, encoder=ENCODER, encoder_checkpoint=str(encoder_file(folder)))
        if self.name == "lightningdit":
            settings = {"critic_checkpoint": str(critic_file(folder)), "critic_trainable": False, **settings}
        return apply_vrpo(self.spec, VRPOConfig(**{**SMALL, **settings}), options=options)

    def train(self, *argv: object, watch: Callable[..., None] | None = None, **arguments: Any) -> "Run":
        """The script's ``main`` on one process, or in the process group there is."""
        run = Run(watch)
        settings = self.arguments(*argv)
        vars(settings).update(arguments)
        reset_accelerate()
        try:
            self.script.main(settings, watch=run)
        finally:
            reset_accelerate()
        run.random_state = digest_of(torch.get_rng_state())
        return run


@contextmanager
def fake_host(name: str) -> Iterator[FakeHost]:
    """Imports a fake under its modules' own names; afterwards they are gone from ``sys.modules``."""
    script = ROOT / SCRIPTS[name]
    with imports_from(script.parent, PACKAGES), process_state():
        yield FakeHost(name, script.parent, importlib.import_module(script.stem), fake_spec(name))


@contextmanager
def imports_from(*folders: Path) -> Iterator[None]:
    """Puts folders on ``sys.path`` and hides modules of the same names that are loaded already."""
    provided = {path.stem for folder in folders for path in folder.iterdir() if not path.name.startswith("_")}
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in provided}
    writers = types.ModuleType("torch.utils.tensorboard")
    writers.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    hidden_writers = sys.modules.get(writers.__name__)
    sys.modules[writers.__name__] = writers
    sys.path[:0] = map(str, folders)
    try:
        yield
    finally:
        del sys.path[: len(folders)]
        for module in [module for module in sys.modules if module.partition(".")[0] in provided]:
            del sys.modules[module]
            inspect._filesbymodname.pop(module, None)  # type: ignore[attr-defined]  # or 'models' stays a file's name
        del sys.modules[writers.__name__]
        if hidden_writers is not None:
            sys.modules[writers.__name__] = hidden_writers
        sys.modules.update(hidden)
        importlib.invalidate_caches()


class SummaryWriter:
    """TensorBoard's, of which CI has none; keeps what it is given."""

    written: list[tuple[str, float, int]]

    def __init__(self, log_dir: str) -> None:
        self.written = []
        type(self).last = self  # type: ignore[attr-defined]

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any = None, walltime: Any = None) -> None:
        self.written.append((tag, float(scalar_value), global_step))


class RecordingTracker(GeneralTracker):
    """An accelerate tracker that keeps what is logged."""

    name = "recording"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []

    @property
    def tracker(self) -> list[dict[str, float]]:
        return self.logged

    def store_init_configuration(self, values: Any) -> None: ...

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.logged.append(dict(values))


@dataclass
class Run:
    """What a training run did, step by step; a loop's ``watch``."""

    watch: Callable[..., None] | None = None
    logs: list[dict[str, float]] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    emas: list[str] = field(default_factory=list)
    random_states: list[str] = field(default_factory=list)
    without_gradient: list[list[str]] = field(default_factory=list)
    random_state: str = ""
    model: Any = None
    ema: Any = None
    optimizer: Any = None

    def __call__(self, when: str, **state: Any) -> None:
        if when == "start":
            self.model, self.ema, self.optimizer = state["model"], state["ema"], state["optimizer"]
        if when == "gradients" and state["sync"]:
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            self.without_gradient.append([n for n, p in trained if p.grad is None])
            own = [p for n, p in trained if "vrpo." not in n]
            self.gradients.append(digest_of(*(p.grad for p in own if p.grad is not None)))
        if when == "step":
            self.logs.append(state["logs"])
            self.parameters.append(digest(self.model))
            self.emas.append(digest(self.ema))
            self.random_states.append(digest_of(torch.get_rng_state()))
        if self.watch is not None:
            self.watch(when, **state)

    @property
    def bits(self) -> dict[str, Any]:
        """All that has to be the same, to the bit, where nothing is changed."""
        names = ("logs", "gradients", "parameters", "emas", "random_states", "random_state")
        return {name: getattr(self, name) for name in names}

    def log_of(self, name: str) -> Tensor:
        return torch.tensor([log[name] for log in self.logs], dtype=torch.float64)


def own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters, the aligner's too, by their names without wrappers."""
    return {
        name.replace("module.", "").replace("_orig_mod.", ""): p.detach().clone()
        for name, p in model.named_parameters()
    }


def reset_accelerate() -> None:
    """Accelerate keeps its state for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def process_state() -> Iterator[None]:
    """What hosts and shims change for the life of a process, put back."""
    environment, allowed = dict(os.environ), torch.serialization.get_safe_globals()
    for name in [name for name in os.environ if name.startswith("VRPO_")]:
        del os.environ[name]
    os.environ |= {"ACCELERATE_USE_CPU": "true", "ENTITY": "", "PROJECT": ""}
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= environment
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def encoder_file(folder: Path) -> Path:
    """Random weights of ``ENCODER``."""
    import timm

    path = folder / "encoder.pt"
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.save(timm.create_model(ENCODER, num_classes=0).state_dict(), path)
    return path


def critic_file(folder: Path) -> Path:
    """An untrained critic for the fakes' latents."""
    path = folder / "critic.safetensors"
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            save_critic(LatentCritic((4, 8, 8), (12,), (4, 4), width=SMALL["critic_width"]), path)
    return path

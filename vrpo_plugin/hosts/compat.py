"""Cures of upstream breakages, each by itself and switchable by its name."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vrpo_plugin.config import check_keys
from vrpo_plugin.patching.handle import Seam

if TYPE_CHECKING:
    from vrpo_plugin.hosts.session import Session

HARD_CODED_CLASSES = 1000  # REPA's samplers.py and train.py: labels are drawn below, and the null label is, this


@dataclass(frozen=True)
class Shim:
    """A cure.

    Attributes:
        name: to switch it off: ``compat=`` lists those to keep.
        issue: where the breakage is reported, or stands.
        reason: what breaks, and what this does.
        until: when it can go.
        seams: what it replaces; it may also prepare the process.
    """

    name: str
    issue: str
    reason: str
    until: str
    seams: Callable[[Session, Shim], Sequence[Seam]]

    def used(self, session: Session) -> None:
        """Reports, once, that the host would have failed here."""
        session.report(self.name, f"{self.reason} ({self.issue})")


def selected(session: Session) -> Iterator[Sequence[Seam]]:
    """The seams of the shims that the options leave on.

    Raises:
        ConfigError: the options name a shim that this host has not.
    """
    shims, wanted = {shim.name: shim for shim in session.spec.shims}, session.options.compat
    if wanted == "none":
        return
    if wanted != "all":
        check_keys(wanted, shims, subject=f"compat of {session.spec.name}")
    for name, shim in shims.items():
        if wanted == "all" or name in wanted:
            yield shim.seams(session, shim)


def _model_class(session: Session) -> type:
    return getattr(session.modules[session.spec.model.file], session.spec.model_class)


def _one_process(session: Session, shim: Shim) -> Sequence[Seam]:
    def module(self: nn.Module) -> nn.Module:
        shim.used(session)
        return self

    cls = _model_class(session)
    return [Seam(cls, "module", lambda _: property(module), f"{cls.__name__}.module", required=False)]


def _resume(session: Session, shim: Shim) -> Sequence[Seam]:
    def wrap(original: Any) -> Any:
        @wraps(original)
        def load(*args: Any, **kwargs: Any) -> Any:
            # An entry of torch's own allow-list; it lets no code run.
            with torch.serialization.safe_globals([argparse.Namespace]):
                loaded = original(*args, **kwargs)
            holds = isinstance(loaded, dict) and isinstance(loaded.get("args"), argparse.Namespace)
            if holds and kwargs.get("weights_only") is not False:
                shim.used(session)
            return loaded

        return load

    return [Seam(torch, "load", wrap, "torch.load")]


def _sit_s(session: Session, shim: Shim) -> Sequence[Seam]:
    def fix(kwargs: dict[str, Any]) -> None:
        if "hidden_size" in kwargs and "decoder_hidden_size" not in kwargs:
            if kwargs["hidden_size"] != 768:
                shim.used(session)
            kwargs["decoder_hidden_size"] = kwargs["hidden_size"]

    session.constructor_fixes.append(fix)
    return []


def _qk_norm(session: Session, shim: Shim) -> Sequence[Seam]:
    module = session.modules[session.spec.model.file]

    def wrap(original: Any) -> Any:
        @wraps(original, updated=())
        def attention(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("qk_norm") and kwargs.get("norm_layer") is None:
                shim.used(session)
                kwargs["norm_layer"] = nn.LayerNorm
            return original(*args, **kwargs)

        return attention

    return [Seam(module, "Attention", wrap, f"{module.__name__}.Attention")]


def _num_classes(session: Session, shim: Shim) -> Sequence[Seam]:
    def wrap(original: Any) -> Any:
        @wraps(original)
        def euler_sampler(model: Any, *args: Any, **kwargs: Any) -> Any:
            classes = _unwrapped(model).num_classes
            if classes >= HARD_CODED_CLASSES:
                return original(model, *args, **kwargs)
            shim.used(session)

            def fewer_classes(x: Any, t: Any, y: Any, **more: Any) -> Any:
                return model(x, t, y=torch.where(y == HARD_CODED_CLASSES, classes, y % classes), **more)

            return original(fewer_classes, *args, **kwargs)

        return euler_sampler

    samplers = importlib.import_module("samplers")
    return [Seam(samplers, "euler_sampler", wrap, "samplers.euler_sampler")]


def _unwrapped(model: Any) -> Any:
    """The host's model below DDP and torch.compile."""
    while not hasattr(model, "num_classes"):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def _report_to_none(session: Session, shim: Shim) -> Sequence[Seam]:
    from accelerate import Accelerator

    def wrap(original: Any) -> Any:
        @wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if kwargs.get("log_with") == "none":
                shim.used(session)
                kwargs["log_with"] = None
            original(self, *args, **kwargs)

        return __init__

    return [Seam(Accelerator, "__init__", wrap, "accelerate.Accelerator.__init__")]


def _dynamo_ema(session: Session, shim: Shim) -> Sequence[Seam]:
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() == "no":
        return []
    from torch._dynamo.eval_frame import OptimizedModule

    def wrap(original: Any) -> Any:
        @wraps(original)
        def named_parameters(self: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            shim.used(session)
            for name, parameter in original(self, *args, **kwargs):
                yield name.replace("_orig_mod.", ""), parameter

        return named_parameters

    label = "torch._dynamo.OptimizedModule.named_parameters"
    return [Seam(OptimizedModule, "named_parameters", wrap, label)]


def _wandb_entity(session: Session, shim: Shim) -> Sequence[Seam]:
    for name in ("ENTITY", "PROJECT"):
        if name not in os.environ:
            shim.used(session)
            os.environ[name] = ""
    return []


def _cont_dir(session: Session, shim: Shim) -> Sequence[Seam]:
    def cont_dir(self: argparse.Namespace) -> Any:
        shim.used(session)
        return self.continue_train_exp_dir

    return [Seam(argparse.Namespace, "cont_dir", lambda _: property(cont_dir), "Namespace.cont_dir", required=False)]


def _fresh_optimizer(session: Session, shim: Shim) -> Sequence[Seam]:
    from vrpo_plugin.hosts.checkpoint import with_fresh_state

    def wrap(original: Any) -> Any:
        @wraps(original)
        def load_state_dict(self: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            fresh = with_fresh_state(self, state_dict, session.aligner_parameters)
            if fresh is not state_dict:
                shim.used(session)
            original(self, fresh)

        return load_state_dict

    return [Seam(torch.optim.Optimizer, "load_state_dict", wrap, "torch.optim.Optimizer.load_state_dict")]


ONE_PROCESS = Shim(
    "one_process",
    "https://github.com/sihyun-yu/REPA/issues/48",
    "on one process the checkpoint asks a model without DDP for .module: it is its own",
    "the host unwraps its model",
    _one_process,
)
RESUME = Shim(
    "resume",
    "train.py:334 saves its argparse.Namespace; torch.load in train.py:235 refuses it since torch 2.6",
    "torch.load takes an argparse.Namespace too, and stays with weights_only",
    "the host saves plain arguments, or allows them itself",
    _resume,
)
SIT_S = Shim(
    "sit_s",
    "models/sit.py:171: SiT_S_* leave decoder_hidden_size at 768",
    "decoder_hidden_size is the model's own hidden_size",
    "the host passes it",
    _sit_s,
)
QK_NORM = Shim(
    "qk_norm",
    "models/sit.py:113: timm's Attention asks for a norm_layer with qk_norm",
    "--qk-norm uses LayerNorm, timm's earlier default",
    "the host passes norm_layer",
    _qk_norm,
)
NUM_CLASSES = Shim(
    "num_classes",
    "samplers.py:59 and train.py:274 write 1000 for --num-classes",
    "preview labels are brought below num_classes, and the null label is num_classes",
    "the host uses args.num_classes",
    _num_classes,
)
REPORT_TO_NONE = Shim(
    "report_to_none",
    "train.py:131 passes --report-to on, and accelerate knows no tracker of the name none",
    "--report-to none means no tracker",
    "accelerate or the host maps it",
    _report_to_none,
)
DYNAMO_EMA = Shim(
    "dynamo_ema",
    "train.py:89, update_ema knows no _orig_mod in parameter names",
    "parameters of a compiled model have their plain names",
    "the host unwraps its model",
    _dynamo_ema,
)
WANDB_ENTITY = Shim(
    "wandb_entity",
    "SiT's train.py:140 reads ENTITY and PROJECT even without --wandb",
    "they are set to nothing",
    "the host reads them with --wandb only",
    _wandb_entity,
)
CONT_DIR = Shim(
    "cont_dir",
    "train_repae.py:281 reads args.cont_dir, which is --continue-train-exp-dir",
    "args.cont_dir is that argument",
    "the host corrects the name",
    _cont_dir,
)
FRESH_OPTIMIZER = Shim(
    "fresh_optimizer",
    "train.py:241: torch refuses an optimizer state with fewer parameters",
    "the checkpoint was saved without vrpo_plugin: the aligner's parameters start with a fresh optimizer state",
    "never: it is what resuming an earlier run takes",
    _fresh_optimizer,
)

"""Workarounds for upstream breakages, each by itself and switchable by its name."""

import argparse
import importlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from vrpo_plugin.config import check_keys
from vrpo_plugin.hosts.base import HostSpec, LibrarySeam, Session, Shim, point
from vrpo_plugin.hosts.options import HostOptions
from vrpo_plugin.patching.handle import Hook, Seam

logger = logging.getLogger("vrpo_plugin")
HARD_CODED_CLASSES = 1000  # REPA's samplers.py and train.py: labels are drawn below, and the null label is, this


def selected(spec: HostSpec, options: HostOptions) -> tuple[Shim, ...]:
    """The shims that the options leave on.

    Raises:
        ConfigError: the options name a shim that this host has not.
    """
    if options.compat == "all":
        return spec.shims
    wanted = () if options.compat == "none" else options.compat
    check_keys(wanted, [shim.name for shim in spec.shims], subject=f"compat of {spec.name}")
    return tuple(shim for shim in spec.shims if shim.name in wanted)


def _one_process(session: Session, shim: Shim) -> Sequence[Seam]:
    def module(self: Any) -> Any:
        shim.used(session)
        return self

    cls = session.model_class
    return [Seam(cls, "module", lambda _: property(module), f"{cls.__name__}.module", required=False)]


def _allow_namespace(session: Session, shim: Shim) -> Sequence[Hook]:
    """An entry of torch's own list of what ``weights_only`` loads; it lets no code run."""
    from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

    def add() -> Callable[[], object]:
        if argparse.Namespace in get_safe_globals():
            return lambda: None
        add_safe_globals([argparse.Namespace])

        def take_back() -> None:
            others = [one for one in get_safe_globals() if one is not argparse.Namespace]
            clear_safe_globals()
            add_safe_globals(others)

        return take_back

    return [Hook("torch.serialization.add_safe_globals", add)]


def _decoder_as_wide(session: Session, shim: Shim, keywords: dict[str, Any]) -> None:
    if "hidden_size" in keywords and "decoder_hidden_size" not in keywords:
        if keywords["hidden_size"] != 768:
            shim.used(session)
        keywords["decoder_hidden_size"] = keywords["hidden_size"]


def _qk_norm(session: Session, shim: Shim) -> Sequence[Seam]:
    module = session.modules[session.spec.model.file]

    def wrap(original: Any) -> Any:
        @wraps(original, updated=())
        def attention(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("qk_norm") and kwargs.get("norm_layer") is None:
                from torch import nn

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
                return model(x, t, y=(y % classes).masked_fill(y == HARD_CODED_CLASSES, classes), **more)

            return original(fewer_classes, *args, **kwargs)

        return euler_sampler

    samplers = importlib.import_module("samplers")
    return [Seam(samplers, "euler_sampler", wrap, "samplers.euler_sampler")]


def _unwrapped(model: Any) -> Any:
    """The host's model below DDP and torch.compile."""
    while not hasattr(model, "num_classes"):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def _no_tracker(session: Session, shim: Shim, arguments: argparse.Namespace) -> None:
    if getattr(arguments, "report_to", None) == "none":
        shim.used(session)
        arguments.report_to = None


def _cont_dir(session: Session, shim: Shim, arguments: argparse.Namespace) -> None:
    if hasattr(arguments, "continue_train_exp_dir") and not hasattr(arguments, "cont_dir"):
        arguments.cont_dir = arguments.continue_train_exp_dir
        if getattr(arguments, "resume_step", 0):
            shim.used(session)


def _plain_names(session: Session, original: Any) -> Any:
    @wraps(original)
    def named_parameters(self: Any, *args: Any, **kwargs: Any) -> Any:
        DYNAMO_EMA.used(session)
        for name, parameter in original(self, *args, **kwargs):
            yield name.replace("_orig_mod.", ""), parameter

    return named_parameters


def _wandb_entity(session: Session, shim: Shim) -> Sequence[Hook]:
    missing = [name for name in ("ENTITY", "PROJECT") if name not in os.environ]

    def add() -> Callable[[], object]:
        shim.used(session)
        os.environ.update(dict.fromkeys(missing, ""))
        return lambda: [os.environ.pop(name, None) for name in missing]

    return [Hook("environment: ENTITY, PROJECT", add)] if missing else []


def _with_fresh_state(session: Session, original: Any) -> Any:
    from vrpo_plugin.hosts.checkpoint import with_fresh_state

    @wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        fresh = with_fresh_state(self, state_dict, session.aligner_parameters)
        if fresh is not state_dict:
            FRESH_OPTIMIZER.used(session)
        original(self, fresh)

    return load_state_dict


ONE_PROCESS = Shim(
    "one_process",
    "https://github.com/sihyun-yu/REPA/issues/48",
    "on one process the checkpoint asks a model without DDP for .module: it is its own",
    "the host unwraps its model",
    seams=_one_process,
)
RESUME = Shim(
    "resume",
    "train.py:334 saves its argparse.Namespace; torch.load in train.py:235 refuses it since torch 2.6",
    "torch.load takes an argparse.Namespace too: it is on torch's list of safe types while VRPO is applied",
    "the host saves plain arguments, or allows them itself",
    hooks=_allow_namespace,
)
SIT_S = Shim(
    "sit_s",
    "models/sit.py:171: SiT_S_* leave decoder_hidden_size at 768",
    "decoder_hidden_size is the model's own hidden_size",
    "the host passes it",
    fix_constructor=_decoder_as_wide,
)
QK_NORM = Shim(
    "qk_norm",
    "models/sit.py:113: timm's Attention asks for a norm_layer with qk_norm",
    "--qk-norm uses LayerNorm, timm's earlier default",
    "the host passes norm_layer",
    seams=_qk_norm,
)
NUM_CLASSES = Shim(
    "num_classes",
    "samplers.py:59 and train.py:274 write 1000 for --num-classes",
    "preview labels are brought below num_classes, and the null label is num_classes",
    "the host uses args.num_classes",
    verified=(
        point(
            "samplers.py",
            "euler_sampler",
            "model latents y num_steps heun cfg_scale guidance_low guidance_high path_type",
            {
                "67f7145": "24097f7a7b3bba86b703fe3e0fc8649f2719a859b4807765472a8b11d6216c40",
                "99ad4ac": "24097f7a7b3bba86b703fe3e0fc8649f2719a859b4807765472a8b11d6216c40",
            },
        ),
    ),
    seams=_num_classes,
)
REPORT_TO_NONE = Shim(
    "report_to_none",
    "train.py:131 passes --report-to on, and accelerate knows no tracker of the name none",
    "--report-to none means no tracker",
    "accelerate or the host maps it",
    fix_arguments=_no_tracker,
)
DYNAMO_EMA = Shim(
    "dynamo_ema",
    "train.py:89, update_ema knows no _orig_mod in parameter names",
    "parameters of a compiled model have their plain names",
    "the host unwraps its model",
    libraries=(
        LibrarySeam(
            "torch._dynamo.eval_frame",
            point("torch/nn/modules/module.py", "Module.named_parameters", "self prefix recurse remove_duplicate"),
            "plain names of a compiled model's parameters",
            _plain_names,
            owner="OptimizedModule",
            needed=lambda: os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no",
        ),
    ),
)
WANDB_ENTITY = Shim(
    "wandb_entity",
    "SiT's train.py:140 reads ENTITY and PROJECT even without --wandb",
    "they are set to nothing",
    "the host reads them with --wandb only",
    hooks=_wandb_entity,
)
CONT_DIR = Shim(
    "cont_dir",
    "train_repae.py:281 reads args.cont_dir, which is --continue-train-exp-dir",
    "args.cont_dir is that argument",
    "the host corrects the name",
    fix_arguments=_cont_dir,
)
FRESH_OPTIMIZER = Shim(
    "fresh_optimizer",
    "train.py:241: torch refuses an optimizer state with fewer parameters",
    "the checkpoint was saved without vrpo_plugin: the aligner's parameters start with a fresh optimizer state",
    "never: it is what resuming an earlier run takes",
    libraries=(
        LibrarySeam(
            "torch.optim",
            point("torch/optim/optimizer.py", "Optimizer.load_state_dict", "self state_dict"),
            "an optimizer state without the aligner",
            _with_fresh_state,
        ),
    ),
)

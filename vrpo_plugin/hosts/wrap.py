"""The replacements of a host's methods: constructor, forward and loss."""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from vrpo_plugin.errors import HostChangedError, HostNotFoundError
from vrpo_plugin.hosts.aligner import HostAligner
from vrpo_plugin.hosts.attach import align, install
from vrpo_plugin.hosts.base import Aligned, HostSpec, Session
from vrpo_plugin.hosts.pixels import tokens_from_pixels
from vrpo_plugin.patching.handle import Seam

Method = Callable[..., Any]


def model_and_loss(session: Session) -> list[Seam]:
    """The seams that every host has."""
    spec, model = session.spec, session.model_class
    label = spec.must_run[0]
    found = [
        Seam(model, "__init__", wrap_constructor(session, label), label),
        Seam(model, "forward", wrap_forward(session), spec.model.name),
    ]
    if spec.loss is not None:
        owner, _, method = spec.loss.name.rpartition(".")
        cls = getattr(session.modules[spec.loss.file], owner)
        found.append(Seam(cls, method, wrap_loss(session, spec.loss.name), spec.loss.name))
    return found


def wrap_constructor(session: Session, label: str) -> Callable[[Method], Method]:
    """The model's ``__init__``: afterwards the aligner is made and attached."""

    def wrap(original: Method) -> Method:
        @wraps(original)
        def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            for shim in session.shims:
                if shim.fix_constructor is not None:
                    shim.fix_constructor(session, shim, kwargs)
            original(self, *args, **kwargs)
            session.handle.fire(label)
            install(session, self)

        return __init__

    return wrap


def wrap_forward(session: Session) -> Callable[[Method], Method]:
    """The model's ``forward``: with the keyword ``vrpo`` it returns (output, :class:`Aligned`).

    The aligner has to run in here, and its loss to be reachable from what is returned: DDP looks at forward's
    outputs to learn which parameters take part.
    """

    def wrap(original: Method) -> Method:
        @wraps(original)
        def forward(self: nn.Module, *args: Any, vrpo: Any = None, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            if vrpo is None:
                if not session.idle and self.training and torch.is_grad_enabled() and not _is_copy(self):
                    raise patch_bypassed(session.spec, f"{type(self).__name__}.forward")
                return output
            aligned = align(session, self, vrpo, args[1], output, args[0])
            return output, (aligned.features, aligned.extra, aligned.metrics)

        return forward

    def wrap_own_loss(original: Method) -> Method:
        own = session.spec.own_forward
        assert own is not None  # a spec without a loss method has it
        signature = inspect.signature(original)

        @wraps(original)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if session.idle or not torch.is_grad_enabled():
                return original(self, *args, **kwargs)
            arguments = signature.bind(self, *args, **kwargs).arguments
            del arguments["self"]
            return own(session, partial(_align_made, session), original, self, arguments)

        return forward

    return wrap if session.spec.loss is not None else wrap_own_loss


def wrap_loss(session: Session, label: str) -> Callable[[Method], Method]:
    """The host's loss: its model is called with the aligner's inputs, its result gets the aligner's losses."""
    spec = session.spec

    def wrap(original: Method) -> Method:
        signature = inspect.signature(original)

        @wraps(original)
        def loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            session.handle.fire(label)
            if session.idle or not torch.is_grad_enabled():
                return original(self, *args, **kwargs)
            call = signature.bind(self, *args, **kwargs)
            call.apply_defaults()
            model = call.arguments["model"]
            if not session.handle.fired[spec.must_run[0]] and not _has_aligner(model):
                raise model_built_too_early(spec)
            inputs = spec.before_loss(session, self, call.arguments)
            if session.encoder == "pixels":
                inputs["z"] = tokens_from_pixels(session, inputs["x0"])
            proxy = ModelProxy(session, model, inputs)
            call.arguments["model"] = proxy
            result = original(*call.args, **call.kwargs)
            if proxy.aligned is None:
                raise patch_bypassed(spec, label)
            session.tracker.record(proxy.aligned.metrics)
            return spec.after_loss(session, self, result, proxy.aligned)

        return loss

    return wrap


class ModelProxy:
    """Stands for the model in one loss call: passes the aligner's inputs, and keeps what the aligner returned."""

    def __init__(self, session: Session, model: Any, inputs: dict[str, Any]) -> None:
        self.session, self.model, self.inputs = session, model, inputs
        self.aligned: Aligned | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output, aligned = self.model(*args, vrpo=self.inputs, **kwargs)
        self.aligned = Aligned(*aligned)
        return self.session.spec.show_to_loss(self.session, output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def patch_bypassed(spec: HostSpec, what: str) -> HostChangedError:
    """The error of a patch that changes nothing."""
    return HostChangedError(
        f"{spec.name}: {what}",
        expected="the patched loss to call the patched model",
        got="a training step that bypassed the patch",
        do="Run 'vrpo check' on the checkout; 'reward_coeff=0 features=host' trains without VRPO.",
    )


def model_built_too_early(spec: HostSpec) -> HostNotFoundError:
    """The error of a model whose constructor ran before it was wrapped."""
    return HostNotFoundError(
        f"{spec.name}: {spec.model_class}",
        expected="a model made after VRPO was applied",
        got="one without an aligner",
        do="Apply below the imports of the script, before its model is made.",
    )


def _align_made(session: Session, model: Any, *args: Any) -> Aligned:
    if not hasattr(model, "vrpo"):
        raise model_built_too_early(session.spec)
    return align(session, model, *args)


def _has_aligner(model: Any) -> bool:
    """It was made under an application that was removed since."""
    return isinstance(model, nn.Module) and any(isinstance(module, HostAligner) for module in model.modules())


def _is_copy(model: nn.Module) -> bool:
    aligner = getattr(model, "vrpo", None)
    return aligner is None or aligner.is_copy

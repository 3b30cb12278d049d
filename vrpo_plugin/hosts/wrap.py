"""The replacements of a host's methods: constructor, forward and loss."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from vrpo_plugin.hosts.aligner import HostAligner
from vrpo_plugin.hosts.base import Aligned
from vrpo_plugin.hosts.session import Session, made_before, never_fired

Method = Callable[..., Any]


def wrap_constructor(session: Session, label: str) -> Callable[[Method], Method]:
    """The model's ``__init__``: afterwards the aligner is made and attached."""

    def wrap(original: Method) -> Method:
        @wraps(original)
        def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            for fix in session.constructor_fixes:
                fix(kwargs)
            original(self, *args, **kwargs)
            session.handle.fire(label)
            session.install(self)

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
                    raise never_fired(session.spec, f"{type(self).__name__}.forward")
                return output
            aligned = session.align(self, vrpo, args[0], args[1], output)
            return output, (aligned.features, aligned.extra, aligned.metrics)

        return forward

    def wrap_own_loss(original: Method) -> Method:
        own = session.spec.forward
        assert own is not None  # a spec without a loss method has it
        signature = inspect.signature(original)

        @wraps(original)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if session.idle:
                return original(self, *args, **kwargs)
            arguments = signature.bind(self, *args, **kwargs).arguments
            del arguments["self"]
            return own(session, original, self, arguments)

        return forward

    return wrap if session.spec.loss is not None else wrap_own_loss


def wrap_loss(session: Session, label: str) -> Callable[[Method], Method]:
    """The host's loss: its model is called with the aligner's inputs, its result gets the aligner's losses."""

    def wrap(original: Method) -> Method:
        signature = inspect.signature(original)

        @wraps(original)
        def loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            session.handle.fire(label)
            if session.idle or not torch.is_grad_enabled():
                return original(self, *args, **kwargs)
            call = signature.bind(self, *args, **kwargs)
            call.apply_defaults()
            if not session.handle.fired[session.spec.counted[0]] and not _has_aligner(call.arguments["model"]):
                raise made_before(session.spec)
            inputs = session.spec.read(session, self, call.arguments)
            proxy = ModelProxy(session, call.arguments["model"], inputs)
            call.arguments["model"] = proxy
            result = original(*call.args, **call.kwargs)
            if proxy.aligned is None:
                raise never_fired(session.spec, label)
            session.tracker.record(proxy.aligned.metrics)
            return session.spec.write(session, self, result, proxy.aligned)

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
        return self.session.spec.hide(self.session, output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _has_aligner(model: Any) -> bool:
    """It was made under an application that was removed since."""
    return isinstance(model, nn.Module) and any(isinstance(module, HostAligner) for module in model.modules())


def _is_copy(model: nn.Module) -> bool:
    aligner = getattr(model, "vrpo", None)
    return aligner is None or aligner.is_copy
